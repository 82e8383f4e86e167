"""Bytes that a device keeps for each parameter, by engine: weights, gradients, optimizer.

With c bytes of the compute precision, s of the optimizer's state and n shards over data ranks, for each
parameter of this device's tensor-parallel shard:

                        weights              gradients           optimizer
    native    ZeRO 0    4 + c (*)            4                   s
              ZeRO 1    4/n + c              4 (4/n: **)         s/n
              ZeRO 2    4/n + c              4/n                 s/n
              ZeRO 3    4/n                  4/n                 s/n
    torchtitan          as native; on one device as ZeRO 3 with n = 1
      in a pipeline     4/n + c              4 (**)              s/n
    megatron  ZeRO 0    c                    4                   4 + s
              ZeRO 1    c                    4                   (4 + s)/n
              ZeRO 2    c                    4/n                 (4 + s)/n
              ZeRO 3    c/n                  4/n                 (4 + s)/n
    deepspeed ZeRO 0    c                    2                   4 + s
              ZeRO 1    c                    2                   (4 + s)/n
              ZeRO 2    c                    2/n                 (4 + s)/n
              ZeRO 3    c/n                  2/n                 (4 + s)/n

(*) The copy that replication keeps; one device in fp32 needs none. (**) With one micro-batch, gradients are
reduced unit by unit. In fp32 there is no separate master: its 4 bytes fall away. The 4 and 2 of megatron's
and deepspeed's gradients are the constant grad_bytes, of which runs may tell otherwise; Megatron-DeepSpeed
keeps c more in bf16. A frozen weight (LoRA) has c bytes, or c/n under ZeRO 3, and nothing else; its adapters
are trained as above.

Where the optimizer is offloaded, all engines keep what offloaded_states says.

Sources: native and torchtitan, what FSDP2 keeps (fp32 shards, units gathered in the compute precision, fp32
reduction). torch's pipelines reduce gradients behind the last micro-batch alone, and keep weights gathered
from the first backward on, whatever FSDP2 is told (torch/distributed/pipelining/stage.py,
backward_maybe_with_nosync). Megatron-LM: 18 bytes a parameter, 6 + 12/d with its distributed optimizer (docs,
Distributed Optimizer). DeepSpeed: 2 + 2 + 12 (ZeRO, arXiv 1910.02054); its BF16_Optimizer adds fp32
gradients. States by optimizer: planner/model/workload.py.
"""

from __future__ import annotations

from functools import lru_cache

from planner.cost.constants import memory_constants
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.lora import layer_adapter_params
from planner.model.spec import Block, Layer, ModelSpec
from planner.model.workload import Optimizer
from planner.strategy.strategy import Degrees, Zero


@frozen
class ParamBytes:
    """Bytes for one parameter on a device. Adds up; times a number of parameters."""

    weights: float
    grads: float
    optimizer: float

    def __add__(self, other: ParamBytes) -> ParamBytes:
        return ParamBytes(
            weights=self.weights + other.weights,
            grads=self.grads + other.grads,
            optimizer=self.optimizer + other.optimizer,
        )

    def __mul__(self, factor: float) -> ParamBytes:
        return ParamBytes(
            weights=self.weights * factor, grads=self.grads * factor, optimizer=self.optimizer * factor
        )

    @property
    def total(self) -> float:
        return self.weights + self.grads + self.optimizer


@frozen
class States:
    """Bytes a parameter of blocks, of the ends (embedding and head), and of routed experts."""

    block: ParamBytes
    end: ParamBytes
    routed: ParamBytes

    def of(self, params: float, end_params: float, routed_params: float = 0.0) -> ParamBytes:
        """The bytes of `params` parameters, of which some belong to the ends and to routed experts."""
        if self.block == self.end == self.routed:
            return self.block * params
        rest = params - end_params - routed_params
        return self.block * rest + self.end * end_params + self.routed * routed_params


def states_of(problem: PlanningProblem, degrees: Degrees) -> States:
    """Bytes a parameter under a problem's engine, precision, optimizer and method."""
    model, optimizer = problem.model, problem.workload.optimizer
    block, end = state_rates(optimizer, model)
    n = degrees.weight_shards
    trained_block, trained_end = (_trained(problem, degrees, state, n) for state in (block, end))
    routed = _trained(problem, degrees, block, degrees.expert_shards)
    adapters = problem.workload.adapters
    if adapters is None:
        return States(block=trained_block, end=trained_end, routed=routed)
    whole = sum(s.count * s.block.params_shard(degrees.tp) for s in model.segments)
    beside = sum(s.count * layer_adapter_params(adapters, s.block, degrees.tp) for s in model.segments)
    frozen = _frozen(problem, degrees, n)
    return States(
        block=frozen + trained_block * (beside / whole),
        end=frozen,
        routed=_frozen(problem, degrees, degrees.expert_shards) + routed * (beside / whole),
    )


def offloaded_states(problem: PlanningProblem, degrees: Degrees) -> tuple[States, States]:
    """Bytes a parameter on the device, and in host memory, where the optimizer's state lies there.

    The device keeps weights in the compute precision, shared out under ZeRO 3 (native: as resident ones, with
    that precision in the master's place), and gradients that ZeRO does not share out; the host masters in
    fp32, the state, and fp32 gradients under ZeRO 2 and 3 (ZeRO-Offload, arXiv 2101.06840).
    """
    resident, size = states_of(problem, degrees), problem.workload.precision.compute_bytes
    block, end = state_rates(problem.workload.optimizer, problem.model)
    shared, parameters = degrees.zero >= Zero.GRADIENTS, degrees.zero is Zero.PARAMETERS
    native = problem.engine_settings.engine is Engine.NATIVE
    kinds = {
        "block": (resident.block, block, degrees.weight_shards),
        "end": (resident.end, end, degrees.weight_shards),
        "routed": (resident.routed, block, degrees.expert_shards),
    }
    device = {
        kind: ParamBytes(
            weights=kept.weights - (4 - size) / n if native else size / (n if parameters else 1),
            grads=0.0 if shared else kept.grads,
            optimizer=0.0,
        )
        for kind, (kept, _, n) in kinds.items()
    }
    host = {
        kind: ParamBytes(weights=4 / n, grads=4 / n if shared else 0.0, optimizer=state / n)
        for kind, (_, state, n) in kinds.items()
    }
    return States(**device), States(**host)


@lru_cache(maxsize=64)
def state_rates(optimizer: Optimizer, model: ModelSpec) -> tuple[float, float]:
    """Bytes of state a parameter: the mean over blocks, and over embedding and head."""
    blocks = sum(s.count * _layer_state_bytes(optimizer, s.block) for s in model.segments)
    table = optimizer.matrix_state_bytes(model.token_width, model.vocab, ends=True)
    end = table / (model.vocab * model.token_width) if model.vocab else 0.0
    return blocks / model.params_blocks, end


def _layer_state_bytes(optimizer: Optimizer, layer: Layer) -> float:
    """State of one layer; a traced layer's parameters are taken for matrices."""
    if not isinstance(layer, Block):
        return float(optimizer.state_bytes * layer.params)
    matrices = layer.matrices()
    each = (m.copies * optimizer.matrix_state_bytes(m.inputs, m.outputs) for m in matrices)
    vectors = layer.params - sum(m.copies * m.inputs * m.outputs for m in matrices)
    return sum(each) + optimizer.vector_state_bytes * vectors


def _frozen(problem: PlanningProblem, degrees: Degrees, n: int) -> ParamBytes:
    """A weight that is not trained: the compute precision's copy; n ranks may share it out."""
    shards = n if degrees.zero is Zero.PARAMETERS else 1
    size = problem.workload.precision.compute_bytes
    return ParamBytes(weights=size / shards, grads=0.0, optimizer=0.0)


def _trained(problem: PlanningProblem, degrees: Degrees, state: float, n: int) -> ParamBytes:
    """A weight that is trained; `state` bytes are the optimizer's, n ranks share it out."""
    if problem.engine_settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED):
        return _with_master(problem, degrees, state, n)
    zero, size = degrees.zero, problem.workload.precision.compute_bytes
    deferred = (
        problem.engine_settings.engine is Engine.TORCHTITAN and degrees.pp > 1 and zero is not Zero.NONE
    )
    copied = size if deferred or zero in (Zero.OPTIMIZER, Zero.GRADIENTS) else 0
    if zero is Zero.NONE and (
        degrees.replicas > 1 or (size < 4 and problem.engine_settings.engine is Engine.NATIVE)
    ):
        copied = size
    late = deferred or zero is Zero.OPTIMIZER
    whole = zero is Zero.NONE or (late and degrees.num_micro_batches > 1)
    return ParamBytes(weights=4 / n + copied, grads=4.0 if whole else 4 / n, optimizer=state / n)


def _with_master(problem: PlanningProblem, degrees: Degrees, state: float, n: int) -> ParamBytes:
    """Weights in the compute precision, a master in fp32 beside the optimizer's state."""
    zero, size = degrees.zero, problem.workload.precision.compute_bytes
    grads = memory_constants(problem).grad_bytes if size < 4 else 4.0
    if problem.engine_settings.accumulates_beside(problem.workload.precision):
        grads += size
    master = 4 if size < 4 else 0
    return ParamBytes(
        weights=size / (n if zero is Zero.PARAMETERS else 1),
        grads=grads / (n if zero >= Zero.GRADIENTS else 1),
        optimizer=(master + state) / (n if zero >= Zero.OPTIMIZER else 1),
    )
