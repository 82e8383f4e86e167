"""Ways to a model that does a task: prompting, LoRA, full fine-tuning, pretraining; what each one costs."""

from __future__ import annotations

import math

from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S, format_bytes
from planner.model.lora import adapted_weights, adapter_params
from planner.model.workload import Adapters
from planner.sizing.principles.napkin import RULE_BYTES, Figure, Question, short
from planner.sizing.principles.napkin_estimate import OwnEstimate
from planner.sizing.principles.napkin_size import Size
from planner.sizing.principles.scaling import FLOPS_PER_PARAM_TOKEN

LORA_FLOPS_PER_PARAM_TOKEN = 4
"""Forward 2 and backward 2 for each frozen parameter and token: gradients of activations pass through frozen
weights, gradients of those weights are not computed (LoRA, arXiv 2106.09685, trains only the adapters)."""

MEMORY_MARGIN = 0.15
"""Share of memory left free where devices are counted: the error band of the datasheet memory model."""


@frozen
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
