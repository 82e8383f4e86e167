"""Time and activation bytes of one layer on one device, from samples or from first principles.

Where the profile measured the layer's class, its samples tell (planner.cost.stage.layer_samples):
"measured",
"interpolated" or "fitted". Without any the analytic time stands alone ("datasheet").

The units that data parallelism wraps: blocks by class, and the two ends of the model.

Blocks as measured runs tell of them: a ratio to the price of every shape, from those that ran.

Constants cannot say which kernels a library picks for which sizes. A block of one shape takes the same time
in every run of the same software on the same device, however many of them a model has: what runs took beyond
their predicted time speaks of the blocks that they are made of. ln(told / priced) is a Gaussian process
around 0 over the octaves of tp, tokens, sequence and width (Matern 3/2; Rasmussen and Williams, "Gaussian
Processes for Machine Learning", 2006, eq. 2.25), so shapes unlike all that ran keep their price. It is the
discrepancy of a calibrated model (Kennedy and O'Hagan, "Bayesian calibration of computer models", 2001).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from planner.cost.communication.context_parallel import with_context_buffers
from planner.cost.compute.analytic import DeviceRates, Known, analytic_cost, core_s, device_rates
from planner.cost.compute.measured_operators import matern
from planner.cost.constants import TimeConstants, memory_constants
from planner.cost.layer import LayerCost, LayerShape, Unit
from planner.cost.memory.activations import engine_bytes
from planner.cost.stage.layer_samples import Run, SampleTable, at_usual_speed
from planner.foundation.arrays import larger, smaller
from planner.foundation.frozen import frozen
from planner.job.problem import PlanningProblem
from planner.model.lora import adapted, layer_adapter_params
from planner.model.spec import Block, Layer
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import Adapters
from planner.profile.profile import BlockResiduals, BlockShape, LayerKind, Profile, shape_key
from planner.strategy.strategy import Degrees

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints

FUSED_SOFTMAX_BATCHES = 4
"""Megatron-LM's fused softmax takes a multiple of so many (sequence, head) pairs; for others it falls back
to separate operators (megatron/core/fusions/fused_softmax.py, is_kernel_available)."""

FUSED_SOFTMAX_KEYS = 4096
"""And rows of at most so many keys."""


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
    settings = problem.engine_settings
    told = profile.residuals_of(
        device=problem.device.name,
        framework=settings.framework,
        engine=settings.engine.family,
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
        compiled=problem.engine_settings.compiled,
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


@frozen
class Units:
    """One device's units: blocks by the key of their class, embedding, head."""

    blocks: dict[str, Unit]
    embedding: Unit
    head: Unit

    def all(self) -> tuple[Unit, ...]:
        """Every distinct unit."""
        return (*self.blocks.values(), self.embedding, self.head)


def units_of(problem: PlanningProblem, classes: dict[str, Layer], degrees: Degrees) -> Units:
    """The units of a model; with adapters, a block trains these alone and the ends train nothing."""
    adapters, tp = problem.workload.adapters, degrees.tp
    model = problem.model.padded(tp)
    table = model.vocab * model.token_width
    rows = table + model.head_bias * model.vocab
    head = model.params_head + (table if model.tied_embeddings else 0)
    # Rows of the vocabulary are shared out; norms and tables of positions are whole on every rank.
    return Units(
        blocks={key: _block_unit(block, adapters, degrees) for key, block in classes.items()},
        embedding=_end_unit(
            model.params_embedding - table + table / tp, 1 + bool(model.learned_positions), adapters
        ),
        head=_end_unit(head - rows + rows / tp, 2, adapters),
    )


def _block_unit(block: Layer, adapters: Adapters | None, degrees: Degrees) -> Unit:
    """Shards of a block's weights by tp, and its share of the routed experts."""
    params, routed = block.params_shard(degrees.tp), 0.0
    copied: tuple[tuple[int, float], ...] = ()
    if isinstance(block, Block):
        copied = tuple(block.params_copied(degrees.tp).items())
        routed = block.routed_params_shard(degrees.expert_tp) / degrees.ep
        params += routed - block.routed_params_shard(degrees.tp)
    if adapters is None:
        return Unit(params=params, tensors=block.tensors, trained=params, routed_params=routed, copied=copied)
    return Unit(
        params=params,
        tensors=2 * len(adapted(block, adapters.modules)),
        trained=layer_adapter_params(adapters, block, degrees.tp),
        routed_params=routed,
    )


def _end_unit(params: float, tensors: int, adapters: Adapters | None) -> Unit:
    if adapters is None:
        return Unit(params=params, tensors=tensors, trained=params)
    return Unit(params=params, tensors=0, trained=0.0)


TIMES = ("forward_s", "backward_s", "forward_idle_s", "backward_idle_s")
"""The seconds of a layer's cost."""

ORIGINS = ("measured", "interpolated", "fitted", "datasheet")


def process_groups(degrees: Degrees, copied: int = 0) -> int:
    """Number of communicators of a device: one for each axis of more than one rank, and one for each of
    `copied` numbers of key-value heads that tensor-parallel neighbours hold copies of."""
    axes = (degrees.tp, degrees.pp, degrees.dp_shard, degrees.dp_replicate, degrees.cp, degrees.ep)
    return sum(size > 1 for size in axes) + copied


class LayerModel:
    """Layer costs of one planning problem, remembered by shape.

    `classes` are the model's layer classes by key, `keys` the class of each layer.
    """

    def __init__(
        self, problem: PlanningProblem, constants: TimeConstants, ratios: Ratios | None = None
    ) -> None:
        self.problem, self.constants = problem, constants
        self.ratios = ratios or residuals_of(problem.profile, problem)
        self.samples = at_usual_speed(problem.profile.layers) if problem.profile else []
        self.rates = device_rates(problem, constants)
        precision, curved = problem.workload.precision, self.rates is not None
        self.table = SampleTable(self.samples, precision, self.analytic, curved=curved)
        self.memory = memory_constants(problem)
        model = problem.model
        self.classes, self.params_total = model.classes(), model.params_total
        self.attention = model.attention
        self.params_routed = model.params_routed
        self.stream_width = model.stream_width
        each = [(segment.block.shape_key, segment.count) for segment in model.segments]
        self.keys = tuple(key for key, count in each for _ in range(count))
        self._before = {key: [0, *accumulate(k == key for k in self.keys)] for key in self.classes}
        self._known: dict[LayerShape, LayerCost] = {}
        self._blocks: Known = {}
        self._units: dict[tuple[int, int, int | None], Units] = {}
        self._copied: dict[int, int] = {}
        self._run_rates: dict[Run, DeviceRates] = {}
        self._analytic_known: dict[tuple[LayerShape, Run], LayerCost] = {}

    def count(self, key: str, first: int, end: int) -> int:
        """Blocks of a class among the layers [first, end)."""
        return self._before[key][end] - self._before[key][first]

    def counts(self, key: str, firsts: Ints, ends: Ints) -> Ints:
        """The same of many ranges of layers at once."""
        import numpy as np

        before = np.asarray(self._before[key])
        counted: Ints = before[ends] - before[firsts]
        return counted

    def units(self, degrees: Degrees) -> Units:
        """What data parallelism wraps of the model."""
        key = degrees.tp, degrees.ep, degrees.etp
        if key not in self._units:
            self._units[key] = units_of(self.problem, self.classes, degrees)
        return self._units[key]

    def runtime_bytes(self, degrees: Degrees) -> int:
        """Bytes of a device's communicators; processes that share the cores of a host have none."""
        if degrees.world == 1 or self.problem.cluster.groups[0].slots_per_node is not None:
            return 0
        if degrees.tp not in self._copied:
            self._copied[degrees.tp] = len(self.problem.model.heads_copied(degrees.tp))
        groups = process_groups(degrees, self._copied[degrees.tp])
        return round(self.memory.communicator_bytes * groups)

    def all_units(self, degrees: Degrees) -> list[tuple[Unit, int]]:
        """The units of the whole model with their counts."""
        units = self.units(degrees)
        blocks = [(units.blocks[key], self.count(key, 0, len(self.keys))) for key in self.classes]
        return [*blocks, (units.embedding, 1), (units.head, 1)]

    def kernel(self, degrees: Degrees) -> AttentionKernel:
        """The attention kernel that runs: a fused softmax does not take every shape."""
        kernel = self.problem.engine_settings.attention
        if kernel is not AttentionKernel.FUSED or self.attention is None:
            return kernel
        pairs = degrees.micro_batch * self.attention.heads // degrees.tp
        taken = pairs % FUSED_SOFTMAX_BATCHES == 0 and self.problem.workload.seq <= FUSED_SOFTMAX_KEYS
        return kernel if taken else AttentionKernel.EAGER

    def cost(self, shape: LayerShape) -> LayerCost:
        """The cost of a layer of the problem's model."""
        if shape not in self._known:
            self._known[shape] = self._as_ran(self._with_frozen(self._cost(shape), shape), shape)
        return self._known[shape]

    def _as_ran(self, cost: LayerCost, shape: LayerShape) -> LayerCost:
        """The cost with the time that runs tell of such a block, no shorter than one that recomputes nothing.

        What a forward pass takes does not follow what is recomputed later: the rest is the backward's.
        """
        if self.ratios is None or shape.kind is not LayerKind.BLOCK or cost.backward_s == 0:
            return cost
        usual = dataclasses.replace(shape, recompute=Recompute.NONE)
        ratio = self._ratio(usual)
        forward_s, backward_s = ratio * cost.forward_s, ratio * cost.backward_s
        busy_s = backward_s - ratio * cost.backward_idle_s
        if shape != usual:
            keeping, whole_s = self.cost(usual), self._ratio(shape) * (cost.forward_s + cost.backward_s)
            backward_s = larger(whole_s - forward_s, keeping.backward_s)
            share = 1 - cost.backward_idle_s / cost.backward_s
            busy_s = larger(share * backward_s, keeping.backward_s - keeping.backward_idle_s)
        return dataclasses.replace(
            cost,
            forward_s=forward_s,
            backward_s=backward_s,
            forward_idle_s=ratio * cost.forward_idle_s,
            backward_idle_s=backward_s - busy_s,
        )

    def _ratio(self, shape: LayerShape) -> Any:
        return self.ratios.ratio(self._block_shape(shape)) if self.ratios else 1.0

    def _block_shape(self, shape: LayerShape) -> BlockShape:
        return block_shape(self.classes[shape.block or self.keys[0]], shape, self.problem)

    def _with_frozen(self, cost: LayerCost, shape: LayerShape) -> LayerCost:
        """The cost with the times of adapters beside frozen weights, where the workload trains only those.

        Samples are of full training: they are scaled by what the analytic times say of the difference.
        """
        adapters, model = self.problem.workload.adapters, self.problem.model
        if adapters is None or self.rates is None:
            return cost
        frozen = analytic_cost(model, shape, self.rates, adapters, known=self._blocks)
        if not self.samples:
            times = {name: getattr(frozen, name) for name in TIMES}
            return dataclasses.replace(cost, **times)
        whole = analytic_cost(model, shape, self.rates)
        scaled = {
            name: getattr(cost, name) * getattr(frozen, name) / getattr(whole, name)
            for name in TIMES
            if getattr(whole, name) > 0
        }
        return dataclasses.replace(cost, **scaled, origin="fitted")

    def doubt(self, shape: LayerShape) -> float:
        """The standard deviation of a block's time, as a share, around what runs tell; 0 where none do."""
        return self.ratios.doubt(self._block_shape(shape)) if isinstance(self.ratios, Residuals) else 0.0

    def lowest_spares_s(self, shape: LayerShape) -> float:
        """Seconds by which the first block's backward is shorter, nothing below it being trained."""
        adapters, model = self.problem.workload.adapters, self.problem.model
        if adapters is None or self.rates is None:
            return 0.0
        each = [analytic_cost(model, shape, self.rates, adapters, lowest=end) for end in (False, True)]
        spared: float = self._ratio(shape) * (each[0].backward_s - each[1].backward_s)
        return spared

    def core_s(self, shape: LayerShape) -> tuple[float, float]:
        """Forward and backward between a block's projections; (0, 0) where the device's rates are unknown."""
        return core_s(self.problem.model, shape, self.rates) if self.rates else (0.0, 0.0)

    def deferrable_s(self, shape: LayerShape) -> float:
        """Seconds of a block's weight gradients that can wait for W: as its forward takes, at most half
        of its backward.

        Attention's part of the forward, which has no weights, is in it: a share that follows the sequence or
        the device's rates would let a pass take longer where its work or its time falls.
        """
        if self.problem.workload.adapters is not None:
            return 0.0
        cost = self.cost(shape)
        return smaller(cost.forward_s, cost.backward_s / 2)

    def exchange_measured(self, shape: LayerShape) -> bool:
        """Whether a layer's cost holds what a rank itself does for its context-parallel exchange: the host's
        part of each message, and putting together what came."""
        form = self.table.nearest(self._key(shape), shape, compiled=self.problem.engine_settings.compiled)
        return form is not None and shape.cp > 1 and form.exchange is shape.cp_exchange

    def _key(self, shape: LayerShape) -> str:
        return shape.block or shape_key(self.problem.model, shape.kind)

    def _cost(self, shape: LayerShape) -> LayerCost:
        settings = self.problem.engine_settings
        measured = self.table.cost(self._key(shape), shape, compiled=settings.compiled)
        if measured is not None:
            return measured
        analytic = analytic_cost(self.problem.model, shape, self.rates, known=self._blocks)
        analytic = with_context_buffers(analytic, self.problem.model, shape)
        return engine_bytes(analytic, self.problem.model, shape, settings, self.memory)

    def analytic(self, shape: LayerShape, run: Run) -> LayerCost:
        """The cost from first principles, samples left aside, of a layer that runs like this."""
        if (shape, run) not in self._analytic_known:
            cost = analytic_cost(self.problem.model, shape, self._rates(run))
            self._analytic_known[shape, run] = with_context_buffers(cost, self.problem.model, shape)
        return self._analytic_known[shape, run]

    def _rates(self, run: Run) -> DeviceRates | None:
        if self.rates is not None and run not in self._run_rates:
            self._run_rates[run] = rates_of_run(self.rates, run)
        return self._run_rates.get(run)


def rates_of_run(rates: DeviceRates, run: Run) -> DeviceRates:
    """The rates under which a layer runs as samples of it did."""
    constants = rates.constants
    if run.apart:
        constants = dataclasses.replace(constants, host_block_forward_s=0.0, host_tp_forward_s=0.0)
    imbalance = 1.0 if run.balanced else rates.imbalance
    return dataclasses.replace(rates, compiled=run.compiled, imbalance=imbalance, constants=constants)
