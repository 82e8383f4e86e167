"""Older decoders, encoders and T5, as data: gpt2 and its kin, opt, bloom, falcon, mpt, bert, roberta.

Defaults are those of the configuration classes of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from planner.model.feed_forward import Activation
from planner.model.huggingface.family import Family
from planner.model.huggingface.segments import by_attention_types, decoder, encoder, encoder_decoder
from planner.model.spec import Norm

_GPT2_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hidden": ("n_embd", "hidden_size"),
        "layers": ("n_layer", "num_hidden_layers"),
        "heads": ("n_head", "num_attention_heads"),
        "optional_ffn": ("n_inner",),
        "max_positions": ("n_positions", "max_position_embeddings"),
        "activation": ("activation_function",),
        "norm_eps": ("layer_norm_epsilon",),
    }
)
_BIASED: Mapping[str, Any] = MappingProxyType(
    {
        "norm": Norm.LAYERNORM,
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "rotary": False,
    }
)
_BERT: Mapping[str, Any] = MappingProxyType(
    {
        "hidden": 768,
        "layers": 12,
        "heads": 12,
        "ffn": 3072,
        "vocab": 30522,
        "max_positions": 512,
        "token_types": 2,
        "activation": "gelu",
        "norm_eps": 1e-12,
        "initializer_range": 0.02,
    }
)
_BERT_FIXED: Mapping[str, Any] = MappingProxyType(
    {**_BIASED, "tied": True, "learned_positions": True, "embedding_norm": True, "pooler": True}
)
_BERT_ONLY: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "position_embedding_type": ("absolute", "relative positions are not described"),
        "is_decoder": (False, "a decoder made of this encoder is not described"),
        "embedding_size": (None, "an embedding of another width is not described"),
    }
)

_GPTJ_FIXED: Mapping[str, Any] = MappingProxyType(
    {**_BIASED, "norms": 1, "parallel": True, "qkv_bias": False, "out_bias": False, "head_bias": True}
)
_GPTJ: Mapping[str, Any] = MappingProxyType(
    {
        "hidden": 4096,
        "layers": 28,
        "heads": 16,
        "optional_ffn": None,
        "vocab": 50400,
        "max_positions": 2048,
        "activation": "gelu_new",
        "norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tied": False,
    }
)
_GPTJ_FAMILY = Family(
    build=decoder,
    defaults=_GPTJ,
    names=_GPT2_NAMES,
    fixed=_GPTJ_FIXED,
    inert=frozenset({"rotary_dim", "rotary"}),
)
_GPT2: Mapping[str, Any] = MappingProxyType(
    {**_GPTJ, "hidden": 768, "layers": 12, "heads": 12, "vocab": 50257, "max_positions": 1024, "tied": True}
)
_T5: Mapping[str, Any] = MappingProxyType(
    {
        "hidden": 512,
        "layers": 6,
        "heads": 8,
        "head_dim": 64,
        "ffn": 2048,
        "vocab": 32128,
        "max_positions": 512,
        "norm_eps": 1e-6,
        "decoder_layers": None,
        "buckets": 32,
        "gated_activation": "relu",
    }
)


def bert_family(defaults: Mapping[str, Any], reserved_positions: int = 0) -> Family:
    """BERT and its kin; some keep the first positions of their table for padding."""
    return Family(
        build=encoder,
        defaults=defaults,
        names={"norm_eps": ("layer_norm_eps",)},
        fixed={**_BERT_FIXED, "reserved_positions": reserved_positions},
        only=_BERT_ONLY,
        inert=frozenset({"tie_word_embeddings"}),
        remark="counted with its pooler and without a masked-language head",
    )


def t5_family(defaults: Mapping[str, Any]) -> Family:
    """T5 and its kin, which differ in their defaults."""
    return Family(
        build=encoder_decoder,
        defaults=defaults,
        names={
            "hidden": ("d_model", "hidden_size"),
            "layers": ("num_layers", "num_hidden_layers"),
            "heads": ("num_heads", "num_attention_heads"),
            "head_dim": ("d_kv", "head_dim"),
            "ffn": ("d_ff",),
            "max_positions": ("n_positions",),
            "norm_eps": ("layer_norm_epsilon",),
        },
        fixed={"tied": True, "rotary": False},
        noted={
            "tie_word_embeddings": (
                True,
                "tie_word_embeddings is false; counted tied, as transformers 5 builds this family",
            )
        },
        inert=frozenset(
            {
                "relative_attention_max_distance",
                "initializer_factor",
                "dense_act_fn",
                "is_gated_act",
                "scale_decoder_outputs",
                "is_encoder_decoder",
            }
        ),
    )


CLASSIC_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": Family(
            build=decoder,
            defaults=_GPT2,
            names=_GPT2_NAMES,
            fixed={**_BIASED, "learned_positions": True},
        ),
        "gpt_bigcode": Family(
            build=decoder,
            defaults={**_GPT2, "activation": "gelu_pytorch_tanh", "multi_query": True},
            names=_GPT2_NAMES,
            fixed={**_BIASED, "learned_positions": True, "new_architecture": False},
            inert=frozenset(
                {"num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"}
            ),
        ),
        "gptj": _GPTJ_FAMILY,
        "codegen": _GPTJ_FAMILY,
        "gpt_neo": Family(
            build=decoder,
            defaults={
                "hidden": 2048,
                "layers": 24,
                "heads": 16,
                "optional_ffn": None,
                "vocab": 50257,
                "max_positions": 2048,
                "activation": "gelu_new",
                "norm_eps": 1e-5,
                "initializer_range": 0.02,
                "tied": True,
                "window": 256,
                "attention_types": None,
            },
            names={
                "layers": ("num_layers", "num_hidden_layers"),
                "heads": ("num_heads", "num_attention_heads"),
                "activation": ("activation_function",),
                "norm_eps": ("layer_norm_epsilon",),
                "window": ("window_size",),
            },
            fixed={**_BIASED, "qkv_bias": False, "learned_positions": True},
            kinds=by_attention_types,
            inert=frozenset({"attention_layers"}),
        ),
        "gpt_neox": Family(
            build=decoder,
            defaults={
                "hidden": 6144,
                "layers": 44,
                "heads": 64,
                "ffn": 24576,
                "vocab": 50432,
                "max_positions": 2048,
                "activation": "gelu",
                "norm_eps": 1e-5,
                "rope_theta": 10_000.0,
                "initializer_range": 0.02,
                "tied": False,
                "parallel": True,
                "qkv_bias": True,
                "out_bias": True,
            },
            names={
                "norm_eps": ("layer_norm_eps",),
                "rope_theta": ("rotary_emb_base", "rope_theta", "rope_parameters.rope_theta"),
            },
            fixed={
                "norm": Norm.LAYERNORM,
                "gated": False,
                "mlp_bias": True,
                "rotary": False,
                "parallel_norms": 2,
            },
            inert=frozenset({"rotary_pct"}),
        ),
        "opt": Family(
            build=decoder,
            defaults={
                "hidden": 768,
                "layers": 12,
                "heads": 12,
                "ffn": 3072,
                "vocab": 50272,
                "max_positions": 2048,
                "activation": "relu",
                "initializer_range": 0.02,
                "tied": True,
                "embedding_width": None,
                "norm_first": True,
                "no_final_norm": False,
                "affine": True,
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
            },
            names={
                "ffn": ("ffn_dim",),
                "activation": ("activation_function",),
                "initializer_range": ("init_std",),
                "qkv_bias": ("enable_bias",),
                "out_bias": ("enable_bias",),
                "mlp_bias": ("enable_bias",),
            },
            fixed={
                "norm": Norm.LAYERNORM,
                "gated": False,
                "rotary": False,
                "learned_positions": True,
                "extra_positions": 2,
            },
            inert=frozenset({"layerdrop"}),
        ),
        "bloom": Family(
            build=decoder,
            defaults={
                "hidden": 64,
                "layers": 2,
                "heads": 8,
                "vocab": 250_880,
                "max_positions": 2048,
                "norm_eps": 1e-5,
                "initializer_range": 0.02,
                "tied": True,
            },
            names={
                "hidden": ("hidden_size", "n_embed"),
                "layers": ("n_layer", "num_hidden_layers"),
                "heads": ("n_head", "num_attention_heads"),
                "max_positions": ("seq_length",),
                "norm_eps": ("layer_norm_epsilon",),
            },
            fixed={**_BIASED, "activation": Activation.GELU_TANH, "embedding_norm": True},
            inert=frozenset(
                {
                    "apply_residual_connection_post_layernorm",
                    "slow_but_exact",
                    "skip_bias_add",
                    "skip_bias_add_qkv",
                    "attention_softmax_in_fp32",
                    "masked_softmax_fusion",
                    "bias_dropout_fusion",
                    "offset_alibi",
                    "unk_token_id",
                    "n_inner",
                }
            ),
        ),
        "falcon": Family(
            build=decoder,
            defaults={
                "hidden": 4544,
                "layers": 32,
                "heads": 71,
                "kv_heads": None,
                "optional_ffn": None,
                "vocab": 65024,
                "max_positions": 2048,
                "activation": "gelu",
                "norm_eps": 1e-5,
                "rope_theta": 10_000.0,
                "initializer_range": 0.02,
                "tied": True,
                "qkv_bias": False,
                "out_bias": False,
                "mlp_bias": False,
                "parallel": True,
                "parallel_norms": None,
                "multi_query": True,
                "new_architecture": False,
            },
            names={
                "hidden": ("hidden_size", "n_embed"),
                "layers": ("num_hidden_layers", "n_layer"),
                "heads": ("num_attention_heads", "n_head"),
                "kv_heads": ("num_kv_heads", "n_head_kv"),
                "optional_ffn": ("ffn_hidden_size",),
                "activation": ("activation",),
                "norm_eps": ("layer_norm_epsilon",),
                "qkv_bias": ("bias",),
                "out_bias": ("bias",),
                "mlp_bias": ("bias",),
                "parallel": ("parallel_attn",),
            },
            fixed={"norm": Norm.LAYERNORM, "gated": False, "rotary": False},
            inert=frozenset({"alibi", "apply_residual_connection_post_layernorm"}),
        ),
        "mpt": Family(
            build=decoder,
            defaults={
                "hidden": 2048,
                "layers": 24,
                "heads": 16,
                "vocab": 50368,
                "max_positions": 2048,
                "norm_eps": 1e-5,
                "initializer_range": 0.02,
                "tied": True,
            },
            names={
                "hidden": ("d_model", "hidden_size"),
                "layers": ("n_layers", "num_hidden_layers"),
                "heads": ("n_heads", "num_attention_heads"),
                "max_positions": ("max_seq_len",),
                "norm_eps": ("layer_norm_epsilon",),
            },
            fixed={
                "norm": Norm.LAYERNORM_WITHOUT_BIAS,
                "gated": False,
                "activation": Activation.GELU,
                "rotary": False,
            },
            only={
                "no_bias": (True, "biases are not described; transformers builds none either"),
                "expansion_ratio": (4, "transformers builds MLPs of 4 times the width whatever it says"),
                "attn_config.alibi": (True, "only linear position biases are described"),
                "attn_config.qk_ln": (False, "the norm of queries and keys is not described"),
                "attn_config.attn_type": (
                    "multihead_attention",
                    "grouped queries are not described for this family",
                ),
                "attn_config.prefix_lm": (False, "a prefix that attends both ways is not described"),
            },
            inert=frozenset(
                {
                    "attn_config",
                    "init_device",
                    "embedding_fraction",
                    "norm_type",
                    "learned_pos_emb",
                    "logit_scale",
                    "init_config",
                    "verbose",
                    "tokenizer_name",
                }
            ),
        ),
        "bert": bert_family(_BERT),
        "roberta": bert_family({**_BERT, "vocab": 50265}, reserved_positions=2),
        "xlm-roberta": bert_family(_BERT, reserved_positions=2),
        "t5": t5_family(_T5),
        "mt5": t5_family(
            {**_T5, "layers": 8, "heads": 6, "ffn": 1024, "vocab": 250_112, "gated_activation": "gated-gelu"}
        ),
    }
)
