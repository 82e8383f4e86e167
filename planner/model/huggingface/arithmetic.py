"""From a config to its Arithmetic: rotations, scales and caps by family, and what none of these says.

What a step costs does not hang on it, so what is not described is listed in `unexpressed` instead of
refused. Source: the configuration and modelling code of transformers 5.23.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from planner.model.arithmetic import Arithmetic, RopeKind, RopeScaling
from planner.model.attention import CAUSAL, Attention, LatentAttention, QkNorm
from planner.model.huggingface.family import MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, Description, Key, Kind
from planner.model.huggingface.segments import is_rotary
from planner.model.huggingface.values import Values, lookup
from planner.model.spec import Block, Segment

PARTIAL: Mapping[str, float] = MappingProxyType(
    {
        "phi": 0.5,
        "stablelm": 0.25,
        "nemotron": 0.5,
        "glm": 0.5,
        "glm4": 0.5,
        "gpt_neox": 0.25,
        "phi3": 1.0,
        "glm4_moe": 0.5,
    }
)
"""Families that turn a part of each head, with the class's part."""

INTERLEAVED = frozenset(
    {
        "cohere",
        "cohere2",
        "glm",
        "glm4",
        "gptj",
        "codegen",
        "ernie4_5",
        "deepseek_v2",
        "deepseek_v3",
        "kimi_k2",
    }
)
"""Families that turn neighbours, (2i, 2i + 1)."""

_SPLIT_ROPE = ("gemma3_text", "olmo3")
"""Families whose windowed layers have a table of their own, never scaled."""


def read_arithmetic(values: Values, family: str, d: Description, segments: tuple[Segment, ...]) -> Arithmetic:
    """What a config of `family` computes; values of a wrong type or range are noted in `values`."""
    facts: dict[str, Any] = {
        "rope_interleaved": family in INTERLEAVED and values.config.get("rope_interleave") is not False,
        "rope_dims": _rope_dims(values, family, d),
        "rope_scaling": None,
    }
    missing: list[str] = []
    if not d.learned_positions:
        facts["rope_scaling"] = _scaling(values, d, missing)
    if family in _SPLIT_ROPE:
        facts["window_rope_theta"] = _window_theta(values, family, d)
    if family == "smollm3":
        facts["unrotated_layers"] = tuple(i for i in range(d.layers) if not is_rotary(d, i))
    if family == "cohere2":
        facts["unrotated_layers"] = _without_window(segments)
    if family in _SCALES:
        facts |= _SCALES[family](values, d)
    facts["attention_scale"] = _latent_scale(values, segments) or facts.get("attention_scale")
    missing += [reason for holds, reason in _missing(values.config, family, d) if holds]
    return Arithmetic(**facts, unexpressed=tuple(dict.fromkeys(missing)))


def _without_window(segments: tuple[Segment, ...]) -> tuple[int, ...]:
    """Layers that meet all keys before."""
    blocks = [segment.block for segment in segments for _ in range(segment.count)]
    mixers = [block.mixer if isinstance(block, Block) else None for block in blocks]
    return tuple(i for i, m in enumerate(mixers) if isinstance(m, Attention) and m.span == CAUSAL)


def _real(values: Values, name: str, default: float | None, low: float = 1e-9) -> Any:
    key = Key(names=(name,), kind=Kind.REAL, low=low, high=1e12, nullable=True)
    return values.read(key, (name,), default)


def _gemma(values: Values, d: Description) -> dict[str, Any]:
    return {"embedding_scale": math.sqrt(d.hidden), "unit_offset": True}


def _gemma2(values: Values, d: Description) -> dict[str, Any]:
    """Queries are scaled by query_pre_attn_scalar; scores and logits may be capped (Gemma 2, 2408.00118)."""
    capped = "attn_logit_softcapping" in values.config or "query_pre_attn_scalar" in values.config
    scalar = _real(values, "query_pre_attn_scalar", 256.0) or 1.0
    return _gemma(values, d) | {
        "attention_scale": scalar**-0.5,
        "attention_cap": _real(values, "attn_logit_softcapping", None if capped else 50.0),
        "logit_cap": _real(values, "final_logit_softcapping", None if capped else 30.0),
    }


def _granite(values: Values, d: Description) -> dict[str, Any]:
    return {
        "embedding_scale": _real(values, "embedding_multiplier", 1.0) or 1.0,
        "residual_scale": _real(values, "residual_multiplier", 1.0) or 1.0,
        "attention_scale": _real(values, "attention_multiplier", 1.0) or 1.0,
        "logit_scale": 1.0 / (_real(values, "logits_scaling", 1.0) or 1.0),
    }


def _cohere(values: Values, d: Description) -> dict[str, Any]:
    return {"logit_scale": _real(values, "logit_scale", 0.0625) or 1.0}


_SCALES: Mapping[str, Callable[[Values, Description], dict[str, Any]]] = MappingProxyType(
    {
        "gemma": _gemma,
        "gemma2": _gemma2,
        "gemma3_text": _gemma2,
        "granite": _granite,
        "granitemoe": _granite,
        "cohere": _cohere,
        "cohere2": _cohere,
        "olmo2": lambda values, d: {"post_norm": True},
        "olmo3": lambda values, d: {"post_norm": True},
        "nemotron": lambda values, d: {"unit_offset": True},
        "opt": lambda values, d: {"position_offset": 2},
        "gpt_neo": lambda values, d: {"attention_scale": 1.0},
    }
)


def _rope_dims(values: Values, family: str, d: Description) -> int | None:
    """Dimensions of a head that are turned, where they are not all."""
    if family in ("gptj", "codegen"):
        key = Key(names=("rotary_dim",), kind=Kind.WHOLE, low=2, high=MAX_HEADS)
        dims = values.read(key, ("rotary_dim",), 64)
        return None if dims is None else min(dims, d.width_of_head)
    if family not in PARTIAL:
        return None
    names: tuple[str, ...] = ("rope_parameters.partial_rotary_factor", "partial_rotary_factor")
    names += ("rotary_pct",) if family == "gpt_neox" else ()
    key = Key(names=names, kind=Kind.REAL, low=0.0, high=1.0)
    part = values.read(key, names, PARTIAL[family])
    dims = int(d.width_of_head * part) if part is not None else d.width_of_head
    return None if dims == d.width_of_head else dims


def _rope_table(values: Values) -> tuple[Mapping[str, Any], str]:
    """The table that says how frequencies are stretched, and its name."""
    for name in ("rope_scaling", "rope_parameters.full_attention", "rope_parameters"):
        table = lookup(values.config, name)
        if isinstance(table, Mapping) and table:
            return table, name
    return {}, ""


def _scaling(values: Values, d: Description, missing: list[str]) -> RopeScaling | None:
    """The stretching of rotary frequencies; kinds that are not described go into `missing`."""
    table, where = _rope_table(values)
    kind = str(table.get("rope_type", table.get("type", "default")))[:40]
    kind = "longrope" if kind == "su" else kind
    if kind in ("default", "mrope") or not table:
        return None
    if kind not in list(RopeKind):
        missing.append(f"rotary frequencies are stretched by '{kind}'")
        return None
    read = Values(table, f"{values.where}{where}.", values.problems)
    original = _original_positions(read, values, d)
    factor = _real(read, "factor", None) or max(1.0, d.max_positions / original)
    facts: dict[str, Any] = {"kind": RopeKind(kind), "factor": factor, "original_positions": original}
    match RopeKind(kind):
        case RopeKind.LLAMA3:
            facts["low_freq_factor"] = _real(read, "low_freq_factor", 1.0) or 1.0
            facts["high_freq_factor"] = _real(read, "high_freq_factor", 4.0) or 4.0
        case RopeKind.YARN:
            facts["beta_fast"] = _real(read, "beta_fast", 32.0) or 32.0
            facts["beta_slow"] = _real(read, "beta_slow", 1.0) or 1.0
            facts["truncate"] = table.get("truncate", True) is not False
            facts["amplitude"] = _yarn_amplitude(read, factor)
        case RopeKind.LONGROPE:
            factor = max(1.0, d.max_positions / original)
            grown = math.sqrt(1 + math.log(factor) / math.log(max(2, original))) if factor > 1 else 1.0
            facts["amplitude"] = _real(read, "attention_factor", grown)
            facts |= {name: _divisors(read, f"{name}_factor") for name in ("short", "long")}
    return RopeScaling(**facts) if not values.problems else None


def _original_positions(read: Values, values: Values, d: Description) -> int:
    name = "original_max_position_embeddings"
    key = Key(names=(name,), kind=Kind.WHOLE, low=1, high=MAX_POSITIONS)
    own = read.read(key, (name,), None) or values.read(key, (name,), None)
    return int(own or d.max_positions)


def _divisors(read: Values, name: str) -> tuple[float, ...]:
    """A list of numbers above 0, as LongRoPE has them."""
    listed = read.config.get(name)
    good = isinstance(listed, list) and 0 < len(listed) <= MAX_LAYERS
    if not (isinstance(listed, list) and good and all(_positive(item) for item in listed)):
        read.fault(name, "is not a list of divisors.", "numbers above 0, one for every frequency")
        return ()
    return tuple(float(item) for item in listed)


def _positive(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool) and 0 < item < 1e12


def _mscale(factor: float, by: float = 1.0) -> float:
    """YaRN's growth of attention with the factor: 0.1 m ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn_amplitude(read: Values, factor: float) -> float:
    """The factor of cosines and sines: as given, else by mscale and mscale_all_dim, else by the factor."""
    given = _real(read, "attention_factor", None)
    over, under = _real(read, "mscale", None, 0.0), _real(read, "mscale_all_dim", None, 0.0)
    if given is not None:
        return float(given)
    return _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor)


def _latent_scale(values: Values, segments: tuple[Segment, ...]) -> float | None:
    """Latent attention's scale under YaRN, by mscale_all_dim squared (DeepSeek-V3's code); None: plain."""
    mixer = next((getattr(s.block, "mixer", None) for s in segments), None)
    table, where = _rope_table(values)
    if not isinstance(mixer, LatentAttention) or table.get("rope_type", table.get("type")) in (
        None,
        "default",
    ):
        return None
    read = Values(table, f"{values.where}{where}.", values.problems)
    by, factor = _real(read, "mscale_all_dim", 0.0, 0.0), _real(read, "factor", 1.0)
    return float(mixer.head_dim**-0.5 * _mscale(factor or 1.0, by) ** 2) if by else None


def _window_theta(values: Values, family: str, d: Description) -> float:
    """The base of windowed layers: gemma3's own; olmo3's is that of the others, but never scaled."""
    usual = 10_000.0 if family == "gemma3_text" else d.rope_theta
    names = ("rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq")
    key = Key(names=names, kind=Kind.REAL, low=1.0, high=1e12)
    return float(values.read(key, names, usual) or usual)


def _missing(config: Mapping[str, Any], family: str, d: Description) -> list[tuple[bool, str]]:
    """What the families compute that Arithmetic has no word for."""
    said = config.get
    normed = d.qk_normed and d.qk_norm is not QkNorm.NONE
    return [
        (bool(said("clip_qkv")), "queries, keys and values are clipped"),
        (
            family in ("cohere", "stablelm") and normed,
            "queries and keys are normed with a weight for each head",
        ),
        (bool(said("scale_attn_by_inverse_layer_idx")), "attention is scaled by the layer's index"),
        (said("scale_attn_weights") is False, "scores are not scaled"),
        (
            bool(said("apply_residual_connection_post_layernorm")),
            "the residual stream is taken behind the norm",
        ),
        (family in ("bloom", "mpt") or (family == "falcon" and bool(said("alibi"))), "positions are ALiBi"),
        (
            family == "ministral3" and bool(lookup(config, "rope_parameters.llama_4_scaling_beta")),
            "queries are scaled by their position",
        ),
        (
            family == "opt" and not d.norm_first,
            "norms are behind the residual sums",
        ),
        (
            str(said("hidden_act", said("activation_function"))) == "quick_gelu",
            "its activation is quick_gelu",
        ),
    ]
