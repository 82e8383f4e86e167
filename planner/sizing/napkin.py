"""Sizes: a bare count of parameters with a llama-like shape near it, or a model by its architecture.

First principles: bytes, FLOPs, days and dollars of a model of N parameters, each with its formula.

The rule of thumb of the lecture: 2 + 4 + 2 bytes a parameter (weights, optimizer, gradients), C = 6 N D
FLOPs on D = 20 N tokens, and C over the device's peak. What the rule leaves out stands beside it.
"""

from __future__ import annotations

import math
import re

from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S, format_count
from planner.model.huggingface import read_config
from planner.model.spec import ModelSpec
from planner.model.workload import Adapters
from planner.sizing.device_rate import DeviceRate
from planner.sizing.scaling import FLOPS_PER_PARAM_TOKEN

HEAD_DIM = 128
ASPECT = 128
FFN_MULTIPLE = 256
MOST_FREE_LAYERS = 48
TP_HEADS = 8
REFERENCE_VOCAB = 32_000
"""A llama-like shape: heads of 128, hidden about 128 x layers, gated MLP of 8/3 hidden rounded up to 256,
32,000 tokens of vocabulary. LLaMA 7B and 13B are exactly this (Touvron et al., arXiv 2302.13971, Table 2)."""

REFERENCE_SOURCE = "LLaMA, arXiv 2302.13971, Table 2"


@frozen
class Size:
    """The model as the arithmetic sees it.

    `params` is what memory holds, `params_active` what a token meets, `params_flops` that without the input
    embedding, whose look-up is no product. A bare size uses one N for all. `shape` is what activations and
    the cost model are taken from; `shape_note` says which.
    """

    name: str
    bare: bool
    params: int
    params_active: int
    params_flops: int
    shape: ModelSpec
    shape_note: str

    @property
    def sparse(self) -> bool:
        return self.params_active != self.params


def reference_shape(params: int, seq: int) -> ModelSpec:
    """The llama-like model whose size is nearest to `params`."""
    layers, hidden = _layers_and_hidden(params)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "intermediate_size": _ffn(hidden),
        "vocab_size": REFERENCE_VOCAB,
        "max_position_embeddings": seq,
        "tie_word_embeddings": False,
    }
    name = f"llama-like-{format_count(params)}"
    return read_config(config, source=name, name=name, sources=(REFERENCE_SOURCE,))


def _layers_and_hidden(params: int) -> tuple[int, int]:
    """Layers and width: hidden = 128 x layers; above 48 layers a multiple of 1024, for tp = 8."""
    about = max(1, round((params / (12 * ASPECT**2)) ** (1 / 3)))
    shapes = [(layers, ASPECT * layers) for layers in range(max(1, about - 8), about + 3)]
    if about > MOST_FREE_LAYERS:
        hidden = HEAD_DIM * TP_HEADS * round(ASPECT * about / (HEAD_DIM * TP_HEADS))
        shapes = [(layers, hidden) for layers in range(about - about // 8, about + about // 8 + 2)]
    return min(shapes, key=lambda shape: abs(_shape_params(*shape) - params))


def _ffn(hidden: int) -> int:
    return math.ceil(8 * hidden / 3 / FFN_MULTIPLE) * FFN_MULTIPLE


def _shape_params(layers: int, hidden: int) -> int:
    block = 4 * hidden**2 + 3 * hidden * _ffn(hidden) + 2 * hidden
    return 2 * REFERENCE_VOCAB * hidden + layers * block + hidden


def bare_size(params: int, seq: int) -> Size:
    """A size alone, such as 7B; activations come from a llama-like shape near it."""
    shape = reference_shape(params, seq)
    note = (
        f"a llama-like shape: {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocab:,}, "
        f"{format_count(shape.params_total)} parameters ({shape.params_total / params - 1:+.1%}); "
        f"hidden about {ASPECT} x layers as in {REFERENCE_SOURCE}"
    )
    return Size(
        name=format_count(params),
        bare=True,
        params=params,
        params_active=params,
        params_flops=params,
        shape=shape,
        shape_note=note,
    )


def model_size(model: ModelSpec) -> Size:
    """A model by its architecture.

    Tables of tokens and positions are looked up and take no FLOPs; a tied table is the output projection too.
    """
    product = model.vocab * model.token_width if model.tied_embeddings else 0
    return Size(
        name=model.name,
        bare=False,
        params=model.params_total,
        params_active=model.params_active,
        params_flops=model.params_active - model.params_embedding + product,
        shape=model,
        shape_note=f"{model.name}: {model.layers} layers of {model.hidden}, vocabulary {model.vocab:,}",
    )


TOKENS_PER_PARAM = 20.0
"""Compute-optimal tokens a parameter (Hoffmann et al., arXiv 2203.15556: 70B on 1.4T)."""

RULE_BYTES = {"bf16": (2, 4, 2), "fp16": (2, 4, 2), "fp8": (2, 4, 2), "fp32": (4, 8, 4)}
"""Bytes a parameter of the rule of thumb: weights, optimizer (two moments), gradients, in the format of
training. fp8 keeps weights in bf16."""

MIXED_BYTES = {
    "16-bit gradients": (2, 2, 4, 4, 4),
    "fp32 gradients": (2, 4, 4, 4, 4),
}
"""Bytes a parameter of ordinary mixed precision: 16-bit weights, gradients, fp32 master weights, two fp32
Adam moments (ZeRO, arXiv 1910.02054, section 3.1: 16 bytes; 18 where gradients are summed in fp32)."""


@frozen
class Figure:
    """One number with its derivation. `value` is None where it is unknown; `note` then says why."""

    name: str
    formula: str
    value: float | int | None
    unit: str
    note: str = ""


@frozen
class Question:
    """Everything that the arithmetic is asked about."""

    size: Size
    rate: DeviceRate
    tokens: int
    tokens_formula: str
    finetune_tokens: int
    finetune_note: str
    seq: int
    adapters: Adapters
    devices: int | None


def short(value: float) -> str:
    """Four digits as people write them: `5.88e21`, `7e9`, `0.4`."""
    return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{value:.4g}")


def rule_of_thumb(q: Question) -> tuple[Figure, ...]:
    """The lecture: bytes, tokens, FLOPs, seconds and days on one device at its peak."""
    weights, optimizer, grads = RULE_BYTES[q.rate.precision]
    each = weights + optimizer + grads
    memory = each * q.size.params
    flops = FLOPS_PER_PARAM_TOKEN * q.size.params_flops * q.tokens
    peak, unknown = q.rate.peak_flops, q.rate.unknown_peak
    seconds = None if peak is None else flops / peak
    peak_text = "peak" if peak is None else f"{short(peak)}"
    return (
        Figure(
            name="bytes_per_param",
            formula=f"{weights} (weights) + {optimizer} (optimizer) + {grads} (gradients)",
            value=each,
            unit="B",
        ),
        Figure(name="memory_bytes", formula=f"{each} B x {short(q.size.params)}", value=memory, unit="B"),
        Figure(name="tokens", formula=q.tokens_formula, value=q.tokens, unit="tokens"),
        Figure(
            name="flops",
            formula=f"6 N D = 6 x {short(q.size.params_flops)} x {short(q.tokens)}",
            value=flops,
            unit="FLOPs",
        ),
        Figure(
            name="seconds",
            formula=f"C / peak = {short(flops)} / {peak_text}",
            value=seconds,
            unit="s",
            note="on one device at its peak" if seconds is not None else unknown,
        ),
        Figure(
            name="days",
            formula=f"{'seconds' if seconds is None else short(seconds)} / 86400",
            value=None if seconds is None else seconds / DAY_S,
            unit="days",
            note="" if seconds is not None else unknown,
        ),
    )


def left_out(q: Question, activations: dict[str, int], why_not: str) -> tuple[Figure, ...]:
    """What the rule of thumb leaves out, each with its size.

    `activations` are bytes of one sequence by recompute option; empty where they are unknown.
    """
    return (*_states(q), *_work(q, activations, why_not), _attention(q), *_utilisation(q))


def _states(q: Question) -> tuple[Figure, ...]:
    if q.rate.precision == "fp32":
        return ()
    return tuple(
        Figure(
            name=f"mixed_precision_{sum(parts)}_bytes",
            formula=f"({' + '.join(str(part) for part in parts)}) x {short(q.size.params)}",
            value=sum(parts) * q.size.params,
            unit="B",
            note=f"16-bit weights, {kind}, fp32 master weights and two fp32 Adam moments",
        )
        for kind, parts in MIXED_BYTES.items()
    )


def _work(q: Question, activations: dict[str, int], why_not: str) -> tuple[Figure, ...]:
    vocab = q.size.shape.vocab
    logits = Figure(
        name="logits_bytes",
        formula=f"seq x vocabulary x (2 + 4) = {q.seq} x {vocab} x 6",
        value=q.seq * vocab * 6,
        unit="B",
        note="of one sequence, in 16 bits and in fp32 for the loss; their gradient takes as much again",
    )
    if not activations:
        unknown = Figure(name="activations_bytes", formula="cost model", value=None, unit="B", note=why_not)
        return unknown, logits
    kept = (
        Figure(
            name=f"activations_{option}_recompute_bytes",
            formula=f"cost model: {q.seq} tokens x {q.size.shape.layers} layers, recompute {option}",
            value=activations[option],
            unit="B",
            note=note,
        )
        for option, note in (
            ("none", "of one sequence, all kept for the backward pass"),
            ("full", "of one sequence, only the inputs of blocks kept"),
        )
        if option in activations
    )
    return (*kept, logits)


def _attention(q: Question) -> Figure:
    """Model FLOPs a token from the architecture, over 6 N."""
    shape = q.size.shape
    flops = 3 * shape.flops_per_token_forward(q.seq)
    own_params = model_size(shape).params_flops
    return Figure(
        name="attention_flops_ratio",
        formula=f"3 x forward FLOPs a token / (6 N) = {short(flops)} / {short(6 * own_params)}",
        value=flops / (6 * own_params),
        unit="ratio",
        note=f"scores and values of causal attention at sequence length {q.seq}, which 6 N D does not count",
    )


def _utilisation(q: Question) -> tuple[Figure, ...]:
    rate = q.rate
    flops = FLOPS_PER_PARAM_TOKEN * q.size.params_flops * q.tokens
    shares = (("assumed", rate.mfu), ("low", rate.mfu_low), ("high", rate.mfu_high))
    notes = {
        "assumed": "on one device at the assumed utilisation, --mfu",
        "low": f"lowest of {rate.mfu_source}",
        "high": "highest of the same runs",
    }
    return tuple(
        Figure(
            name=f"days_at_{kind}_mfu",
            formula=f"{short(flops)} / (peak x {share:.3g}) / 86400",
            value=None if rate.peak_flops is None else flops / (rate.peak_flops * share) / DAY_S,
            unit="days",
            note=notes[kind] if rate.peak_flops is not None else rate.unknown_peak,
        )
        for kind, share in shares
    )
