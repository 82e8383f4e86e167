"""The units that data parallelism wraps: blocks by class, and the two ends of the model."""

from __future__ import annotations

from planner.cost.passes import Unit
from planner.foundation.frozen import frozen
from planner.job.problem import PlanningProblem
from planner.model.lora import adapted, layer_adapter_params
from planner.model.spec import Block, Layer
from planner.model.workload import Adapters
from planner.strategy.strategy import Degrees


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
