"""What clipping and update take of each tensor and each parameter of a device's shard."""

from __future__ import annotations

from planner.cost.analytic import DeviceRates
from planner.cost.messages import Messages
from planner.cost.physics import Physics

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
