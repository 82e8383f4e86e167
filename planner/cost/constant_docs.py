"""What each constant of a profile means, and how its value is told.

Constants of the time and memory models have their meanings beside their priors; the others are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from planner.cost.constants import OVERLAP_SLOWDOWN
from planner.cost.memory_constants import MEMORY_PRIORS
from planner.cost.time_constants import PRIORS
from planner.foundation.units import format_bytes, format_seconds, format_si

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "gemm_flops": "rate of one large matrix product",
        "memory_bytes_per_s": "rate of a copy in device memory, reads and writes counted",
        "runtime_bytes": "memory of a process or context before anything is trained",
        "fsdp_unit_forward_s": "what the hooks of a sharded unit add to its forward, messages apart",
        "fsdp_unit_backward_s": "the same in its backward",
        "fsdp_reduce_unit_s": "what reducing a sharded unit's gradients takes besides its bytes",
        "fsdp_reduce_copy_s_per_byte": "copies around that reduction, for each byte in fp32",
        "fsdp_gather_unit_s": "what gathering a sharded unit takes besides its bytes",
        "fsdp_gather_copy_s_per_byte": "copies around that gathering, for each gathered byte",
        "fsdp_copy_s_per_byte": "the mean of both copies",
        "fsdp_reduce_bend_bytes": "bytes beyond which reducing a sharded unit has another rate",
        "fsdp_reduce_beyond_s_per_byte": "that rate, for each byte beyond",
        "fsdp_gather_bend_bytes": "bytes beyond which gathering a sharded unit has another rate",
        "fsdp_gather_beyond_s_per_byte": "that rate, for each byte beyond",
        "replicate_reduce_bend_bytes": "bytes beyond which summing a replicated unit has another rate",
        "replicate_reduce_beyond_s_per_byte": "that rate, for each byte beyond",
        "replicate_unit_forward_s": "what the hooks of a replicated unit add to its forward",
        "replicate_unit_backward_s": "the same in its backward",
        "replicate_reduce_unit_s": "what summing a replicated unit's gradients takes besides its bytes",
        "replicate_reduce_copy_s_per_byte": "copies around that sum, for each byte in fp32",
        "grad_accumulate_s_per_param": "adding a gradient to one that exists, for each parameter",
        "pp_action_s": "what the pipeline's runtime adds to each pass through a stage",
        "optimizer_s_per_tensor": "update of the optimizer, for each tensor",
        "optimizer_s_per_param": "update of the optimizer, for each parameter",
        "clip_s_per_tensor": "norm and scaling of gradients, for each tensor",
        "clip_s_per_param": "norm and scaling of gradients, for each parameter",
        "overlap_slowdown": "how much longer products take while a copy runs beside them, as a share",
        "overlap_message_slowdown": "how much longer that copy takes beside products, as a share",
        "time_error": "share by which predicted step times are off: 90 % of runs left out are within it",
        "memory_error_lower": "share of the peak that the real one may lie below the predicted",
        "memory_error_upper": "share of the peak that the real one may lie above the predicted",
    }
)


def meaning_of(name: str) -> str:
    """What a constant means; empty where this version does not know it."""
    prior = PRIORS.get(name) or MEMORY_PRIORS.get(name)
    return prior.meaning if prior is not None else MEANINGS.get(name, "")


def usual_value(name: str) -> float | None:
    """The value before any fit, or None for constants that only measuring gives."""
    if name == "overlap_slowdown":
        return OVERLAP_SLOWDOWN
    prior = PRIORS.get(name) or MEMORY_PRIORS.get(name)
    return None if prior is None else prior.value


UNITS = (
    ("_s_per_byte", "s a byte"),
    ("_s_per_param", "s a parameter"),
    ("_s_per_tensor", "s a tensor"),
)


def told_value(name: str, value: float) -> str:
    """A constant's value for people, in the unit that its name says."""
    if value == 0:
        return "0"
    for suffix, unit in UNITS:
        if name.endswith(suffix):
            return f"{value:.3g} {unit}"
    if name.endswith("_bytes_per_s"):
        return format_si(value, "B/s")
    if name.endswith("_flops"):
        return format_si(value, "FLOP/s")
    if name in COUNTED:
        return f"{value:.4g}"
    if name.endswith("_bytes"):
        return format_bytes(value)
    return format_seconds(value) if name.endswith("_s") else f"{value:.4g}"


COUNTED = ("grad_bytes", "norm_bytes", "unfused_norm_bytes", "loss_bytes", "gathered_logits_bytes")
"""Bytes of one value, not sizes."""
