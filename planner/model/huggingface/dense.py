"""Decoders with RMSNorm before (and after) attention and dense MLPs, as data: llama, mistral, qwen, gemma.

Defaults are those of the configuration classes of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from planner.model.attention import QkNorm
from planner.model.huggingface.family import LINEAR, SLIDING, Family
from planner.model.huggingface.segments import (
    all_windowed,
    decoder,
    delta_decoder,
    full_every_nth,
    windowed_from,
    windowed_where_not_rotary,
)

LLAMA_KEYS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": None,
        "head_dim": None,
        "ffn": 11008,
        "vocab": 32000,
        "max_positions": 2048,
        "activation": "silu",
        "norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "initializer_range": 0.02,
        "tied": False,
    }
)
"""What nearly every decoder of this kind reads, with llama's defaults."""

BIASES: Mapping[str, Any] = MappingProxyType({"qkv_bias": False, "out_bias": False})
WINDOWS_QWEN: Mapping[str, Any] = MappingProxyType(
    {"use_window": False, "window": 4096, "first_window": 28, "layer_types": None}
)
LAYER_NORM_EPS: Mapping[str, tuple[str, ...]] = MappingProxyType({"norm_eps": ("layer_norm_eps",)})

_GEMMA: Mapping[str, Any] = MappingProxyType(
    {
        **LLAMA_KEYS,
        **BIASES,
        "vocab": 256_000,
        "head_dim": 256,
        "max_positions": 8192,
        "activation": "gelu_pytorch_tanh",
        "tied": True,
    }
)
_GEMMA_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType({"activation": ("hidden_activation",)})
_GEMMA_SCALARS = frozenset(
    {
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "rope_local_base_freq",
        "cache_implementation",
        "hidden_act",
        "hidden_activation",
    }
)
_GEMMA_ONLY: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {"use_bidirectional_attention": (False, "bidirectional attention is not described")}
)
_QWEN3_5: Mapping[str, Any] = MappingProxyType(
    {
        **LLAMA_KEYS,
        **BIASES,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 256,
        "ffn": 12288,
        "vocab": 248_320,
        "max_positions": 32768,
        "kernel": 4,
        "delta_key_heads": 16,
        "delta_key_dim": 128,
        "delta_value_heads": 32,
        "delta_value_dim": 128,
        "full_every": 4,
        "layer_types": None,
    }
)
DELTA_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType({"full_every": ("full_attention_interval",)})
DELTA_FIXED: Mapping[str, Any] = MappingProxyType(
    {"gated_attention": True, "qk_norm": QkNorm.HEAD, "rotary": False}
)

GRANITE_SCALARS = frozenset(
    {"embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"}
)

LLAMA = Family(
    build=decoder,
    defaults={**LLAMA_KEYS, **BIASES, "mlp_bias": False},
)
MISTRAL = Family(
    build=decoder,
    defaults={
        **LLAMA_KEYS,
        "kv_heads": 8,
        "ffn": 14336,
        "max_positions": 131_072,
        "window": 4096,
    },
    kinds=all_windowed,
)
QWEN2 = Family(
    build=decoder,
    defaults={
        **LLAMA_KEYS,
        "kv_heads": 32,
        "ffn": 22016,
        "vocab": 151_936,
        "max_positions": 32768,
        **WINDOWS_QWEN,
    },
    fixed={"qkv_bias": True},
    kinds=windowed_from,
)
QWEN3 = Family(
    build=decoder,
    defaults={**QWEN2.defaults, **BIASES, "head_dim": 128},
    fixed={"qk_norm": QkNorm.HEAD},
    kinds=windowed_from,
)
DENSE_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": LLAMA,
        "granite": Family(
            build=decoder,
            defaults=LLAMA.defaults,
            inert=GRANITE_SCALARS,
        ),
        "arcee": Family(
            build=decoder,
            defaults={
                **LLAMA.defaults,
                "hidden": 2560,
                "ffn": 18432,
                "max_positions": 4096,
                "activation": "relu2",
                "norm_eps": 1e-5,
            },
            fixed={"gated": False},
        ),
        "seed_oss": Family(
            build=decoder,
            defaults={
                **LLAMA.defaults,
                "qkv_bias": True,
                "layers": 64,
                "heads": 80,
                "kv_heads": 8,
                "head_dim": 128,
                "ffn": 27648,
                "vocab": 155_136,
                "max_positions": 524_288,
            },
            names={"out_bias": ("attention_out_bias",)},
        ),
        "ernie4_5": Family(
            build=decoder,
            defaults={
                **LLAMA.defaults,
                "hidden": 1024,
                "layers": 18,
                "heads": 16,
                "kv_heads": 2,
                "head_dim": 128,
                "ffn": 3072,
                "vocab": 103_424,
                "max_positions": 131_072,
                "norm_eps": 1e-5,
                "rope_theta": 500_000.0,
                "tied": True,
            },
            names=dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), ("use_bias",)),
        ),
        "smollm3": Family(
            build=decoder,
            defaults={
                **LLAMA.defaults,
                "hidden": 2048,
                "layers": 36,
                "heads": 16,
                "kv_heads": 4,
                "vocab": 128_256,
                "max_positions": 32768,
                "rope_theta": 2e6,
                "tied": True,
                "use_window": False,
                "window": None,
                "layer_types": None,
                "rotary_layers": None,
                "rotary_every": 4,
            },
            kinds=windowed_where_not_rotary,
            inert=frozenset({"max_window_layers"}),
        ),
        "mistral": MISTRAL,
        "ministral": Family(
            build=decoder, defaults={**MISTRAL.defaults, "layer_types": None}, kinds=all_windowed
        ),
        "ministral3": Family(
            build=decoder,
            defaults={
                **MISTRAL.defaults,
                "layers": 34,
                "vocab": 131_072,
                "head_dim": 128,
                "max_positions": 262_144,
                "norm_eps": 1e-5,
                "rope_theta": 1e6,
                "window": None,
            },
            kinds=all_windowed,
        ),
        "qwen2": QWEN2,
        "qwen2_vl_text": Family(
            build=decoder,
            defaults={
                **QWEN2.defaults,
                "hidden": 8192,
                "layers": 80,
                "heads": 64,
                "kv_heads": 8,
                "ffn": 29568,
                "vocab": 152_064,
                "rope_theta": 1e6,
                "first_window": 80,
            },
            fixed={"qkv_bias": True},
            kinds=windowed_from,
        ),
        "qwen3": QWEN3,
        "qwen3_vl_text": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                **BIASES,
                "kv_heads": 32,
                "head_dim": 128,
                "ffn": 22016,
                "vocab": 151_936,
                "max_positions": 128_000,
                "rope_theta": 500_000.0,
            },
            fixed={"qk_norm": QkNorm.HEAD},
        ),
        "qwen3_5_text": Family(
            build=delta_decoder,
            defaults=_QWEN3_5,
            names=DELTA_NAMES,
            fixed=DELTA_FIXED,
            kinds=full_every_nth(LINEAR),
        ),
        "gemma": Family(
            build=decoder,
            defaults={
                **_GEMMA,
                "hidden": 3072,
                "layers": 28,
                "heads": 16,
                "kv_heads": 16,
                "ffn": 24576,
            },
            only=_GEMMA_ONLY,
            inert=_GEMMA_SCALARS,
        ),
        "gemma2": Family(
            build=decoder,
            defaults={
                **_GEMMA,
                "hidden": 2304,
                "layers": 26,
                "heads": 8,
                "kv_heads": 4,
                "ffn": 9216,
                "window": 4096,
                "layer_types": None,
            },
            names=_GEMMA_NAMES,
            fixed={"norms": 4, "full_every": 2},
            only=_GEMMA_ONLY,
            kinds=full_every_nth(SLIDING),
            inert=_GEMMA_SCALARS,
        ),
        "gemma3_text": Family(
            build=decoder,
            defaults={
                **_GEMMA,
                "hidden": 2304,
                "layers": 26,
                "heads": 8,
                "kv_heads": 4,
                "ffn": 9216,
                "vocab": 262_208,
                "max_positions": 131_072,
                "rope_theta": 1e6,
                "window": 4096,
                "layer_types": None,
                "full_every": 6,
            },
            names=_GEMMA_NAMES,
            fixed={"norms": 4, "qk_norm": QkNorm.HEAD},
            only=_GEMMA_ONLY,
            kinds=full_every_nth(SLIDING),
            inert=_GEMMA_SCALARS,
            needless=frozenset({"heads", "vocab"}),
        ),
    }
)
