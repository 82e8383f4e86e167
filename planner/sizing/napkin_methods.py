"""The cost model's own answer beside the napkin: the least devices that hold the training, and their speed.

Only sharded data parallelism and tensor parallelism inside a node are tried, with every recompute option:
what a first run uses. `plan solve` searches the whole space.

Ways to a model that does a task: prompting, LoRA, full fine-tuning, pretraining; what each one costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from planner.cost.evaluate import CostModel, Evaluation
from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S, format_bytes
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_text import join, shaped_part
from planner.hardware.prices import Market
from planner.job.engine_settings import native_settings
from planner.job.problem import PlanningProblem
from planner.model.lora import adapted_weights, adapter_params
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Adapters, Precision, Workload
from planner.sizing.napkin import RULE_BYTES, Figure, Question, Size, short
from planner.sizing.scaling import FLOPS_PER_PARAM_TOKEN
from planner.strategy.estimate import MemoryBreakdown, Verdict
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages

STEP_TOKENS = 2**22
"""Tokens of a global step: 4 Mi, as GPT-3 (3.2M) and Llama 2 (4M) took. It sets how often weights are
gathered and gradients reduced, and does not change memory."""

MOST_MICRO_BATCHES = 256
"""Micro-batches of a step at most: more change no memory and hardly the speed, and take long to replay."""

DEVICES_PER_NODE = 8
MOST_DEVICES = 2**17
TP_DEGREES = (1, 2, 4, 8)
RANK = {Verdict.SAFE: 0, Verdict.RISKY: 1, Verdict.NO: 2}


@frozen
class OwnEstimate:
    """The fastest safe strategy on `devices`, or the best of what does not fit, with its verdict.

    `work_bytes` is what a device holds beside weights, gradients and optimizer state (activations of one
    sequence, logits, buffers), by recompute option, under the same degrees.
    """

    devices: int
    cluster: str
    label: str
    recompute: str
    precision: str
    seq: int
    batch: int
    verdict: str
    peak_memory_bytes: int
    memory_limit_bytes: int
    memory: MemoryBreakdown
    work_bytes: dict[str, int]
    step_time_s: float
    step_time_interval_s: tuple[float, float]
    tokens_per_s: float
    mfu: float | None


def node_shape(devices: int) -> tuple[int, int]:
    """Nodes and devices a node: the largest node of at most 8 that divides the count."""
    per_node = max(size for size in range(1, DEVICES_PER_NODE + 1) if devices % size == 0)
    return devices // per_node, per_node


def own_estimate(
    model: ModelSpec, device: str, precision: Precision, seq: int, devices: int | None
) -> OwnEstimate | None:
    """The estimate on `devices`, or on the least power of two that is safe; None where none up to 2^17 is.

    Raises InputError where the cost model cannot cost the model or the device's peak is unknown.
    """
    if devices is not None:
        found = _best(model, cluster_of(devices, device), precision, seq)
        return None if found is None else found[1]
    usable = cluster_of(1, device).groups[0].device.usable_memory_bytes
    count = 1
    while count * usable < 16 * model.params_total:  # weights, gradients and state alone, at 16 bytes
        count *= 2
    while count <= MOST_DEVICES:
        found = _best(model, cluster_of(count, device), precision, seq)
        if found is not None and found[1].verdict == Verdict.SAFE:
            return found[1]
        count *= 2
    return None


def activations_bytes(model: ModelSpec, device: str, precision: Precision, seq: int) -> dict[str, int]:
    """Activations of one sequence on one device that are kept for the backward pass, by recompute option."""
    options = evaluated(model, cluster_of(1, device), precision, seq, tp=1)
    return {str(each.recompute): each.evaluation.stages[0].memory.activations_bytes for each in options}


def cluster_of(devices: int, device: str) -> ClusterSpec:
    nodes, per_node = node_shape(devices)
    part = shaped_part(nodes, per_node, device, None, "--device", Market(instances=()))
    return join(part.name, [part], "--device")


def _best(
    model: ModelSpec, cluster: ClusterSpec, precision: Precision, seq: int
) -> tuple[tuple[float, float], OwnEstimate] | None:
    """The best strategy on a cluster: by verdict, then by time (memory where nothing fits)."""
    found = []
    for tp in TP_DEGREES:
        if cluster.devices_per_node % tp == 0:
            options = list(evaluated(model, cluster, precision, seq, tp))
            found += [(_order(each), _answer(each, options)) for each in options]
    return min(found, key=lambda item: item[0], default=None)


class Option(NamedTuple):
    """One evaluated strategy of a problem."""

    problem: PlanningProblem
    recompute: Recompute
    evaluation: Evaluation


def evaluated(
    model: ModelSpec, cluster: ClusterSpec, precision: Precision, seq: int, tp: int
) -> Iterator[Option]:
    dp = cluster.devices // tp
    accumulated = min(max(1, STEP_TOKENS // (seq * dp)), MOST_MICRO_BATCHES)
    problem = PlanningProblem(
        model=model,
        workload=Workload(seq=seq, batch=dp * accumulated, precision=precision),
        cluster=cluster,
        profile=None,
        memory_limit_bytes=cluster.groups[0].device.usable_memory_bytes,
        engine_settings=native_settings(cluster),
    )
    costs = CostModel(problem)
    degrees = Degrees(
        tp=tp,
        dp_shard=dp,
        zero=Zero.PARAMETERS if dp > 1 else Zero.NONE,
        num_micro_batches=accumulated,
        sequence_parallel=tp > 1,
    )
    for recompute in Recompute:
        strategy = Strategy(degrees=degrees, stages=even_stages(model.layers, 1, recompute))
        if not broken_rules(problem, strategy):
            yield Option(problem, recompute, costs.evaluate(strategy))


def _order(option: Option) -> tuple[float, float]:
    """By verdict, then the fastest: by tokens, since steps of different splits differ in size."""
    estimate = option.evaluation.estimate
    rank = RANK[estimate.verdict]
    return rank, estimate.peak_memory_bytes if rank == 2 else 1 / estimate.tokens_per_s


def _answer(option: Option, options: list[Option]) -> OwnEstimate:
    estimate, workload = option.evaluation.estimate, option.problem.workload
    memories = {str(each.recompute): each.evaluation.stages[0].memory for each in options}
    return OwnEstimate(
        devices=option.problem.cluster.devices,
        cluster=option.problem.cluster.name,
        label=option.evaluation.strategy.degrees.label(),
        recompute=str(option.recompute),
        precision=str(workload.precision),
        seq=workload.seq,
        batch=workload.batch,
        verdict=str(estimate.verdict),
        peak_memory_bytes=estimate.peak_memory_bytes,
        memory_limit_bytes=estimate.memory_limit_bytes,
        memory=option.evaluation.stages[0].memory,
        work_bytes={
            name: memory.activations_bytes + memory.transient_bytes + memory.runtime_bytes
            for name, memory in memories.items()
        },
        step_time_s=estimate.step_time_s,
        step_time_interval_s=estimate.step_time_interval_s,
        tokens_per_s=estimate.tokens_per_s,
        mfu=estimate.mfu,
    )


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
