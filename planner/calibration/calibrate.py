"""calibrate(): a profile of constants fitted to measured runs, from the general to the particular.

Runs of one framework speak of its family of engines, and of the device whatever runs on it. Of several, those
of every family are fitted first, then those of every framework, then those of a framework on every device;
each starts from the one before and is held to it as to a prior, so that few runs move little, and a device or
framework without runs is predicted by the constants of the others of its family. Where it predicts its groups
from each other better on its own, starting from what is usual, it stands on its own.

told_of_blocks(): what is left of runs' times once constants are fitted, as ratios of their blocks' shapes.

Run i of step time t_i, predicted p_i, of which a share s_i follows the time of its blocks of shape x_i, says

    ln(t_i / p_i) = s_i g(x_i) + noise,     g ~ Gaussian process over shapes
    (planner.cost.stage.layer_cost)

with noise as Cauchy's, as in the fit: what other runs of like blocks do not say too is no block's. Spread
and noise are those that predict groups of runs best from the others, by g of all but them (eq. 5.12 of
Rasmussen and Williams, for several rows) on top of the fit's own left-out errors. Unless that makes these
errors less by a part that chance would not, nothing is told.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from planner.calibration.fit import Fit, Scope, fit
from planner.calibration.memory_fit import MemoryFit, calibrate_memory
from planner.calibration.predict import LayersKey, Measured, step_time_s, with_constants
from planner.calibration.run_setup import RunSetup, Setups
from planner.calibration.runs import Run, Status
from planner.cost.constants import time_constants_of
from planner.cost.evaluate import CostModel
from planner.cost.stage.layer_cost import LayerModel, block_shape, likeness, placed
from planner.foundation.errors import InputError, Problem
from planner.profile.choose import check_device
from planner.profile.profile import (
    PROFILE_SCHEMA,
    BlockResidual,
    BlockResiduals,
    BlockShape,
    Constant,
    LayerKind,
    Profile,
)

SPREADS = (0.05, 0.1)
NOISES = (0.02, 0.05)
"""Choices of the process: the spread of blocks around their prices, and the noise of one run, both as shares.
Kernels that a library picks badly for one size cost a block a tenth and more."""

ROUNDS = 6
"""Times that runs are weighed anew by how far they are off."""

LEAST_RUNS = 10
"""Fewer runs than this tell nothing of blocks: with few groups errors fall by chance."""

WORTH = 0.97
"""Left-out errors must fall below this share of what they were."""

STEP = 0.02
"""The share by which blocks are made slower to see what of a step follows them."""


@dataclasses.dataclass(frozen=True, slots=True)
class ToldBlocks:
    """What runs of a fit tell of blocks, None for nothing; and the errors of runs, each predicted from the
    other groups, with it."""

    residuals: BlockResiduals | None
    left_out: tuple[float, ...]


def told_of_blocks(found: Fit, profile: Profile, family: str) -> ToldBlocks:
    """What the runs of a fit tell; `profile` has its constants."""
    import numpy as np

    if len(found.runs) < LEAST_RUNS:
        return ToldBlocks(None, found.left_out)
    shapes, shares = _blocks(found.runs, profile)
    seen, left_out = (-np.log1p(np.asarray(errors)) for errors in (found.errors, found.left_out))
    groups = np.array([run.group for run in found.runs])
    tried = [_Process(shapes, shares, seen, *choice) for choice in itertools.product(SPREADS, NOISES)]
    leaves = [left_out - process.left_out(groups) for process in tried]
    best = min(range(len(tried)), key=lambda index: float(np.mean(np.abs(leaves[index]))))
    if float(np.mean(np.abs(leaves[best]))) >= WORTH * float(np.mean(np.abs(left_out))):
        return ToldBlocks(None, found.left_out)
    residuals = tried[best].residuals(found.scope, family)
    return ToldBlocks(residuals, tuple(math.expm1(-float(each)) for each in leaves[best]))


def nothing_told(scope: Scope, family: str) -> BlockResiduals:
    """Where runs of a scope tell nothing of their blocks, and those of a wider one do."""
    return BlockResiduals(spread=SPREADS[0], noise=NOISES[0], told=(), **scope.named(family))


class _Process:
    """The process of one choice, with the weights at which its runs settle."""

    def __init__(
        self,
        shapes: Sequence[BlockShape],
        shares: Any,
        seen: Any,
        spread: float,
        noise: float,
    ) -> None:
        import numpy as np

        self.shapes, self.shares, self.seen = shapes, shares, seen
        self.spread, self.noise = spread, noise
        between = spread**2 * likeness(placed(shapes), placed(shapes))
        self.across = shares[:, None] * between * shares[None, :]
        self.weights = np.ones(len(seen))
        for _ in range(ROUNDS):
            self.inverse = np.linalg.inv(self.across + np.diag(noise**2 / self.weights))
            off = (seen - self.across @ (self.inverse @ seen)) / noise
            self.weights = 1 / (1 + off**2)

    def left_out(self, groups: Any) -> Any:
        """What it says of each group of runs without them."""
        import numpy as np

        found, said = np.empty(len(self.seen)), self.inverse @ self.seen
        for group in dict.fromkeys(groups):
            held = np.flatnonzero(groups == group)
            found[held] = self.seen[held] - np.linalg.solve(self.inverse[np.ix_(held, held)], said[held])
        return found

    def residuals(self, scope: Scope, family: str) -> BlockResiduals:
        """Runs of one shape as one."""
        places: dict[BlockShape, list[int]] = {}
        for place, shape in enumerate(self.shapes):
            places.setdefault(shape, []).append(place)
        told = []
        for shape, own in places.items():
            weight = float(self.weights[own] @ self.shares[own] ** 2)
            summed = float(self.weights[own] @ (self.shares[own] * self.seen[own]))
            told.append(BlockResidual(shape=shape, log_ratio=summed / weight, weight=weight))
        return BlockResiduals(
            spread=self.spread,
            noise=self.noise,
            told=tuple(told),
            **scope.named(family),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Slower:
    """Blocks at their price and a little slower, in turn."""

    def ratio(self, shape: BlockShape) -> Any:
        import numpy as np

        return np.array([1.0, 1.0 + STEP])


def _blocks(runs: Sequence[Measured], profile: Profile) -> tuple[list[BlockShape], Any]:
    """The shape of each run's blocks, of several classes that of most, and the share of its step that follows
    their time: d ln step / d ln block."""
    import numpy as np

    shapes, shares = [], []
    layers: dict[LayersKey, LayerModel] = {}
    for run in runs:
        problem, strategy = run.setup.problem, run.setup.strategy
        if run.layers_key not in layers:
            constants = time_constants_of(
                profile, problem.engine_settings, problem.device.name, problem.cluster.network
            )
            layers[run.layers_key] = LayerModel(problem, constants, _Slower())
        model = CostModel(problem, layers[run.layers_key])
        taken: Any = step_time_s(model, strategy)
        shares.append(math.log(taken[1] / taken[0]) / math.log1p(STEP))
        key = max(model.layers.classes, key=model.layers.keys.count)
        recompute = strategy.stages[0].recompute.options()[0]
        asked = model.layout(strategy.degrees).shape_of(LayerKind.BLOCK, recompute, key)
        shapes.append(block_shape(model.layers.classes[key], asked, problem))
    return shapes, np.maximum(np.array(shares), 1e-3)


MIN_RUNS = 3
"""Fewer runs than this are not fitted."""

MIN_OWN_RUNS = 2
"""Fewer runs than this of a framework, or of a device under it, are not fitted apart from the others."""

MIN_CLUSTER_RUNS = 20
"""Fewer runs than this do not tell a cluster from others of its device."""

TIME_ERROR = "time_error"
QUANTILE = 0.9
"""The share of left-out runs whose error is within the interval that the profile's estimates carry."""


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """The profile, the fits that it is made of with what each tells of blocks, and the runs that could not be
    used, by reason."""

    profile: Profile
    fits: tuple[Fit, ...]
    unused: dict[str, int]
    memory: tuple[MemoryFit, ...] = ()
    blocks: tuple[ToldBlocks, ...] = ()


def calibrate(
    runs: Sequence[Run],
    *,
    name: str,
    base: Profile | None = None,
    blocks: bool = True,
    progress: Callable[[str], None] = print,
) -> Calibration:
    """The profile of constants that explains the runs best, with what they tell of their `blocks`: little use
    to a profile that is to speak for all models of a device.

    Raises InputError where no run can be used, or `base` was measured on another device than theirs.
    """
    if base is not None:
        base = dataclasses.replace(base, residuals=())  # they are left of other constants
    measured, unused = usable(runs, base)
    if len(measured) < MIN_RUNS:
        listed = ", ".join(f"{rule} ({count})" for rule, count in unused.items())
        raise InputError(
            Problem(
                where="RUNS",
                fault=f"{len(measured)} of {len(runs)} rows can be used: {listed or 'none has a step time'}.",
                legal=f"at least {MIN_RUNS} rows with a step time, model sizes, device and degrees",
            )
        )
    if base is not None:
        check_device(base, sorted({_device(run) for run in measured}), "--profile", "the runs are")
    usual = profile = base or _empty(name, measured)
    fits: list[Fit] = []
    tellings: list[ToldBlocks] = []
    for scope, chosen in scopes(measured):
        found = fit(chosen, scope, profile, progress)
        if fits:
            alone = fit(chosen, scope, usual, progress)
            found = min(found, alone, key=lambda each: each.left_out_error)
        fits.append(found)
        family = _family(found.runs[0])
        profile = with_constants(profile, found.constants(profile))
        told = told_of_blocks(found, profile, family) if blocks else ToldBlocks(None, found.left_out)
        tellings.append(told)
        error = Constant(
            name=TIME_ERROR,
            value=_quantile([abs(error) for error in told.left_out]),
            origin=f"{QUANTILE:.0%} of {len(found.runs)} runs, each predicted from the other groups",
            **scope.named(family),
        )
        held = told.residuals or (nothing_told(scope, family) if profile.residuals else None)
        profile = with_constants(profile, [error])
        if held:
            profile = dataclasses.replace(profile, residuals=(*profile.residuals, held))
    memory = calibrate_memory(runs, profile)
    for each in memory:
        profile = with_constants(profile, each.constants)
    return Calibration(profile, tuple(fits), unused, memory, tuple(tellings))


def usable(runs: Sequence[Run], base: Profile | None) -> tuple[list[Measured], dict[str, int]]:
    """The runs with a step time that the cost model can predict, and the others by reason."""
    setups, measured, unused = Setups(lambda device: base), [], dict[str, int]()
    for run in runs:
        if run.status is Status.OOM or run.step_time_s is None:
            continue
        setup = setups.setup(run)
        if isinstance(setup, RunSetup):
            measured.append(Measured(run, setup, run.step_time_s))
        else:
            unused[setup.rule] = unused.get(setup.rule, 0) + 1
    return measured, unused


def scopes(measured: Sequence[Measured]) -> list[tuple[Scope, list[Measured]]]:
    """All runs of one framework; of several those of each family of engines, then of each framework.

    Each framework's also on every device, and in every cluster by its network. None twice, none of few runs.
    """
    frameworks = sorted({run.run.framework for run in measured})
    if len(frameworks) == 1:
        return _by_device(Scope(), measured)
    found: list[tuple[Scope, list[Measured]]] = []
    for family in sorted({_family(run) for run in measured}):
        own = [run for run in measured if _family(run) == family]
        named = {f: [run for run in own if run.run.framework == f] for f in frameworks}
        present = {framework: runs for framework, runs in named.items() if runs}
        if len(present) > 1 and len(own) >= MIN_OWN_RUNS:
            found.append((Scope(engine=family), own))
        for framework, runs in present.items():
            if len(runs) >= MIN_OWN_RUNS:
                found += _by_device(Scope(framework=framework, engine=family), runs)
    return found


def _by_device(scope: Scope, runs: Sequence[Measured]) -> list[tuple[Scope, list[Measured]]]:
    """Runs of a scope; where there are several devices those of each, and of each their clusters'."""
    found = [(scope, list(runs))]
    devices = sorted({_device(run) for run in runs})
    for device in devices:
        there = [run for run in runs if _device(run) == device]
        own = scope if len(devices) == 1 else dataclasses.replace(scope, device=device)
        if own is not scope and len(there) >= MIN_OWN_RUNS:
            found.append((own, there))
        found += _by_network(own, there)
    return found


def _by_network(scope: Scope, runs: Sequence[Measured]) -> list[tuple[Scope, list[Measured]]]:
    """Runs of each network, where there are several: clusters differ in more than their links."""
    named: dict[str, list[Measured]] = {}
    for run in runs:
        named.setdefault(run.setup.problem.cluster.network, []).append(run)
    if len(named) == 1:
        return []
    many = {network: own for network, own in named.items() if len(own) >= MIN_CLUSTER_RUNS}
    return [(dataclasses.replace(scope, network=network), own) for network, own in sorted(many.items())]


def _family(run: Measured) -> str:
    return run.setup.problem.engine_settings.engine.family


def _device(run: Measured) -> str:
    return run.setup.problem.cluster.groups[0].device.name


def _quantile(values: Sequence[float]) -> float:
    """The QUANTILE of some values; never below their mean."""
    ordered = sorted(values)
    return max(ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))], fmean(ordered))


def _empty(name: str, measured: Sequence[Measured]) -> Profile:
    """A profile without samples: it speaks for every device by constants alone."""
    devices = sorted({_device(run) for run in measured})
    return Profile(
        schema_version=PROFILE_SCHEMA,
        name=name,
        device=devices[0] if len(devices) == 1 else "",
        device_title=", ".join(devices),
        backend="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={},
        devices_per_node=max(run.setup.problem.cluster.devices_per_node for run in measured),
        slots_per_node=None,
        layers=(),
        comms=(),
        contention=(),
        constants=(),
    )
