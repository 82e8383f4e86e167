"""Every architecture that is read, and the wrappers that hold one of them as their text part."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from planner.model.huggingface.classic import CLASSIC_FAMILIES
from planner.model.huggingface.dense import DENSE_FAMILIES
from planner.model.huggingface.experts import EXPERT_FAMILIES
from planner.model.huggingface.family import Family
from planner.model.huggingface.mixed import MIXED_FAMILIES
from planner.model.huggingface.variants import VARIANT_FAMILIES

_OWN = {
    **DENSE_FAMILIES,
    **VARIANT_FAMILIES,
    **CLASSIC_FAMILIES,
    **EXPERT_FAMILIES,
    **MIXED_FAMILIES,
}

FAMILIES: Mapping[str, Family] = MappingProxyType({**_OWN, "qwen2_5_vl_text": _OWN["qwen2_vl_text"]})
"""Every model_type that is read."""

WRAPPERS: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "gemma3_text",
        "llama4": "llama4_text",
        "mistral3": "mistral",
        "qwen2_vl": "qwen2_vl_text",
        "qwen2_5_vl": "qwen2_5_vl_text",
        "qwen3_vl": "qwen3_vl_text",
        "qwen3_vl_moe": "qwen3_vl_moe_text",
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "llava": "llama",
        "llava_next": "llama",
        "llava_next_video": "llama",
        "llava_onevision": "qwen2",
        "video_llava": "llama",
        "vipllava": "llama",
        "idefics3": "llama",
        "smolvlm": "llama",
        "internvl": "qwen2",
        "paligemma": "gemma",
        "aya_vision": "cohere2",
        "kimi_k25": "kimi_k2",
    }
)
"""Multimodal model_types, and the text model that they hold where they do not name it."""

TEXT_PARTS = ("text_config", "language_config", "llm_config")
"""Keys under which wrappers hold their text model."""
