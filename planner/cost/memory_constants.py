"""The few constants of the memory model that measured runs can determine, with priors, bounds and meanings.

A profile may hold any of them, for all software, for one framework or for one set of its fused kernels. Two
hold for kinds of kernels: what norms keep, and attention that is not flash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from planner.cost import constants
from planner.cost.time_constants import Prior, unfused_norms
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.sublayer import AttentionKernel
from planner.strategy.strategy import Degrees

MEMORY_PRIORS: Mapping[str, Prior] = MappingProxyType(
    {
        "activation_scale": Prior(
            value=1.0, spread=0.1, low=0.5, high=2.0,
            meaning="bytes that blocks keep for the backward pass over those of the formula",
        ),
        "grad_bytes": Prior(
            value=4.0, spread=1.0, low=1.0, high=8.0,
            meaning="bytes of a parameter's gradient where weights have a master: 4 in Megatron's buffers, 2 "
            "in DeepSpeed's (ZeRO, arXiv 1910.02054), 2 + 4 in its bf16 optimizer",
        ),
        "norm_bytes": Prior(
            value=0.0, spread=1.0, low=0.0, high=12.0,
            meaning="bytes that a norm of one kernel keeps of each value besides input and result",
        ),
        "unfused_norm_bytes": Prior(
            value=8.0, spread=2.0, low=0.0, high=24.0,
            meaning="the same of a norm in tensor operations: the input in fp32, kept for the square and for "
            "the product",
        ),
        "probability_scale": Prior(
            value=2.5, spread=0.5, low=0.5, high=6.0,
            meaning="copies of the attention's probabilities that a fused softmax keeps: softmax, mask and "
            "dropout are 2.5 (arXiv 2205.05198)",
        ),
        "eager_probability_scale": Prior(
            value=3.5, spread=0.5, low=0.5, high=8.0,
            meaning="the same of attention in tensor operations: the scores besides",
        ),
        "loss_bytes": Prior(
            value=12.0, spread=2.0, low=4.0, high=40.0,
            meaning="bytes of each logit at the worst moment of the loss: 2 as the product gives it, 4 as "
            "logarithm of the softmax, 4 and 2 of its gradient",
        ),
        "gathered_logits_bytes": Prior(
            value=0.0, spread=2.0, low=0.0, high=20.0,
            meaning="bytes of each logit besides where tensor-parallel ranks gather them for the loss: the "
            "parts, the message's buffer, the whole, 2 each",
        ),
        "transient_scale": Prior(
            value=1.0, spread=0.3, low=0.2, high=4.0,
            meaning="bytes that live for a moment over those of the formula",
        ),
        "allocator_slack": Prior(
            value=1.0, spread=0.06, low=1.0, high=1.5,
            meaning="what the allocator reserves over tensors, pools and holes that the formula knows",
        ),
        "context_bytes": Prior(
            value=0.818 * 2**30, spread=0.3, low=0.2 * 2**30, high=4.0 * 2**30,
            meaning="what the driver's context and the libraries' code take outside the allocator "
            "(0.817 GiB on H100 with torch 2.11, the same in 16 runs)",
        ),
        "communicator_bytes": Prior(
            value=constants.COMMUNICATOR_BYTES, spread=0.2 * 2**30, low=0.0, high=2.0 * 2**30,
            meaning="buffers of one process group's communicator (aiconfigurator-core 0.12.0: 342 MB for "
            "2 devices, 392 MiB for 4 to 8)",
        ),
        "workspace_bytes": Prior(
            value=0.065 * 2**30, spread=0.1 * 2**30, low=0.0, high=1.0 * 2**30,
            meaning="workspaces of the libraries that the allocator counts (H100 with torch 2.11)",
        ),
    }
)  # fmt: skip


@frozen
class MemoryConstants:
    """The constants of one stack: fitted where a profile has them, else their priors.

    `norm_bytes` and `probability_scale` are those of the stack's kind of norm and attention.
    """

    activation_scale: float
    grad_bytes: float
    norm_bytes: float
    probability_scale: float
    loss_bytes: float
    gathered_logits_bytes: float
    transient_scale: float
    allocator_slack: float
    context_bytes: float
    communicator_bytes: float
    workspace_bytes: float


def memory_constants(problem: PlanningProblem) -> MemoryConstants:
    """The constants that hold for a problem's device and stack."""
    settings, values = problem.engine_settings, {}
    for field in dataclasses.fields(MemoryConstants):
        name = constant_name(field.name, settings)
        fitted = fitted_constant(problem, name)
        values[field.name] = memory_prior(name, settings) if fitted is None else fitted
    return MemoryConstants(**values)


def constant_name(name: str, settings: EngineSettings) -> str:
    """The constant that stands for `name` where a stack's kernels decide."""
    if name == "norm_bytes" and unfused_norms(settings):
        return "unfused_norm_bytes"
    if name == "probability_scale" and settings.attention is AttentionKernel.EAGER:
        return "eager_probability_scale"
    return name


def fitted_constant(problem: PlanningProblem, name: str) -> float | None:
    """What the problem's profile says of a constant for its device and stack, or None."""
    profile, settings = problem.profile, problem.engine_settings
    if profile is None:
        return None
    device = problem.device.name
    return profile.constant_of(
        name,
        device=device,
        network=problem.cluster.network,
        framework=settings.framework,
        kernels=settings.kernels,
        engine=settings.engine.family,
    )


def memory_prior(name: str, settings: EngineSettings) -> float:
    """The prior of a constant for a stack."""
    if name == "grad_bytes" and settings.engine is Engine.DEEPSPEED:
        return 2.0
    if name == "loss_bytes" and settings.gathers_logits:
        return 16.0  # written in plain operations: three fp32 tensors at once beside the logits and a copy
    if name == "loss_bytes" and settings.fused_loss:
        return 8.0  # as the product gives it, its softmax in fp32, the gradient in 16 bits
    if name == "gathered_logits_bytes" and settings.gathers_logits:
        return 6.0
    if name == "allocator_slack" and settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED):
        return 1.06  # published logs have 1.06 to 1.22
    return MEMORY_PRIORS[name].value


def process_groups(degrees: Degrees, copied: int = 0) -> int:
    """Communicators of a device: one for each axis over which it talks to others, and for each of `copied`
    numbers of key-value heads that neighbours have copies of."""
    axes = (degrees.tp, degrees.pp, degrees.dp_shard, degrees.dp_replicate, degrees.cp, degrees.ep)
    return sum(size > 1 for size in axes) + copied
