"""First principles: bytes, FLOPs, days and dollars of a model of N parameters, each with its formula.

The rule of thumb of the lecture: 2 + 4 + 2 bytes a parameter (weights, optimizer, gradients), C = 6 N D
FLOPs on D = 20 N tokens, and C over the device's peak. What the rule leaves out stands beside it.
"""

from __future__ import annotations

import math
import re

from planner.adapters import Adapters, adapted_weights, adapter_params
from planner.codec import noun
from planner.device_rate import DeviceRate
from planner.hf import read_config
from planner.model import ModelSpec
from planner.napkin_estimate import OwnEstimate
from planner.scaling import FLOPS_PER_PARAM_TOKEN
from planner.units import DAY_S, format_bytes, format_count

TOKENS_PER_PARAM = 20.0
"""Compute-optimal tokens a parameter (Hoffmann et al., arXiv 2203.15556: 70B on 1.4T)."""

LORA_FLOPS_PER_PARAM_TOKEN = 4
"""Forward 2 and backward 2 for each frozen parameter and token: gradients of activations pass through frozen
weights, gradients of those weights are not computed (LoRA, arXiv 2106.09685, trains only the adapters)."""

HEAD_DIM = 128
ASPECT = 128
FFN_MULTIPLE = 256
MOST_FREE_LAYERS = 48
TP_HEADS = 8
REFERENCE_VOCAB = 32_000
"""A llama-like shape: heads of 128, hidden about 128 x layers, gated MLP of 8/3 hidden rounded up to 256,
32,000 tokens of vocabulary. LLaMA 7B and 13B are exactly this (Touvron et al., arXiv 2302.13971, Table 2)."""

REFERENCE_SOURCE = "LLaMA, arXiv 2302.13971, Table 2"

RULE_BYTES = {"bf16": (2, 4, 2), "fp16": (2, 4, 2), "fp8": (2, 4, 2), "fp32": (4, 8, 4)}
"""Bytes a parameter of the rule of thumb: weights, optimizer (two moments), gradients, in the format of
training. fp8 keeps weights in bf16."""

MIXED_BYTES = {
    "16-bit gradients": (2, 2, 4, 4, 4),
    "fp32 gradients": (2, 4, 4, 4, 4),
}
"""Bytes a parameter of ordinary mixed precision: 16-bit weights, gradients, fp32 master weights, two fp32
Adam moments (ZeRO, arXiv 1910.02054, section 3.1: 16 bytes; 18 where gradients are summed in fp32)."""

MEMORY_MARGIN = 0.15
"""Share of memory left free where devices are counted: the error band of the datasheet memory model."""


@noun
class Figure:
    """One number with its derivation. `value` is None where it is unknown; `note` then says why."""

    name: str
    formula: str
    value: float | int | None
    unit: str
    note: str = ""


@noun
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


@noun
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


def short(value: float) -> str:
    """Four digits as people write them: `5.88e21`, `7e9`, `0.4`."""
    return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{value:.4g}")


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


@noun
class Method:
    """One way to a model that does the task, and what it costs.

    `verdict` says whether it fits on `devices_used`: SAFE, RISKY, NO, or empty where that is unknown.
    `cost_model_days` is the cost model's own answer, where it has one.
    """

    name: str
    title: str
    trained_params: Figure
    memory_bytes: Figure
    devices_min: Figure
    devices_used: int | None
    verdict: str
    tokens: Figure
    flops: Figure
    seconds: Figure
    usd: Figure
    cost_model_days: Figure


def methods(q: Question, own: OwnEstimate | None, why_not: str) -> tuple[Method, ...]:
    """Prompting, LoRA, full fine-tuning and pretraining: cheapest first."""
    return (
        _prompting(q),
        _lora(q, own, why_not),
        _full("finetune", "full fine-tuning", q.finetune_tokens, q.finetune_note, q, own, why_not),
        _full("pretrain", "pretraining", q.tokens, q.tokens_formula, q, own, why_not),
    )


def _prompting(q: Question) -> Method:
    weights = RULE_BYTES[q.rate.precision][0] * q.size.params
    usable = q.rate.usable_memory_bytes
    nothing = "nothing is trained"
    return Method(
        name="prompting",
        title="prompting",
        trained_params=Figure(name="trained_params", formula=nothing, value=0, unit="params"),
        memory_bytes=Figure(
            name="memory_bytes",
            formula=f"{RULE_BYTES[q.rate.precision][0]} B x {short(q.size.params)}",
            value=weights,
            unit="B",
            note="weights to run the model; each sequence in flight adds its keys and values",
        ),
        devices_min=Figure(
            name="devices_min",
            formula="ceil(weights / usable memory)",
            value=math.ceil(weights / usable),
            unit="devices",
        ),
        devices_used=None,
        verdict="",
        tokens=Figure(name="tokens", formula=nothing, value=0, unit="tokens"),
        flops=Figure(name="flops", formula=nothing, value=0, unit="FLOPs"),
        seconds=Figure(name="seconds", formula=nothing, value=0, unit="s"),
        usd=Figure(name="usd", formula=nothing, value=0, unit="USD", note="use is paid by the token instead"),
        cost_model_days=Figure(name="cost_model_days", formula=nothing, value=0, unit="days"),
    )


def trained_adapters(adapters: Adapters, size: Size) -> Figure:
    """Parameters of the adapters of a model."""
    count = adapted_weights(adapters, size.shape)
    return Figure(
        name="trained_params",
        formula=f"r x (in + out) of {count} weights, r = {adapters.rank}",
        value=adapter_params(adapters, size.shape),
        unit="params",
        note="routers and experts are left as they are" if size.sparse else "",
    )


def _lora(q: Question, own: OwnEstimate | None, why_not: str) -> Method:
    adapters = trained_adapters(q.adapters, q.size)
    trained = int(adapters.value or 0)
    frozen_bytes = RULE_BYTES[q.rate.precision][0]
    states = frozen_bytes * q.size.params + 16 * trained
    flops = (
        LORA_FLOPS_PER_PARAM_TOKEN * q.size.params_flops + FLOPS_PER_PARAM_TOKEN * trained
    ) * q.finetune_tokens
    work = None if own is None else min(own.work_bytes.values())
    devices = None if work is None else _devices_that_hold(states, work, q.rate.usable_memory_bytes)
    memory = Figure(
        name="memory_bytes",
        formula=f"{frozen_bytes} B x {short(q.size.params)} frozen + 16 B x {short(trained)} trained + work",
        value=states if work is None else states + work,
        unit="B",
        note=why_not and f"without work: {why_not}"
        if work is None
        else f"work {format_bytes(work)} (full recompute)",
    )
    return _method(
        "lora",
        f"LoRA, rank {q.adapters.rank}, {q.adapters.modules}",
        adapters,
        memory,
        _devices_figure(devices, why_not, "power of two; states / n + work within 85 % of usable memory"),
        (q.finetune_tokens, q.finetune_note),
        (flops, "(4 N + 6 adapters) x tokens: no gradients of frozen weights"),
        q,
        Figure(
            name="cost_model_days",
            formula="not modelled",
            value=None,
            unit="days",
            note="the cost model knows full training only",
        ),
        ""
        if work is None
        else _verdict(states / (q.devices or devices or 1) + work, q.rate.usable_memory_bytes),
    )


def _verdict(need_bytes: float, usable_bytes: float) -> str:
    """SAFE with the margin free, RISKY without it, else NO."""
    if need_bytes * (1 + MEMORY_MARGIN) <= usable_bytes:
        return "SAFE"
    return "RISKY" if need_bytes <= usable_bytes else "NO"


def _devices_that_hold(states: float, work: float, usable: float) -> int | None:
    """The least power of two whose devices hold a share of the states and one sequence's work each."""
    room = usable / (1 + MEMORY_MARGIN) - work
    if room <= 0:
        return None
    count = 1
    while states / count > room:
        count *= 2
    return count


def _devices_figure(devices: int | None, why_not: str, formula: str) -> Figure:
    note = "" if devices is not None else why_not or "one sequence's activations alone do not fit"
    return Figure(name="devices_min", formula=formula, value=devices, unit="devices", note=note)


def _full(
    name: str, title: str, tokens: int, tokens_note: str, q: Question, own: OwnEstimate | None, why_not: str
) -> Method:
    each = 16
    states = each * q.size.params
    work = None if own is None else own.work_bytes[own.recompute]
    memory = Figure(
        name="memory_bytes",
        formula=f"{each} B x {short(q.size.params)} + work",
        value=states if work is None else states + work,
        unit="B",
        note=why_not and f"without work: {why_not}" if own is None or work is None
        else f"work {format_bytes(work)} a device (recompute {own.recompute})",
    )  # fmt: skip
    least = own.devices if own is not None and q.devices is None else None
    return _method(
        name,
        title,
        Figure(name="trained_params", formula="N", value=q.size.params, unit="params"),
        memory,
        _devices_figure(
            least, why_not or "--devices was given", "cost model: least power of two that is SAFE"
        ),
        (tokens, tokens_note),
        (FLOPS_PER_PARAM_TOKEN * q.size.params_flops * tokens, "6 N x tokens"),
        q,
        _own_days(tokens, q, own, why_not),
        "" if own is None else own.verdict,
    )


def _own_days(tokens: int, q: Question, own: OwnEstimate | None, why_not: str) -> Figure:
    known = own is not None and q.rate.peak_flops is not None
    days = tokens / own.tokens_per_s / DAY_S if own is not None and known else None
    return Figure(
        name="cost_model_days",
        formula="tokens / (cost model's tokens/s) / 86400"
        + (f" on {own.devices} devices" if own is not None else ""),
        value=days,
        unit="days",
        note="" if known else why_not or q.rate.unknown_peak,
    )


def _method(
    name: str,
    title: str,
    trained: Figure,
    memory: Figure,
    devices_min: Figure,
    tokens: tuple[int, str],
    flops: tuple[float, str],
    q: Question,
    own_days: Figure,
    verdict: str,
) -> Method:
    """A method that trains: its time at the assumed utilisation, and its dollars."""
    least = devices_min.value
    used = q.devices or (None if least is None else int(least))
    rate, price = q.rate, q.rate.price
    device_s = None if rate.flops_per_s is None else flops[0] / rate.flops_per_s
    usd = None if device_s is None or price is None else device_s / 3600 * price.usd_per_device_hour
    return Method(
        name=name,
        title=title,
        trained_params=trained,
        memory_bytes=memory,
        devices_min=devices_min,
        devices_used=used,
        verdict=verdict if used is not None else "",
        tokens=Figure(name="tokens", formula=tokens[1], value=tokens[0], unit="tokens"),
        flops=Figure(name="flops", formula=flops[1], value=flops[0], unit="FLOPs"),
        seconds=Figure(
            name="seconds",
            formula=f"FLOPs / (devices x peak x MFU {rate.mfu:.1%}), {used or 1} devices",
            value=None if device_s is None else device_s / (used or 1),
            unit="s",
            note="" if device_s is not None else rate.unknown_peak,
        ),
        usd=Figure(
            name="usd",
            formula="device-hours x price"
            + (f" of {short(price.usd_per_device_hour)} USD" if price is not None else ""),
            value=usd,
            unit="USD",
            note="" if usd is not None else ("no price is known" if price is None else rate.unknown_peak),
        ),
        cost_model_days=own_days,
    )
