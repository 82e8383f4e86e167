"""Decoders with attention and experts, as data: mixtral, qwen, llama4, gpt_oss and others.

Defaults are those of the configuration classes of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from planner.model.attention import QkNorm
from planner.model.feed_forward import Score, TopkMethod
from planner.model.huggingface.dense import BIASES, GRANITE_SCALARS, LLAMA_KEYS
from planner.model.huggingface.family import SLIDING, Family
from planner.model.huggingface.segments import (
    after_first_dense,
    all_windowed,
    chunked_where_rotary,
    decoder,
    every_step,
    everywhere,
    full_every_nth,
    full_first_and_every_sixth,
    listed_or_every_step,
    sink_decoder,
    windowed_before,
)
from planner.model.spec import Norm

BALANCE: Mapping[str, Any] = MappingProxyType({"aux_loss": 0.001, "z_loss": 0.0, "capacity": None})
"""What keeps loads even; z_loss and capacity are no keys of the classes, but ours may have them."""

CORRECTED: Mapping[str, Any] = MappingProxyType(
    {
        **BALANCE,
        "aux_loss": 0.0,
        "bias_speed": 0.001,
        "score": "sigmoid",
        "topk_method": "noaux_tc",
        "normalised": True,
        "expert_scale": 1.0,
        "expert_groups": 1,
        "chosen_groups": 1,
    }
)
"""Balanced by a bias: its speed is DeepSeek-V3's (arXiv 2412.19437, section 4.2)."""

MIXTRAL: Mapping[str, Any] = MappingProxyType(
    {
        **LLAMA_KEYS,
        "kv_heads": 8,
        "ffn": 14336,
        "max_positions": 131_072,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "experts": 8,
        "topk": 2,
        **BALANCE,
    }
)
_QWEN_MOE: Mapping[str, Any] = MappingProxyType(
    {
        **LLAMA_KEYS,
        "hidden": 2048,
        "layers": 24,
        "heads": 16,
        "kv_heads": 16,
        "ffn": 5632,
        "vocab": 151_936,
        "max_positions": 32768,
        "expert_ffn": 1408,
        "experts": 60,
        "topk": 4,
        "sparse_every": 1,
        "dense_layers": None,
        **BALANCE,
        "normalised": False,
    }
)
QWEN_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType({"sparse_every": ("decoder_sparse_step",)})
FIRST_DENSE_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
        "aux_loss": ("aux_loss_alpha", "router_aux_loss_coef"),
    }
)
EXPERT_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "mixtral": Family(
            build=decoder,
            defaults={**MIXTRAL, "window": None},
            kinds=all_windowed,
            sparse=everywhere,
        ),
        "granitemoe": Family(
            build=decoder,
            defaults={**LLAMA_KEYS, **BIASES, "experts": 8, "topk": 2, **BALANCE},
            sparse=everywhere,
            inert=GRANITE_SCALARS,
        ),
        "minimax_m2": Family(
            build=decoder,
            defaults={
                **MIXTRAL,
                "hidden": 3072,
                "layers": 62,
                "heads": 48,
                "head_dim": 128,
                "ffn": 1536,
                "vocab": 200_064,
                "max_positions": 196_608,
                "norm_eps": 1e-6,
                "rope_theta": 5e6,
                "experts": 256,
                "topk": 8,
                "bias_speed": 0.001,
            },
            fixed={
                "qk_norm": QkNorm.WIDTH,
                "rotary": False,
                "score": Score.SIGMOID,
                "topk_method": TopkMethod.CORRECTED,
            },
            sparse=everywhere,
        ),
        "phimoe": Family(
            build=decoder,
            defaults={
                **MIXTRAL,
                **BIASES,
                "head_bias": False,
                "ffn": 6400,
                "vocab": 32064,
                "experts": 16,
                "window": None,
            },
            fixed={"norm": Norm.LAYERNORM},
            kinds=all_windowed,
            sparse=everywhere,
            inert=frozenset({"input_jitter_noise", "original_max_position_embeddings"}),
        ),
        "olmoe": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                **BIASES,
                "hidden": 2048,
                "layers": 16,
                "heads": 16,
                "ffn": 2048,
                "vocab": 50304,
                "max_positions": 4096,
                "norm_eps": 1e-5,
                "experts": 64,
                "topk": 8,
                **BALANCE,
                "aux_loss": 0.01,
                "normalised": False,
            },
            fixed={"qk_norm": QkNorm.WIDTH},
            sparse=everywhere,
        ),
        "gpt_oss": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                "qkv_bias": True,
                "out_bias": True,
                "hidden": 2880,
                "layers": 36,
                "heads": 64,
                "kv_heads": 8,
                "head_dim": 64,
                "ffn": 2880,
                "vocab": 201_088,
                "max_positions": 131_072,
                "norm_eps": 1e-5,
                "rope_theta": 150_000.0,
                "experts": 128,
                "topk": 4,
                **BALANCE,
                "window": 128,
                "layer_types": None,
            },
            names={"topk": ("num_experts_per_tok", "experts_per_token")},
            fixed={"expert_bias": True, "router_bias": True, "sinks": True, "full_every": 2},
            kinds=full_every_nth(SLIDING),
            sparse=everywhere,
            inert=frozenset({"swiglu_alpha", "swiglu_limit", "initial_context_length"}),
        ),
        "llama4_text": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                **BIASES,
                "hidden": 5120,
                "layers": 48,
                "heads": 40,
                "kv_heads": 8,
                "head_dim": 128,
                "ffn": 8192,
                "dense_ffn": 16384,
                "vocab": 202_048,
                "max_positions": 131_072,
                "norm_eps": 1e-5,
                "rope_theta": 500_000.0,
                "experts": 16,
                "topk": 1,
                "sparse_every": 1,
                "sparse_layers": None,
                "qk_normed": True,
                "chunk_span": 8192,
                "rotary_layers": None,
                "rotary_every": 4,
                "layer_types": None,
            },
            names={"sparse_every": ("interleave_moe_layer_step",)},
            fixed={"shared": 1, "qk_norm": QkNorm.WEIGHTLESS},
            kinds=chunked_where_rotary,
            sparse=listed_or_every_step,
            inert=frozenset({"attn_temperature_tuning", "floor_scale", "attn_scale", "for_llm_compressor"}),
        ),
        "qwen2_moe": Family(
            build=decoder,
            defaults={
                **_QWEN_MOE,
                "qkv_bias": True,
                "shared_ffn": 5632,
                "use_window": False,
                "window": 4096,
                "first_window": 28,
                "layer_types": None,
            },
            names={**QWEN_NAMES, "qkv_bias": ("qkv_bias",)},
            fixed={"shared_gate": True},
            kinds=windowed_before,
            sparse=every_step,
        ),
        "qwen3_moe": Family(
            build=decoder,
            defaults={
                **_QWEN_MOE,
                **BIASES,
                "heads": 32,
                "kv_heads": 4,
                "ffn": 6144,
                "expert_ffn": 768,
                "experts": 128,
                "topk": 8,
                "use_window": False,
                "window": 4096,
            },
            names=QWEN_NAMES,
            fixed={"qk_norm": QkNorm.HEAD},
            kinds=all_windowed,
            sparse=every_step,
            inert=frozenset(
                {"max_window_layers", "use_qk_norm", "qkv_bias", "shared_expert_intermediate_size"}
            ),
        ),
        "qwen3_vl_moe_text": Family(
            build=decoder,
            defaults={
                **_QWEN_MOE,
                **BIASES,
                "max_positions": 128_000,
                "rope_theta": 500_000.0,
                "tied": True,
            },
            names=QWEN_NAMES,
            fixed={"qk_norm": QkNorm.HEAD},
            sparse=every_step,
        ),
        "glm4_moe": Family(
            build=decoder,
            defaults={
                **LLAMA_KEYS,
                "qkv_bias": False,
                "layers": 46,
                "heads": 96,
                "kv_heads": 8,
                "ffn": 10944,
                "vocab": 151_552,
                "max_positions": 131_072,
                "norm_eps": 1e-5,
                "expert_ffn": 1408,
                "experts": 128,
                "topk": 8,
                "shared": 1,
                "first_dense": 1,
                "qk_normed": False,
                **CORRECTED,
            },
            names=FIRST_DENSE_NAMES,
            fixed={"qk_norm": QkNorm.HEAD, "rotary": False},
            sparse=after_first_dense,
        ),
        "mimo_v2_flash": Family(
            build=sink_decoder,
            defaults={
                **LLAMA_KEYS,
                "qkv_bias": False,
                "layers": 48,
                "heads": 64,
                "kv_heads": 4,
                "head_dim": 192,
                "value_dim": 128,
                "ffn": 16384,
                "vocab": 152_576,
                "max_positions": 131_072,
                "norm_eps": 1e-5,
                "rope_theta": 5e6,
                "expert_ffn": 2048,
                "experts": 256,
                "topk": 8,
                "window": 129,
                "layer_types": None,
                "windowed_layers": None,
                "mlp_types": None,
                "sparse_flags": None,
            },
            names=FIRST_DENSE_NAMES,
            fixed={"rotary": False, "first_dense": 1},
            kinds=full_first_and_every_sixth,
            sparse=after_first_dense,
            inert=frozenset(
                {
                    "attention_value_scale",
                    "n_shared_experts",
                    "attention_chunk_size",
                    "sliding_window_size",
                    "hybrid_block_size",
                    "add_swa_attention_sink_bias",
                    "add_full_attention_sink_bias",
                    "layernorm_epsilon",
                    *(f"swa_{key}" for key in ("rope_theta", "num_attention_heads", "num_key_value_heads")),
                    *(f"swa_{key}" for key in ("head_dim", "v_head_dim")),
                }
            ),
        ),
        "dbrx": Family(
            build=decoder,
            defaults={
                "hidden": 2048,
                "layers": 24,
                "heads": 16,
                "kv_heads": 1,
                "ffn": 3584,
                "vocab": 32000,
                "max_positions": 2048,
                "activation": "silu",
                "rope_theta": 10_000.0,
                "initializer_range": 0.02,
                "tied": False,
                "experts": 4,
                "topk": 1,
            },
            names={
                "hidden": ("d_model", "hidden_size"),
                "layers": ("n_layers", "num_hidden_layers"),
                "heads": ("n_heads", "num_attention_heads"),
                "kv_heads": ("attn_config.kv_n_heads",),
                "ffn": ("ffn_config.ffn_hidden_size",),
                "max_positions": ("max_seq_len", "max_position_embeddings"),
                "activation": ("ffn_config.ffn_act_fn.name",),
                "rope_theta": ("attn_config.rope_theta",),
                "experts": ("ffn_config.moe_num_experts",),
                "topk": ("ffn_config.moe_top_k",),
            },
            fixed={"norm": Norm.LAYERNORM_WITHOUT_BIAS},
            sparse=everywhere,
            inert=frozenset({"num_key_value_heads", "rope_parameters", "emb_pdrop", "resid_pdrop"}),
            needless=frozenset({"ffn"}),
        ),
    }
)
