"""Memory constants that agree best with measured peaks and with which runs ran out of memory.

For runs with a measured peak m_i, and runs that ended (or not) for want of memory with limit l_i, the fit
minimises over the constants c, each with its prior's value v and spread s,

    sum 2 (sqrt(1 + r_i^2) - 1)  +  sum 2 ln(1 + exp(-+ z_i))  +  sum ((c_j - v_j) / s_j)^2

    r_i = ln(p_i(c) / m_i) / PEAK_ERROR        z_i = ln(p_i(c) / l_i) / LIMIT_ERROR, + where it ran out

A peak is the largest over pipeline ranks of what is nearly linear in the constants: it is linearised there
and solved again, ROUNDS times. The band of the verdict is planner.calibration.memory_fit's.

The band of a memory verdict: how far peaks lie from predictions that were made without them.

Every run is predicted twice: from the runs of the other groups, and, where there are two models or more, from
those of the other models. Errors are of measured over predicted, less 1; a run that ran out needed at least
its limit, and one that ran at most that:

    upper    the largest error above, and MARGIN
    lower    what QUANTILE of the errors below stay within

A plan that is called safe and runs out loses its run, one that is called impossible and is not loses a
choice: hence the largest on one side and a quantile on the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from planner.calibration.predict import with_constants
from planner.calibration.run_setup import RunSetup, Setups
from planner.calibration.runs import MemoryKind, Run, Status
from planner.cost.constants import MEMORY_SPECS, ConstantSpec, fitted_constant, kernel_constant, stack_prior
from planner.cost.evaluate import CostModel, memory_of_ranks
from planner.cost.stage.peak_memory import MEMORY_ERROR, RankMemory
from planner.foundation.units import GIB
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.sublayer import AttentionKernel
from planner.profile.profile import Constant, Profile
from planner.strategy.schedule.schedules import build_table

MARGIN = 0.02
"""Added above: limits themselves are known to about this, as what else is on a device differs."""

QUANTILE = 0.98
"""Share of the runs whose peaks may lie at most the band's lower end below their prediction."""


def memory_band(
    above: Sequence[float], below: Sequence[float], framework: str, told: str
) -> tuple[Constant, ...]:
    """The band from errors of left-out runs, 0 where a run says no more; `told` names the runs."""
    ends = {}
    if above:
        ends["upper"] = max(above) + MARGIN
    if below:
        ends["lower"] = _quantile(below)
    widest = MEMORY_ERROR["datasheet"]  # few groups never teach less than no calibration
    origin = f"{told}, each predicted from the other groups and from the other models"
    return tuple(
        Constant(name=f"memory_error_{name}", value=min(value, widest), origin=origin, framework=framework)
        for name, value in ends.items()
    )


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(QUANTILE * len(ordered)) - 1)]


PEAK_ERROR = 0.03
"""Scatter of measured peaks around a right model: what allocators of one layout differ by."""

LIMIT_ERROR = 0.04
"""How sharply a limit divides runs that ran from those that did not: fragmentation differs by run."""

MIN_RUNS = 3
"""Fewer runs of a framework than this say too little of its memory."""

ROUNDS = 2
TOLD = 0.05
"""A constant that moves less than this share of its prior's spread stays at its prior."""

FITTED = (
    "activation_scale",
    "grad_bytes",
    "norm_bytes",
    "unfused_norm_bytes",
    "probability_scale",
    "eager_probability_scale",
    "transient_scale",
    "loss_bytes",
    "gathered_logits_bytes",
    "allocator_slack",
)


RESERVING = (MemoryKind.RESERVED, MemoryKind.DEVICE)
"""Kinds of peaks that tell of the allocator."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryRun:
    """A run with its setup, and what is known of its peak: measured bytes of a kind, or only its end."""

    run: Run
    setup: RunSetup
    kind: MemoryKind | None
    bytes: float

    @property
    def ran_out(self) -> bool:
        return self.run.status is Status.OOM


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryFit:
    """The constants fitted for a framework, their band, and each run's left-out prediction over its bytes."""

    framework: str
    runs: tuple[MemoryRun, ...]
    constants: tuple[Constant, ...]
    left_out: tuple[float, ...]

    @property
    def peak_errors(self) -> tuple[float, ...]:
        """Left-out errors of the runs whose peak was measured."""
        pairs = zip(self.runs, self.left_out, strict=True)
        return tuple(ratio - 1 for run, ratio in pairs if run.kind is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Unknown:
    """A constant of a fit and the value that it starts from and is held to."""

    name: str
    prior: ConstantSpec
    start: float


def calibrate_memory(runs: Sequence[Run], base: Profile) -> tuple[MemoryFit, ...]:
    """One fit for each framework of which MIN_RUNS or more tell of memory."""
    known = memory_runs(runs, base)
    by_framework: dict[str, list[MemoryRun]] = {}
    for run in known:
        by_framework.setdefault(run.run.framework, []).append(run)
    return tuple(
        fit_memory(own, framework, base) for framework, own in by_framework.items() if len(own) >= MIN_RUNS
    )


def memory_runs(runs: Sequence[Run], base: Profile) -> list[MemoryRun]:
    """Runs with a measured peak, those that ran out, and those that ran beside them in a group."""
    setups, found = Setups(lambda device: base), []
    tried = {run.group_name for run in runs if run.status is Status.OOM}
    for run in runs:
        measured = run.peak_memory_gib is not None and run.status is not Status.OOM
        if not measured and run.group_name not in tried:
            continue
        setup = setups.setup(run)
        if isinstance(setup, RunSetup):
            kind = (run.memory_kind or MemoryKind.ALLOCATED) if measured else None
            size = (run.peak_memory_gib or 0.0) * GIB if measured else setup.problem.memory_limit_bytes
            found.append(MemoryRun(run, setup, kind, float(size)))
    return found


def fit_memory(runs: Sequence[MemoryRun], framework: str, base: Profile) -> MemoryFit:
    """The most probable constants of a framework's runs, and the band that its left-out groups leave."""
    import numpy as np

    unknowns = _unknowns(runs, base)
    x = np.array([unknown.start for unknown in unknowns])
    for _ in range(ROUNDS):
        linear = _Linear(runs, unknowns, x, framework, base)
        x = linear.solve(np.ones(len(runs)))
    left_out = _left_out(linear, runs, x, lambda run: run.group_name)
    judged = left_out
    if len({_model_name(run.run) for run in runs}) > 1:
        judged += _left_out(linear, runs, x, _model_name)
    origin = f"fitted to {len(runs)} runs"
    constants = [
        _constant(u, float(v), framework, origin)
        for u, v in zip(unknowns, x, strict=True)
        if abs(v - u.start) > TOLD * u.prior.spread
    ]
    return MemoryFit(
        framework=framework,
        runs=tuple(runs),
        constants=(*constants, *_band(runs, judged, framework)),
        left_out=left_out,
    )


def _model_name(run: Run) -> str:
    return run.model or f"{run.layers}-{run.hidden}"


def _left_out(
    linear: _Linear, runs: Sequence[MemoryRun], fitted: Any, key: Callable[[Run], str]
) -> tuple[float, ...]:
    """Each run's prediction over its bytes from the runs of other keys; from all where there is one key."""
    import numpy as np

    keys = np.array([key(run.run) for run in runs])
    ratios = np.ones(len(runs))
    for value in dict.fromkeys(keys):
        held = keys == value
        rest = fitted if held.all() else linear.solve(1.0 - held)
        ratios[held] = linear.ratios(rest)[held]
    return tuple(float(ratio) for ratio in ratios)


def _constant(unknown: _Unknown, value: float, framework: str, origin: str) -> Constant:
    return Constant(name=unknown.name, value=value, origin=origin, framework=framework)


def _unknowns(runs: Sequence[MemoryRun], base: Profile) -> list[_Unknown]:
    """The constants that these runs can tell of, each from a problem that it holds for."""
    problems = list({run.setup.problem.engine_settings: run.setup.problem for run in runs}.values())
    found = []
    for name in FITTED:
        told = [problem for problem in problems if _tells(problem, name)]
        if name == "allocator_slack" and not any(run.kind in RESERVING for run in runs):
            continue
        if told:
            found.append(_Unknown(name, MEMORY_SPECS[name], _start(told[0], name, base)))
    return found


def _tells(problem: PlanningProblem, name: str) -> bool:
    """Whether runs of a problem's stack tell of a constant."""
    settings = problem.engine_settings
    match name:
        case "grad_bytes":
            return settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED)
        case "gathered_logits_bytes":
            return settings.gathers_logits
        case "norm_bytes" | "unfused_norm_bytes":
            return kernel_constant("norm_bytes", settings) == name
        case "probability_scale" | "eager_probability_scale":
            unfused = settings.attention is not AttentionKernel.FLASH
            return unfused and kernel_constant("probability_scale", settings) == name
    return True


def _start(problem: PlanningProblem, name: str, base: Profile) -> float:
    fitted = fitted_constant(dataclasses.replace(problem, profile=base), name)
    return stack_prior(name, problem.engine_settings) if fitted is None else fitted


class _Linear:
    """Peaks of runs as the largest of linear functions of the constants, around `at`."""

    def __init__(
        self, runs: Sequence[MemoryRun], unknowns: Sequence[_Unknown], at: Any, framework: str, base: Profile
    ) -> None:
        import numpy as np

        self.runs, self.unknowns, self.at = runs, unknowns, at
        peaks = _Peaks(runs, framework, base, unknowns)
        values = peaks.of(at)
        self.starts = np.cumsum([0, *(len(v) for v in values)])[:-1]
        self.values = np.concatenate(values)
        columns = []
        for index, unknown in enumerate(unknowns):
            moved = np.array(at)
            moved[index] += 0.1 * unknown.prior.spread
            columns.append((np.concatenate(peaks.of(moved)) - self.values) / (moved[index] - at[index]))
        self.slopes = np.stack(columns, axis=1)
        self.bytes = np.array([run.bytes for run in runs])
        self.measured = np.array([run.kind is not None for run in runs])
        self.sign = np.array([-1.0 if run.ran_out else 1.0 for run in runs])

    def ratios(self, x: Any) -> Any:
        """Predicted over measured, or over the limit."""
        import numpy as np

        ranks = self.values + self.slopes @ (x - self.at)
        return np.maximum(np.maximum.reduceat(ranks, self.starts), 1.0) / self.bytes

    def cost(self, x: Any, weights: Any) -> float:
        """What the fit minimises, over the runs of weight 1."""
        import numpy as np

        logs = np.log(self.ratios(x))
        robust = 2 * (np.sqrt(1 + (logs / PEAK_ERROR) ** 2) - 1)
        ended = 2 * np.logaddexp(0.0, self.sign * logs / LIMIT_ERROR)
        each = np.where(self.measured, robust, ended)
        held = sum(
            ((value - unknown.start) / unknown.prior.spread) ** 2
            for unknown, value in zip(self.unknowns, x, strict=True)
        )
        return float(weights @ each + held)

    def solve(self, weights: Any) -> Any:
        """The constants of least cost within their bounds."""
        from scipy.optimize import minimize

        bounds = [(unknown.prior.low, unknown.prior.high) for unknown in self.unknowns]
        return minimize(self.cost, self.at, args=(weights,), method="Powell", bounds=bounds).x


class _Peaks:
    """Bytes of every pipeline rank of every run under given constants. Runs of one problem share a model."""

    def __init__(
        self, runs: Sequence[MemoryRun], framework: str, base: Profile, unknowns: Sequence[_Unknown]
    ) -> None:
        self.runs, self.framework, self.base, self.unknowns = runs, framework, base, unknowns

    def of(self, x: Any) -> list[Any]:
        """One array a run."""
        pairs = zip(self.unknowns, x, strict=True)
        constants = [_constant(u, float(v), self.framework, "") for u, v in pairs]
        profile = with_constants(self.base, constants)
        models: dict[object, CostModel] = {}
        return [self._bytes(run, profile, models) for run in self.runs]

    def _bytes(self, run: MemoryRun, profile: Profile, models: dict[object, CostModel]) -> Any:
        import numpy as np

        problem, degrees = run.setup.problem, run.setup.strategy.degrees
        key = _key(problem)
        if key not in models:
            models[key] = CostModel(dataclasses.replace(problem, profile=profile))
        model = models[key]
        shape = model.layout(degrees)
        table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
        costs = model.stage_costs(shape, run.setup.strategy)
        ranks = memory_of_ranks((shape,) * degrees.pp, table, costs)  # runs have devices of one kind
        return np.array([_of_kind(rank, run.kind, shape.memory.context_bytes) for rank in ranks])


def _key(problem: PlanningProblem) -> object:
    return (problem.model, problem.workload, problem.cluster, problem.engine_settings)


def _of_kind(rank: RankMemory, kind: MemoryKind | None, context_bytes: float) -> float:
    """A rank's peak as an observer sees it; None: what is compared with the limit."""
    parts = list(rank.parts.values())
    if kind is MemoryKind.ALLOCATED:
        return float(sum(part.allocated_bytes for part in parts))
    if kind is MemoryKind.RESERVED:
        return float(sum(part.allocated_bytes + part.allocator_bytes for part in parts))
    return rank.peak_bytes + (context_bytes if kind is MemoryKind.DEVICE else 0.0)


def _band(runs: Sequence[MemoryRun], ratios: Sequence[float], framework: str) -> tuple[Constant, ...]:
    """The band of the verdict; `ratios` are predictions over bytes, of all runs once or more often."""
    above, below = [], []
    for index, ratio in enumerate(ratios):
        run, error = runs[index % len(runs)], 1 / ratio - 1
        if run.kind is not None or run.ran_out:
            above.append(max(error, 0.0))
        if run.kind is not None or not run.ran_out:
            below.append(max(-error, 0.0))
    return memory_band(above, below, framework, f"{len(runs)} runs")
