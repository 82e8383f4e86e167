"""What Megatron-LM (Megatron Core 0.13 to 0.15, 2025) runs, read in its source: files are named at each rule.

Stages may be of any sizes: --pipeline-model-parallel-layout writes them down (since core 0.13; before that,
layers divide by pp, or by pp x chunks).
"""

from __future__ import annotations

from planner.foundation.suggest import divisors, nearest_values
from planner.job.problem import PlanningProblem
from planner.model.workload import Method, Optimizer, Precision
from planner.strategy.engines.megatron_model import model_faults
from planner.strategy.engines.recipes import first_of_each, without_copies
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees, Offload, Schedule, Strategy, Zero

RELEASE = "Megatron-LM with Megatron Core 0.15"
MEGATRON_SCHEDULES = (Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED)
MEGATRON_OPTIMIZERS = (Optimizer.ADAMW, Optimizer.SGD)


def megatron_model(problem: PlanningProblem) -> Rejected | None:
    """A GPT whose sizes and arithmetic have arguments (planner.strategy.engines.megatron_model)."""
    faults = model_faults(problem.model, problem.workload)
    if not faults:
        return None
    return Rejected(
        rule="megatron_model",
        detail=f"pretrain_gpt.py of {RELEASE} has no argument for what {problem.model.name} is: "
        f"{'; '.join(faults)}.",
        legal="models of one kind of attention, two norms a block, arithmetic as Llama's or GPT's",
        fix="--model, or another --engine",
    )


def megatron_adapters(problem: PlanningProblem) -> Rejected | None:
    """No argument of megatron/training/arguments.py adds adapters."""
    if problem.workload.method is not Method.LORA:
        return None
    return Rejected(
        rule="megatron_adapters",
        detail="method=lora: pretrain_gpt.py trains all weights; adapters are Megatron Bridge's, another "
        "program.",
        legal="--method pretrain or finetune",
        fix="--method finetune",
    )


def megatron_schedule(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """1F1B, and interleaved 1F1B with virtual stages.

    `get_forward_backward_func` of megatron/core/pipeline_parallel/schedules.py has these two.
    """
    if degrees.pp == 1 or degrees.schedule in MEGATRON_SCHEDULES:
        return None
    return Rejected(
        rule="megatron_schedule",
        detail=f"schedule={degrees.schedule}: Megatron-LM's pipeline runs 1F1B, plain or interleaved.",
        legal=", ".join(MEGATRON_SCHEDULES),
        fix="--fix schedule=",
    )


def megatron_sharding(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """The distributed optimizer is ZeRO 1; 2 and 3 are Megatron-FSDP, without a pipeline here.

    --data-parallel-sharding-strategy optim_grads or optim_grads_params with --use-megatron-fsdp
    (megatron/training/arguments.py). Its documentation names tensor, context and expert parallelism beside
    it; --use-torch-fsdp2 asserts pp = 1. With a pipeline every micro-batch would gather each stage again.
    """
    if degrees.zero <= Zero.OPTIMIZER or degrees.pp == 1:
        return None
    return Rejected(
        rule="megatron_sharding",
        detail=f"zero={int(degrees.zero)} with pp={degrees.pp}: Megatron-LM's distributed optimizer shares "
        "out optimizer state (zero=1); gradients and parameters are shared out by Megatron-FSDP, without a "
        "pipeline.",
        legal="zero=0 or 1, or pp=1",
        fix="--fix zero=1",
    )


def megatron_experts_sequence(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Experts with tensor parallelism need sequence parallelism: else every rank routes the same tokens.

    "When using MoE and tensor parallelism, sequence parallelism must be used" (megatron/training/
    yaml_arguments.py; megatron/core/model_parallel_config.py for expert parallelism).
    """
    if degrees.tp == 1 or degrees.sequence_parallel or not problem.model.experts:
        return None
    return Rejected(
        rule="megatron_experts_sequence",
        detail=f"tp={degrees.tp} over layers of experts without sequence parallelism: Megatron-LM refuses.",
        legal="sequence_parallel=true, or tp=1",
        fix="--fix sequence_parallel=true",
    )


def megatron_heads(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Query groups divide by tp: `divide(num_query_groups, world_size)` of megatron/core/transformer/
    attention.py.

    Later releases split the rows of linear_qkv all the same and gather its result over tp, in every layer,
    which costs something else than copies do and is not modelled.
    """
    why = "divides query groups by tp (later releases gather all queries, keys and values, not modelled)"
    return without_copies(problem, degrees, "Megatron-LM", why)


def megatron_context(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Asserted: "seq-length should be a multiple of 2 * context-parallel-size" (training/arguments.py).

    Any exchange: --cp-comm-type p2p, all_gather or a2a.
    """
    unit, seq = 2 * degrees.cp, problem.workload.seq
    if degrees.cp == 1 or seq % unit == 0:
        return None
    return Rejected(
        rule="megatron_context",
        detail=f"cp={degrees.cp} and a sequence of {seq} tokens: Megatron-LM asks for a multiple of 2 x cp = "
        f"{unit}, by whatever exchange.",
        legal=f"cp of {nearest_values(divisors(seq // 2) if seq % 2 == 0 else [1], degrees.cp)}",
        fix="--fix cp=",
    )


def megatron_optimizer(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """adam and sgd (--optimizer); the distributed optimizer and FSDP know Adam alone.

    "Only Adam and HybridDeviceOptimizer currently supported" (megatron/core/optimizer/distrib_optimizer.py).
    """
    optimizer = problem.workload.optimizer
    if optimizer is Optimizer.ADAMW or (optimizer is Optimizer.SGD and degrees.zero is Zero.NONE):
        return None
    known = optimizer in MEGATRON_OPTIMIZERS
    why = "its distributed optimizer knows Adam alone" if known else "it has adam and sgd"
    return Rejected(
        rule="megatron_optimizer",
        detail=f"{optimizer} with zero={int(degrees.zero)}: Megatron-LM cannot train with it: {why}.",
        legal="zero=0, or --optimizer adamw" if known else f"--optimizer {' or '.join(MEGATRON_OPTIMIZERS)}",
        fix="--fix zero=0" if known else "--optimizer adamw",
    )


def megatron_experts_precision(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Asserted: "Expert parallelism is not supported with fp16 training" (megatron/training/arguments.py)."""
    if degrees.ep == 1 or problem.workload.precision is not Precision.FP16:
        return None
    return Rejected(
        rule="megatron_experts_precision",
        detail=f"ep={degrees.ep} in fp16: Megatron-LM asserts that experts are whole in fp16.",
        legal="--precision bf16, fp32 or fp8, or ep=1",
        fix="--precision bf16",
    )


def megatron_recompute(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """None, selective for all blocks, or full for the first N blocks of every stage, one N for all.

    --recompute-granularity is one for the run; full with --recompute-method block and
    --recompute-num-layers N recomputes the first N blocks of each stage (megatron/core/transformer/
    transformer_block.py, `_checkpointed_forward`).
    """
    counts = [stage.recompute for stage in strategy.stages]
    if all(each.selective == each.layers for each in counts):
        return None
    most = max(each.full for each in counts)
    sizes = [stage.layers for stage in strategy.stages]
    if [stage.recompute for stage in first_of_each(sizes, most)] == counts:
        return None
    each_stage = ", ".join(f"{c.none}/{c.selective}/{c.full}" for c in counts[:8])
    return Rejected(
        rule="megatron_recompute",
        detail=f"blocks that recompute nothing/selectively/in full, by stage: {each_stage}"
        f"{', ...' if len(counts) > 8 else ''}. Megatron-LM has selective recomputation for all blocks, or "
        "full for the first N of every stage.",
        legal="one option for all blocks, or the same number in full in every stage",
        fix="--fix recompute=none, selective or full",
    )


def megatron_offload(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """--optimizer-cpu-offload with the distributed optimizer; activations without pipeline or recomputation.

    "Currently there is no support for Pipeline parallelism with CPU offloading", and "CPU offloading does not
    work when activation recomputation is enabled" (megatron/core/transformer/transformer_config.py).
    """
    degrees = strategy.degrees
    again = any(stage.recompute.none < stage.layers for stage in strategy.stages)
    if Offload.ACTIVATIONS in strategy.offloads and (degrees.pp > 1 or again):
        return Rejected(
            rule="megatron_offload",
            detail=f"offload=activations with pp={degrees.pp}{' and recomputation' if again else ''}: "
            "Megatron-LM offloads activations without a pipeline and without recomputation.",
            legal="offload=none, or pp=1 and recompute=none",
            fix="--fix offload=none",
        )
    if Offload.OPTIMIZER in strategy.offloads and degrees.zero is not Zero.OPTIMIZER:
        return Rejected(
            rule="megatron_offload",
            detail=f"offload=optimizer with zero={int(degrees.zero)}: Megatron-LM offloads the state of its "
            "distributed optimizer (zero=1).",
            legal="offload=none, or zero=1",
            fix="--fix zero=1",
        )
    return None


def megatron_offload_layers(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """Asserted: --cpu-offloading-num-layers is below the number of layers (megatron/core/transformer/
    transformer_config.py)."""
    layers = problem.model.layers
    if all(stage.offload.activations < layers for stage in strategy.stages):
        return None
    return Rejected(
        rule="megatron_offload_layers",
        detail=f"offload=activations of all {layers} blocks: Megatron-LM asserts --cpu-offloading-num-layers "
        "below their number.",
        legal=f"activations of up to {layers - 1} blocks, or offload=none",
        fix="--fix offload=none",
    )


MEGATRON_PROBLEM_RULES = (megatron_model, megatron_adapters)
MEGATRON_RULES = (
    megatron_schedule,
    megatron_sharding,
    megatron_experts_sequence,
    megatron_heads,
    megatron_context,
    megatron_optimizer,
    megatron_experts_precision,
)
MEGATRON_STRATEGY_RULES = (megatron_recompute, megatron_offload, megatron_offload_layers)
