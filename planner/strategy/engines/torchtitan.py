"""What torchtitan runs, as of its release 0.2.2 (2026), read in its source: files are named at each rule."""

from __future__ import annotations

from planner.foundation.suggest import divisors, nearest_values
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.workload import Method, Optimizer, Precision
from planner.strategy.engines.recipes import every_kth, most_on_a_rank, without_copies
from planner.strategy.engines.torchtitan_model import model_faults
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees, Schedule, Strategy, Zero

RELEASE = "torchtitan 0.2.2"
TORCH_SCHEDULES = (
    Schedule.GPIPE,
    Schedule.ONE_F_ONE_B,
    Schedule.INTERLEAVED,
    Schedule.ZBV,
    Schedule.DUALPIPEV,
)
"""GPipe, 1F1B, Interleaved1F1B, ZBVZeroBubble and DualPipeV of torch.distributed.pipelining.schedules, where
`get_schedule_class` finds what `pipeline_parallel_schedule` names; InterleavedZeroBubble is not planned."""


def torchtitan_model(problem: PlanningProblem) -> Rejected | None:
    """Classes of torchtitan/models that export writes flavours of
    (planner.strategy.engines.torchtitan_model)."""
    faults = model_faults(problem.model)
    if not faults:
        return None
    return Rejected(
        rule="torchtitan_model",
        detail=f"no class of {RELEASE} is {problem.model.name}: {'; '.join(faults)}.",
        legal="models like Llama 3, Qwen 3 (dense or experts alone) and DeepSeek-V3",
        fix="--model, or another --engine",
    )


def torchtitan_sharding(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """FSDP2 shards parameters over dp_shard x cp: resharded after forward (3) or not (2).

    `ParallelDims.fsdp_enabled` is dp_shard > 1 or cp > 1, and `fsdp_reshard_after_forward` is always or never
    (torchtitan/distributed/parallel_dims.py, fsdp.py). No option shares out the optimizer alone.
    """
    shards = degrees.dp_shard * degrees.cp
    if shards == 1 or degrees.zero in (Zero.GRADIENTS, Zero.PARAMETERS):
        return None
    return Rejected(
        rule="torchtitan_sharding",
        detail=f"zero={int(degrees.zero)} over dp_shard={degrees.dp_shard} x cp={degrees.cp} = {shards} "
        "ranks: torchtitan shards parameters over these ranks whenever they are more than one (FSDP2).",
        legal="zero=3 (resharded after forward), zero=2 (not)",
        fix="--fix zero=3",
    )


def torchtitan_replicas(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Replicas without shards are DDP, which runs alone.

    "DDP has not supported > 1D parallelism" (torchtitan/models/llama3/infra/parallelize.py).
    """
    if degrees.dp_replicate == 1 or degrees.dp_shard * degrees.cp > 1 or degrees.tp * degrees.pp == 1:
        return None
    return Rejected(
        rule="torchtitan_replicas",
        detail=f"dp={degrees.dp} replicas without shards (zero=0) beside tp={degrees.tp}, pp={degrees.pp}: "
        "torchtitan's DDP runs with no other parallelism.",
        legal="zero=2 or 3, or tp=1 and pp=1",
        fix="--fix zero=3",
    )


def torchtitan_sequence_parallel(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """The tensor-parallel plans of its models shard the norms' inputs by sequence, always.

    `apply_non_moe_tp` of torchtitan/models/llama3/infra/parallelize.py puts SequenceParallel on every norm.
    """
    if degrees.tp == 1 or degrees.sequence_parallel:
        return None
    return Rejected(
        rule="torchtitan_sequence_parallel",
        detail=f"tp={degrees.tp} without sequence parallelism: torchtitan's tensor parallelism includes it.",
        legal="sequence_parallel=true, or tp=1",
        fix="--fix sequence_parallel=true",
    )


def torchtitan_heads(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Keys and values are split by ColwiseParallel, and then viewed as whole heads.

    `apply_non_moe_tp` of torchtitan/models/llama3/infra/parallelize.py; DTensor cannot view a part of a head
    as one.
    """
    why = "splits key and value projections over its ranks, and a part of a head cannot be viewed as one"
    return without_copies(problem, degrees, "torchtitan", why)


def torchtitan_sequence(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """The sequence divides by tp x 2 cp, whether or not cp is used (`ParallelDims.seq_len_divisor`)."""
    unit, seq = degrees.tp * 2 * degrees.cp, problem.workload.seq
    if degrees.tp * degrees.cp == 1 or seq % unit == 0:
        return None
    nearest = sorted({max(1, seq // unit) * unit, (seq // unit + 1) * unit})
    return Rejected(
        rule="torchtitan_sequence",
        detail=f"a sequence of {seq} tokens does not divide by tp x 2 cp = {degrees.tp} x {2 * degrees.cp} = "
        f"{unit}, which torchtitan asserts.",
        legal="--seq " + " or ".join(str(value) for value in nearest),
        fix="--seq",
    )


def torchtitan_schedule(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Pipeline schedules are the classes of torch.distributed.pipelining."""
    if degrees.pp == 1 or degrees.schedule in TORCH_SCHEDULES:
        return None
    return Rejected(
        rule="torchtitan_schedule",
        detail=f"schedule={degrees.schedule} has no class in torch.distributed.pipelining.schedules.",
        legal=", ".join(TORCH_SCHEDULES),
        fix="--fix schedule=",
    )


def torchtitan_context(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """torch's context_parallel gathers keys and values.

    `context_parallel_rotate_method` is "allgather" by default (torchtitan/config/job_config.py).
    """
    if degrees.cp == 1 or degrees.cp_exchange is CpExchange.GATHER:
        return None
    return Rejected(
        rule="torchtitan_context",
        detail=f"cp={degrees.cp} by {degrees.cp_exchange}: torchtitan's context parallelism gathers keys and "
        "values.",
        legal="cp_exchange=gather",
        fix="--fix cp_exchange=gather",
    )


def torchtitan_experts(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Experts are in tp shards or whole, and ep borrows all of cp (and of tp) before dp_shard.

    `ParallelDims._validate`: etp is tp or 1; with etp = tp, cp divides ep and ep dp_shard x cp; with etp = 1,
    cp x tp divides ep and ep dp_shard x cp x tp.
    """
    if degrees.ep == 1:
        return None
    if degrees.expert_tp not in (1, degrees.tp):
        return Rejected(
            rule="torchtitan_experts",
            detail=f"etp={degrees.expert_tp}: torchtitan has experts whole or in tp={degrees.tp} shards.",
            legal=f"etp=1 or {degrees.tp}",
            fix="--fix etp=",
        )
    borrowed = degrees.cp if degrees.expert_tp == degrees.tp else degrees.cp * degrees.tp
    ranks = degrees.dp_shard * borrowed
    if degrees.ep % borrowed == 0 and ranks % degrees.ep == 0:
        return None
    what = "cp" if degrees.expert_tp == degrees.tp else "cp x tp"
    return Rejected(
        rule="torchtitan_experts",
        detail=f"ep={degrees.ep} with etp={degrees.expert_tp}: torchtitan borrows whole {what}={borrowed} "
        f"for it, then parts of dp_shard={degrees.dp_shard}.",
        legal=f"ep of {nearest_values((d for d in divisors(ranks) if d % borrowed == 0), degrees.ep)}",
        fix="--fix ep=",
    )


def torchtitan_workload(problem: PlanningProblem) -> Rejected | None:
    """Adam and AdamW, parameters in bf16 or fp32 with fp8 products, all weights trained.

    `build_optimizers` of torchtitan/components/optimizer.py knows Adam and AdamW, `mixed_precision_param` of
    torchtitan/config/job_config.py bfloat16 and float32.
    """
    workload = problem.workload
    faults = {
        f"its optimizer is {workload.optimizer}": workload.optimizer is not Optimizer.ADAMW,
        "its precision is fp16": workload.precision is Precision.FP16,
        "its method is lora": workload.method is Method.LORA,
    }
    found = [fault for fault, holds in faults.items() if holds]
    if not found:
        return None
    return Rejected(
        rule="torchtitan_workload",
        detail=f"torchtitan cannot train this workload: {'; '.join(found)}.",
        legal="--optimizer adamw, --precision bf16, fp32 or fp8, --method pretrain or finetune",
        fix="--optimizer, --precision, --method",
    )


def torchtitan_tied(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Embedding and head are tied where both are of one module (torchtitan/models/qwen3/model/model.py,
    `enable_weight_tying`); stages are copies of the model without the other's parts."""
    if degrees.pp == 1 or not problem.model.tied_embeddings:
        return None
    return Rejected(
        rule="torchtitan_tied",
        detail=f"pp={degrees.pp} and tied embeddings: torchtitan ties them within one stage alone.",
        legal="pp=1",
        fix="--fix pp=1",
    )


def torchtitan_precision(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Parameters are cast by FSDP, or by autocast where nothing is split.

    "Mixed precision training with TP or PP is only supported when FSDP/HSDP/CP is enabled": otherwise it is
    disabled with a warning (`maybe_enable_amp` of torchtitan/distributed/utils.py).
    """
    sharded, split = degrees.dp_shard * degrees.cp > 1, degrees.tp * degrees.pp > 1
    precision = problem.workload.precision
    if sharded or not split or precision is Precision.FP32:
        return None
    return Rejected(
        rule="torchtitan_precision",
        detail=f"{precision} with tp={degrees.tp}, pp={degrees.pp} and no shards: torchtitan casts "
        "parameters in FSDP alone, and would train in fp32.",
        legal="zero=2 or 3 over two or more ranks, or --precision fp32",
        fix="--fix zero=3",
    )


def torchtitan_recompute(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """One mode for all blocks: none, full, selective by operator, or full for every k-th block of a rank.

    torchtitan/distributed/activation_checkpoint.py: `mode`, and `selective_ac_option` "op" or a number, for
    which one counter runs over the blocks that a rank holds. Here the full ones of a stage come first: their
    number is the engine's, and with it what they cost.
    """
    counts = [stage.recompute for stage in strategy.stages]
    none, selective, full = (sum(getattr(each, k) for each in counts) for k in ("none", "selective", "full"))
    if sum(map(bool, (none, selective, full))) == 1 or (not selective and _full_every_kth(strategy)):
        return None
    return Rejected(
        rule="torchtitan_recompute",
        detail=f"{none} blocks recompute nothing, {selective} selectively and {full} in full: torchtitan has "
        "one mode for all blocks, or full recomputation of every k-th block of a rank.",
        legal="one option for all blocks, or full for every k-th",
        fix="--fix recompute=none, selective or full",
    )


def _full_every_kth(strategy: Strategy) -> bool:
    sizes = [stage.layers for stage in strategy.stages]
    found = [stage.recompute for stage in strategy.stages]
    return any(
        [stage.recompute for stage in every_kth(strategy.degrees, sizes, k)] == found
        for k in range(1, most_on_a_rank(strategy.degrees, sizes) + 1)
    )


def torchtitan_offload(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """`enable_cpu_offload` moves parameters, gradients and optimizer together (FSDP2's CPUOffloadPolicy)."""
    if not strategy.offloads:
        return None
    return Rejected(
        rule="torchtitan_offload",
        detail=f"offload={'+'.join(strategy.offloads)}: torchtitan offloads parameters, gradients and "
        "optimizer state together, or nothing.",
        legal="offload=none",
        fix="--fix offload=none",
    )


TORCHTITAN_PROBLEM_RULES = (torchtitan_model, torchtitan_workload)
TORCHTITAN_RULES = (
    torchtitan_sharding,
    torchtitan_replicas,
    torchtitan_sequence_parallel,
    torchtitan_heads,
    torchtitan_sequence,
    torchtitan_schedule,
    torchtitan_context,
    torchtitan_experts,
    torchtitan_tied,
    torchtitan_precision,
)
TORCHTITAN_STRATEGY_RULES = (torchtitan_recompute, torchtitan_offload)
