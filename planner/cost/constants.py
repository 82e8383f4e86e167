"""The constants of the cost model: what each means, its unit, its prior and how far a fit may move it.

A profile may hold any of them: for all software, for one framework, or for one named set of its fused
kernels. A constant that the profile lacks has its prior. Three tables list them:

    TimeConstants      constants of the time model that measured runs determine (`plan calibrate`)
    MemoryConstants    constants of the memory model that measured runs determine
    MEASURED           constants that only `plan profile` or the residuals of a calibration give

Constants that nothing measures stand beside the formula that uses them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, format_bytes, format_seconds, format_si
from planner.job.engine_settings import Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.sublayer import AttentionKernel
from planner.profile.profile import Profile


@frozen
class ConstantSpec:
    """One constant of the cost model, whatever its value in a profile.

    `prior` is its value before any fit, None where only a measurement gives one. `spread` is the standard
    deviation of the prior: of the logarithm, or of the value itself where it may be 0 (`low` = 0). A fit
    keeps it within `low` and `high`. `unit` is empty for ratios and counts. `device` constants belong to a
    device and its links, the others to the software that runs on it.
    """

    name: str
    unit: str = ""
    meaning: str
    source: str = ""
    prior: float | None = None
    spread: float = 0.5
    low: float = 0.0
    high: float = 0.0
    device: bool = False

    @property
    def logarithmic(self) -> bool:
        """True if a fit moves the logarithm of the constant."""
        return self.low > 0

    @property
    def description(self) -> str:
        """The meaning with its source."""
        return f"{self.meaning} ({self.source})" if self.source else self.meaning

    def text(self, value: float) -> str:
        """Return a value of the constant in its unit, for people."""
        if value == 0:
            return "0"
        match self.unit:
            case "s":
                return format_seconds(value)
            case "bytes":
                return format_bytes(value)
            case "B/s" | "FLOP/s":
                return format_si(value, self.unit)
            case "bytes a value" | "":
                return f"{value:.4g}"
        return f"{value:.3g} {self.unit}"


def _fitted(prior: float, low: float, high: float, meaning: str, **more: Any) -> Any:
    """A field of a table of fitted constants; the field's name is the constant's."""
    about = {"prior": prior, "low": low, "high": high, "meaning": meaning, **more}
    return dataclasses.field(metadata=about)


def _specs(table: type) -> Mapping[str, ConstantSpec]:
    """The constants of a table by name."""
    fields = dataclasses.fields(table)
    return MappingProxyType({each.name: ConstantSpec(name=each.name, **each.metadata) for each in fields})


@frozen
class TimeConstants:
    """The values of the time model's constants for one software stack on one device.

    A value may be an array, an entry for each of many sets of constants: then one evaluation gives the cost
    under every set (planner.foundation.arrays), from which a fit takes its derivatives.
    """

    # fmt: off
    # Operators on the device
    gemm_scale: float = _fitted(
        1.0, 0.4, 1.3, "rate of matrix products over that of the tables", spread=0.25, device=True
    )
    attention_share: float = _fitted(
        0.48, 0.05, 0.9, "share of the dense peak that a flash attention kernel reaches",
        source="FlashAttention-2, arXiv 2307.08691: 0.5 to 0.7 on A100; less on H100",
        spread=0.4, device=True,
    )
    scan_share: float = _fitted(
        0.12, 0.01, 0.6, "share of the dense peak that the scan of a recurrent mixer reaches",
        source="as quick as FlashAttention-2 at 2k tokens with a quarter of its FLOPs: Mamba-2, arXiv "
        "2405.21060",
    )
    probability_passes: float = _fitted(
        6.0, 1.0, 60.0, "times that a fused softmax and its products read or write every attention "
        "probability in the forward pass; separate operators do so twice as often", spread=1.0,
    )
    fp8_scale: float = _fitted(
        1.0, 0.6, 1.5, "rate of fp8 products over that of the tables, gemm_scale apart: scales by tensor or "
        "block, casts of weights", spread=0.1,
    )
    cast_scale: float = _fitted(
        1.0, 0.1, 6.0, "bytes that casts to fp8 move over those of one kernel for each operand, which reads "
        "2 bytes of a value and writes 1 byte twice", spread=0.3,
    )
    elementwise_scale: float = _fitted(
        1.0, 0.1, 6.0, "bytes that element-wise kernels move over those of fused kernels", spread=0.7
    )
    norm_scale: float = _fitted(
        1.0, 0.2, 20.0, "bytes that norms move over those of one that reads and writes once", spread=0.7
    )
    rotary_scale: float = _fitted(
        9.0, 0.5, 30.0, "bytes that rotary embeddings move over reading and writing queries and keys once: "
        "cast to fp32, two products, halves exchanged, sum, cast", spread=0.7,
    )
    layer_s: float = _fitted(
        0.0, 0.0, 1e-2, "time that the kernels of a Llama block's forward take however small they are: "
        "launches and tails on the device; its backward takes twice that", unit="s", spread=0.0005,
    )
    host_block_forward_s: float = _fitted(
        1.0e-3, 1e-5, 2e-2, "least time in which the host launches a Llama block's forward in eager mode, "
        "other blocks by their number of operators; the backward costs twice that",
        source="about 45 launches of 10 us through autograd plus module hooks; 1B-parameter steps on an "
        "H100 are at this floor", unit="s", spread=0.7,
    )
    compiled_host_share: float = _fitted(
        0.3, 0.02, 1.0, "host time of a compiled block over that of an eager one"
    )
    compiled_elementwise_share: float = _fitted(
        0.5, 0.1, 1.0, "bytes that compiled element-wise kernels move over those of eager ones", spread=0.4
    )
    host_tp_forward_s: float = _fitted(
        3.0e-3, 0.0, 2e-2, "host time that tensor parallelism adds to a block's forward in eager mode: "
        "DTensor's sharding hooks",
        source="a 20-layer stage of a 70B model at tp 8 took 0.48 s with recomputation on an H100, of which "
        "the device needed under half", unit="s", spread=0.003,
    )
    # Messages
    tp_scale: float = _fitted(
        1.0, 0.2, 6.0, "time of tensor-parallel messages over that of the collective in isolation",
        device=True,
    )
    tp_rank_s: float = _fitted(
        0.0, 0.0, 1e-3, "time that a tensor-parallel message waits for each rank beyond the first, since "
        "ranks arrive late by turns", unit="s", spread=5e-5,
    )
    dp_scale: float = _fitted(
        1.0, 0.2, 40.0, "time of data-parallel messages over that of the collective in isolation",
        spread=1.0, device=True,
    )
    dp_congestion: float = _fitted(
        0.0, 0.0, 1.5, "power of the number of ranks with which messages between data ranks slow down: each "
        "waits for the latest rank, and their paths share the fabric's links", spread=0.3, device=True,
    )
    dp_rank_s: float = _fitted(
        0.0, 0.0, 5e-3, "time that the message of one FSDP unit between data ranks waits for each rank "
        "beyond the first", unit="s", spread=1e-4,
    )
    dp_exposed: float = _fitted(
        0.0, 0.0, 1.0, "share of the gradient reduction, and of the gathering of weights once a step, that "
        "nothing hides"
    )
    pp_scale: float = _fitted(
        1.0, 0.2, 20.0, "time of a message between pipeline stages over that of the message in isolation",
        spread=0.7, device=True,
    )
    pp_exposed: float = _fitted(
        0.0, 0.0, 1.0, "share of a message between pipeline stages for which the sending stage stands still"
    )
    backward_scale: float = _fitted(
        1.0, 0.7, 1.5, "time of a block's products in the backward pass over twice their forward's (2.5 "
        "times of attention): their shapes differ, and weight gradients add up in fp32",
        spread=0.1, device=True,
    )
    cp_scale: float = _fitted(
        1.0, 0.2, 6.0, "time of context-parallel messages over that of the message in isolation"
    )
    cp_step_s: float = _fitted(
        0.0, 0.0, 5e-3, "time that each hop of a ring, or each other message of context parallelism, takes "
        "besides: launches, smaller kernels", unit="s", spread=1e-4,
    )
    ep_scale: float = _fitted(
        1.0, 0.2, 10.0, "time of sending tokens to experts and back over that of the all-to-all in isolation",
        spread=0.3,
    )
    ep_exposed: float = _fitted(
        1.0, 0.0, 1.0, "share of sending tokens to experts and back that nothing hides: all of it, unless "
        "micro-batches are interleaved", spread=0.15,
    )
    ep_overlapped: float = _fitted(
        0.3, 0.0, 1.0, "the same share where one micro-batch's messages run behind another's products "
        "(Megatron's overlap_moe_expert_parallel_comm)", spread=0.1,
    )
    # Experts, recomputation, head and step
    expert_s: float = _fitted(
        8e-5, 1e-6, 2e-3, "time that each of a device's experts adds to a forward, however few its rows: "
        "kernels of its own, launched one by one; its backward twice that", unit="s", spread=0.3,
    )
    graphed_share: float = _fitted(
        0.2, 0.01, 1.0, "share of the host's time, and of expert_s, that remains where whole steps are "
        "replayed as CUDA graphs", spread=0.3,
    )
    routed_scale: float = _fitted(
        1.5, 0.2, 10.0, "bytes that kernels on the rows of experts move (permutation, activation, weighted "
        "sum) over those of fused ones", spread=0.3,
    )
    expert_imbalance: float = _fitted(
        1.3, 1.0, 4.0, "rows of the expert-parallel rank that has most over the mean",
        source="Megatron-MoE-ModelZoo, Qwen3-235B on 256 H100 at 16k tokens: 237 TFLOP/s with the model's "
        "own routing, 295 with an even one", spread=0.2,
    )
    grouped_scale: float = _fitted(
        1.0, 0.2, 2.0, "rate of the products of experts over that of one product of as many rows as run at "
        "once", spread=0.2,
    )
    recompute_scale: float = _fitted(
        1.0, 0.8, 1.6, "time of a recomputed forward over that of the first forward", spread=0.15
    )
    head_scale: float = _fitted(
        1.0, 0.1, 6.0, "bytes that the loss moves over the vocabulary over those of a fused kernel",
        spread=0.7,
    )
    unaligned_head_scale: float = _fitted(
        1.7, 0.8, 4.0, "time of head and loss over a vocabulary that is no multiple of 8, whose rows are "
        "unaligned, over that of one that is",
        source="nanoGPT, 2023-02: 50304 for 50257 made GPT-2's steps 25 % faster", spread=0.3,
    )
    optimizer_scale: float = _fitted(
        1.0, 0.2, 10.0, "time of clipping and update over reading and writing their state once", spread=0.7
    )
    action_s: float = _fitted(
        0.0, 0.0, 0.1, "time that every pass of a micro-batch through a stage takes besides its layers",
        unit="s", spread=0.001,
    )
    recompute_pass_s: float = _fitted(
        0.0, 0.0, 0.2, "time that a stage's backward takes besides its layers where it recomputes them: "
        "states of random generators saved and set, the host waiting for the device", unit="s", spread=0.02,
    )
    host_link_share: float = _fitted(
        0.8, 0.05, 1.0, "share of the nominal rate that copies between device and host memory reach",
        source="profiles/measured/links.csv: 0.88 on an H100 host; thresholds of healthy nodes 0.6 to 0.76",
        spread=0.25,
    )
    cpu_update_s: float = _fitted(
        0.25e-9, 0.02e-9, 5e-9, "time in which a node's processors run AdamW's update of one parameter in "
        "host memory",
        source="ZeRO-Offload, arXiv 2101.06840: 0.22 s for 1 billion, 2.6 s for 10 on a DGX-2", unit="s",
    )
    step_s: float = _fitted(
        0.0, 0.0, 10.0, "time that every step takes besides: data, logging, synchronisation",
        unit="s", spread=0.03,
    )
    # fmt: on


@frozen
class MemoryConstants:
    """The values of the memory model's constants for one software stack on one device.

    `norm_bytes` and `probability_scale` are those of the stack's kernels: for unfused norms and eager
    attention they have the values of `unfused_norm_bytes` and `eager_probability_scale`.
    """

    # fmt: off
    activation_scale: float = _fitted(
        1.0, 0.5, 2.0, "bytes that blocks save for the backward pass over those of the formula", spread=0.1
    )
    grad_bytes: float = _fitted(
        4.0, 1.0, 8.0, "bytes of a parameter's gradient where weights have a master copy: 4 in Megatron's "
        "buffers, 2 in DeepSpeed's, 2 + 4 in its bf16 optimizer",
        source="ZeRO, arXiv 1910.02054", unit="bytes a value", spread=1.0,
    )
    norm_bytes: float = _fitted(
        0.0, 0.0, 12.0, "bytes that a norm of one kernel saves of each value besides its input and result",
        unit="bytes a value", spread=1.0,
    )
    unfused_norm_bytes: float = _fitted(
        8.0, 0.0, 24.0, "bytes that a norm in tensor operations saves of each value besides its input and "
        "result: the input in fp32, for the square and for the product", unit="bytes a value", spread=2.0,
    )
    probability_scale: float = _fitted(
        2.5, 0.5, 6.0, "copies of the attention probabilities that a fused softmax saves: softmax, mask and "
        "dropout are 2.5",
        source="arXiv 2205.05198",
    )
    eager_probability_scale: float = _fitted(
        3.5, 0.5, 8.0, "copies of the attention probabilities that attention in tensor operations saves, "
        "the scores among them"
    )
    loss_bytes: float = _fitted(
        12.0, 4.0, 40.0, "bytes of each logit at the peak of the loss: 2 from the product, 4 of the "
        "logarithm of the softmax, 4 and 2 of its gradient", unit="bytes a value", spread=2.0,
    )
    gathered_logits_bytes: float = _fitted(
        0.0, 0.0, 20.0, "further bytes of each logit where tensor-parallel ranks gather them for the loss: "
        "the parts, the message's buffer, the whole, 2 each", unit="bytes a value", spread=2.0,
    )
    transient_scale: float = _fitted(
        1.0, 0.2, 4.0, "bytes of temporary tensors over those of the formula", spread=0.3
    )
    allocator_slack: float = _fitted(
        1.0, 1.0, 1.5, "memory that the allocator reserves over the tensors, pools and holes of the formula",
        spread=0.06,
    )
    context_bytes: float = _fitted(
        0.818 * GIB, 0.2 * GIB, 4.0 * GIB, "memory of the driver's context and the libraries' code, outside "
        "the allocator",
        source="0.817 GiB on H100 with torch 2.11, the same in 16 runs", unit="bytes", spread=0.3,
    )
    communicator_bytes: float = _fitted(
        392.0 * 2**20, 0.0, 2.0 * GIB, "buffers of one process group's communicator",
        source="aiconfigurator-core 0.12.0: 342 MB for 2 devices, 392 MiB for 4 to 8",
        unit="bytes", spread=0.2 * GIB,
    )
    workspace_bytes: float = _fitted(
        0.065 * GIB, 0.0, 1.0 * GIB, "workspaces of the libraries that the allocator counts",
        source="H100 with torch 2.11", unit="bytes", spread=0.1 * GIB,
    )
    # fmt: on


_MEASURED = {
    "gemm_flops": ("FLOP/s", "rate of one large matrix product"),
    "memory_bytes_per_s": ("B/s", "rate of a copy in device memory, reads and writes counted"),
    "runtime_bytes": ("bytes", "memory of a process or context before anything is trained"),
    "fsdp_unit_forward_s": ("s", "time that a sharded unit's hooks add to its forward, messages apart"),
    "fsdp_unit_backward_s": ("s", "time that a sharded unit's hooks add to its backward, messages apart"),
    "fsdp_reduce_unit_s": ("s", "time of reducing a sharded unit's gradients besides its bytes"),
    "fsdp_reduce_copy_s_per_byte": ("s a byte", "copies around that reduction, for each byte in fp32"),
    "fsdp_gather_unit_s": ("s", "time of gathering a sharded unit besides its bytes"),
    "fsdp_gather_copy_s_per_byte": ("s a byte", "copies around that gathering, for each gathered byte"),
    "fsdp_copy_s_per_byte": ("s a byte", "mean of the copies around reductions and gatherings"),
    "fsdp_reduce_bend_bytes": ("bytes", "size beyond which reducing a sharded unit has another rate"),
    "fsdp_reduce_beyond_s_per_byte": ("s a byte", "that rate, for each byte beyond"),
    "fsdp_gather_bend_bytes": ("bytes", "size beyond which gathering a sharded unit has another rate"),
    "fsdp_gather_beyond_s_per_byte": ("s a byte", "that rate, for each byte beyond"),
    "replicate_reduce_bend_bytes": ("bytes", "size beyond which summing a replicated unit has another rate"),
    "replicate_reduce_beyond_s_per_byte": ("s a byte", "that rate, for each byte beyond"),
    "replicate_unit_forward_s": ("s", "time that a replicated unit's hooks add to its forward"),
    "replicate_unit_backward_s": ("s", "time that a replicated unit's hooks add to its backward"),
    "replicate_reduce_unit_s": ("s", "time of summing a replicated unit's gradients besides its bytes"),
    "replicate_reduce_copy_s_per_byte": ("s a byte", "copies around that sum, for each byte in fp32"),
    "grad_accumulate_s_per_param": ("s a parameter", "time of adding a gradient to one that exists"),
    "pp_action_s": ("s", "time that the pipeline's runtime adds to each pass through a stage"),
    "optimizer_s_per_tensor": ("s a tensor", "time of the update, for each tensor"),
    "optimizer_s_per_param": ("s a parameter", "time of the update, for each parameter"),
    "clip_s_per_tensor": ("s a tensor", "time of the norm and scaling of gradients, for each tensor"),
    "clip_s_per_param": ("s a parameter", "time of the norm and scaling of gradients, for each parameter"),
    "overlap_slowdown": ("", "share by which products take longer while a copy runs"),
    "overlap_message_slowdown": ("", "share by which a copy takes longer while products run"),
    "time_error": ("", "share by which predicted step times are off: 90 % of runs left out are within it"),
    "memory_error_lower": ("", "share of the peak that the real one may lie below the predicted"),
    "memory_error_upper": ("", "share of the peak that the real one may lie above the predicted"),
}

OVERLAP_SLOWDOWN = 0.19
"""Share by which compute takes longer while communication overlaps it, in the mean (arXiv 2507.03114)."""

TIME_SPECS = _specs(TimeConstants)
MEMORY_SPECS = _specs(MemoryConstants)
MEASURED = MappingProxyType(
    {
        name: ConstantSpec(
            name=name,
            unit=unit,
            meaning=meaning,
            prior=OVERLAP_SLOWDOWN if name == "overlap_slowdown" else None,
        )
        for name, (unit, meaning) in _MEASURED.items()
    }
)
_SPECS = {**TIME_SPECS, **MEMORY_SPECS, **MEASURED}


def spec_of(name: str) -> ConstantSpec:
    """Return the table's entry of a constant; a name that is in no table has no meaning and no unit."""
    return _SPECS.get(name) or ConstantSpec(name=name, meaning="")


def time_constants_of(
    profile: Profile | None, settings: EngineSettings, device: str = "", network: str = ""
) -> TimeConstants:
    """Return the time model's constants for a stack on a device in a cluster of a network."""
    fitted = {name: _fitted_value(profile, name, settings, device, network) for name in TIME_SPECS}
    values = {name: stack_prior(name, settings) if value is None else value for name, value in fitted.items()}
    return TimeConstants(**values)


def problem_time_constants(problem: PlanningProblem) -> TimeConstants:
    """Return the time model's constants that a problem's own profile has for its stack and device."""
    return time_constants_of(
        problem.profile, problem.engine_settings, problem.device.name, problem.cluster.network
    )


def memory_constants(problem: PlanningProblem) -> MemoryConstants:
    """Return the memory model's constants for a problem's stack and device."""
    values = {}
    for name in MEMORY_SPECS:
        spoken_for = kernel_constant(name, problem.engine_settings)
        fitted = fitted_constant(problem, spoken_for)
        values[name] = stack_prior(spoken_for, problem.engine_settings) if fitted is None else fitted
    return MemoryConstants(**values)


def kernel_constant(name: str, settings: EngineSettings) -> str:
    """Return the name of the constant that holds for `name` given a stack's kernels."""
    if name == "norm_bytes" and _unfused_norms(settings):
        return "unfused_norm_bytes"
    eager = name == "probability_scale" and settings.attention is AttentionKernel.EAGER
    return "eager_probability_scale" if eager else name


def fitted_constant(problem: PlanningProblem, name: str) -> float | None:
    """Return the value of a constant in the problem's profile for its stack, device and network, or None."""
    return _fitted_value(
        problem.profile, name, problem.engine_settings, problem.device.name, problem.cluster.network
    )


def fitted_to_runs(profile: Profile | None, settings: EngineSettings, device: str) -> bool:
    """True if a profile's constants were fitted to measured step times of this stack on this device."""
    return _fitted_value(profile, "time_error", settings, device) is not None


def _fitted_value(
    profile: Profile | None, name: str, settings: EngineSettings, device: str, network: str = ""
) -> float | None:
    if profile is None:
        return None
    return profile.constant_of(
        name,
        device=device,
        network=network,
        framework=settings.framework,
        kernels=settings.kernels,
        engine=settings.engine.family,
    )


FIRST_FLASH = r"flash[ _-]?att(entio)?n[ _-]?(v?1|$)"
"""Names of the first FlashAttention."""

FIRST_FLASH_SHARE = 0.30
"""attention_share of the first FlashAttention: 30 to 50 % of the dense peak forward and 25 to 35 % backward,
on A100 (arXiv 2307.08691, introduction)."""

FUSED_ELEMENTWISE = 0.6
"""elementwise_scale where activation and gate are one kernel: it moves three values for the five of two
kernels, and attention takes queries, keys and values as the projections leave them."""

UNFUSED_NORM = 6.0
"""norm_scale of an RMSNorm in separate operators: cast to fp32, square, mean, product, cast, weight."""


def stack_prior(name: str, settings: EngineSettings) -> float:
    """Return the prior of a constant for a software stack."""
    buffered = settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED)
    match name:
        case "dp_exposed" if buffered and not settings.overlaps_gradients:
            return 1.0  # both reduce after the last backward unless they are set to overlap
        case "host_tp_forward_s" if buffered:
            return 0.0  # their layers contain tensor parallelism; the prior is that of DTensor's hooks
        case "pp_exposed" if buffered:
            return 0.5  # both wait for their sends and receives together
        case "rotary_scale" if buffered:
            return 1.0  # one kernel
        case "elementwise_scale" if settings.fuses_elementwise:
            return FUSED_ELEMENTWISE
        case "attention_share" if re.search(FIRST_FLASH, settings.kernels.lower()):
            return FIRST_FLASH_SHARE
        case "norm_scale" if _unfused_norms(settings):
            return UNFUSED_NORM
        case "grad_bytes" if settings.engine is Engine.DEEPSPEED:
            return 2.0
        case "loss_bytes" if settings.gathers_logits:
            return 16.0  # in tensor operations: three fp32 tensors at once besides the logits and a copy
        case "loss_bytes" if settings.fused_loss:
            return 8.0  # 2 from the product, its softmax in fp32, the gradient in 16 bits
        case "gathered_logits_bytes" if settings.gathers_logits:
            return 6.0
        case "allocator_slack" if buffered:
            return 1.06  # published logs have 1.06 to 1.22
    prior = spec_of(name).prior
    assert prior is not None, f"{name} has no prior"
    return prior


def _unfused_norms(settings: EngineSettings) -> bool:
    """True if a named set of kernels has none for the norm."""
    return bool(settings.kernels) and "rms" not in settings.kernels.lower()
