"""Decoders with latent attention, linear attention or state spaces, as data: deepseek, minimax, qwen3_next.

Defaults are those of the configuration classes of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from planner.model.huggingface.dense import BIASES, DELTA_FIXED, DELTA_NAMES, LLAMA_KEYS
from planner.model.huggingface.experts import BALANCE, CORRECTED, FIRST_DENSE_NAMES, MIXTRAL, QWEN_NAMES
from planner.model.huggingface.family import LINEAR, Family
from planner.model.huggingface.segments import (
    after_first_dense,
    all_indexed,
    all_linear,
    by_hybrid_pattern,
    delta_decoder,
    every_step,
    everywhere,
    full_every_nth,
    hybrid_decoder,
    latent_decoder,
    lightning_decoder,
    linear_at_odd,
)

_DELTA: Mapping[str, Any] = MappingProxyType(
    {
        **LLAMA_KEYS,
        **BIASES,
        "hidden": 2048,
        "layers": 48,
        "heads": 16,
        "kv_heads": 2,
        "head_dim": 256,
        "ffn": 5632,
        "vocab": 151_936,
        "max_positions": 32768,
        "kernel": 4,
        "delta_key_heads": 16,
        "delta_key_dim": 128,
        "delta_value_heads": 32,
        "delta_value_dim": 128,
        "full_every": 4,
        "layer_types": None,
        "expert_ffn": 512,
        "shared_ffn": 512,
        "experts": 512,
        "topk": 10,
        "sparse_every": 1,
        "dense_layers": None,
    }
)
_LATENT: Mapping[str, Any] = MappingProxyType(
    {
        **{key: value for key, value in LLAMA_KEYS.items() if key not in ("kv_heads", "head_dim")},
        "hidden": 7168,
        "layers": 61,
        "heads": 128,
        "ffn": 18432,
        "vocab": 129_280,
        "max_positions": 4096,
        "qkv_bias": False,
        "query_rank": 1536,
        "kv_rank": 512,
        "nope_dim": 128,
        "rope_dim": 64,
        "value_dim": 128,
        "expert_ffn": 2048,
        "experts": 256,
        "topk": 8,
        "shared": 1,
        "first_dense": 3,
        "sparse_every": 1,
        **CORRECTED,
        "expert_scale": 2.5,
        "expert_groups": 8,
        "chosen_groups": 4,
    }
)
_UNCORRECTED = frozenset({"bias_speed", "score", "normalised"})
_LATENT_INERT = frozenset({"num_key_value_heads", "head_dim", "qk_head_dim", "rope_interleave"})
_INDEXED: Mapping[str, Any] = MappingProxyType(
    {
        **_LATENT,
        "max_positions": 163_840,
        "index_heads": 64,
        "index_dim": 128,
        "index_topk": 2048,
        "layer_types": None,
        "mlp_types": None,
    }
)
_NEMOTRON_H: Mapping[str, Any] = MappingProxyType(
    {
        "hidden": 4096,
        "layers": 0,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "ffn": 21504,
        "vocab": 131_072,
        "max_positions": 4096,
        "activation": "relu2",
        "norm_eps": 1e-5,
        "initializer_range": 0.02,
        "mlp_bias": False,
        "state": 128,
        "state_heads": 128,
        "state_head_dim": 64,
        "groups": 8,
        "kernel": 4,
        "state_chunk": 128,
        "conv_bias": True,
        "state_bias": False,
        "expert_ffn": 7688,
        "shared_ffn": 7688,
        "latent": None,
        "experts": 8,
        "topk": 2,
        "layer_types": None,
        "hybrid_pattern": None,
    }
)
_NEMOTRON_H_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "activation": ("mlp_hidden_act",),
        "norm_eps": ("layer_norm_epsilon",),
        "kernel": ("conv_kernel", "mamba_d_conv"),
        "shared_ffn": ("moe_shared_expert_intermediate_size",),
        "layer_types": ("layers_block_type", "layer_types"),
        **FIRST_DENSE_NAMES,
    }
)

DEEPSEEK_V3 = Family(
    build=latent_decoder,
    defaults=_LATENT,
    names=FIRST_DENSE_NAMES,
    fixed={"rotary": False},
    sparse=after_first_dense,
    inert=_LATENT_INERT,
)

MIXED_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "minimax": Family(
            build=lightning_decoder,
            defaults={**MIXTRAL, "window": None, "block_size": 256, "layer_types": None},
            kinds=linear_at_odd,
            sparse=everywhere,
            inert=frozenset(
                f"{part}_{letter}_factor"
                for part in ("full_attn", "linear_attn", "mlp")
                for letter in ("alpha", "beta")
            ),
        ),
        "qwen3_next": Family(
            build=delta_decoder,
            defaults=_DELTA,
            names={**DELTA_NAMES, **QWEN_NAMES},
            fixed={**DELTA_FIXED, "shared_gate": True},
            kinds=full_every_nth(LINEAR),
            sparse=every_step,
        ),
        "qwen3_5_moe_text": Family(
            build=delta_decoder,
            defaults={
                **{
                    key: value
                    for key, value in _DELTA.items()
                    if key not in ("ffn", "sparse_every", "dense_layers")
                },
                "layers": 40,
                "vocab": 248_320,
                "experts": 256,
                "topk": 8,
            },
            names=DELTA_NAMES,
            fixed={**DELTA_FIXED, "shared_gate": True},
            kinds=full_every_nth(LINEAR),
            sparse=everywhere,
            inert=frozenset({"intermediate_size"}),
        ),
        "deepseek_v2": Family(
            build=latent_decoder,
            defaults={
                **{key: value for key, value in _LATENT.items() if key not in _UNCORRECTED},
                **BALANCE,
                "aux_loss": 0.001,
                "topk_method": "greedy",
                "expert_scale": 1.0,
                "expert_groups": None,
                "chosen_groups": None,
                "hidden": 4096,
                "layers": 32,
                "heads": 32,
                "ffn": 11008,
                "vocab": 102_400,
                "max_positions": 2048,
                "mlp_bias": False,
                "expert_ffn": 1407,
                "experts": 64,
                "topk": 6,
                "shared": 2,
                "first_dense": 0,
            },
            names=FIRST_DENSE_NAMES,
            fixed={"rotary": False, "normalised": False},
            sparse=after_first_dense,
            inert=_LATENT_INERT,
        ),
        "deepseek_v3": DEEPSEEK_V3,
        "kimi_k2": DEEPSEEK_V3,
        "deepseek_v32": Family(
            build=latent_decoder,
            defaults=_INDEXED,
            names=FIRST_DENSE_NAMES,
            fixed={"rotary": False, "index_offset": 0},
            kinds=all_indexed,
            sparse=after_first_dense,
            inert=_LATENT_INERT | {"mlp_bias"},
        ),
        "glm_moe_dsa": Family(
            build=latent_decoder,
            defaults={
                **_INDEXED,
                "expert_groups": 1,
                "chosen_groups": 1,
                "hidden": 6144,
                "layers": 78,
                "heads": 64,
                "ffn": 12288,
                "vocab": 154_880,
                "max_positions": 202_752,
                "norm_eps": 1e-5,
                "query_rank": 2048,
                "nope_dim": 192,
                "value_dim": 256,
                "index_heads": 32,
                "indexer_types": None,
                "index_pattern": None,
                "index_every": 1,
                "index_offset": 2,
            },
            names=FIRST_DENSE_NAMES,
            fixed={"rotary": False},
            kinds=all_indexed,
            sparse=after_first_dense,
            inert=_LATENT_INERT | {"mlp_bias"},
        ),
        "nemotron_h": Family(
            build=hybrid_decoder,
            defaults=_NEMOTRON_H,
            names=_NEMOTRON_H_NAMES,
            fixed={"gated": False, "rotary": False},
            kinds=by_hybrid_pattern,
            inert=frozenset({"attention_bias", "tie_word_embeddings", "n_shared_experts", "expand"}),
            needless=frozenset({"ffn", "layers"}),
        ),
        "mamba2": Family(
            build=hybrid_decoder,
            defaults={
                "hidden": 4096,
                "layers": 64,
                "vocab": 32768,
                "norm_eps": 1e-5,
                "initializer_range": 0.1,
                "tied": False,
                "state": 128,
                "state_heads": 128,
                "state_head_dim": 64,
                "groups": 8,
                "kernel": 4,
                "state_chunk": 256,
                "expand": 2,
                "conv_bias": True,
                "state_bias": False,
            },
            names={
                "norm_eps": ("layer_norm_epsilon",),
                "state": ("state_size",),
                "state_heads": ("num_heads",),
                "state_head_dim": ("head_dim",),
                "kernel": ("conv_kernel",),
            },
            # A recurrence takes any length; the bound is ours.
            fixed={"heads": 1, "max_positions": 2**20, "rotary": False},
            kinds=all_linear,
            inert=frozenset({"hidden_act", "rms_norm", "norm_before_gate"}),
        ),
    }
)
