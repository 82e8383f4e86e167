"""The report's words: headline, tiles, the plan in sentences, the certificate, and what they rest on."""

from __future__ import annotations

import platform
from collections import Counter
from importlib import metadata

from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_count, format_seconds, format_usd
from planner.hardware.cluster import ClusterSpec
from planner.report.run_record import RunRecord
from planner.strategy.estimate import Verdict
from planner.strategy.plan import PLAN_SCHEMA, Certificate, Plan, usd_per_hour
from planner.strategy.strategy import Degrees, Schedule, Zero

GOOD_ERROR = 0.10
FAIR_ERROR = 0.25
"""Up to these a prediction counts as good, or as fair, in the page's colours. Nothing is decided by them."""


@frozen
class Tile:
    """A headline figure: predicted, and measured with its error where it was measured."""

    title: str
    value: str
    detail: str = ""
    measured: str = ""
    error: str = ""
    tone: str = ""


@frozen
class Table:
    """A table of texts. Columns from the first to before the second of `numbers` stand to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, int] = (1, 99)
    strong_rows: tuple[int, ...] = ()


@frozen
class Fact:
    """A name and its value."""

    name: str
    value: str


VERDICT_WORDS = {
    Verdict.SAFE: "fits in memory, with the error band to spare",
    Verdict.RISKY: "may not fit: the limit lies inside the error band",
    Verdict.NO: "does not fit in memory",
}
ZERO_WORDS = {
    Zero.NONE: "Every data-parallel rank keeps all weights, gradients and optimizer state of its stage",
    Zero.OPTIMIZER: "Data-parallel ranks share out the optimizer state (ZeRO 1)",
    Zero.GRADIENTS: "Data-parallel ranks share out optimizer state and gradients (ZeRO 2)",
    Zero.PARAMETERS: "Data-parallel ranks share out optimizer state, gradients and weights (ZeRO 3)",
}
SCHEDULE_WORDS = {
    Schedule.GPIPE: "GPipe: all forwards, then all backwards",
    Schedule.ONE_F_ONE_B: "1F1B: one forward, one backward in turn",
    Schedule.INTERLEAVED: "interleaved 1F1B: several stages on each rank",
    Schedule.ZB_H1: "ZB-H1: 1F1B with weight gradients later, in the bubble",
    Schedule.ZBV: "ZB-V: zero bubble, two stages on each rank as a V",
    Schedule.DUALPIPEV: "DualPipeV: forward and backward of two stages in one slot, as a V",
}
STATUS_WORDS = {
    "optimal": "Proven: no plan of the searched space is predicted to be faster.",
    "gap": "The search ended before the proof did; a better plan may exist within the gap.",
    "heuristic": "Found by a heuristic; nothing is proven beyond the bound.",
    "infeasible": "No plan of the searched space satisfies the rules and limits.",
}


def percent(share: float, digits: int = 1) -> str:
    """`3.2 %`."""
    return f"{100 * share:.{digits}f} %"


def signed_percent(share: float) -> str:
    """`+3.2 %` or `-3.2 %`."""
    return f"{100 * share:+.1f} %"


def tone_of(error: float) -> str:
    """`good`, `fair` or `bad`, by the size of a relative error."""
    if abs(error) <= GOOD_ERROR:
        return "good"
    return "fair" if abs(error) <= FAIR_ERROR else "bad"


def describe_error(predicted: float, measured: float | None) -> tuple[str, str]:
    """How far the prediction was off, in words, and its tone."""
    if not measured:
        return "", ""
    error = predicted / measured - 1
    if abs(error) < 0.0005:
        return "predicted exactly", "good"
    return f"predicted {percent(abs(error))} too {'high' if error > 0 else 'low'}", tone_of(error)


def headline(plan: Plan, run: RunRecord | None) -> str:
    """The answer in one sentence or two."""
    estimate = plan.estimate
    low_s, high_s = estimate.step_time_interval_s
    text = (
        f"{format_count(plan.model.params_total)} parameters on {plan.strategy.degrees.world} "
        f"{'device' if plan.strategy.degrees.world == 1 else 'devices'}: a step should take "
        f"{format_seconds(estimate.step_time_s)} ({format_seconds(low_s)} to {format_seconds(high_s)}), "
        f"and the plan {VERDICT_WORDS[estimate.verdict]}."
    )
    measured_s = run.step_time_s if run else None
    if measured_s is None:
        return text
    words, _ = describe_error(estimate.step_time_s, measured_s)
    inside = "inside" if low_s <= measured_s <= high_s else "outside"
    return f"{text} Measured: {format_seconds(measured_s)}, {inside} that interval; {words}."


def headline_tiles(plan: Plan, run: RunRecord | None) -> tuple[Tile, ...]:
    """The figures that everybody asks for first."""
    run = run or RunRecord()
    tiles = [_step_tile(plan, run), _memory_tile(plan, run), _rate_tile(plan, run), _mfu_tile(plan, run)]
    tiles += _budget_tiles(plan)
    if run.steps_done and usd_per_hour(plan) is not None:
        tiles.append(_spent_tile(plan, run))
    return tuple(tiles)


def _step_tile(plan: Plan, run: RunRecord) -> Tile:
    low_s, high_s = plan.estimate.step_time_interval_s
    error, tone = describe_error(plan.estimate.step_time_s, run.step_time_s)
    return Tile(
        title="Step time",
        value=format_seconds(plan.estimate.step_time_s),
        detail=f"interval {format_seconds(low_s)} to {format_seconds(high_s)}",
        measured=format_seconds(run.step_time_s) if run.step_time_s else "",
        error=error,
        tone=tone,
    )


def _memory_tile(plan: Plan, run: RunRecord) -> Tile:
    peak, limit = plan.estimate.peak_memory_bytes, plan.estimate.memory_limit_bytes
    error, tone = describe_error(peak, run.peak_memory_bytes)
    return Tile(
        title="Peak memory",
        value=format_bytes(peak),
        detail=f"{percent(peak / limit, 0)} of {format_bytes(limit)}" if limit else "",
        measured=format_bytes(run.peak_memory_bytes) if run.peak_memory_bytes else "",
        error=error,
        tone=tone,
    )


def _rate_tile(plan: Plan, run: RunRecord) -> Tile:
    error, tone = describe_error(plan.estimate.tokens_per_s, run.tokens_per_s)
    return Tile(
        title="Throughput",
        value=f"{format_count(plan.estimate.tokens_per_s)} tok/s",
        detail=f"{plan.workload.tokens_per_step:,} tokens a step",
        measured=f"{format_count(run.tokens_per_s)} tok/s" if run.tokens_per_s else "",
        error=error,
        tone=tone,
    )


def _mfu_tile(plan: Plan, run: RunRecord) -> Tile:
    mfu = plan.estimate.mfu
    if mfu is None:
        return Tile(title="MFU", value="unknown", detail="the device's peak FLOP/s is not known")
    error, tone = describe_error(mfu, run.mfu)
    return Tile(
        title="MFU",
        value=percent(mfu),
        detail="model FLOPs over the peak of all devices",
        measured=percent(run.mfu) if run.mfu else "",
        error=error,
        tone=tone,
    )


def _budget_tiles(plan: Plan) -> list[Tile]:
    """Days and dollars of the whole run, with what is lost between steps where the plan counts that."""
    job, tokens = plan.estimate.job, plan.workload.tokens
    days, usd = (plan.estimate.days, plan.estimate.cost_usd) if job is None else (job.days, job.cost_usd)
    if days is None:
        return []
    detail = f"for {format_count(tokens)} tokens" if tokens else ""
    detail += f" at a goodput of {percent(job.goodput)}" if job is not None else ""
    cost = "at the listed price" if usd is not None else f"{plan.cluster.name} has no price"
    return [
        Tile(title="Whole run", value=format_seconds(days * 86_400), detail=detail),
        Tile(title="Cost", value=format_usd(usd), detail=cost),
    ]


def _spent_tile(plan: Plan, run: RunRecord) -> Tile:
    """Dollars predicted for the steps that were done, beside those spent."""
    predicted, spent = run.predicted_cost_usd(plan), run.cost_usd
    error, tone = describe_error(predicted, spent) if predicted is not None else ("", "")
    return Tile(
        title=f"Cost of {run.steps_done:,} steps",
        value=format_usd(predicted),
        detail="predicted",
        measured=format_usd(spent),
        error=error,
        tone=tone,
    )


def plan_sentences(plan: Plan) -> tuple[str, ...]:
    """What the strategy does, for a reader who does not know its symbols."""
    degrees = plan.strategy.degrees
    sentences = [f"{_product(degrees)}."]
    steps = f"A step of {plan.workload.batch} sequences of {plan.workload.seq} tokens runs as "
    each = f" on each of {degrees.dp} data-parallel replicas" if degrees.dp > 1 else ""
    count = degrees.num_micro_batches
    batches = f"{count} micro-batch{'es' if count > 1 else ''} of {degrees.micro_batch}"
    order = f", in the order of {SCHEDULE_WORDS[degrees.schedule]}" if degrees.pp > 1 else ""
    sentences.append(f"{steps}{batches}{each}{order}.")
    if degrees.dp > 1:
        sentences.append(ZERO_WORDS[degrees.zero] + ".")
    recomputing = sum(stage.layers - stage.recompute.none for stage in plan.strategy.stages)
    if recomputing:
        sentences.append(f"{recomputing} of {plan.model.layers} layers recompute in the backward pass.")
    for what, counts in (
        ("optimizer state", [stage.offload.optimizer for stage in plan.strategy.stages]),
        ("activations", [stage.offload.activations for stage in plan.strategy.stages]),
    ):
        if sum(counts):
            sentences.append(f"{sum(counts)} of {plan.model.layers} layers have their {what} in host memory.")
    return tuple(sentences)


def _product(degrees: Degrees) -> str:
    parts = []
    if degrees.pp > 1:
        chunks = f" of {degrees.chunks} stages each" if degrees.chunks > 1 else ""
        parts.append(f"{degrees.pp} pipeline ranks{chunks}")
    if degrees.dp > 1:
        parts.append(f"{degrees.dp}-way data parallelism")
    if degrees.cp > 1:
        parts.append(f"{degrees.cp}-way context parallelism")
    if degrees.tp > 1:
        sequence = " with sequence parallelism" if degrees.sequence_parallel else ""
        parts.append(f"{degrees.tp}-way tensor parallelism{sequence}")
    ranks = f"{degrees.world} rank{'s' if degrees.world > 1 else ''}"
    return f"{ranks}: {' x '.join(parts)}" if parts else f"{ranks}, nothing is split"


def certificate_sentences(certificate: Certificate) -> tuple[str, ...]:
    """The solver's certificate in words."""
    c = certificate
    checked = "agrees with" if c.verified else "was not checked against"
    return (
        STATUS_WORDS.get(c.status, f"Status: {c.status}."),
        f"The plan's predicted step is {format_seconds(c.objective_s)}; no plan of the searched space can be "
        f"below {format_seconds(c.lower_bound_s)}, so at most {percent(c.gap, 2)} could be gained.",
        f"{c.shapes:,} global shapes were considered: {c.pruned:,} were ruled out by rules or bounds, and "
        f"{c.milps:,} stage problems were solved exactly, in {format_seconds(c.wall_s)}.",
        f"The solver's answer {checked} an evaluation that shares no code with it.",
    )


def _links_text(cluster: ClusterSpec) -> str:
    """The cluster's links, and those of groups that have their own."""
    text = f"{cluster.intra.name} within a node, {cluster.inter.name} between nodes"
    for group in cluster.groups:
        if group.intra or group.inter:
            intra, inter = (group.intra or cluster.intra).name, (group.inter or cluster.inter).name
            text += f"; {intra} within a node and {inter} between nodes of {group.device.name}"
    return text


def model_facts(plan: Plan) -> tuple[Fact, ...]:
    """The inputs of the plan in short."""
    model, work = plan.model, plan.workload
    counts: Counter[str] = Counter()
    for group in plan.cluster.groups:
        counts[group.device.title] += group.devices
    devices = " and ".join(f"{count} x {title}" for title, count in counts.items())
    facts = (
        ("Model", f"{model.name} ({model.model_type})"),
        ("Parameters", f"{model.params_total:,}"),
        ("Layers", f"{model.layers} x {model.hidden} wide, vocabulary {model.vocab:,}"),
        ("Batch", f"{work.batch} sequences of {work.seq} tokens"),
        ("Numbers", f"{work.precision}, {work.optimizer}, {work.method}"),
        ("Tokens", f"{work.tokens:,}" if work.tokens else "open-ended"),
        ("Cluster", f"{plan.cluster.name}: {devices}"),
        ("Links", _links_text(plan.cluster)),
    )
    return tuple(Fact(name=name, value=value) for name, value in facts)


def run_facts(run: RunRecord) -> tuple[Fact, ...]:
    """How the run went."""
    facts = []
    if run.steps:
        facts.append(Fact(name="Steps", value=f"{len(run.steps)}, of which {len(run.timed_steps)} timed"))
        losses = [step.loss for step in run.steps if step.loss is not None]
        if losses:
            facts.append(Fact(name="Loss", value=f"{losses[0]:.4g} → {losses[-1]:.4g}"))
    summary = run.summary
    if summary is not None:
        known = {
            "Status": summary.status,
            "Spread of step times": percent(summary.measured_step_time_spread)
            if summary.measured_step_time_spread is not None
            else None,
            "Goodput": percent(summary.goodput) if summary.goodput is not None else None,
        }
        facts += [Fact(name=name, value=value) for name, value in known.items() if value is not None]
    if run.steps_done:
        facts.append(Fact(name="Cost so far", value=format_usd(run.cost_usd)))
    if run.expected_cost_usd is not None:
        facts.append(Fact(name="Cost expected in all", value=format_usd(run.expected_cost_usd)))
    return tuple(facts)


def run_warnings(run: RunRecord | None) -> tuple[str, ...]:
    """What a reader must know before believing the measured figures."""
    if run is None:
        return ()
    warnings = list(run.notes)
    if run.summary is not None:
        warnings += [f"What ran differs from the plan: {each}" for each in run.summary.executed_differences]
    lost = [step.step for step in run.steps if step.loss is None]
    if lost:
        warnings.append(
            f"The loss was not a finite number in {len(lost)} of {len(run.steps)} steps, "
            f"first in step {lost[0]}."
        )
    return tuple(warnings)


def version_facts(run: RunRecord | None) -> tuple[Fact, ...]:
    """The versions that made the page, and those that the run recorded."""
    try:
        own = metadata.version("shardwise")
    except metadata.PackageNotFoundError:
        own = "not installed as a package"
    facts = [
        Fact(name="shardwise", value=own),
        Fact(name="Python", value=platform.python_version()),
        Fact(name="plan.json schema", value=str(PLAN_SCHEMA)),
    ]
    if run is not None and run.summary is not None:
        versions = run.summary.versions or {}
        facts += [Fact(name=f"{name} (run)", value=version) for name, version in sorted(versions.items())]
    return tuple(facts)
