"""told_of_blocks(): what is left of runs' times once constants are fitted, as ratios of their blocks' shapes.

Run i of step time t_i, predicted p_i, of which a share s_i follows the time of its blocks of shape x_i, says

    ln(t_i / p_i) = s_i g(x_i) + noise,     g ~ Gaussian process over shapes
    (planner.cost.compute.block_correction)

with noise as Cauchy's, as in the fit: what other runs of like blocks do not say too is no block's. Spread
and noise are those that predict groups of runs best from the others, by g of all but them (eq. 5.12 of
Rasmussen and Williams, for several rows) on top of the fit's own left-out errors. Unless that makes these
errors less by a part that chance would not, nothing is told.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from planner.calibration.fit import Fit, Scope
from planner.calibration.predict import LayersKey, Measured, step_time_s
from planner.cost.compute.block_correction import block_shape, likeness, placed
from planner.cost.evaluate import CostModel
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.time_constants import physics_of
from planner.profile.block_residual import BlockResidual, BlockResiduals, BlockShape
from planner.profile.profile import LayerKind, Profile

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
            physics = physics_of(profile, problem.stack, problem.device.name, problem.cluster.network)
            layers[run.layers_key] = LayerModel(problem, physics, _Slower())
        model = CostModel(problem, layers[run.layers_key])
        taken: Any = step_time_s(model, strategy)
        shares.append(math.log(taken[1] / taken[0]) / math.log1p(STEP))
        key = max(model.layers.classes, key=model.layers.keys.count)
        recompute = strategy.stages[0].recompute.options()[0]
        asked = model.shape(strategy.degrees).shape_of(LayerKind.BLOCK, recompute, key)
        shapes.append(block_shape(model.layers.classes[key], asked, problem))
    return shapes, np.maximum(np.array(shares), 1e-3)
