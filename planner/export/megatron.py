"""Settings as arguments of Megatron-LM's pretrain_gpt.py, and back: one table of flags.

Read in Megatron-LM of Megatron Core 0.15 (megatron/training/arguments.py, and the classes of megatron/core
that it fills). Stages are always written down (--pipeline-model-parallel-layout): E is the embedding, t a
block, L the loss, `|` ends a stage, and stage i is on pipeline rank i mod pp.

Flags of Megatron-LM that say what the model is, and those that change neither time nor memory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from planner.export.settings import Key, Recipe, Settings, read_back, unread, whole
from planner.foundation.errors import Problem
from planner.model.attention import CpExchange
from planner.model.workload import Optimizer, Precision
from planner.strategy.strategy import Schedule, Zero, even_stages

ARGUMENTS = "megatron/training/arguments.py"
CONFIG = "megatron/core/transformer/transformer_config.py"
LAYOUT = "megatron/core/transformer/pipeline_parallel_layer_layout.py"
MOMENTUM = 0.9
"""Of SGD, as the runtime's own."""


def layout_text(sizes: tuple[int, ...]) -> str:
    """Stages as the layout's text: `Et*3|t*2|t*3L`."""
    stages = [f"t*{size}" if size > 1 else "t" for size in sizes]
    return f"E{'|'.join(stages)}L"


def layout_sizes(text: str) -> tuple[int, ...]:
    """Blocks of each stage of a layout. Raises ValueError where a stage is not of E, t and L."""
    flat = re.sub(r"[\s,\\]", "", str(text))
    while (group := re.search(r"\(([^()]*)\)\*(\d+)", flat)) is not None:
        if int(group[2]) * len(group[1]) > MOST_LAYOUT:
            raise ValueError(text)
        flat = flat[: group.start()] + group[1] * int(group[2]) + flat[group.end() :]
    flat = flat.replace("(", "").replace(")", "")
    sizes = []
    for stage in flat.rstrip("|").split("|"):
        if re.fullmatch(r"E?(t(\*\d+)?)*L?", stage) is None:
            raise ValueError(text)
        sizes.append(sum(int(count or 1) for count in re.findall(r"t(?:\*(\d+))?", stage)))
    return tuple(sizes)


MOST_LAYOUT = 100_000
"""Characters of a layout, repetitions written out; models have some hundred blocks."""


def _layout(settings: Settings) -> str | None:
    return layout_text(settings.sizes) if settings.pp > 1 else None


def _granularity(settings: Settings) -> str | None:
    kinds = {Recipe.SELECTIVE: "selective", Recipe.FULL: "full", Recipe.FIRST: "full"}
    return kinds.get(settings.recompute)


def _method(settings: Settings) -> str | None:
    return {Recipe.FULL: "uniform", Recipe.FIRST: "block"}.get(settings.recompute)


def _number(settings: Settings) -> int | None:
    return {Recipe.FULL: 1, Recipe.FIRST: settings.recompute_number}.get(settings.recompute)


def _recipe(found: Mapping[str, Any]) -> dict[str, Any]:
    """What --recompute-* say together. Raises ValueError for what no plan has a word for."""
    granularity = found.get("--recompute-granularity")
    if "--recompute-activations" in found:
        granularity = "selective"
    if granularity is None:
        return {"recompute": Recipe.NONE}
    if granularity == "selective":
        modules = found.get("--recompute-modules", "core_attn")
        if modules != "core_attn":
            raise ValueError(f"--recompute-modules {modules}: a plan recomputes core_attn, or whole blocks")
        return {"recompute": Recipe.SELECTIVE}
    method, number = found.get("--recompute-method"), whole(found.get("--recompute-num-layers", 1))
    if granularity != "full" or method not in ("uniform", "block"):
        raise ValueError(f"--recompute-granularity {granularity} with --recompute-method {method}")
    if method == "block":
        return {"recompute": Recipe.FIRST, "recompute_number": number}
    if number > 1:
        raise ValueError(f"--recompute-num-layers {number} with uniform: a plan keeps every block's input")
    return {"recompute": Recipe.FULL}


def _zero(value: Any) -> Zero:
    return {
        "no_shard": Zero.NONE,
        "optim": Zero.OPTIMIZER,
        "optim_grads": Zero.GRADIENTS,
        "optim_grads_params": Zero.PARAMETERS,
    }[value]


def _exchange(value: Any) -> CpExchange:
    ways = {
        "p2p": CpExchange.RING,
        "all_gather": CpExchange.GATHER,
        "allgather": CpExchange.GATHER,
        "a2a": CpExchange.ALL_TO_ALL,
    }
    return ways[value]


FSDP = {Zero.GRADIENTS: True, Zero.PARAMETERS: True}
SHARDED = {Zero.GRADIENTS: "optim_grads", Zero.PARAMETERS: "optim_grads_params"}
SPREAD = {CpExchange.RING: "p2p", CpExchange.GATHER: "all_gather", CpExchange.ALL_TO_ALL: "a2a"}
BF16 = {Precision.BF16: True, Precision.FP8: True}
HYBRID = {Precision.FP8: "hybrid"}

KEYS = (
    Key(name="--tensor-model-parallel-size", field="tp", source=ARGUMENTS),
    Key(name="--sequence-parallel", field="sequence_parallel", source=ARGUMENTS, words={True: True}),
    Key(name="--pipeline-model-parallel-size", field="pp", source=ARGUMENTS),
    Key(
        name="--pipeline-model-parallel-layout",
        field="sizes",
        source=LAYOUT,
        write=_layout,
        read=layout_sizes,
    ),
    Key(name="--context-parallel-size", field="cp", source=ARGUMENTS),
    Key(name="--cp-comm-type", field="cp_exchange", source=CONFIG, words=SPREAD, read=_exchange),
    Key(name="--expert-model-parallel-size", field="ep", source=ARGUMENTS),
    Key(name="--expert-tensor-parallel-size", field="etp", source=ARGUMENTS),
    Key(name="--micro-batch-size", field="micro_batch", source=ARGUMENTS),
    Key(name="--global-batch-size", field="batch", source=ARGUMENTS),
    Key(name="--seq-length", field="seq", source=ARGUMENTS),
    Key(name="--use-distributed-optimizer", field="zero", source=ARGUMENTS, words={Zero.OPTIMIZER: True}),
    Key(name="--use-megatron-fsdp", field="zero", source=ARGUMENTS, words=FSDP, reads=False),
    Key(
        name="--data-parallel-sharding-strategy",
        field="zero",
        source=ARGUMENTS,
        words=SHARDED,
        read=_zero,
        reads=False,
    ),
    Key(
        name="--ckpt-format",
        field="zero",
        source=ARGUMENTS,
        words=dict.fromkeys(FSDP, "fsdp_dtensor"),
        reads=False,
    ),
    Key(
        name="--num-distributed-optimizer-instances",
        field="dp_replicate",
        source=ARGUMENTS,
        write=lambda s: s.dp_replicate if s.zero and (s.dp_replicate or 1) > 1 else None,
        read=whole,
    ),
    Key(name="--overlap-grad-reduce", field="zero", source=ARGUMENTS, write=lambda _: True, reads=False),
    Key(
        name="--overlap-param-gather",
        field="zero",
        source=ARGUMENTS,
        words=FSDP,
        reads=False,
        strict=True,
    ),
    Key(
        name="--recompute-granularity",
        field="recompute",
        source=CONFIG,
        write=_granularity,
        reads=False,
    ),
    Key(
        name="--recompute-modules",
        field="recompute",
        source=CONFIG,
        words={Recipe.SELECTIVE: "core_attn"},
        reads=False,
    ),
    Key(name="--recompute-method", field="recompute", source=CONFIG, write=_method, reads=False),
    Key(name="--recompute-num-layers", field="recompute", source=CONFIG, write=_number, reads=False),
    Key(name="--optimizer-cpu-offload", field="offload_optimizer", source=ARGUMENTS, words={True: True}),
    Key(
        name="--use-precision-aware-optimizer",
        field="offload_optimizer",
        source=ARGUMENTS,
        words={True: True},
        reads=False,
    ),
    Key(
        name="--cpu-offloading-num-layers",
        field="offload_activations",
        source=CONFIG,
        write=lambda s: s.offload_activations or None,
        read=whole,
    ),
    Key(name="--bf16", field="precision", source=ARGUMENTS, words=BF16, read=lambda _: Precision.BF16),
    Key(name="--fp16", field="precision", source=ARGUMENTS, words={Precision.FP16: True}),
    Key(name="--fp8-format", field="precision", source=ARGUMENTS, words=HYBRID, read=lambda _: Precision.FP8),
    Key(
        name="--optimizer",
        field="optimizer",
        source=ARGUMENTS,
        words={Optimizer.ADAMW: "adam", Optimizer.SGD: "sgd"},
    ),
    Key(
        name="--sgd-momentum",
        field="optimizer",
        source=ARGUMENTS,
        words={Optimizer.SGD: MOMENTUM},
        reads=False,
    ),
)
"""What a plan says, as flags: written in this order, read by the same names."""

OLDER_SPLITS = (
    "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--recompute-activations",
)
"""Read, and never written: the layout says the same."""


def settings_from(
    found: Mapping[str, Any], layers: int, source: str, problems: list[Problem]
) -> tuple[Settings, tuple[str, ...]]:
    """Settings that flags say, and the flags among them that are not read.

    A flag that no plan has a word for becomes a problem.
    """

    fields = read_back(KEYS, found, source, problems)
    if "--use-megatron-fsdp" in found or "--use-custom-fsdp" in found:
        strategy = str(found.get("--data-parallel-sharding-strategy", "no_shard"))
        fields["zero"] = _zero(strategy) if strategy in _STRATEGIES else Zero.NONE
    try:
        fields |= _recipe(found)
    except ValueError as error:
        problems.append(Problem(where=f"{source}: --recompute-*", fault=f"{error}.", legal=RECOMPUTE_LEGAL))
    settings = Settings(**fields)
    settings = dataclasses.replace(settings, **_split(found, settings, layers, source, problems))
    if "--cp-comm-type" not in found and settings.cp > 1:
        settings = dataclasses.replace(settings, cp_exchange=CpExchange.RING)
    known = (*OLDER_SPLITS, *MODEL_FLAGS, *INERT, "--use-custom-fsdp")
    lost = unread(found, KEYS, known, settings)
    return settings, lost if "--overlap-grad-reduce" in found else (*lost, NOT_OVERLAPPED)


NOT_OVERLAPPED = "the lack of --overlap-grad-reduce: priced as if it were there"
RECOMPUTE_LEGAL = "selective of core_attn, full with uniform 1, or full with block N"
_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def _split(
    found: Mapping[str, Any], settings: Settings, layers: int, source: str, problems: list[Problem]
) -> dict[str, Any]:
    """Chunks, schedule and sizes of stages: by the layout, or by the flags before there was one."""
    pp = settings.pp
    try:
        sizes = settings.sizes or _older_sizes(found, pp, layers)
    except ValueError as error:
        problems.append(Problem(where=f"{source}: --pipeline-model-parallel-size", fault=f"{error}."))
        return {}
    if pp == 1:
        return {"sizes": ()}
    chunks = max(1, len(sizes) // pp)
    schedule = Schedule.INTERLEAVED if chunks > 1 else Schedule.ONE_F_ONE_B
    return {"chunks": chunks, "schedule": schedule, "sizes": sizes}


def _older_sizes(found: Mapping[str, Any], pp: int, layers: int) -> tuple[int, ...]:
    """Even stages, but for the first and the last rank where these are said. Raises ValueError."""
    chunks = whole(found.get("--num-virtual-stages-per-pipeline-rank", 1))
    if "--num-layers-per-virtual-pipeline-stage" in found:
        chunks = layers // (pp * whole(found["--num-layers-per-virtual-pipeline-stage"]))
    first, last = (found.get(f"--decoder-{end}-pipeline-num-layers") for end in ("first", "last"))
    ranks: list[int | None] = [None] * pp
    if first is not None:
        ranks[0] = whole(first)
    if last is not None:
        ranks[-1] = whole(last)
    open_ranks, left = ranks.count(None), layers - sum(rank or 0 for rank in ranks)
    if left < open_ranks or (open_ranks and left % open_ranks) or (not open_ranks and left):
        raise ValueError(f"is {pp}, and {left} of {layers} blocks do not divide over {open_ranks} ranks")
    each = [rank if rank is not None else left // open_ranks for rank in ranks]
    if any(rank % chunks for rank in each):
        raise ValueError(f"is {pp}, and a rank's {max(each)} blocks do not divide into {chunks} stages")
    if chunks == 1:
        return tuple(each)
    per_stage = [stage.layers for rank in each for stage in even_stages(rank, chunks)]
    return tuple(per_stage[rank * chunks + chunk] for chunk in range(chunks) for rank in range(pp))


MODEL_SIZES = {
    "--num-layers": "layers",
    "--hidden-size": "hidden",
}
"""Flags that must agree with the model that is named, and its field."""

MODEL_FLAGS = (
    *MODEL_SIZES,
    "--ffn-hidden-size",
    "--num-attention-heads",
    "--kv-channels",
    "--group-query-attention",
    "--num-query-groups",
    "--max-position-embeddings",
    "--position-embedding-type",
    "--rotary-base",
    "--rotary-percent",
    "--rotary-interleaved",
    "--rotary-seq-len-interpolation-factor",
    "--use-rope-scaling",
    "--rope-scaling-factor",
    "--rope-type",
    "--rotary-scaling-factor",
    "--original-max-position-embeddings",
    "--beta-fast",
    "--beta-slow",
    "--mscale",
    "--mscale-all-dim",
    "--normalization",
    "--norm-epsilon",
    "--apply-layernorm-1p",
    "--swiglu",
    "--squared-relu",
    "--disable-bias-linear",
    "--add-qkv-bias",
    "--qk-layernorm",
    "--untie-embeddings-and-output-weights",
    "--make-vocab-size-divisible-by",
    "--vocab-size",
    "--window-size",
    "--multi-latent-attention",
    "--q-lora-rank",
    "--kv-lora-rank",
    "--qk-head-dim",
    "--qk-pos-emb-head-dim",
    "--v-head-dim",
    "--num-experts",
    "--moe-router-topk",
    "--moe-ffn-hidden-size",
    "--moe-shared-expert-intermediate-size",
    "--moe-layer-freq",
    "--moe-router-score-function",
    "--moe-router-pre-softmax",
    "--moe-router-num-groups",
    "--moe-router-group-topk",
    "--moe-router-topk-scaling-factor",
    "--moe-router-enable-expert-bias",
    "--moe-router-bias-update-rate",
    "--moe-router-load-balancing-type",
    "--moe-aux-loss-coeff",
    "--moe-z-loss-coeff",
    "--moe-router-dtype",
)
"""What --model says instead. --moe-expert-capacity-factor is not among them: it drops tokens, and so work."""

INERT = (
    "--use-mcore-models",
    "--transformer-impl",
    "--attention-backend",
    "--use-flash-attn",
    "--no-masked-softmax-fusion",
    "--attention-softmax-in-fp32",
    "--accumulate-allreduce-grads-in-fp32",
    "--attention-dropout",
    "--hidden-dropout",
    "--init-method-std",
    "--lr",
    "--min-lr",
    "--lr-decay-style",
    "--lr-decay-iters",
    "--lr-decay-samples",
    "--lr-warmup-iters",
    "--lr-warmup-samples",
    "--lr-warmup-fraction",
    "--lr-warmup-init",
    "--weight-decay",
    "--start-weight-decay",
    "--end-weight-decay",
    "--weight-decay-incr-style",
    "--clip-grad",
    "--adam-beta1",
    "--adam-beta2",
    "--adam-eps",
    "--train-iters",
    "--train-samples",
    "--seed",
    "--exit-interval",
    "--exit-duration-in-mins",
    "--exit-signal-handler",
    "--log-interval",
    "--log-throughput",
    "--log-params-norm",
    "--log-num-zeros-in-grad",
    "--log-timers-to-tensorboard",
    "--log-memory-to-tensorboard",
    "--tensorboard-dir",
    "--tensorboard-queue-size",
    "--tensorboard-log-interval",
    "--wandb-project",
    "--wandb-exp-name",
    "--wandb-save-dir",
    "--timing-log-level",
    "--eval-iters",
    "--eval-interval",
    "--save",
    "--save-interval",
    "--load",
    "--no-load-optim",
    "--no-load-rng",
    "--no-save-optim",
    "--no-save-rng",
    "--async-save",
    "--dist-ckpt-format",
    "--data-path",
    "--data-args-path",
    "--data-cache-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--split",
    "--mock-data",
    "--num-workers",
    "--tokenizer-type",
    "--tokenizer-model",
    "--vocab-file",
    "--merge-file",
    "--distributed-backend",
    "--distributed-timeout-minutes",
    "--no-create-attention-mask-in-dataloader",
    "--manual-gc",
    "--manual-gc-interval",
    "--moe-grouped-gemm",
    "--moe-token-dispatcher-type",
    "--no-check-for-nan-in-loss-and-grad",
    "--nnodes",
    "--nproc-per-node",
    "--nproc_per_node",
    "--node-rank",
    "--node_rank",
    "--master-addr",
    "--master_addr",
    "--master-port",
    "--master_port",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
)
"""Rates, data, logs, checkpoints, launcher: of no step's time or memory, as far as plans count."""
