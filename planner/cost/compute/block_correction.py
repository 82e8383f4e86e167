"""Blocks as measured runs tell of them: a ratio to the price of every shape, from those that ran.

Constants cannot say which kernels a library picks for which sizes. A block of one shape takes the same time
in every run of the same software on the same device, however many of them a model has: what runs took beyond
their predicted time speaks of the blocks that they are made of. ln(told / priced) is a Gaussian process
around 0 over the octaves of tp, tokens, sequence and width (Matern 3/2; Rasmussen and Williams, "Gaussian
Processes for Machine Learning", 2006, eq. 2.25), so shapes unlike all that ran keep their price. It is the
discrepancy of a calibrated model (Kennedy and O'Hagan, "Bayesian calibration of computer models", 2001).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from planner.cost.compute.measured_operators import matern
from planner.cost.layer import LayerShape
from planner.job.problem import PlanningProblem
from planner.model.spec import Layer
from planner.profile.profile import BlockResiduals, BlockShape, Profile

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats

PARAMS_OF_WIDTH = 12
"""Parameters of a GPT block of hidden size h, over h squared."""

OCTAVES = (1.0, 1.0, 1.0, 0.25)
"""Octaves of tp, tokens, sequence and width over which blocks are alike. Kernels are picked by exact widths,
and measured runs of one width say little of another, even half an octave away."""

UNLIKE = {
    "device": 0.5,
    "precision": 0.5,
    "recompute": 0.5,
    "kernel": 0.8,
    "compiled": 0.5,
    "routed": 0.5,
    "splits_sequences": 0.5,
}
"""Correlation of blocks that differ in one of these; a kernel of attention is the least of a block."""


class Ratios(Protocol):
    """What says how much longer than its price a block takes."""

    def ratio(self, shape: BlockShape) -> Any:
        """The factor on its time; an array where several are asked for at once."""
        ...


class Residuals:
    """The ratios that the runs of a profile's fit tell."""

    def __init__(self, told: BlockResiduals) -> None:
        self.told = told
        self._doubts: dict[BlockShape, float] = {}

    def ratio(self, shape: BlockShape) -> float:
        """1 where no run tells of such a block."""
        across = self.told.spread**2 * likeness(placed([shape]), self._placed)
        return math.exp(float((across @ self._weights)[0]))

    def doubt(self, shape: BlockShape) -> float:
        """Standard deviation of the ratio's logarithm: `spread` where no run tells of such a block, next to
        nothing where many do."""
        if shape not in self._doubts:
            across = self.told.spread**2 * likeness(placed([shape]), self._placed)[0]
            left = self.told.spread**2 - float(across @ self._inverse @ across)
            self._doubts[shape] = math.sqrt(max(left, 0.0))
        return self._doubts[shape]

    @cached_property
    def _placed(self) -> Placed:
        return placed([each.shape for each in self.told.told])

    @cached_property
    def _inverse(self) -> Floats:
        """The inverse of the covariance of what was told."""
        import numpy as np

        between = self.told.spread**2 * likeness(self._placed, self._placed)
        noise = np.diag([self.told.noise**2 / each.weight for each in self.told.told])
        found: Floats = np.linalg.inv(between + noise)  # type: ignore[assignment]
        return found

    @cached_property
    def _weights(self) -> Floats:
        """That times what was told."""
        import numpy as np

        found: Floats = self._inverse @ np.array([each.log_ratio for each in self.told.told])
        return found


def residuals_of(profile: Profile | None, problem: PlanningProblem) -> Residuals | None:
    """What a profile's runs tell of the blocks of a problem."""
    if profile is None:
        return None
    stack = problem.stack
    told = profile.residuals_of(
        device=problem.device.name,
        framework=stack.framework,
        engine=stack.engine.family,
        network=problem.cluster.network,
    )
    return Residuals(told) if told is not None and told.told else None


def block_shape(block: Layer, shape: LayerShape, problem: PlanningProblem) -> BlockShape:
    """The shape of a block of a class."""
    return BlockShape(
        device=problem.device.name,
        precision=shape.precision,
        recompute=shape.recompute,
        kernel=shape.kernel,
        compiled=problem.stack.compiled,
        routed=block.params_active < block.params,
        tp=shape.tp,
        cp=shape.cp,
        tokens=shape.tokens,
        seq=shape.seq,
        width=math.sqrt(block.params_active / PARAMS_OF_WIDTH),
    )


class Placed(NamedTuple):
    """Shapes (rows) by the logarithms of their sizes, and by what is alike or not."""

    sizes: Floats
    kinds: Any


def placed(shapes: Sequence[BlockShape]) -> Placed:
    """Shapes as `likeness` takes them."""
    import numpy as np

    sizes = [(each.tp, each.tokens, each.seq, each.width) for each in shapes]
    kinds = [[getattr(each, name) for name in UNLIKE] for each in shapes]
    return Placed(np.log2(sizes), np.array(kinds, dtype=object))


def likeness(a: Placed, b: Placed) -> Floats:
    """Correlation of the ratios of two lists of shapes."""
    import numpy as np

    unlike = a.kinds[:, None] != b.kinds[None, :]
    kin = np.where(unlike, list(UNLIKE.values()), 1.0).prod(axis=2)
    found: Floats = matern(a.sizes, b.sizes, np.array(OCTAVES)) * kin
    return found
