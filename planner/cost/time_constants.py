"""Physics: the few constants of the analytic time model that measured runs can determine.

A profile may hold any of them, for all software, for one framework, or for one named set of its fused
kernels; the others stay at their prior. `PRIORS` says what each means, where its prior comes from and how
far a fit may move it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from planner.cost import constants
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.profile.profile import Profile


@frozen
class Prior:
    """A constant before any fit: its value, how far from it one expects to be, bounds, meaning and source.

    `spread` is a standard deviation: of the logarithm, or of the value itself where that may be 0.
    `device` constants belong to a device and its links, the others to the software that runs on it.
    """

    value: float
    spread: float = 0.5
    low: float
    high: float
    meaning: str
    device: bool = False

    @property
    def logarithmic(self) -> bool:
        return self.low > 0


PRIORS: Mapping[str, Prior] = MappingProxyType(
    {
        "gemm_scale": Prior(
            value=1.0, spread=0.25, low=0.4, high=1.3, device=True,
            meaning="rate of matrix products over the rate of their shape in the tables",
        ),
        "attention_share": Prior(
            value=0.48, spread=0.4, low=0.05, high=0.9, device=True,
            meaning="share of the dense peak that a flash kernel reaches between the projections "
            "(FlashAttention-2, arXiv 2307.08691: 0.5 to 0.7 on A100; less on H100)",
        ),
        "scan_share": Prior(
            value=0.12, spread=0.5, low=0.01, high=0.6,
            meaning="share of the dense peak that a recurrent mixer reaches between projections (as quick as "
            "FlashAttention-2 at 2k tokens with a quarter of its FLOPs: Mamba-2, arXiv 2405.21060)",
        ),
        "probability_passes": Prior(
            value=6.0, spread=1.0, low=1.0, high=60.0,
            meaning="times that a fused softmax and the products around it read or write every "
            "probability in the forward pass; separate operators do twice that",
        ),
        "fp8_scale": Prior(
            value=1.0, spread=0.1, low=0.6, high=1.5,
            meaning="rate of products in fp8 over that of the tables, besides gemm_scale: scales by tensor "
            "or block, casts of weights",
        ),
        "cast_scale": Prior(
            value=1.0, spread=0.3, low=0.1, high=6.0,
            meaning="bytes that casts to fp8 move over those of one kernel for each operand: 2 read and "
            "2 x 1 written for a value",
        ),
        "elementwise_scale": Prior(
            value=1.0, spread=0.7, low=0.1, high=6.0,
            meaning="bytes that element-wise kernels move over those of a fused kernel a step",
        ),
        "norm_scale": Prior(
            value=1.0, spread=0.7, low=0.2, high=20.0,
            meaning="bytes that norms move over those of one fused kernel, which reads and writes once",
        ),
        "rotary_scale": Prior(
            value=9.0, spread=0.7, low=0.5, high=30.0,
            meaning="bytes that turning queries and keys by their position moves, over reading and writing "
            "them once: cast to fp32, two products, halves exchanged, sum, cast",
        ),
        "layer_s": Prior(
            value=0.0, spread=0.0005, low=0.0, high=1e-2,
            meaning="what the kernels of a Llama block's forward take however small they are: launches and "
            "tails on the device; its backward twice that, under the host's floor",
        ),
        "host_block_forward_s": Prior(
            value=constants.HOST_BLOCK_FORWARD_S, spread=0.7, low=1e-5, high=2e-2,
            meaning="least time that the host takes to launch a Llama block's forward; others by operators",
        ),
        "compiled_host_share": Prior(
            value=0.3, spread=0.5, low=0.02, high=1.0,
            meaning="host time of a compiled block over that of an eager one",
        ),
        "compiled_elementwise_share": Prior(
            value=0.5, spread=0.4, low=0.1, high=1.0,
            meaning="bytes that element-wise kernels move once they are compiled, over those of eager ones",
        ),
        "host_tp_forward_s": Prior(
            value=constants.HOST_TP_FORWARD_S, spread=0.003, low=0.0, high=2e-2,
            meaning="what tensor parallelism adds to it",
        ),
        "tp_scale": Prior(
            value=1.0, spread=0.5, low=0.2, high=6.0, device=True,
            meaning="time of tensor-parallel messages over that of the same collective alone",
        ),
        "tp_rank_s": Prior(
            value=0.0, spread=5e-5, low=0.0, high=1e-3,
            meaning="what every tensor-parallel message waits for each rank beyond the first: ranks are late "
            "by turns",
        ),
        "dp_scale": Prior(
            value=1.0, spread=1.0, low=0.2, high=40.0, device=True,
            meaning="time of data-parallel messages over that of the same collective alone",
        ),
        "dp_congestion": Prior(
            value=0.0, spread=0.3, low=0.0, high=1.5, device=True,
            meaning="power of the number of ranks with which messages between data ranks slow down: each "
            "waits for the latest, and their paths share the fabric's links",
        ),
        "dp_rank_s": Prior(
            value=0.0, spread=1e-4, low=0.0, high=5e-3,
            meaning="what the message of one unit between data ranks waits for each rank beyond the first",
        ),
        "dp_exposed": Prior(
            value=0.0, spread=0.5, low=0.0, high=1.0,
            meaning="share of reducing gradients, and of gathering weights once a step, that nothing hides",
        ),
        "pp_scale": Prior(
            value=1.0, spread=0.7, low=0.2, high=20.0, device=True,
            meaning="time of a hop between stages over that of the same message alone",
        ),
        "pp_exposed": Prior(
            value=0.0, spread=0.5, low=0.0, high=1.0,
            meaning="share of a hop between stages for which the sending stage stands still",
        ),
        "backward_scale": Prior(
            value=1.0, spread=0.1, low=0.7, high=1.5, device=True,
            meaning="time of a block's products in the backward pass over twice their forward's (2.5 times "
            "of attention): their shapes differ, and weight gradients add up in fp32",
        ),
        "cp_scale": Prior(
            value=1.0, spread=0.5, low=0.2, high=6.0,
            meaning="time of context-parallel messages over that of the same message alone",
        ),
        "cp_step_s": Prior(
            value=0.0, spread=1e-4, low=0.0, high=5e-3,
            meaning="what each hop of a ring, or each other message of context parallelism, takes besides: "
            "launches, smaller kernels",
        ),
        "ep_scale": Prior(
            value=1.0, spread=0.3, low=0.2, high=10.0,
            meaning="time of sending tokens to experts and back over that of the same all-to-all alone",
        ),
        "ep_exposed": Prior(
            value=1.0, spread=0.15, low=0.0, high=1.0,
            meaning="share of it that nothing hides: all of it, unless micro-batches are interleaved",
        ),
        "ep_overlapped": Prior(
            value=0.3, spread=0.1, low=0.0, high=1.0,
            meaning="the same where one micro-batch's messages run behind another's products (Megatron's "
            "overlap_moe_expert_parallel_comm)",
        ),
        "expert_s": Prior(
            value=8e-5, spread=0.3, low=1e-6, high=2e-3,
            meaning="what each of a device's experts takes in a forward besides, however few its rows: "
            "kernels of its own, launched one by one; its backward twice that",
        ),
        "graphed_share": Prior(
            value=0.2, spread=0.3, low=0.01, high=1.0,
            meaning="share of the host's time, and of expert_s, that is left where whole steps are replayed "
            "as CUDA graphs",
        ),
        "routed_scale": Prior(
            value=1.5, spread=0.3, low=0.2, high=10.0,
            meaning="bytes that kernels on rows of experts move (permutation, activation, weighted sum) over "
            "those of fused ones",
        ),
        "expert_imbalance": Prior(
            value=1.3, spread=0.2, low=1.0, high=4.0,
            meaning="rows of the ep rank that has most over the mean. Megatron-MoE-ModelZoo, Qwen3-235B on "
            "256 H100 at 16k tokens: 237 TFLOP/s with the model's own routing, 295 with an even one",
        ),
        "grouped_scale": Prior(
            value=1.0, spread=0.2, low=0.2, high=2.0,
            meaning="rate of products of experts over that of one product of as many rows as run at once",
        ),
        "recompute_scale": Prior(
            value=1.0, spread=0.15, low=0.8, high=1.6,
            meaning="time of a forward that is run again over that of the first",
        ),
        "head_scale": Prior(
            value=1.0, spread=0.7, low=0.1, high=6.0,
            meaning="bytes that the loss moves over the vocabulary, over those of a fused kernel",
        ),
        "unaligned_head_scale": Prior(
            value=1.7, spread=0.3, low=0.8, high=4.0,
            meaning="time of head and loss over a vocabulary that is no multiple of 8, over that of one that "
            "is: its rows are unaligned (nanoGPT, 2023-02: 50304 for 50257 made GPT-2's steps 25 % faster)",
        ),
        "optimizer_scale": Prior(
            value=1.0, spread=0.7, low=0.2, high=10.0,
            meaning="time of clipping and update over reading and writing their state once",
        ),
        "action_s": Prior(
            value=0.0, spread=0.001, low=0.0, high=0.1,
            meaning="what every pass of a micro-batch through a stage takes besides its layers",
        ),
        "recompute_pass_s": Prior(
            value=0.0, spread=0.02, low=0.0, high=0.2,
            meaning="what a stage's backward takes besides its layers where it recomputes them: the states "
            "of random generators saved and set, the host waiting for the device",
        ),
        "host_link_share": Prior(
            value=0.8, spread=0.25, low=0.05, high=1.0,
            meaning="share of the nominal rate that copies between device and host memory reach "
            "(profiles/measured/links.csv: 0.88 on an H100 host; thresholds of healthy nodes 0.6 to 0.76)",
        ),
        "cpu_update_s": Prior(
            value=0.25e-9, spread=0.5, low=0.02e-9, high=5e-9,
            meaning="what a node's processors take for AdamW's update of one parameter in host memory "
            "(ZeRO-Offload, arXiv 2101.06840: 0.22 s for 1 billion, 2.6 s for 10 on a DGX-2)",
        ),
        "step_s": Prior(
            value=0.0, spread=0.03, low=0.0, high=10.0,
            meaning="what every step takes besides: data, logging, synchronisation",
        ),
    }
)  # fmt: skip


@frozen
class Physics:
    """The constants of one stack on one device: fitted where a profile has them, else their priors."""

    gemm_scale: float
    attention_share: float
    scan_share: float
    probability_passes: float
    fp8_scale: float
    cast_scale: float
    elementwise_scale: float
    norm_scale: float
    rotary_scale: float
    layer_s: float
    host_block_forward_s: float
    compiled_host_share: float
    compiled_elementwise_share: float
    host_tp_forward_s: float
    tp_scale: float
    tp_rank_s: float
    dp_scale: float
    dp_congestion: float
    dp_rank_s: float
    dp_exposed: float
    pp_scale: float
    pp_exposed: float
    backward_scale: float
    cp_scale: float
    cp_step_s: float
    ep_scale: float
    ep_exposed: float
    ep_overlapped: float
    expert_s: float
    graphed_share: float
    routed_scale: float
    expert_imbalance: float
    grouped_scale: float
    recompute_scale: float
    head_scale: float
    unaligned_head_scale: float
    optimizer_scale: float
    action_s: float
    recompute_pass_s: float
    host_link_share: float
    cpu_update_s: float
    step_s: float


def physics_of(
    profile: Profile | None, settings: EngineSettings, device: str = "", network: str = ""
) -> Physics:
    """The constants that hold for a stack on a device, in a cluster of a network."""
    fitted = {name: _fitted(profile, name, settings, device, network) for name in PRIORS}
    values = {name: prior_of(name, settings) if value is None else value for name, value in fitted.items()}
    return Physics(**values)


def usual_physics(problem: PlanningProblem) -> Physics:
    """The constants that a problem's own profile has for its stack and device."""
    return physics_of(problem.profile, problem.engine_settings, problem.device.name, problem.cluster.network)


def fitted_to_runs(profile: Profile | None, settings: EngineSettings, device: str) -> bool:
    """Whether measured runs speak for the time of this stack on this device."""
    return _fitted(profile, "time_error", settings, device) is not None


def _fitted(
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

FUSED_ELEMENTWISE = 0.6
"""elementwise_scale where activation and gate are one kernel: they move three values for the five of two
kernels, and attention takes queries, keys and values as the projections leave them."""

FIRST_FLASH_SHARE = 0.30
"""attention_share of it: 30 to 50 % of the dense peak forward and 25 to 35 % backward, on A100 (arXiv
2307.08691, introduction)."""

UNFUSED_NORM = 6.0
"""norm_scale of an RMSNorm in separate operators: cast to fp32, square, mean, product, cast, weight."""


def unfused_norms(settings: EngineSettings) -> bool:
    """Whether a named set of kernels has none for the norm."""
    return bool(settings.kernels) and "rms" not in settings.kernels.lower()


def prior_of(name: str, settings: EngineSettings) -> float:
    """The prior of a constant for a stack."""
    buffered = settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED)
    if name == "dp_exposed" and buffered and not settings.overlaps_gradients:
        return 1.0  # both reduce after the last backward unless told to overlap
    if name == "host_tp_forward_s" and settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED):
        return 0.0  # tensor parallelism is written into their layers; its prior is that of DTensor's hooks
    if name == "pp_exposed" and settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED):
        return 0.5  # both wait for their sends and receives together
    if name == "rotary_scale" and settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED):
        return 1.0  # one kernel
    if name == "elementwise_scale" and settings.fuses_elementwise:
        return FUSED_ELEMENTWISE
    if name == "attention_share" and re.search(FIRST_FLASH, settings.kernels.lower()):
        return FIRST_FLASH_SHARE
    if name == "norm_scale" and unfused_norms(settings):
        return UNFUSED_NORM
    return PRIORS[name].value
