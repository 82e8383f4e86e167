"""From a run to what the cost model takes: a planning problem and a strategy, or why there is none.

Rows of tables are partial, and some cannot be predicted. That is data, never an exception: every row gives
a RunSetup or a Rejected. What a row leaves open and has a usual value is filled in and listed in `assumed`.

The micro-batch of a run that states none: whoever reports a run has tried some and kept the fastest.

Tables leave it out more often than any other degree (arXiv 2104.04473, table 1: tuned for each row).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from math import prod

from planner.calibration.run_model import NamedModels, run_model
from planner.calibration.runs import Run, RunRecompute, Status
from planner.calibration.software import (
    run_cp_exchange,
    run_etp,
    run_method,
    run_offload,
    run_precision,
    run_schedule,
    run_sequence_parallel,
    run_zero,
    settings_of_run,
    unmodelled,
    usual_chunks,
    usual_micro_batch,
)
from planner.cost.evaluate import CostModel
from planner.foundation.errors import InputError
from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_text import parse_cluster
from planner.job.engine_settings import SCALING
from planner.job.problem import PlanningProblem
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.profile.profile import Profile
from planner.strategy.estimate import Rejected, Verdict
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Schedule, Strategy, Zero, even_stages, offloaded, sized_stages

MOST = 16
"""Sequences of the largest micro-batch that is tried."""


def tried_micro_batches(share: int) -> tuple[int, ...]:
    """What one would try for a data rank's share of the batch: powers of 2 that divide it."""
    powers = (1 << power for power in range(MOST.bit_length()))
    return tuple(size for size in powers if share % size == 0)


def fastest_that_fits(problem: PlanningProblem, strategies: Iterable[Strategy]) -> tuple[Strategy, bool]:
    """The strategy of the least predicted step time, SAFE before RISKY before NO, and whether it fits."""
    model, order = CostModel(problem), list(Verdict)
    estimates = [(strategy, model.evaluate(strategy).estimate) for strategy in strategies]
    best, estimate = min(estimates, key=lambda each: (order.index(each[1].verdict), each[1].step_time_s))
    return best, estimate.verdict is not Verdict.NO


MAX_ACTIONS = 2_000_000
"""Passes of a step that are replayed at most; tables of real runs stay under a tenth of it."""

REMATERIALISES = r"\bjax\b|maxtext|paxml"
"""Frameworks that recompute a whole block unless told otherwise: MaxText's remat_policy is full."""

WAIVED = ("tp_within_node", "tp_divides_heads", "positions_cover_sequence", "zero_matches_shards")
"""Rules of good plans that a run which really ran may have broken: its cost is still defined."""

ProfileOf = Callable[[str], Profile | None]
"""The profile that counts for a device of a name."""


@frozen
class RunSetup:
    """What the cost model takes to predict a run, and what was taken for granted."""

    problem: PlanningProblem
    strategy: Strategy
    assumed: tuple[str, ...] = ()


@frozen
class _Shape:
    """The degrees of a row whose product is its number of devices."""

    tp: int
    pp: int
    cp: int
    dp: int


def run_problem(run: Run, profile: Profile | None) -> RunSetup | Rejected:
    """The problem and strategy of one run, or the reason why it cannot be predicted."""
    return Setups(lambda device: profile).setup(run)


class Setups:
    """Setups of many runs: clusters are read once, and a profile is chosen by device."""

    def __init__(self, profile_of: ProfileOf) -> None:
        self.profile_of = profile_of
        self._clusters: dict[str, ClusterSpec | Rejected] = {}
        self._profiles: dict[str, Profile | None] = {}
        self._models = NamedModels()

    def setup(self, run: Run) -> RunSetup | Rejected:
        """The problem and strategy of one run, or the reason why it cannot be predicted."""
        refused = _unpredictable(run) or unmodelled(run)
        if refused is not None:
            return refused
        if run.micro_batch is None and run.global_batch is not None:
            return self._tuned(run, run.global_batch)
        return self._stated(run)

    def _tuned(self, run: Run, batch: int) -> RunSetup | Rejected:
        """The setup of a run whose micro-batch is not stated: its framework's usual one, or the fastest
        that fits."""
        shape = _shape(run, [])
        if isinstance(shape, Rejected):
            return shape
        share = max(1, batch // shape.dp)
        usual = usual_micro_batch(run, share)
        sizes = (usual,) if usual else tried_micro_batches(share)
        if run.status is Status.OOM and len(sizes) > 1:
            return Rejected(rule="row_complete", detail="micro_batch unknown, and the run did not fit.")
        tried = [self._stated(dataclasses.replace(run, micro_batch=size)) for size in sizes]
        setups = {each.strategy: each for each in tried if isinstance(each, RunSetup)}
        if not setups:
            return tried[0]
        best, why = next(iter(setups)), ""
        if len(setups) > 1:
            try:
                best, fits = fastest_that_fits(setups[best].problem, setups)
            except InputError:  # whoever evaluates it meets it again, and says so
                return setups[best]
            why = ", the fastest that fits" if fits else ", the fastest; none fits"
        told = f"micro_batch {best.degrees.micro_batch}{why}"
        return dataclasses.replace(setups[best], assumed=(told, *setups[best].assumed))

    def _stated(self, run: Run) -> RunSetup | Rejected:
        """The setup of a run whose micro-batch is known, or which has no batch."""
        assumed: list[str] = []
        cluster = self._cluster(run)
        if isinstance(cluster, Rejected):
            return cluster
        shape = _shape(run, assumed)
        if isinstance(shape, Rejected):
            return shape
        model = run_model(run, self._models, assumed)
        if isinstance(model, Rejected):
            return model
        precision = run_precision(run, cluster.groups[0].device, assumed)
        if isinstance(precision, Rejected):
            return precision
        degrees = _degrees(run, shape, model.layers, assumed)
        if isinstance(degrees, Rejected):
            return degrees
        model = _padded(model, degrees, assumed)
        problem = self._problem(run, model, precision, cluster, degrees, assumed)
        offload = run_offload(run)
        if isinstance(offload, Rejected):
            return offload
        strategy = _strategy(run, model, degrees, assumed)
        strategy = dataclasses.replace(strategy, stages=offloaded(strategy.stages, offload))
        broken = [rule for rule in broken_rules(problem, strategy) if rule.rule not in WAIVED]
        if broken:
            return broken[0]
        return RunSetup(problem=problem, strategy=strategy, assumed=tuple(assumed))

    def _cluster(self, run: Run) -> ClusterSpec | Rejected:
        text = f"{run.nodes}x{run.gpus_per_node}:{run.device}" + (f"@{run.network}" if run.network else "")
        if text not in self._clusters:
            try:
                self._clusters[text] = parse_cluster(text, "cluster")
            except InputError as error:
                self._clusters[text] = Rejected(rule="cluster_known", detail=str(error.problems[0]))
        return self._clusters[text]

    def _problem(
        self,
        run: Run,
        model: ModelSpec,
        precision: Precision,
        cluster: ClusterSpec,
        degrees: Degrees,
        assumed: list[str],
    ) -> PlanningProblem:
        assert run.seq_len is not None, "checked before"
        device = cluster.groups[0].device
        if device.name not in self._profiles:
            self._profiles[device.name] = self.profile_of(device.name)
        method, adapters = run_method(run, assumed)
        return PlanningProblem(
            model=model,
            workload=Workload(
                seq=run.seq_len,
                batch=degrees.batch,
                precision=precision,
                method=method,
                adapters=adapters,
            ),
            cluster=cluster,
            profile=self._profiles[device.name],
            memory_limit_bytes=min(group.device.usable_memory_bytes for group in cluster.groups),
            engine_settings=settings_of_run(run, assumed),
        )


def _unpredictable(run: Run) -> Rejected | None:
    """Why a row cannot be predicted whatever the model, or None."""
    if run.status is Status.ERROR:
        return Rejected(rule="status", detail="the run ended in an error, which says nothing of its plan.")
    unknown = [name for name in ("device", "nodes", "gpus_per_node", "seq_len") if not getattr(run, name)]
    if unknown:
        return Rejected(rule="row_complete", detail=f"{', '.join(unknown)} unknown.")
    return None


def _shape(run: Run, assumed: list[str]) -> _Shape | Rejected:
    """The degrees of a row. Where dp is not stated it fills the devices, else one other may; cp is 1."""
    devices = run.devices
    assert devices is not None, "checked before"
    stated = {"tp": run.tp, "pp": run.pp, "cp": run.cp or 1, "dp": run.dp}
    known = prod(value for value in stated.values() if value is not None)
    absent = [name for name, value in stated.items() if value is None]
    left, rest = divmod(devices, known)
    filling = "dp" if "dp" in absent else absent[0] if len(absent) == 1 else None
    if rest or (left > 1 and filling is None):
        unknown = f", {' and '.join(absent)} unknown" if absent else ""
        return Rejected(rule="world_size", detail=f"its degrees make {known} devices of {devices}{unknown}.")
    for name in absent:
        stated[name] = left if name == filling else 1
        assumed.append(f"{name} {stated[name]}")
    return _Shape(**{name: value or 1 for name, value in stated.items()})


def _degrees(run: Run, shape: _Shape, layers: int, assumed: list[str]) -> Degrees | Rejected:
    batches = _micro_batches(run, shape.dp, assumed)
    if isinstance(batches, Rejected):
        return batches
    micro_batch, count = batches
    split = layers + sum(ends_dealt(layers, shape.pp * (run.chunks or 1), run.framework))
    chunks = run.chunks or usual_chunks(run, split, shape.pp, count, assumed)
    schedule = run_schedule(run, shape.pp, chunks)
    if isinstance(schedule, Rejected):
        return schedule
    if schedule is Schedule.INTERLEAVED and run.chunks is None and chunks == 1:
        return Rejected(rule="row_complete", detail="interleaved, and chunks unknown.")
    zero = run_zero(run, shape.dp * shape.cp, assumed)
    replicate = shape.dp if zero is Zero.NONE else run.dp_replicate or 1
    if shape.dp % replicate:
        return Rejected(rule="row_complete", detail=f"dp {shape.dp} is not whole shards x {replicate}.")
    chunks = chunks if shape.pp > 1 else 1
    if count * shape.pp * chunks > MAX_ACTIONS:
        return Rejected(rule="row_complete", detail=f"{count} micro-batches are too many to replay.")
    exchange = run_cp_exchange(run, shape.cp, assumed)
    if isinstance(exchange, Rejected):
        return exchange
    return Degrees(
        tp=shape.tp,
        pp=shape.pp,
        chunks=chunks,
        schedule=schedule,
        dp_replicate=replicate,
        dp_shard=shape.dp // replicate,
        cp=shape.cp,
        ep=run.ep or 1,
        zero=zero,
        micro_batch=micro_batch,
        num_micro_batches=count,
        sequence_parallel=run_sequence_parallel(run, shape.tp, assumed),
        cp_exchange=exchange,
        etp=run_etp(run, shape.tp, shape.dp * shape.cp * shape.tp, assumed),
    )


def _micro_batches(run: Run, dp: int, assumed: list[str]) -> tuple[int, int] | Rejected:
    """Sequences of a micro-batch, and how many of them a data rank runs in a step.

    A rank's share that does not divide (some frameworks run a smaller last one) is spread evenly over as
    many micro-batches. Memory alone needs no global batch.
    """
    micro, batch = run.micro_batch, run.global_batch
    if batch is None and micro is not None and run.step_time_s is None:
        assumed.append(f"global_batch {micro * dp}")
        return micro, 1
    if batch is None:
        return Rejected(rule="row_complete", detail="global_batch unknown.")
    share, rest = divmod(batch, dp)
    if rest:
        return Rejected(rule="batch_divides", detail=f"{batch} sequences do not divide by dp {dp}.")
    assert micro is not None, "chosen before"
    count = -(-share // micro)
    if share % micro:
        count = next(n for n in range(count, share + 1) if share % n == 0)
        assumed.append(f"{count} equal micro-batches of {share // count}")
    return share // count, count


def _padded(model: ModelSpec, degrees: Degrees, assumed: list[str]) -> ModelSpec:
    """The model with its vocabulary padded where tensor parallelism could not split it."""
    padded = model.padded(degrees.tp)
    if padded is not model:
        assumed.append(f"vocab padded to {padded.vocab}")
    return padded


def _strategy(run: Run, model: ModelSpec, degrees: Degrees, assumed: list[str]) -> Strategy:
    recompute, count = _recompute(run, assumed), min(degrees.stages, model.layers)
    ends = ends_dealt(model.layers, count, run.framework)
    if not sum(ends):
        return Strategy(degrees=degrees, stages=even_stages(model.layers, count, recompute))
    share, rest = divmod(model.layers + sum(ends), count)
    sizes = [share + (stage < rest) for stage in range(count)]
    sizes[0], sizes[-1] = sizes[0] - ends[0], sizes[-1] - ends[1]
    told = " and ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    assumed.append(f"{told} layers on the end stages")
    return Strategy(degrees=degrees, stages=sized_stages(sizes, recompute))


def ends_dealt(layers: int, stages: int, framework: str) -> tuple[int, int]:
    """How many layers' places the first stage gives to what is none, and the last, as layers are dealt out.

    One each in Megatron-LM where stages divide evenly so: its account_for_embedding_in_pipeline_split and its
    twin; 126 and 94 layers are made for it. Aleph Alpha's deals the embedding, the last norm and the head as
    layers of their own (pipe_partition_uniform).
    """
    if stages == 1:
        return 0, 0
    if re.search(SCALING, framework.lower()):
        return (1, 2) if (layers + 3) // stages > 2 else (0, 0)
    counted, rest = divmod(layers + 2, stages)
    return (1, 1) if layers % stages and not rest and counted > 1 else (0, 0)


def _recompute(run: Run, assumed: list[str]) -> Recompute:
    """The nearest option of a block; without a word in the row, none, but in JAX full."""
    match run.recompute:
        case None if re.search(REMATERIALISES, run.framework.lower()):
            assumed.append("recompute full")
            return Recompute.FULL
        case None:
            assumed.append("recompute none")
            return Recompute.NONE
        case RunRecompute.MLP:
            return Recompute.SELECTIVE
        case stated:
            return Recompute(str(stated))
