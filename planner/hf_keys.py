"""The keys of a Hugging Face config.json by family: one table a family, read by `planner.hf`.

Sources: the configuration classes of transformers 5.23.0 (names, defaults, synonyms); the parameter counts
that follow from these tables are tested against models built by that library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from planner.feed_forward import Activation, Mlp
from planner.mixers import Attention
from planner.model import Block, ModelSpec, Norm, Segment

MAX_LAYERS = 10_000
MAX_WIDTH = 2**20
MAX_FFN = 2**24
MAX_HEADS = 2**16
MAX_VOCAB = 2**27
MAX_POSITIONS = 2**31


class Missing(Enum):
    """Marks a key that a config must hold."""

    REQUIRED = "required"


REQUIRED = Missing.REQUIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key: its names in files (the first is the usual one), type, range and default.

    A name may be a path into nested objects, such as `rope_parameters.rope_theta`. `choices` maps the
    texts that are legal to what they mean. A default of None means that the family derives the value.
    """

    names: tuple[str, ...]
    kind: type[int] | type[float] | type[bool] | type[str]
    default: int | float | bool | str | Missing | None
    low: float = 0.0
    high: float = 0.0
    choices: Mapping[str, Any] | None = None


def _whole(*names: str, high: int, default: int | Missing | None = REQUIRED) -> Key:
    return Key(names=names, kind=int, default=default, low=1, high=high)


def _real(*names: str, default: float, low: float, high: float) -> Key:
    return Key(names=names, kind=float, default=default, low=low, high=high)


def _flag(*names: str, default: bool) -> Key:
    return Key(names=names, kind=bool, default=default)


def _choice(*names: str, choices: Mapping[str, Any], default: str) -> Key:
    return Key(names=names, kind=str, default=default, choices=choices)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": Activation.SILU,
        "swish": Activation.SILU,
        "gelu": Activation.GELU,
        "gelu_new": Activation.GELU_TANH,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
        "gelu_fast": Activation.GELU_TANH,
        "relu": Activation.RELU,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model_type: its keys, what of its other keys is inert, and how values become a ModelSpec.

    `noted` maps a key to the value at which it means nothing here; any other value is written into the
    model's sources, since it is not part of the description but does not change the cost. `faults`
    names what contradicts itself, as (key, text, legal); `build` is called only where there is none.
    """

    keys: Mapping[str, Key]
    faults: Callable[[Mapping[str, Any]], list[tuple[str, str, str]]]
    build: Callable[[Mapping[str, Any], str, str, tuple[str, ...]], ModelSpec]
    noted: Mapping[str, Any]


COMMON_INERT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "model_type",
        "pretraining_tp",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "id2label",
        "label2id",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "finetuning_task",
        "problem_type",
        "max_length",
        "min_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "chunk_size_feed_forward",
        "is_decoder",
        "torchscript",
        "tf_legacy_loss",
        "use_bfloat16",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "gradient_checkpointing",
        "rope_interleaved",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "n_ctx",
    }
)
"""Keys that say nothing about what a training step costs."""

CHANGES_COST: Mapping[str, str] = MappingProxyType(
    {
        "quantization_config": "the weights are quantised, which is not modelled",
        "num_local_experts": "experts are not part of this family",
        "num_experts": "experts are not part of this family",
        "n_routed_experts": "experts are not part of this family",
        "pruned_heads": "its heads were pruned",
        "add_cross_attention": "cross attention is not modelled",
        "is_encoder_decoder": "an encoder is not modelled",
        "text_config": "holds a model inside a model",
        "vision_config": "a vision tower is not modelled",
        "audio_config": "an audio tower is not modelled",
        "sliding_window": "sliding-window attention is not modelled for this family",
        "attention_chunk_size": "chunked attention is not modelled for this family",
    }
)
"""Keys that would change the cost: any value but null, false, 0 and empty is refused, with the reason."""


def _llama_faults(v: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    faults = _heads_faults(v, "num_attention_heads", "hidden_size")
    heads, kv_heads = v["heads"], v["kv_heads"] or v["heads"]
    if heads % kv_heads:
        legal = ", ".join(str(n) for n in range(1, min(heads, 4096) + 1) if heads % n == 0)
        faults.append(
            ("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} heads.", legal[:80])
        )
    head_dim = v["head_dim"] or v["hidden"] // heads
    if head_dim % 2:
        faults.append(("head_dim", f"is {head_dim}; rotary positions turn pairs.", "even numbers"))
    return faults


def _heads_faults(v: Mapping[str, Any], heads_key: str, hidden_key: str) -> list[tuple[str, str, str]]:
    if v.get("head_dim") is None and v["hidden"] % v["heads"]:
        text = f"is {v['heads']}, which does not divide {hidden_key} {v['hidden']}."
        return [(heads_key, text, f"divisors of {v['hidden']}")]
    return []


def _llama(v: Mapping[str, Any], name: str, model_type: str, sources: tuple[str, ...]) -> ModelSpec:
    attention = Attention(
        heads=v["heads"],
        kv_heads=v["kv_heads"] or v["heads"],
        head_dim=v["head_dim"] or v["hidden"] // v["heads"],
        qkv_bias=v["attention_bias"],
        out_bias=v["attention_bias"],
    )
    mlp = Mlp(width=v["ffn"], gated=True, activation=v["activation"], bias=v["mlp_bias"])
    block = Block(hidden=v["hidden"], norm=Norm.RMSNORM, mixer=attention, mlp=mlp)
    return _spec(v, name, model_type, sources, block, learned_positions=0)


def _gpt2_faults(v: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return _heads_faults(v, "n_head", "n_embd")


def _gpt2(v: Mapping[str, Any], name: str, model_type: str, sources: tuple[str, ...]) -> ModelSpec:
    attention = Attention(
        heads=v["heads"],
        kv_heads=v["heads"],
        head_dim=v["hidden"] // v["heads"],
        qkv_bias=True,
        out_bias=True,
    )
    mlp = Mlp(width=v["ffn"] or 4 * v["hidden"], gated=False, activation=v["activation"], bias=True)
    block = Block(hidden=v["hidden"], norm=Norm.LAYERNORM, mixer=attention, mlp=mlp)
    return _spec(v, name, model_type, sources, block, learned_positions=v["max_positions"])


def _spec(
    v: Mapping[str, Any],
    name: str,
    model_type: str,
    sources: tuple[str, ...],
    block: Block,
    learned_positions: int,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        model_type=model_type,
        hidden=v["hidden"],
        vocab=v["vocab"],
        max_positions=v["max_positions"],
        learned_positions=learned_positions,
        rope_theta=v.get("rope_theta", 10_000.0),
        norm=block.norm,
        norm_eps=v["norm_eps"],
        initializer_range=v["initializer_range"],
        tied_embeddings=v["tied"],
        segments=(Segment(block=block, count=v["layers"]),),
        sources=sources,
    )


LLAMA = Family(
    keys=MappingProxyType(
        {
            "hidden": _whole("hidden_size", high=MAX_WIDTH),
            "layers": _whole("num_hidden_layers", high=MAX_LAYERS),
            "heads": _whole("num_attention_heads", high=MAX_HEADS),
            "kv_heads": _whole("num_key_value_heads", high=MAX_HEADS, default=None),
            "head_dim": _whole("head_dim", high=MAX_HEADS, default=None),
            "ffn": _whole("intermediate_size", high=MAX_FFN),
            "vocab": _whole("vocab_size", high=MAX_VOCAB),
            "max_positions": _whole("max_position_embeddings", high=MAX_POSITIONS, default=2048),
            "activation": _choice("hidden_act", choices=ACTIVATIONS, default="silu"),
            "norm_eps": _real("rms_norm_eps", default=1e-6, low=0.0, high=1.0),
            "rope_theta": _real(
                "rope_theta", "rope_parameters.rope_theta", default=10_000.0, low=1.0, high=1e12
            ),
            "initializer_range": _real("initializer_range", default=0.02, low=0.0, high=10.0),
            "tied": _flag("tie_word_embeddings", default=False),
            "attention_bias": _flag("attention_bias", default=False),
            "mlp_bias": _flag("mlp_bias", default=False),
        }
    ),
    faults=_llama_faults,
    build=_llama,
    noted=MappingProxyType(
        {"rope_scaling": None, "rope_parameters.rope_type": "default", "attention_dropout": 0.0}
    ),
)

GPT2 = Family(
    keys=MappingProxyType(
        {
            "hidden": _whole("n_embd", "hidden_size", high=MAX_WIDTH),
            "layers": _whole("n_layer", "num_hidden_layers", high=MAX_LAYERS),
            "heads": _whole("n_head", "num_attention_heads", high=MAX_HEADS),
            "ffn": _whole("n_inner", high=MAX_FFN, default=None),
            "vocab": _whole("vocab_size", high=MAX_VOCAB),
            "max_positions": _whole("n_positions", "max_position_embeddings", high=MAX_POSITIONS),
            "activation": _choice("activation_function", choices=ACTIVATIONS, default="gelu_new"),
            "norm_eps": _real("layer_norm_epsilon", default=1e-5, low=0.0, high=1.0),
            "initializer_range": _real("initializer_range", default=0.02, low=0.0, high=10.0),
            "tied": _flag("tie_word_embeddings", default=True),
        }
    ),
    faults=_gpt2_faults,
    build=_gpt2,
    noted=MappingProxyType(
        {
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        }
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({"llama": LLAMA, "gpt2": GPT2})
"""Every model_type that is read."""
