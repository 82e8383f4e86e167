"""What adding up gradients, clipping and update take of each tensor and parameter of a device's shard."""

from __future__ import annotations

from planner.cost.communication.messages import Messages
from planner.cost.compute.analytic import DeviceRates
from planner.cost.time_constants import Physics
from planner.job.engine_settings import Engine

UPDATE_BYTES = 28.0
"""AdamW reads parameter, gradient and two moments, and writes three of them, all in fp32."""


def update_s(messages: Messages, rates: DeviceRates | None, physics: Physics) -> tuple[float, float]:
    """Seconds a tensor, and a parameter: of a profile's sweep, else its constants, else by bytes."""
    swept = rates.sampled.update_s() if rates and rates.sampled and rates.own else None
    if swept is not None:
        return swept
    constant = messages.constant
    each = constant("optimizer_s_per_param") + constant("clip_s_per_param")
    per_tensor = constant("optimizer_s_per_tensor") + constant("clip_s_per_tensor")
    if each == 0.0 and rates is not None:
        each = physics.optimizer_scale * UPDATE_BYTES / rates.memory_bytes_per_s
    return per_tensor, each


def accumulate_s(messages: Messages, rates: DeviceRates | None) -> float:
    """Seconds of adding a micro-batch's gradient to that of earlier ones, a parameter: measured, or by bytes.

    Megatron-LM adds the compute precision's to fp32, DeepSpeed adds in the compute precision, all others in
    fp32: two are read, one is written. Where bf16 gradients are summed beside themselves, these are set to
    zero and added to before. Behind a product that adds up by itself that takes no time.
    """
    measured, stack = messages.constant("grad_accumulate_s_per_param"), messages.problem.stack
    if measured or rates is None or stack.accumulates_in_products:
        return measured
    size = messages.value_bytes
    moved = {Engine.MEGATRON: size + 8, Engine.DEEPSPEED: 3 * size}.get(stack.engine, 12)
    if stack.accumulates_beside(messages.problem.workload.precision):
        moved += 4 * size
    return moved / rates.memory_bytes_per_s
