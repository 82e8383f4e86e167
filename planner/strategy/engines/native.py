"""What this project's own runtime runs (`plan train`): planner.strategy.engines.native knows it.

What the runtime of this version executes of a model, and what it does not yet.

How the native runtime cuts a micro-batch's tokens where it projects them onto the vocabulary.

Head and loss are one: for a chunk of tokens at a time logits are formed, their softmax, and from it at once
the gradients of the head's input and weight, so that the logits of all tokens never exist together.
"""

from __future__ import annotations

import dataclasses
import math

from planner.foundation.errors import InputError, Problem
from planner.foundation.suggest import nearest_values
from planner.job.problem import PlanningProblem
from planner.model.attention import (
    CAUSAL,
    Attention,
    AttentionSpan,
    CpExchange,
    LatentAttention,
    QkNorm,
    Reach,
)
from planner.model.feed_forward import Experts, FeedForward
from planner.model.spec import Block, Layer, ModelSpec
from planner.model.workload import Precision, Workload
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees, Strategy

EXECUTED_TYPES = (
    *(
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "arcee",
    ),
    *("seed_oss", "ernie4_5", "smollm3", "phi", "phi3", "olmo", "olmo2", "olmo3", "cohere", "cohere2"),
    *("nemotron", "starcoder2", "stablelm", "glm", "glm4", "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen"),
    *("opt", "falcon", "deepseek_v2", "deepseek_v3", "kimi_k2", "mixtral", "qwen2_moe"),
    *("qwen3_moe", "olmoe", "glm4_moe"),
)
"""Families whose arithmetic the runtime repeats, as far as `ModelSpec.arithmetic` has words for it."""

FP8_MULTIPLE = 16
"""Tokens, inputs and outputs of a product in fp8 must be multiples of it (cuBLASLt)."""

WORKLOADS_EXECUTED = "--precision bf16, fp16 or fp32; --method pretrain or finetune"
"""What can be said instead where a workload is not executed."""

EXECUTED_QK_NORMS = (QkNorm.NONE, QkNorm.HEAD, QkNorm.HEAD_LAYERNORM, QkNorm.WIDTH)


def plain_parts(layer: Layer) -> tuple[Block, Attention | LatentAttention, FeedForward]:
    """A layer as the block that the runtime builds, its attention, its MLP or experts.

    Raises InputError for others.
    """
    faults = _layer_faults(layer)
    if faults:
        raise InputError(*(Problem(where="--model", fault=f"{fault}.") for fault in faults))
    assert isinstance(layer, Block) and layer.mlp is not None
    assert isinstance(layer.mixer, (Attention, LatentAttention))
    return layer, layer.mixer, layer.mlp


def not_executed(model: ModelSpec) -> list[str]:
    """What of a model the runtime cannot build; empty where it can build all."""
    each = (fault for layer in model.classes().values() for fault in _layer_faults(layer))
    faults = dict.fromkeys(each)
    ends = {
        f"its family is {model.model_type}": model.model_type not in EXECUTED_TYPES,
        "the embedding is projected to the hidden size": model.embedding_width is not None,
        "the embedding is normed": model.embedding_norm,
        "it has a table of token types": model.token_types > 0,
        "it has a pooler": model.pooler,
        f"it has {model.final_norms} final norms": model.final_norms != 1,
        "an encoder precedes its decoder": model.encoder_layers > 0,
    }
    ends |= dict.fromkeys(model.arithmetic.unexpressed, True)
    return [*faults, *(fault for fault, found in ends.items() if found)]


def vocabulary_not_executed(model: ModelSpec, degrees: Degrees) -> list[str]:
    """Why ranks cannot share out the vocabulary; empty where they can.

    Rank r of tp has the rows from r ceil(V / tp) on, the last one fewer where tp does not divide V. Then data
    ranks share out its columns, since parts of unequal parts have no simple place in the whole. The head's
    bias, which has none, is whole on every rank of tp.
    """
    vocab, tp, shards = model.vocab, degrees.tp, degrees.weight_shards
    if vocab % tp == 0:
        return []
    faults = {
        f"the last of {tp} parts of {-(-vocab // tp)} rows has none": (tp - 1) * -(-vocab // tp) >= vocab,
        f"{shards} ranks cannot share out {model.hidden} columns of unequal parts": model.hidden % shards
        != 0,
    }
    return [fault for fault, found in faults.items() if found]


def context_not_executed(model: ModelSpec, degrees: Degrees) -> list[str]:
    """What of a model's attention ranks cannot share out by blocks of keys; empty where they can."""
    if degrees.cp == 1 or degrees.cp_exchange is CpExchange.ALL_TO_ALL:
        return []
    spans = {
        m.span
        for b in model.transformer_blocks()
        for m in b.mixers
        if isinstance(m, Attention | LatentAttention)
    }
    faults = [_reach(span) for span in sorted(spans - {CAUSAL}, key=str)]
    if model.arithmetic.attention_cap is not None:
        faults.append("scores are capped")
    return faults


def offload_not_executed(strategy: Strategy) -> list[str]:
    """What of a strategy's offloading the runtime cannot do; empty where it can all.

    Selective recomputation keeps results beside autograd, where they are not caught on their way to host
    memory.
    """
    return [
        f"blocks of stage {index} that recompute selectively are among the {stage.offload.activations} "
        "whose activations are in host memory"
        for index, stage in enumerate(strategy.stages)
        if stage.recompute.selective and stage.offload.activations > stage.recompute.full
    ]


def check_executed_offload(strategy: Strategy) -> None:
    """Raises InputError where a strategy keeps in host memory what the runtime cannot catch."""
    faults = offload_not_executed(strategy)
    if faults:
        raise InputError(
            Problem(
                where="stages.offload",
                fault=f"can be estimated, but this version cannot train it: {'; '.join(faults)}.",
                legal="offload none or optimizer, or recompute none or full",
                fix="estimate again with --fix offload=none or --fix recompute=full, or solve",
            )
        )


def check_executed(model: ModelSpec, what: str) -> None:
    """Raises InputError with everything that keeps the runtime from building `model`."""
    faults = not_executed(model)
    if faults:
        listed = "; ".join(faults)
        raise InputError(
            Problem(
                where="--model",
                fault=f"{model.name} can be planned, but this version cannot {what} it: {listed}.",
                legal=f"decoders of the families {', '.join(EXECUTED_TYPES)}",
            )
        )


def not_executed_workload(model: ModelSpec, workload: Workload) -> list[str]:
    """What of training `model` as a workload says the runtime cannot do; empty where it can all."""
    faults = {
        "experts do not multiply in fp8": workload.precision is Precision.FP8 and bool(model.experts),
    }
    return [fault for fault, found in faults.items() if found]


def products_not_executed(model: ModelSpec, workload: Workload, degrees: Degrees) -> list[str]:
    """Products in fp8 whose sizes no kernel has; empty where it has all, or the workload is in others."""
    if workload.precision is not Precision.FP8:
        return []
    sizes = {"tokens of a micro-batch": degrees.micro_batch * workload.seq / degrees.cp}
    for block in model.transformer_blocks():
        for matrix in block.with_kv_copies(degrees.tp).matrices():
            inputs, outputs = matrix.shard(degrees.tp)
            sizes |= {f"inputs of {inputs:g}": inputs, f"outputs of {outputs:g}": outputs}
    faults = [
        f"{name} are no multiple of {FP8_MULTIPLE}, as products in fp8 must be"
        for name, size in sizes.items()
        if size % FP8_MULTIPLE
    ]
    if degrees.pp > 1 and degrees.schedule.splits_backward:
        faults.append(f"weight gradients in fp8 do not wait for a pass of their own ({degrees.schedule})")
    return faults


def check_executed_workload(model: ModelSpec, workload: Workload, degrees: Degrees) -> None:
    """Raises InputError with everything that keeps the runtime from training `model` as `workload` says."""
    faults = not_executed_workload(model, workload) + products_not_executed(model, workload, degrees)
    if faults:
        raise InputError(
            Problem(
                where="workload",
                fault=f"can be planned, but this version cannot train it: {'; '.join(faults)}.",
                legal=WORKLOADS_EXECUTED,
            )
        )


def _layer_faults(layer: Layer) -> list[str]:
    if not isinstance(layer, Block):
        return ["its layers were traced from a module"]
    faults = {
        f"a block has {layer.norms} norms": layer.norms not in ((1, 2) if layer.parallel else (2, 4)),
        "a block attends to an encoder": layer.cross is not None,
    }
    return [fault for fault, found in faults.items() if found] + _mixer_faults(layer) + _mlp_faults(layer)


def _mixer_faults(block: Block) -> list[str]:
    mixer = block.mixer
    if isinstance(mixer, LatentAttention):
        return [_reach(mixer.span)] if mixer.span != CAUSAL else []
    if not isinstance(mixer, Attention):
        return [f"a block mixes tokens by {type(mixer).__name__}" if mixer else "a block has no attention"]
    faults = {
        f"queries and keys are normed ({mixer.qk_norm})": mixer.qk_norm not in EXECUTED_QK_NORMS,
        _reach(mixer.span): mixer.span.reach not in (Reach.CAUSAL, Reach.WINDOW),
        "attention is gated": mixer.gated,
        "attention has sinks": mixer.sinks,
        "attention has a table of relative positions": mixer.position_buckets > 0,
        "values are of another width than keys": mixer.value_dim is not None,
    }
    return [fault for fault, found in faults.items() if found]


def _reach(span: AttentionSpan) -> str:
    if span.reach is Reach.ALL:
        return "attention is not causal"
    return f"attention reaches a {span.reach} of {span.size} keys"


def _mlp_faults(block: Block) -> list[str]:
    if isinstance(block.mlp, Experts) and block.mlp.latent is not None:
        return ["its experts read a latent of the tokens"]
    return [] if block.mlp else ["a block has no MLP"]


MOST_TP = 64
"""Larger tensor-parallel degrees are not named as legal: no node has as many devices."""


def native_context(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Ranks that share out a sequence meet keys block by block."""
    faults = context_not_executed(problem.model, degrees)
    if not faults:
        return None
    return Rejected(
        rule="native_context",
        detail=f"cp={degrees.cp} by {degrees.cp_exchange} meets keys block by block in the native "
        f"runtime, and {'; '.join(faults)}.",
        legal="cp=1, or cp_exchange=all_to_all",
        fix="--fix cp_exchange=all_to_all",
    )


def native_vocabulary(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Each rank has some rows of embedding and head; of unequal parts data ranks share out the columns."""
    faults = vocabulary_not_executed(problem.model, degrees)
    if not faults:
        return None
    model, ways = problem.model, range(1, MOST_TP + 1)
    legal = [tp for tp in ways if not vocabulary_not_executed(model, dataclasses.replace(degrees, tp=tp))]
    return Rejected(
        rule="native_vocabulary",
        detail=f"tp={degrees.tp} cannot split the vocabulary of {model.vocab} in the native runtime: "
        f"{'; '.join(faults)}.",
        legal=nearest_values(legal, degrees.tp),
        fix="--fix tp= or dp_shard=",
    )


def native_workload(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Products in fp8 that kernels have, and adapters beside what the trainer knows."""
    faults = not_executed_workload(problem.model, problem.workload)
    faults += products_not_executed(problem.model, problem.workload, degrees)
    if not faults:
        return None
    return Rejected(
        rule="native_workload",
        detail=f"the native runtime cannot train this workload: {'; '.join(faults)}.",
        legal=WORKLOADS_EXECUTED,
        fix="--precision, --method",
    )


def native_model(problem: PlanningProblem) -> Rejected | None:
    """Blocks that the runtime builds."""
    faults = not_executed(problem.model)
    if not faults:
        return None
    return Rejected(
        rule="native_model",
        detail=f"the native runtime cannot build {problem.model.name}: {'; '.join(faults)}.",
        legal=f"decoders of the families {', '.join(EXECUTED_TYPES)}",
        fix="--model, or another --engine",
    )


def native_offload(problem: PlanningProblem, strategy: Strategy) -> Rejected | None:
    """Selective recomputation keeps results where the runtime cannot send them to host memory."""
    faults = offload_not_executed(strategy)
    if not faults:
        return None
    return Rejected(
        rule="native_offload",
        detail=f"the native runtime cannot offload so: {'; '.join(faults)}.",
        legal="offload=none or optimizer, or recompute=none or full",
        fix="--fix offload=none or --fix recompute=full",
    )


NATIVE_PROBLEM_RULES = (native_model,)
NATIVE_RULES = (native_context, native_vocabulary, native_workload)
NATIVE_STRATEGY_RULES = (native_offload,)


CHUNK_BYTES = 2**30
"""Most bytes of a chunk's logits in fp32. At 128,256 columns that is 2,093 tokens: large enough that adding
a chunk's part to the weight's gradient (2 c V h bytes moved) is a fifth of its product on an H100."""


def chunk_tokens(tokens: int, columns: int) -> int:
    """Tokens of a chunk, of `tokens` in all and `columns` of the vocabulary; the last has what is left."""
    return min(tokens, max(1, CHUNK_BYTES // (4 * columns)))


def chunk_count(tokens: int, columns: int) -> int:
    """Into how many chunks tokens are cut."""
    return max(1, math.ceil(tokens / max(1, chunk_tokens(tokens, columns))))


def chunk_logits(tokens: float, columns: float) -> float:
    """Logits of a chunk, at most: of whole tokens there may be fewer, by less than one of them."""
    return min(tokens * columns, max(columns, CHUNK_BYTES / 4))
