"""What a run's texts say of its software: engine, attention kernel, precision, schedule, defaults.

A table rarely states everything. What it leaves out is taken from the framework's usual way and added to
`assumed`, so that a reader sees what a prediction rests on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from planner.cluster import Device
from planner.estimate import Rejected
from planner.kept import AttentionKernel
from planner.runs.run import Run, RunRecompute
from planner.stack import Engine, Selective, Stack
from planner.strategy import Schedule, Zero
from planner.workload import AdapterModules, Adapters, Method, Precision

ENGINES: tuple[tuple[str, Engine], ...] = (
    (r"deepspeed.*megatron|megatron-?deepspeed", Engine.MEGATRON),
    (r"megatron|nemo|mbridge|nanotron|megascale|fast-llm|ptd-p|neox", Engine.MEGATRON),
    (r"deepspeed|colossal|aleph|aa-scaling", Engine.DEEPSPEED),
    (r"torchtitan|torch-reference|fsdp2?\b", Engine.TORCHTITAN),
)
"""Engine by the first pattern found in `framework`; others are plain PyTorch. FSDP2 is torchtitan's way."""

MODERN = r"flash|torchtitan|fsdp|nemo|bridge|megatron-core|mcore|litgpt|maxtext|torchtune|nanotron|torch"
"""Frameworks whose attention is a flash kernel where a table does not state it."""

OLD_DEVICES = ("v100", "a100", "p100", "t4")
"""On these, Megatron-LM and DeepSpeed ran their own fused softmax until FlashAttention came (2022-23)."""

AMPERE_FLASH = r"flash[ _-]?attention(?![ _-]?[34])"
"""Words of runs whose flash kernel is the first or second FlashAttention."""

LATER_FLASH = r"\bfa[34]\b|flash[ _-]?attention[ _-]?[34]|cudnn|transformer[ _-]?engine"

COMPILED = r"compile|\bjax\b|paxml|maxtext"
"""Words of runs whose blocks are compiled; JAX always compiles."""

SHARDS_SEQUENCE = r"nemo|bridge|megatron-core|mcore|torchtitan"
"""Frameworks that turn sequence parallelism on with tensor parallelism unless told otherwise."""

SHARDS_OPTIMIZER = r"nemo|bridge|megatron-core|mcore|nanotron"
"""Frameworks whose recipes share out the optimizer (ZeRO 1) unless told otherwise."""

SHARDS_PARAMETERS = r"fsdp|torchtitan|zero-?3|maxtext|torch-reference"
"""Frameworks that share out parameters (ZeRO 3) unless told otherwise."""

SCHEDULES: tuple[tuple[str, str], ...] = (
    (r"zb-?2p\b", "zb-2p"),
    (r"zb-?1p\b|zb-?h1\b", "zb-h1"),
    (r"zb-?v\b", "zbv"),
    (r"dualpipe-?v", "dualpipev"),
    (r"dualpipe", "dualpipe"),
    (r"\bgpipe\b", "gpipe"),
    (r"1f1b-i schedule", "interleaved"),
)
"""Schedules as frameworks and papers write them. Zero Bubble's ZB-1p keeps 1F1B's memory: ZB-H1."""

NOT_MODELLED: tuple[tuple[str, str], ...] = (
    (r"\bqlora\b", "fine-tuning of quantised weights"),
    (r"\badapter\b", "fine-tuning with adapters other than LoRA"),
    (r"offload(?! false)|optimizer state on cpu", "offloading"),
    (r"^(?!.*\blora\b).*bf16-true", "training with weights and optimizer state in bf16"),
)
"""Words that name what the cost model does not know: rows with them are not predicted."""


LORA = Adapters(rank=16, modules=AdapterModules.ALL)
"""Adapters of runs that say LoRA and no more: all linear layers, as torchtune's recipes."""

MEGATRON_LORA = Adapters(rank=16, modules=AdapterModules.QKV)
"""NVIDIA's benchmarks adapt the fused query, key and value projection alone: Megatron-Bridge's performance
recipes set target_modules to linear_qkv, of rank 16; NeMo 1's tuning config attention_qkv, of rank 32."""

LITGPT_LORA = Adapters(rank=8, modules=AdapterModules.QV)
"""LitGPT's default: query and value (its finetune/lora.py)."""


def run_method(run: Run, assumed: list[str]) -> tuple[Method, Adapters | None]:
    """What the run trained, by its words: adapters, all weights of a given model, or all from scratch."""
    words = run.words
    if re.search(r"\blora\b", words):
        megatron = run_engine(run.framework) is Engine.MEGATRON
        adapters = LITGPT_LORA if "litgpt" in words else MEGATRON_LORA if megatron else LORA
        assumed.append(f"LoRA of rank {adapters.rank} on {adapters.modules}")
        return Method.LORA, adapters
    finetuned = re.search(r"\bsft\b|fine-?tun", words)
    return (Method.FINETUNE if finetuned else Method.PRETRAIN), None


def unmodelled(run: Run) -> Rejected | None:
    """What the row's words name that the cost model does not know, or None."""
    for pattern, what in NOT_MODELLED:
        if re.search(pattern, run.words):
            return Rejected(rule="not_modelled", detail=f"{what} is not modelled.")
    return None


def run_engine(framework: str) -> Engine:
    """The engine that a framework's name stands for."""
    found = (engine for pattern, engine in ENGINES if re.search(pattern, framework.lower()))
    return next(found, Engine.NATIVE)


def run_stack(run: Run, assumed: list[str]) -> Stack:
    """The software of a run; an attention kernel that is not stated is the usual one of its time."""
    attention = run.attention or _usual_attention(run)
    if run.attention is None:
        assumed.append(f"attention {attention}")
    compiled = run.compile
    if compiled is None:
        words = run.words
        compiled = bool(re.search(COMPILED, words)) and "no torch.compile" not in words
    return Stack(
        engine=run_engine(run.framework),
        framework=run.framework,
        attention=attention,
        kernels=run.fused_kernels,
        compiled=compiled,
        selective=Selective.MLP if run.recompute is RunRecompute.MLP else None,
        ampere_flash=bool(re.search(AMPERE_FLASH, run.words)) and not re.search(LATER_FLASH, run.words),
    )


def _usual_attention(run: Run) -> AttentionKernel:
    old = run.device.startswith(OLD_DEVICES)
    if re.search(MODERN, run.framework.lower()) or "flash" in run.words or not old:
        return AttentionKernel.FLASH
    return AttentionKernel.FUSED


def run_precision(run: Run, device: Device, assumed: list[str]) -> Precision | Rejected:
    """The format of matrix products; where none is stated, the device's usual one."""
    text = run.precision.lower()
    known: Mapping[str, Precision] = {str(precision): precision for precision in Precision}
    if text in known:
        return known[text]
    if text:
        return Rejected(rule="precision", detail=f"{run.precision} is not modelled.", legal=", ".join(known))
    usual = Precision.BF16 if device.peak_bf16_flops is not None else Precision.FP16
    if run_engine(run.framework) is Engine.MEGATRON and run.device.startswith(OLD_DEVICES):
        usual = Precision.FP16
    assumed.append(f"precision {usual}")
    return usual


def run_schedule(run: Run, pp: int, chunks: int) -> Schedule | Rejected:
    """The pipeline schedule: stated, named in a text, or 1F1B (interleaved where there are chunks)."""
    if pp == 1:
        return Schedule.ONE_F_ONE_B
    named = run.schedule.lower()
    if not named:
        found = (name for pattern, name in SCHEDULES if re.search(pattern, run.words))
        named = next(found, "interleaved" if chunks > 1 else "1f1b")
    known: Mapping[str, Schedule] = {str(schedule): schedule for schedule in Schedule}
    if named not in known:
        return Rejected(
            rule="schedule", detail=f"the schedule {named} is not modelled.", legal=", ".join(known)
        )
    return known[named]


def run_zero(run: Run, dp: int, assumed: list[str]) -> Zero:
    """What data ranks share out. One rank shares nothing, but ZeRO 3 wraps and casts its weights as ever."""
    if dp == 1:
        return Zero.PARAMETERS if run.zero == Zero.PARAMETERS else Zero.NONE
    if run.zero is not None:
        return Zero(run.zero)
    usual = Zero.NONE
    for pattern, zero in ((SHARDS_PARAMETERS, Zero.PARAMETERS), (SHARDS_OPTIMIZER, Zero.OPTIMIZER)):
        if re.search(pattern, run.framework.lower()):
            usual = zero
            break
    assumed.append(f"zero {int(usual)}")
    return usual


def run_sequence_parallel(run: Run, tp: int, assumed: list[str]) -> bool:
    """Whether tensor-parallel ranks share out the sequence between their products."""
    if tp == 1:
        return False
    if run.sequence_parallel is not None:
        return run.sequence_parallel
    usual = bool(re.search(SHARDS_SEQUENCE, run.framework.lower()))
    assumed.append(f"sequence_parallel {str(usual).lower()}")
    return usual
