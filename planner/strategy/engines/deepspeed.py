"""What DeepSpeed (0.19.8, 2026) runs, read in its source: files are named at each rule."""

from __future__ import annotations

from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.workload import Optimizer, Precision
from planner.strategy.engines.recipes import without_copies
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees, Offload, Schedule, Strategy, Zero

RELEASE = "DeepSpeed 0.19.8"


def deepspeed_precision(problem: PlanningProblem) -> Rejected | None:
    """`bf16` and `fp16` of ds_config.json (deepspeed/runtime/precision_config.py), else fp32."""
    if problem.workload.precision is not Precision.FP8:
        return None
    return Rejected(
        rule="deepspeed_precision",
        detail="precision=fp8: ds_config.json has bf16 and fp16; fp8 is no setting of it.",
        legal="--precision bf16, fp16 or fp32",
        fix="--precision bf16",
    )


def deepspeed_pipeline_sharding(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Asserted: "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism" (runtime/pipe/engine.py)."""
    if degrees.pp == 1 or degrees.zero <= Zero.OPTIMIZER:
        return None
    return Rejected(
        rule="deepspeed_pipeline_sharding",
        detail=f"zero={int(degrees.zero)} with pp={degrees.pp}: DeepSpeed's pipeline engine asserts zero "
        "below 2, since each micro-batch's backward adds to whole gradients.",
        legal="zero=0 or 1, or pp=1",
        fix="--fix zero=1",
    )


def deepspeed_schedule(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """`TrainSchedule` is 1F1B with one stage a rank (deepspeed/runtime/pipe/schedule.py)."""
    if degrees.pp == 1 or (degrees.schedule is Schedule.ONE_F_ONE_B and degrees.chunks == 1):
        return None
    return Rejected(
        rule="deepspeed_schedule",
        detail=f"schedule={degrees.schedule} with chunks={degrees.chunks}: DeepSpeed's pipeline engine runs "
        "1F1B with one stage a rank.",
        legal="schedule=1f1b, chunks=1",
        fix="--fix schedule=1f1b",
    )


def deepspeed_sequence_parallel(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """AutoTP all-reduces whole activations (deepspeed/module_inject/layers.py); Ulysses is a cp."""
    if not degrees.sequence_parallel:
        return None
    return Rejected(
        rule="deepspeed_sequence_parallel",
        detail=f"sequence_parallel=true over tp={degrees.tp}: DeepSpeed's tensor parallelism keeps the "
        "sequence whole; what it calls sequence parallelism is cp by all_to_all (Ulysses).",
        legal="sequence_parallel=false",
        fix="--fix sequence_parallel=false",
    )


def deepspeed_tensor_sharding(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Asserted: "the compatibility between 'autotp' and 'zero_stage = 3' has not been validated", asserted in
    `_configure_tensor_parallel_states` of deepspeed/runtime/engine.py (to 0.19.2)."""
    if degrees.tp == 1 or degrees.zero is not Zero.PARAMETERS:
        return None
    return Rejected(
        rule="deepspeed_tensor_sharding",
        detail=f"zero=3 with tp={degrees.tp}: DeepSpeed asserts zero up to 2 beside its tensor parallelism.",
        legal="zero=0, 1 or 2, or tp=1",
        fix="--fix zero=2",
    )


def deepspeed_heads(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """AutoTP deals whole key-value heads to ranks, each to one (`get_shard_size` of deepspeed/module_inject/
    tp_shard.py): where they are fewer, some ranks have none."""
    why = "deals each key-value head to one rank, and as many to each only where tp divides them"
    return without_copies(problem, degrees, "DeepSpeed", why)


def deepspeed_hybrid(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Shards over a part of the data ranks were MiCS, which is refused since it was removed.

    "MiCS ZeRO-3 sharding has been removed" (deepspeed/runtime/config.py, `_REMOVED_ZERO_CONFIG_KEYS`; the
    project's issue 8489). Releases 0.16 to 0.18 have it, with zero=3 alone.
    """
    if degrees.dp_shard == 1 or degrees.dp_replicate == 1:
        return None
    return Rejected(
        rule="deepspeed_hybrid",
        detail=f"zero={int(degrees.zero)} over {degrees.dp_shard} of dp={degrees.dp} ranks: {RELEASE} has no "
        "replicas of shards any more (MiCS was removed).",
        legal=f"dp_shard={degrees.dp}",
        fix=f"--fix dp_shard={degrees.dp}, or --engine torchtitan",
    )


def deepspeed_optimizer(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """ZeRO updates flat pieces of parameters; Adafactor needs their rows and columns.

    `flatten_dense_tensors_aligned` of deepspeed/runtime/zero/stage_1_and_2.py, and `_create_fp32_partitions`
    of stage3.py; shapes of factors are those of arXiv 1804.04235.
    """
    optimizer = problem.workload.optimizer
    if optimizer is not Optimizer.ADAFACTOR or degrees.zero is Zero.NONE:
        return None
    return Rejected(
        rule="deepspeed_optimizer",
        detail=f"{optimizer} with zero={int(degrees.zero)}: DeepSpeed's ZeRO flattens matrices, whose "
        "rows and columns it needs.",
        legal="zero=0, or --optimizer adamw",
        fix="--optimizer adamw",
    )


def deepspeed_context(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Context parallelism is Ulysses (deepspeed/sequence/layer.py, arXiv 2309.14509), without a pipeline.

    Every published example of it turns the pipeline engine off (--no-pipeline-parallel in Megatron-DeepSpeed,
    examples_deepspeed/sequence_parallel), which knows nothing of its groups.
    """
    if degrees.cp == 1:
        return None
    if degrees.cp_exchange is not CpExchange.ALL_TO_ALL:
        return Rejected(
            rule="deepspeed_context",
            detail=f"cp={degrees.cp} by {degrees.cp_exchange}: DeepSpeed trades the sequence for heads "
            "(Ulysses).",
            legal="cp_exchange=all_to_all",
            fix="--fix cp_exchange=all_to_all",
        )
    if degrees.pp > 1:
        return Rejected(
            rule="deepspeed_context",
            detail=f"cp={degrees.cp} with pp={degrees.pp}: DeepSpeed's Ulysses runs without its pipeline.",
            legal="cp=1, or pp=1",
            fix="--fix pp=1",
        )
    return None


def deepspeed_experts(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Asserted: "MoE not supported with Stage 3" (deepspeed/runtime/engine.py); nor is it with a pipeline."""
    if degrees.ep == 1 or (degrees.zero is not Zero.PARAMETERS and degrees.pp == 1):
        return None
    return Rejected(
        rule="deepspeed_experts",
        detail=f"ep={degrees.ep} with zero={int(degrees.zero)} and pp={degrees.pp}: DeepSpeed's expert "
        "parallelism runs with zero up to 2 and without a pipeline.",
        legal="zero=0, 1 or 2 and pp=1, or ep=1",
        fix="--fix zero=2 --fix pp=1",
    )


def deepspeed_stages(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """`partition_method` "type:..." balances the number of blocks (deepspeed/runtime/pipe/module.py)."""
    sizes = [stage.layers for stage in strategy.stages]
    if max(sizes) - min(sizes) <= 1:
        return None
    fewest, most = sum(sizes) // len(sizes), -(-sum(sizes) // len(sizes))
    return Rejected(
        rule="deepspeed_stages",
        detail=f"stages of {min(sizes)} to {max(sizes)} blocks: DeepSpeed balances their number.",
        legal=f"{fewest} blocks in every stage"
        if fewest == most
        else f"{fewest} or {most} blocks in a stage",
        fix="let stages be even",
    )


def deepspeed_recompute(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """Every block recomputes in full, or none does.

    `activation_checkpoint_interval` 1 or 0 of PipelineModule; without it, the model's own gradient
    checkpointing (deepspeed/runtime/activation_checkpointing/checkpointing.py).
    """
    none = sum(stage.recompute.none for stage in strategy.stages)
    full = sum(stage.recompute.full for stage in strategy.stages)
    layers = sum(stage.layers for stage in strategy.stages)
    if layers in (none, full):
        return None
    return Rejected(
        rule="deepspeed_recompute",
        detail=f"{none} blocks recompute nothing, {layers - none - full} selectively and {full} in full: "
        "DeepSpeed recomputes every block in full, or none.",
        legal="recompute=none or full",
        fix="--fix recompute=full",
    )


def deepspeed_offload_optimizer(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """State in host memory is updated by DeepSpeedCPUAdam (`_configure_basic_optimizer` and
    `zero_force_ds_cpu_optimizer` of deepspeed/runtime/engine.py)."""
    optimizer = problem.workload.optimizer
    if Offload.OPTIMIZER not in strategy.offloads or optimizer is Optimizer.ADAMW:
        return None
    return Rejected(
        rule="deepspeed_offload_optimizer",
        detail=f"offload=optimizer of {optimizer}: DeepSpeed updates state in host memory by "
        "DeepSpeedCPUAdam.",
        legal="--optimizer adamw, or offload=none",
        fix="--optimizer adamw, or --fix offload=none",
    )


def deepspeed_offload(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """`offload_optimizer` takes all of the state under ZeRO 1 to 3 (deepspeed/runtime/zero/config.py);
    `cpu_checkpointing` moves the inputs of recomputed blocks alone."""
    stages, zero = strategy.stages, strategy.degrees.zero
    if Offload.OPTIMIZER in strategy.offloads:
        part = any(stage.offload.optimizer != stage.layers for stage in stages)
        if part or zero is Zero.NONE:
            return Rejected(
                rule="deepspeed_offload",
                detail=f"offload=optimizer of {'a part of the blocks' if part else 'all blocks'} with "
                f"zero={int(zero)}: DeepSpeed offloads all optimizer state, under zero=1, 2 or 3.",
                legal="offload of every block's state with zero=1, 2 or 3, or offload=none",
                fix="--fix zero=1, or offload=none",
            )
    if any(stage.offload.activations > stage.recompute.full for stage in stages):
        return Rejected(
            rule="deepspeed_offload",
            detail="offload=activations of blocks that keep them: DeepSpeed offloads the inputs of blocks "
            "that recompute in full (cpu_checkpointing).",
            legal="recompute=full, or offload=none",
            fix="--fix recompute=full",
        )
    return None


DEEPSPEED_PROBLEM_RULES = (deepspeed_precision,)
DEEPSPEED_RULES = (
    deepspeed_pipeline_sharding,
    deepspeed_schedule,
    deepspeed_sequence_parallel,
    deepspeed_tensor_sharding,
    deepspeed_heads,
    deepspeed_hybrid,
    deepspeed_optimizer,
    deepspeed_context,
    deepspeed_experts,
)
DEEPSPEED_STRATEGY_RULES = (
    deepspeed_stages,
    deepspeed_recompute,
    deepspeed_offload,
    deepspeed_offload_optimizer,
)
