"""What a run's texts say of its software: engine, attention kernel, precision, schedule, defaults.

A table rarely states everything. What it leaves out is taken from the framework's usual way and added to
`assumed`, so that a reader sees what a prediction rests on.

The software that a plan for an engine is priced by: its Stack, under the name that a profile knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from planner.calibration.runs import Run, RunRecompute
from planner.hardware.catalog import architecture_of
from planner.hardware.cluster import ClusterSpec, Device
from planner.job.engine_settings import SCALING, Dispatch, Engine, EngineSettings, Selective, native_settings
from planner.model.attention import CpExchange
from planner.model.sublayer import AttentionKernel
from planner.model.workload import AdapterModules, Adapters, Method, Precision
from planner.profile.profile import Profile
from planner.strategy.engines.recipes import USUAL_EXCHANGE
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Offload, Schedule, Zero

ENGINES: tuple[tuple[str, Engine], ...] = (
    (r"deepspeed.*megatron|megatron-?deepspeed", Engine.MEGATRON),
    (r"megatron|nemo|mbridge|nanotron|megascale|fast-llm|ptd-p|neox", Engine.MEGATRON),
    (rf"deepspeed|colossal|{SCALING}", Engine.DEEPSPEED),
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

OVERLAPS_GRADIENTS = r"nemo|bridge|dp/pp comm overlap|overlap.{0,6}grad"
"""Frameworks whose recipes reduce gradients behind the backward pass, and words that say so."""

OVERLAPS_DISPATCH = r"a2a overlap|moe overlap"
ATTENDS_IN_FP8 = r"fp8 (attention|dpa|dot[- ]product)"
WHOLE_GRAPHS = r"full[- ]iteration cuda graph"
GRAPHED_RECIPES = ((r"qwen3|deepseek", r"g?b[23]00", (26, 6)), (r"kimi", r"g?b[23]00", (26, 8)))
FP8_ATTENTION = ((r"qwen3", r"g?b[23]00", (26, 6)), (r"deepseek", r"g?b300", (26, 6)))
FUSED_EXPERTS = ((r"gpt.?oss", r"gb[23]00", (26, 6)),)
"""Releases (year, month of the NeMo container) from which Megatron-Bridge's MXFP8 recipes on Blackwell replay
whole steps as CUDA graphs and send tokens behind another micro-batch's products (its pull requests 4211,
4249, 4498, 4606, 4700 for 0.5.0 and 0.5.1, 5168 for 0.6.0), or compute attention in fp8 (3983, 4249, 4606),
or fuse an expert's activation with its products (release notes of 0.5.1)."""

INTERLEAVES = r"nemo|bridge"
"""Frameworks whose recipes interleave stages wherever they have a pipeline: of 181 published rows that state
it 175 do, most with two layers a chunk."""

CHUNK_LAYERS = 2

TITAN_CHUNKS = 2
"""Stages of a rank in torchtitan's schedules of several (its pipeline_parallel.py)."""

ULYSSES = r"ulysses"
DEDUPLICATES = r"\bdeepep\b|\bhybrid-?ep\b"
FP8_DISPATCH = r"fp8 dispatch"
BALANCED = r"force-balanced|forced? (load )?balanc"
"""Benchmarks of routing that is forced to be even."""

USUALLY_DEDUPLICATES = r"bridge"
"""Megatron-Bridge's recipes dispatch by DeepEP on Hopper and HybridEP on Blackwell."""

WHOLE_EXPERT_RECIPES = r"bridge|megatron-core moe"
"""Frameworks whose recipes do not shard an expert, whatever tp is; Megatron-LM shards it as the rest."""

SCHEDULES: tuple[tuple[str, str], ...] = (
    (r"zb-?2p\b", "zb-2p"),
    (r"zb-?1p\b|zb-?h1\b", "zb-h1"),
    (r"zb-?v\b", "zbv"),
    (r"dualpipe-?v", "dualpipev"),
    (r"dualpipe", "dualpipe"),
    (r"\bgpipe\b", "gpipe"),
    (r"1f1b-i schedule|interleaved 1f1b", "interleaved"),
)
"""Schedules as frameworks and papers write them. Zero Bubble's ZB-1p keeps 1F1B's memory: ZB-H1."""

NOT_MODELLED: tuple[tuple[str, str], ...] = (
    (r"\bqlora\b", "fine-tuning of quantised weights"),
    (r"\badapter\b", "fine-tuning with adapters other than LoRA"),
    (r"^(?!.*\blora\b).*bf16-true", "training with weights and optimizer state in bf16"),
)
"""Words that name what the cost model does not know: rows with them are not predicted."""


FUSED_LOSS = r"\bce fusion|cross.?entropy.{0,6}fus|fused.{0,6}cross.?entropy"
"""Words of runs whose loss is one kernel, Megatron-LM's cross_entropy_loss_fusion for one."""

OFFLOADS: tuple[tuple[str, Offload], ...] = (
    (r"optimi[sz]er states? on cpu|offload\w* (of )?(the )?optimi[sz]er|optimi[sz]er (state )?offload",
     Offload.OPTIMIZER),
    (r"activations? (cpu )?offload\w*(?! false)|offload\w* (of )?(the )?activations?"
     r"|act cpu offload(?! false)", Offload.ACTIVATIONS),
)  # fmt: skip
"""Words for what lies in host memory."""

OFFLOADS_MORE = r"offload\w*[^;,|]*\bparam|full offload|param\w* offload"
"""Words for parameters in host memory, which come up in every pass: not modelled."""

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


def run_offload(run: Run) -> Offload | Rejected:
    """What of the run lies in host memory, by its words, or why that is not modelled."""
    words = run.words
    found = [offload for pattern, offload in OFFLOADS if re.search(pattern, words)]
    if re.search(OFFLOADS_MORE, words):
        return Rejected(rule="not_modelled", detail="offloading of parameters is not modelled.")
    if len(found) > 1:
        return Rejected(rule="not_modelled", detail="offloading of several kinds is not read from words.")
    if found:
        return found[0]
    if re.search(r"offload(?! false)", words):
        return Rejected(rule="not_modelled", detail="the row says offloading, and not of what.")
    return Offload.NONE


def run_engine(framework: str) -> Engine:
    """The engine that a framework's name stands for."""
    found = (engine for pattern, engine in ENGINES if re.search(pattern, framework.lower()))
    return next(found, Engine.NATIVE)


def settings_of_run(run: Run, assumed: list[str]) -> EngineSettings:
    """The software of a run; an attention kernel that is not stated is the usual one of its time."""
    attention = run.attention or _usual_attention(run)
    if run.attention is None:
        assumed.append(f"attention {attention}")
    compiled = run.compile
    if compiled is None:
        words = run.words
        compiled = bool(re.search(COMPILED, words)) and "no torch.compile" not in words
    graphed = _graphed(run, assumed)
    return EngineSettings(
        engine=run_engine(run.framework),
        framework=run.framework,
        attention=attention,
        kernels=run.fused_kernels,
        compiled=compiled,
        selective=_selective(run),
        ampere_flash=_ampere_flash(run),
        dispatch=_dispatch(run, assumed),
        dispatch_bytes=1 if re.search(FP8_DISPATCH, run.words) else None,
        balanced=bool(re.search(BALANCED, run.words)),
        overlaps_gradients=bool(re.search(OVERLAPS_GRADIENTS, run.words)),
        overlaps_dispatch=graphed or bool(re.search(OVERLAPS_DISPATCH, run.words)),
        graphed=graphed,
        fused_experts=graphed or _released(run, FUSED_EXPERTS),
        fp8_attention=bool(re.search(ATTENDS_IN_FP8, run.words)) or _released(run, FP8_ATTENTION),
        liger="liger" in run.words,
        fused_loss=bool(re.search(FUSED_LOSS, run.words)),
    )


def _is_torchtitan(run: Run) -> bool:
    """Whether a run is of torchtitan itself, not of another program on FSDP, which counts as that engine."""
    return "torchtitan" in run.framework.lower()


def _selective(run: Run) -> Selective | None:
    """What selective recomputation means where it is not the engine's own kind: that of the MLP alone, and
    what other programs on FSDP than torchtitan do, which keep what is expensive (LLaMA's: arXiv 2302.13971).
    """
    if run.recompute is RunRecompute.MLP:
        return Selective.MLP
    other = run_engine(run.framework) is Engine.TORCHTITAN and not _is_torchtitan(run)
    return Selective.ELEMENTWISE if other else None


def _ampere_flash(run: Run) -> bool:
    """Whether a run's flash kernel was written for Ampere."""
    if re.search(LATER_FLASH, run.words):
        return False
    titan = _is_torchtitan(run) and titan_flash_is_amperes(run.device)
    return titan or bool(re.search(AMPERE_FLASH, run.words))


def titan_flash_is_amperes(device: str) -> bool:
    """Whether torchtitan's attention runs FlashAttention-2 on a device newer than that was written for: on
    Hopper PyTorch's kernel is that; on Blackwell torchtitan asks for cuDNN's (its models/attention.py)."""
    return architecture_of(device).startswith("Hopper")


def _graphed(run: Run, assumed: list[str]) -> bool:
    """Whether whole steps are replayed as a CUDA graph: said in a text, or the recipe's since a release."""
    if re.search(WHOLE_GRAPHS, run.words):
        return True
    if not _released(run, GRAPHED_RECIPES):
        return False
    assumed.append("whole steps in CUDA graphs, dispatch behind products")
    return True


def _released(run: Run, recipes: tuple[tuple[str, str, tuple[int, int]], ...]) -> bool:
    """Whether a run of Megatron-Bridge in fp8 is of a release since which its recipe has something."""
    release = re.search(r"\b(2\d)\.(\d\d)(?:\.\d\d)? nemo container", run.source.lower())
    if release is None or "bridge" not in run.framework.lower() or run.precision.lower() != "fp8":
        return False
    made = int(release.group(1)), int(release.group(2))
    return any(
        re.search(model, run.model.lower()) and re.match(device, run.device) and made >= first
        for model, device, first in recipes
    )


def _dispatch(run: Run, assumed: list[str]) -> Dispatch:
    """How tokens are sent to experts: named in a text, or the framework's usual way."""
    if run.ep is None or run.ep == 1:
        return Dispatch.ALL_TO_ALL
    if re.search(DEDUPLICATES, run.words):
        return Dispatch.DEDUPLICATED
    usual = bool(re.search(USUALLY_DEDUPLICATES, run.framework.lower())) and "a2a" not in run.words
    found = Dispatch.DEDUPLICATED if usual else Dispatch.ALL_TO_ALL
    assumed.append(f"dispatch {found}")
    return found


def run_cp_exchange(run: Run, cp: int, assumed: list[str]) -> CpExchange | Rejected:
    """How context-parallel ranks exchange keys and values: stated, named in a text, or the engine's way."""
    if cp == 1:
        return CpExchange.RING
    stated = run.cp_exchange.lower()
    known: Mapping[str, CpExchange] = {str(exchange): exchange for exchange in CpExchange}
    if stated:
        found = known.get(stated)
        legal = ", ".join(known)
        return found or Rejected(rule="cp_exchange", detail=f"{stated} is not modelled.", legal=legal)
    if re.search(ULYSSES, run.words):
        return CpExchange.ALL_TO_ALL
    usual = USUAL_EXCHANGE[run_engine(run.framework)]
    assumed.append(f"cp_exchange {usual}")
    return usual


def run_etp(run: Run, tp: int, ranks: int, assumed: list[str]) -> int | None:
    """Shards of each expert: stated, named in a text, or the framework's way; None: as many as tp.

    `ranks` hold copies of all of a stage: where they are too few for shards of experts, there are none.
    """
    named = re.search(r"\betp[ =](\d{1,3})\b", run.words)
    if run.etp is not None or named:
        return run.etp or int(named.group(1) if named else 1)
    if run.ep is None or run.ep == 1 or tp == 1:
        return None
    whole = bool(re.search(WHOLE_EXPERT_RECIPES, run.framework.lower())) or ranks % (run.ep * tp) > 0
    assumed.append(f"etp {1 if whole else tp}")
    return 1 if whole else None


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


def usual_micro_batch(run: Run, share: int) -> int | None:
    """The micro-batch of a row that leaves it open, of a data rank's share, where its framework has a usual
    one: torchtitan's pipelines split the share into as many as they have ranks, unless told otherwise
    (experimental.pipeline_parallel_microbatches)."""
    pp = run.pp or 1
    if pp == 1 or run_engine(run.framework) is not Engine.TORCHTITAN or share % pp:
        return None
    return share // pp


def usual_chunks(run: Run, layers: int, pp: int, micro_batches: int, assumed: list[str]) -> int:
    """Chunks of a rank where a row leaves them open: as recipes of its framework do, else 1.

    Chunks are of the fewest layers from CHUNK_LAYERS up that divide a rank's.
    """
    if run_engine(run.framework) is Engine.TORCHTITAN and run_schedule(run, pp, 1) is Schedule.INTERLEAVED:
        assumed.append(f"chunks {TITAN_CHUNKS}")
        return TITAN_CHUNKS
    own, rest = divmod(layers, pp)
    if pp == 1 or rest or micro_batches % pp or not re.search(INTERLEAVES, run.framework.lower()):
        return 1
    size = next(size for size in range(min(CHUNK_LAYERS, own), own + 1) if own % size == 0)
    if own > size:
        assumed.append(f"chunks {own // size}")
    return own // size


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
    pipelined = run_engine(run.framework) is Engine.TORCHTITAN and (run.pp or 1) > 1
    if pipelined and run.zero in (None, Zero.PARAMETERS):
        assumed.append("zero 2, weights gathered throughout, as torchtitan's pipelines keep them")
        return Zero.GRADIENTS
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


TITLES = {
    Engine.NATIVE: "the native runtime",
    Engine.TORCHTITAN: "torchtitan",
    Engine.MEGATRON: "Megatron-LM with --overlap-grad-reduce",
    Engine.DEEPSPEED: "DeepSpeed",
}


def settings_for_engine(engine: Engine, profile: Profile | None, cluster: ClusterSpec) -> EngineSettings:
    """The engine as its own recipes run it: flash attention, gradients reduced early where it can.

    Megatron-LM can with --overlap-grad-reduce, which its guide recommends; DeepSpeed reduces after the last
    backward pass. On Hopper torchtitan's attention is PyTorch's FlashAttention-2.
    """
    if engine is Engine.NATIVE:
        return native_settings(cluster)
    titan = engine is Engine.TORCHTITAN
    return EngineSettings(
        engine=engine,
        framework=fitted_framework(engine, profile),
        ampere_flash=titan and all(map(titan_flash_is_amperes, (g.device.name for g in cluster.groups))),
        overlaps_gradients=engine is Engine.MEGATRON,
    )


def fitted_framework(engine: Engine, profile: Profile | None) -> str:
    """The one framework of this engine that a profile's constants were fitted for; "" where none or several.

    Without one the constants of the engine's family hold. Megatron-DeepSpeed sums gradients in its own way
    (Stack.accumulates_beside), and stands for neither engine.
    """
    if profile is None or engine is Engine.NATIVE:
        return ""
    names = {constant.framework for constant in profile.constants if constant.framework}
    own = {name for name in names if run_engine(name) is engine and not _of_both(name)}
    return own.pop() if len(own) == 1 else ""


def _of_both(framework: str) -> bool:
    name = framework.lower()
    return "megatron" in name and "deepspeed" in name


def priced_as(settings: EngineSettings, profile: Profile | None) -> str:
    """In words, whose software the figures are of, and what of it a profile was fitted to."""
    family, constants = settings.engine.family, profile.constants if profile is not None else ()
    fitted = [f"its family ({family})"] if any(c.engine == family for c in constants) else []
    fitted += [settings.framework] if settings.framework else []
    known = f"by constants of {' and of '.join(fitted)}" if fitted else "of which no run was fitted"
    measured = profile is not None and profile.layers and family != Engine.NATIVE.family
    return f"priced as {TITLES[settings.engine]}, {known}" + (
        "; layers as measured natively" if measured else ""
    )
