"""Decoders with rotary positions that differ in norms, biases or order: cohere, phi, olmo, nemotron...

Defaults are those of the configuration classes of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from planner.model.attention import QkNorm
from planner.model.huggingface.dense import BIASES, LAYER_NORM_EPS, LLAMA_KEYS
from planner.model.huggingface.family import SLIDING, Family
from planner.model.huggingface.segments import all_windowed, decoder, full_every_nth
from planner.model.spec import Norm

COHERE = Family(
    build=decoder,
    defaults={
        **LLAMA_KEYS,
        **BIASES,
        "hidden": 8192,
        "layers": 40,
        "heads": 64,
        "ffn": 22528,
        "vocab": 256_000,
        "max_positions": 8192,
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tied": True,
        "qk_normed": False,
    },
    names=LAYER_NORM_EPS,
    fixed={
        "norm": Norm.LAYERNORM_WITHOUT_BIAS,
        "norms": 1,
        "parallel": True,
        "qk_norm": QkNorm.WIDTH,
    },
    inert=frozenset({"logit_scale"}),
)

_GLM: Mapping[str, Any] = MappingProxyType(
    {
        **LLAMA_KEYS,
        "layers": 40,
        "kv_heads": 2,
        "head_dim": 128,
        "ffn": 13696,
        "vocab": 151_552,
        "max_positions": 131_072,
        "norm_eps": 1.5625e-7,
        "qkv_bias": True,
    }
)

VARIANT_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "phi": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                "hidden": 2048,
                "layers": 24,
                "ffn": 8192,
                "vocab": 51200,
                "activation": "gelu_new",
                "norm_eps": 1e-5,
                "qk_normed": False,
            },
            names={**LAYER_NORM_EPS, "qk_normed": ("qk_layernorm",)},
            fixed={
                "norm": Norm.LAYERNORM,
                "norms": 1,
                "parallel": True,
                "gated": False,
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
                "head_bias": True,
                "qk_norm": QkNorm.HEAD_LAYERNORM,
                "rotary": False,
            },
        ),
        "phi3": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                "hidden": 3072,
                "ffn": 8192,
                "vocab": 32064,
                "max_positions": 4096,
                "norm_eps": 1e-5,
                "window": None,
            },
            fixed={"rotary": False},
            kinds=all_windowed,
            inert=frozenset({"original_max_position_embeddings"}),
        ),
        "olmo": Family(
            build=decoder,
            defaults={
                **{key: value for key, value in LLAMA_KEYS.items() if key != "norm_eps"},
                **BIASES,
                "vocab": 50304,
            },
            fixed={"norm": Norm.LAYERNORM_WITHOUT_PARAMETERS},
        ),
        "olmo2": Family(
            build=decoder,
            defaults={**LLAMA_KEYS, **BIASES, "vocab": 50304, "norm_eps": 1e-5},
            fixed={"qk_norm": QkNorm.WIDTH},
        ),
        "olmo3": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                **BIASES,
                "vocab": 50304,
                "norm_eps": 1e-5,
                "rope_theta": 500_000.0,
                "window": 4096,
                "layer_types": None,
            },
            fixed={"qk_norm": QkNorm.WIDTH, "full_every": 4},
            kinds=full_every_nth(SLIDING),
        ),
        "cohere": COHERE,
        "cohere2": Family(
            build=decoder,
            defaults={
                **{key: value for key, value in COHERE.defaults.items() if key != "qk_normed"},
                "rope_theta": 10_000.0,
                "window": 4096,
                "full_every": 4,
                "layer_types": None,
            },
            names=LAYER_NORM_EPS,
            fixed={"norm": Norm.LAYERNORM_WITHOUT_BIAS, "norms": 1, "parallel": True},
            kinds=full_every_nth(SLIDING),
            inert=frozenset({"logit_scale", "rotary_pct", "order_of_interleaved_layers"}),
        ),
        "nemotron": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                **BIASES,
                "mlp_bias": False,
                "hidden": 6144,
                "heads": 48,
                "ffn": 24576,
                "vocab": 256_000,
                "max_positions": 4096,
                "activation": "relu2",
                "norm_eps": 1e-5,
                "initializer_range": 0.0134,
            },
            names={"norm_eps": ("norm_eps",)},
            fixed={"norm": Norm.LAYERNORM, "gated": False, "rotary": False},
        ),
        "starcoder2": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
                "hidden": 3072,
                "layers": 30,
                "heads": 24,
                "kv_heads": 2,
                "ffn": 12288,
                "vocab": 49152,
                "max_positions": 4096,
                "activation": "gelu_pytorch_tanh",
                "norm_eps": 1e-5,
                "initializer_range": 0.018042,
                "tied": True,
                "window": None,
            },
            names={
                "norm_eps": ("norm_epsilon",),
                "qkv_bias": ("use_bias",),
                "out_bias": ("use_bias",),
                "mlp_bias": ("use_bias",),
            },
            fixed={"norm": Norm.LAYERNORM, "gated": False},
            kinds=all_windowed,
        ),
        "stablelm": Family(
            build=decoder,
            defaults={
                **{key: value for key, value in LLAMA_KEYS.items() if key != "head_dim"},
                "hidden": 2560,
                "kv_heads": 32,
                "ffn": 6912,
                "vocab": 50304,
                "max_positions": 4096,
                "norm_eps": 1e-5,
                "qkv_bias": False,
                "qk_normed": False,
                "parallel": False,
            },
            names={**LAYER_NORM_EPS, "qkv_bias": ("use_qkv_bias",), "qk_normed": ("qk_layernorm",)},
            fixed={"norm": Norm.LAYERNORM, "qk_norm": QkNorm.WIDTH, "parallel_norms": 1, "rotary": False},
        ),
        "glm": Family(build=decoder, defaults=_GLM, fixed={"rotary": False}),
        "glm4": Family(build=decoder, defaults=_GLM, fixed={"rotary": False, "norms": 4}),
    }
)
