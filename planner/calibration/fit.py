"""fit(): the constants that make predicted step times agree best with measured ones.

For runs i with measured time t_i and constants c = prior . exp(spread x) (prior + spread x where a constant
may be 0), the fit minimises

    sum_i rho(r_i^2) + sum_j x_j^2,      r_i = ln(p_i(c) / t_i) / e

with rho = ln(1 + z) and each c_j within its bounds: the most probable constants, given their priors, where
runs scatter by e as Cauchy's distribution does: ERROR at first, then what they were found to scatter by. A
run that something else slowed (a neighbour on the fabric, a bad node) pulls the less the farther off it is.
A constant whose uncertainty the runs do not reduce below KNOWN of its prior's is not determined by them: it
stays at its prior and is named, and the others are fitted again.

What the fit would have predicted for a group of runs without having seen it follows from one Gauss-Newton
step away from the optimum, with the Jacobian at hand: no further model is evaluated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from planner.calibration.predict import LayersKey, Measured, ProblemKey, step_time_s
from planner.cost.constants import TIME_SPECS, TimeConstants, stack_prior, time_constants_of
from planner.cost.evaluate import CostModel
from planner.cost.stage.layer_cost import LayerModel
from planner.job.engine_settings import EngineSettings
from planner.profile.profile import Constant, Profile

LEAST_ERROR, MOST_ERROR = 0.03, 0.3
"""Scatter is not believed to be less than the first, nor more than the second."""

ERROR = 0.05
"""Scatter of measured runs that a fit begins with, as a share: what repeated runs of one layout differ by."""

KNOWN = 0.97
"""A constant is determined where its uncertainty shrinks below this share of its prior's."""

STEP = 0.02
"""Prior spreads between the two ends of a finite difference."""

DAMPINGS = (1e-3, 0.1, 1.0, 10.0, 100.0)
"""Of each step of Levenberg and Marquardt, all tried at once."""

KIN_MOST = 4.0
"""Spreads that a set of kernels may lie from its framework."""

MAX_STEPS = 20
LEAST_GAIN = 1e-3
"""A step that lessens the cost by a smaller share is the last."""

ROUNDS = 3
"""Times that constants are dropped which the runs do not determine."""

MAX_RUNS = 1200
"""Runs that one fit evaluates; of more, evenly many of every group: constants are few."""

BY_KERNELS = ("elementwise_scale", "norm_scale", "attention_share")
"""Constants that every named set of fused kernels has for itself, held to the framework's own by KINSHIP."""

KINSHIP = 0.5
"""Spread of a set of kernels around its framework's constant, as a share of that constant's own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unknown:
    """One constant of a fit: for which kernels, and the value that it starts from.

    `kin` is the place of the framework's own among the unknowns, None where it is that itself: a set of
    kernels moves with its framework, and KINSHIP of a spread on its own. `told` where a wider fit determined
    the start: that one is held to by KINSHIP of its prior's spread too.
    """

    name: str
    kernels: str
    start: float
    kin: int | None = None
    told: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} ({self.kernels})" if self.kernels else self.name

    @property
    def spread(self) -> float:
        """How far from its start one expects it, as its prior's spread is meant."""
        return TIME_SPECS[self.name].spread * (KINSHIP if self.told else 1.0)

    def value(self, x: float) -> float:
        """The constant at `x` spreads from its start, within its bounds."""
        prior = TIME_SPECS[self.name]
        raw = self.start * math.exp(self.spread * x) if prior.logarithmic else self.start + self.spread * x
        return min(max(raw, prior.low), prior.high)

    def values(self, x: Any) -> Any:
        """The constant at each of some `x`."""
        import numpy as np

        return np.array([self.value(float(each)) for each in x])

    def bounds(self) -> tuple[float, float]:
        """The range of x that its bounds leave."""
        prior = TIME_SPECS[self.name]
        if prior.logarithmic:
            low, high = (math.log(end / self.start) / self.spread for end in (prior.low, prior.high))
        else:
            low, high = ((end - self.start) / self.spread for end in (prior.low, prior.high))
        if self.kin is not None:
            return -KIN_MOST, KIN_MOST
        return min(low, -1e-6), max(high, 1e-6)


@dataclasses.dataclass(frozen=True, slots=True)
class Scope:
    """What a fit speaks of: a device, a network, a family of engines and a framework, each empty for any."""

    device: str = ""
    framework: str = ""
    engine: str = ""
    network: str = ""

    @property
    def label(self) -> str:
        place = ", ".join(part for part in (self.device, self.network) if part)
        return " on ".join(part for part in (self.framework or self.engine, place) if part) or "all runs"

    def named(self, family: str) -> dict[str, str]:
        """Fields of what holds for it and belongs to software: for its family of engines at most."""
        return {
            "device": self.device,
            "framework": self.framework,
            "engine": self.engine or family,
            "network": self.network,
        }

    def constant(self, unknown: Unknown, value: float, origin: str, family: str = "") -> Constant:
        """A constant of this scope; one that belongs to software holds for its family of engines at most."""
        return Constant(
            name=unknown.name,
            value=value,
            origin=origin,
            kernels=unknown.kernels,
            **self.named("" if TIME_SPECS[unknown.name].device else family),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """The outcome: constants with the share of their prior's uncertainty that is left, and errors.

    The constants hold for `scope`.
    Errors are predicted over measured minus 1. `left_out` are those of each run predicted from the runs of
    the other groups.
    """

    scope: Scope
    runs: tuple[Measured, ...]
    unknowns: tuple[Unknown, ...]
    values: tuple[float, ...]
    uncertainty: tuple[float, ...]
    errors: tuple[float, ...]
    left_out: tuple[float, ...]

    def determined(self, index: int) -> bool:
        """Whether the runs say more of a constant than its prior does."""
        return self.uncertainty[index] < KNOWN

    @property
    def left_out_error(self) -> float:
        """Mean error of groups of runs that are predicted from the others."""
        return fmean(abs(error) for error in self.left_out)

    def constants(self, known: Profile) -> tuple[Constant, ...]:
        """The constants for a profile that knows wider ones: those that the runs determine, and those that
        stayed at another value than it knows; a set of kernels moves with its framework."""
        told, origin = f"fitted to {len(self.runs)} runs", f"usual, where {len(self.runs)} runs tell no other"
        stacks = {run.kernels: run.setup.problem.engine_settings for run in self.runs}
        stacks[""] = dataclasses.replace(self.runs[0].setup.problem.engine_settings, kernels="")
        family, found = stacks[""].engine.family, []
        for index, (u, value) in enumerate(zip(self.unknowns, self.values, strict=True)):
            moved = self.determined(index) or (u.kin is not None and self.determined(u.kin))
            wider, is_told = _start(u.name, stacks[u.kernels], self.scope, known)
            if moved or (is_told and wider != value):
                found.append(self.scope.constant(u, value, told if moved else origin, family))
        return tuple(found)


def fit(runs: Sequence[Measured], scope: Scope, base: Profile, progress: Callable[[str], None]) -> Fit:
    """The most probable constants of a scope, starting from those that `base` has for it.

    What the runs do not determine goes back to its start, and the others are fitted again.
    """
    import numpy as np

    unknowns, sample = unknowns_of(runs, scope, base), evenly(runs, MAX_RUNS)
    problem = _Problem(sample, unknowns, scope, base)
    solution, free = _determined(problem, progress)
    uncertainty = np.ones(len(unknowns))
    uncertainty[free] = solution.uncertainty()
    ranges = [unknowns[index].bounds() for index in free]
    inside = [low + 1e-6 < v < high - 1e-6 for v, (low, high) in zip(solution.x[free], ranges, strict=True)]
    left_out = _left_out(sample, solution, free, np.array(inside))
    return Fit(
        scope=scope,
        runs=tuple(sample),
        unknowns=tuple(unknowns),
        values=tuple(float(values[0]) for values in values_of(unknowns, solution.x[None, :])),
        uncertainty=tuple(float(u) for u in uncertainty),
        errors=tuple(math.expm1(problem.error * float(r)) for r in solution.residuals),
        left_out=tuple(math.expm1(problem.error * float(r)) for r in left_out),
    )


def _determined(problem: _Problem, progress: Callable[[str], None]) -> tuple[Solution, Any]:
    """The solution in the constants that the runs determine, and their places; others are at their start."""
    import numpy as np

    free = np.arange(len(problem.unknowns))
    solution = problem.solve(np.zeros(len(free)), free, progress)
    problem.error = solution.scatter(problem.error)
    for _ in range(ROUNDS):
        solution = problem.solve(solution.x, free, progress)
        known = solution.uncertainty() < KNOWN
        if known.all() or not known.any():
            return solution, free
        free = free[known]
        solution = dataclasses.replace(
            solution, x=np.where(np.isin(range(len(solution.x)), free), solution.x, 0)
        )
    return problem.solve(solution.x, free, progress), free


@dataclasses.dataclass(frozen=True, slots=True)
class Solution:
    """The place of the least cost: x, the residuals there, and their derivatives by the free x."""

    x: Any
    residuals: Any
    jacobian: Any

    def weights(self) -> Any:
        """How much each run counts: the less, the farther it is off."""
        return 1 / (1 + self.residuals**2)

    def scatter(self, error: float) -> float:
        """What runs scatter by around the model, as a share: robustly, from residuals in units of `error`."""
        import numpy as np

        runs, moved = self.jacobian.shape
        spent = moved - float(np.sum(self.uncertainty() ** 2))  # runs' worth that the constants used up
        spread = 1.4826 * float(np.median(np.abs(self.residuals)))
        found = error * spread * math.sqrt(runs / max(runs - spent, 1.0))
        return min(max(found, LEAST_ERROR), MOST_ERROR)

    def uncertainty(self) -> Any:
        """The share of each free constant's prior uncertainty that is left."""
        import numpy as np

        weighted = self.weights()[:, None] * self.jacobian
        information = self.jacobian.T @ weighted + np.eye(self.jacobian.shape[1])
        return np.sqrt(np.diag(np.linalg.inv(information)))


def unknowns_of(runs: Sequence[Measured], scope: Scope, base: Profile) -> list[Unknown]:
    """Every constant, and one for each named set of kernels where its time depends on them."""
    stacks = {run.kernels: run.setup.problem.engine_settings for run in runs}
    usual = dataclasses.replace(runs[0].setup.problem.engine_settings, kernels="")
    found: list[Unknown] = []
    for name in TIME_SPECS:
        own = len(found)
        start, told = _start(name, usual, scope, base)
        found.append(Unknown(name, "", start, None, told))
        if name in BY_KERNELS:
            named = [(kernels, settings) for kernels, settings in sorted(stacks.items()) if kernels]
            for kernels, settings in named:
                start, told = _start(name, settings, scope, base)
                found.append(Unknown(name, kernels, start, own, told))
    return found


def _start(name: str, settings: EngineSettings, scope: Scope, base: Profile) -> tuple[float, bool]:
    """Where a constant starts, and whether a wider fit told so."""
    known = base.constant_of(
        name,
        device=scope.device,
        network=scope.network,
        framework=scope.framework,
        kernels=settings.kernels,
        engine=settings.engine.family,
    )
    return (stack_prior(name, settings) if known is None else known), known is not None


def values_of(unknowns: Sequence[Unknown], sets: Any) -> list[Any]:
    """The values of each unknown under each of some sets of x (rows)."""
    moved = [
        sets[:, index] if u.kin is None else sets[:, u.kin] + KINSHIP * sets[:, index]
        for index, u in enumerate(unknowns)
    ]
    return [unknown.values(x) for unknown, x in zip(unknowns, moved, strict=True)]


def evenly(runs: Sequence[Measured], most: int) -> list[Measured]:
    """At most so many runs, taken in turn from every group, each group in steps over its whole."""
    if len(runs) <= most:
        return list(runs)
    step = len(runs) / most
    ordered = sorted(runs, key=lambda run: (run.group, run.step_time_s, run.run.id))
    return [ordered[int(index * step)] for index in range(most)]


class _Problem:
    """The residuals of one fit and their derivatives by finite differences."""

    def __init__(
        self, runs: Sequence[Measured], unknowns: Sequence[Unknown], scope: Scope, base: Profile
    ) -> None:
        self.runs, self.unknowns, self.scope, self.error = runs, unknowns, scope, ERROR
        places: dict[ProblemKey, list[int]] = {}
        for place, run in enumerate(runs):
            places.setdefault(run.problem_key, []).append(place)
        self._places = tuple(places.values())
        self._base = base

    def residuals(self, sets: Any) -> Any:
        """ln(predicted / measured) over the scatter, of every run (rows) under each of some sets of x.

        A run's cost is evaluated once, with every constant an array over the sets; runs of one problem share
        their layers' costs.
        """
        import numpy as np

        values = values_of(self.unknowns, sets)
        found = np.empty((len(self.runs), len(sets)))
        layers: dict[LayersKey, LayerModel] = {}
        for places in self._places:
            first = self.runs[places[0]]
            key = first.layers_key
            if key not in layers:
                layers[key] = LayerModel(first.setup.problem, self._constants(first, values))
            model = CostModel(first.setup.problem, layers[key])
            for place in places:
                run = self.runs[place]
                found[place] = step_time_s(model, run.setup.strategy) / run.step_time_s
        return np.log(found) / self.error

    def _constants(self, run: Measured, values: Sequence[Any]) -> TimeConstants:
        """The constants of a run's problem, where the unknowns have these values."""
        problem = run.setup.problem
        cluster = problem.cluster
        own = time_constants_of(self._base, problem.engine_settings, problem.device.name, cluster.network)
        pairs = zip(self.unknowns, values, strict=True)
        told = {unknown.name: value for unknown, value in pairs if unknown.kernels in ("", run.kernels)}
        return dataclasses.replace(own, **told)

    def with_jacobian(self, x: Any, free: Any) -> tuple[Any, Any]:
        """The residuals and their derivatives by each free x, one-sided towards the inside of its bounds."""
        import numpy as np

        sets = np.tile(np.asarray(x, dtype=float), (len(free) + 1, 1))
        for row, index in enumerate(free, start=1):
            low, high = self.unknowns[index].bounds()
            step = STEP if x[index] + STEP <= high else -STEP
            sets[row, index] += max(step, low - x[index])
        found = self.residuals(sets)
        steps = sets[1:, free].diagonal() - x[free]
        return found[:, 0], (found[:, 1:] - found[:, :1]) / steps

    def solve(self, x: Any, free: Any, progress: Callable[[str], None]) -> Solution:
        """Levenberg-Marquardt on the robust sum from `x`; those of the places `free` move within bounds."""
        import numpy as np

        at, jacobian = self.with_jacobian(x, free)
        for step in range(MAX_STEPS):
            before = _cost(at, x)
            tries = np.tile(x, (len(DAMPINGS), 1))
            tries[:, free] += [self._step(x[free], free, at, jacobian, damping) for damping in DAMPINGS]
            there = self.residuals(tries)
            costs = [_cost(there[:, place], tried) for place, tried in enumerate(tries)]
            best = int(np.argmin(costs))
            if costs[best] < before:
                x = tries[best]
                at, jacobian = self.with_jacobian(x, free)
            progress(f"{self.scope.label}: step {step + 1}, mean error {_mean_error(at, self.error):.2%}")
            if before - costs[best] < LEAST_GAIN * before:
                break
        return Solution(x, at, jacobian)

    def _step(self, x: Any, free: Any, at: Any, jacobian: Any, damping: float) -> Any:
        """A damped step of the linearised problem within the bounds."""
        import numpy as np
        from scipy.optimize import lsq_linear

        ends = zip(*(self.unknowns[index].bounds() for index in free), strict=True)
        low, high = (np.array(end) for end in ends)
        root = 1 / np.sqrt(1 + at**2)
        rows = np.concatenate([root[:, None] * jacobian, np.eye(len(x)), np.sqrt(damping) * np.eye(len(x))])
        sides = np.concatenate([-root * at, -x, np.zeros(len(x))])
        return lsq_linear(rows, sides, bounds=(low - x - 1e-9, high - x + 1e-9)).x


def _cost(residuals: Any, x: Any) -> float:
    import numpy as np

    return float(np.sum(np.log1p(residuals**2)) + np.sum(x**2))


def _mean_error(residuals: Any, error: float) -> float:
    import numpy as np

    return float(np.mean(np.abs(np.expm1(error * residuals))))


def _left_out(runs: Sequence[Measured], solution: Solution, free: Any, inside: Any) -> Any:
    """Residuals of each group as predicted from the others: one step of Gauss-Newton without its rows.

    Only constants move that do not lie at a bound (`inside`, of those that are free).
    """
    import numpy as np

    x, jacobian, residuals = solution.x[free][inside], solution.jacobian[:, inside], solution.residuals
    weighted = solution.weights()[:, None] * jacobian
    information = jacobian.T @ weighted + np.eye(len(x))
    gradient = weighted.T @ residuals + x
    groups = np.array([run.group for run in runs])
    found = np.array(residuals)
    for group in dict.fromkeys(groups):
        held = groups == group
        rest = information - jacobian[held].T @ weighted[held]
        moved = -np.linalg.solve(rest, gradient - weighted[held].T @ residuals[held])
        found[held] = residuals[held] + jacobian[held] @ moved
    return found
