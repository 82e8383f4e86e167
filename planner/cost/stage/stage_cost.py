"""StageCost: what one pipeline stage costs on each of its devices, and what of it lies in host memory."""

from __future__ import annotations

from planner.cost.memory.parameter_state import ParamBytes
from planner.cost.passes import Pass
from planner.foundation.frozen import frozen


@frozen
class Hosted:
    """What of a stage lies in host memory: `blocks` first blocks' activations, state, or both.

    `kept` are the states that stay on the device. `saved_bytes` are activations of a micro-batch and
    `state_bytes` the optimizer's in host memory; `window_bytes` of activations are on the device at a time,
    those of `window` blocks.
    """

    kept: ParamBytes
    state_bytes: float
    state_params: float
    blocks: int
    window: int
    saved_bytes: float
    window_bytes: float


@frozen
class StageCost:
    """One stage on each of its devices.

    `unshard_s` comes before the first forward of a step, `reduce_s` after the last backward, `optimizer_s`
    after the reduction of all stages. `copied_s` of `reduce_s` sums the gradients of key-value heads over
    the tensor-parallel ranks that have copies of them. `params` are those of one device's shard by tensor
    and expert parallelism, before any sharding over data ranks; `end_params` those of embedding and head
    among them, `routed_params` those of routed experts, `largest_apart_params` those of the largest block's
    experts where they are a unit of their own. `saved_bytes` are kept for each micro-batch;
    `block_saved_bytes` of them by blocks; `waiting_bytes` from its input gradients to its weight gradients,
    where a schedule puts those off and the engine holds less for them. `frozen` weights have no gradients:
    those of adapters beside them alone. `hosted` says what of the stage lies in host memory, where something
    does (planner.cost.fit.offload).
    `weights_s` are the blocks' weight gradients that the engine can leave for later, `deferred_s` those that
    it does: of blocks that recompute nothing. None where it splits a backward as torch does.
    """

    forward: Pass
    backward: Pass
    unshard_s: float
    reduce_s: float
    optimizer_s: float
    params: float
    largest_unit_params: float
    saved_bytes: float
    forward_transient_bytes: float
    backward_transient_bytes: float
    blocks: int = 0
    end_params: float = 0.0
    routed_params: float = 0.0
    largest_block_params: float = 0.0
    largest_apart_params: float = 0.0
    block_saved_bytes: float = 0.0
    block_transient_bytes: float = 0.0
    waiting_bytes: float = 0.0
    holds_head: bool = False
    frozen: bool = False
    hosted: Hosted | None = None
    weights_s: float | None = None
    deferred_s: float | None = None
    copied_s: float = 0.0
