"""Rules of context and expert parallelism: what must divide what, and which models can be so split."""

from __future__ import annotations

from planner.foundation.suggest import divisors, nearest_values
from planner.job.problem import PlanningProblem
from planner.model.attention import Attention, CpExchange, LatentAttention
from planner.model.traced_layer import TracedLayer
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees


def context_divides(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Each rank holds an equal part of the sequence: for causal balance an early and a late half of it."""
    if degrees.cp == 1:
        return None
    parts = 1 if degrees.cp_exchange is CpExchange.ALL_TO_ALL else 2
    seq = problem.workload.seq
    if seq % (parts * degrees.cp) == 0:
        return None
    each = "an early and a late part of the sequence, for balance" if parts == 2 else "an equal part"
    return Rejected(
        rule="cp_divides_sequence",
        detail=f"cp={degrees.cp} cannot split a sequence of {seq} tokens: each rank holds {each}, so "
        f"{parts * degrees.cp} must divide it.",
        legal=nearest_values(divisors(seq // parts) if seq % parts == 0 else [1], degrees.cp),
        fix="--fix cp=",
    )


def context_heads(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Trading the sequence for heads gives each of tp x cp ranks whole heads."""
    if degrees.cp == 1 or degrees.cp_exchange is not CpExchange.ALL_TO_ALL:
        return None
    mixers = (m for block in problem.model.transformer_blocks() for m in block.mixers)
    heads = (m.heads for m in mixers if isinstance(m, (Attention, LatentAttention)))
    for count in dict.fromkeys(heads):
        if count % (degrees.tp * degrees.cp):
            own = count // degrees.tp
            return Rejected(
                rule="cp_divides_heads",
                detail=f"cp={degrees.cp} by all_to_all cannot split the {own} of {count} attention heads "
                f"that each of tp={degrees.tp} ranks has: each rank needs whole heads.",
                legal=f"cp of {nearest_values(divisors(own), degrees.cp)}, or cp_exchange=ring",
                fix="--fix cp=",
            )
    return None


def context_attends(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Only attention's exchange is modelled: a recurrent state would pass from rank to rank."""
    if degrees.cp == 1:
        return None
    what = _not_split_by_context(problem)
    if what is None:
        return None
    return Rejected(
        rule="cp_needs_attention",
        detail=f"cp={degrees.cp} shares out the sequence, and {what}.",
        legal="cp=1",
        fix="--fix cp=1",
    )


def _not_split_by_context(problem: PlanningProblem) -> str | None:
    model = problem.model
    if any(isinstance(layer, TracedLayer) for layer in model.classes().values()):
        return f"the traced layers of {model.name} run whole"
    if model.encoder_layers:
        return "attention between an encoder and its decoder is not modelled for it"
    mixers = [m for block in model.transformer_blocks() for m in block.mixers]
    others = [m for m in mixers if not isinstance(m, (Attention, LatentAttention))]
    return f"{type(others[0]).__name__} layers pass a state along it" if others else None


def experts_divide(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Each of ep ranks holds as many whole experts, each of etp shards as many columns of one."""
    if degrees.ep == 1 and degrees.etp is None:
        return _expert_widths(problem, degrees)
    experts = problem.model.experts
    if not experts:
        return Rejected(
            rule="ep_needs_experts",
            detail=f"ep={degrees.ep} and etp={degrees.expert_tp} share out experts, and {problem.model.name} "
            "has none.",
            legal="ep=1, and no etp",
            fix="--fix ep=1",
        )
    for count in dict.fromkeys(each.count for each in experts):
        if count % degrees.ep:
            return Rejected(
                rule="ep_divides_experts",
                detail=f"ep={degrees.ep} cannot split {count} experts: each rank needs whole ones.",
                legal=nearest_values(divisors(count), degrees.ep),
                fix="--fix ep=",
            )
    return _expert_widths(problem, degrees)


def _expert_widths(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    for width in dict.fromkeys(each.expert.width for each in problem.model.experts):
        if width % degrees.expert_tp:
            own = degrees.etp is not None
            return Rejected(
                rule="etp_divides_experts" if own else "tp_divides_widths",
                detail=f"{'etp' if own else 'tp'}={degrees.expert_tp} cannot split the experts' width of "
                f"{width} into equal shards.",
                legal=nearest_values((d for d in divisors(width) if d <= 64), degrees.expert_tp),
                fix="--fix etp=" if own else "--fix tp=",
            )
    return None


def experts_within_replicas(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Experts are shared out over ranks that hold copies of the dense weights, or shards by tp."""
    if not degrees.spreads_experts:
        return None
    ranks = degrees.dp_shard * degrees.cp * degrees.tp
    if degrees.dp_shard == 1:
        ranks = degrees.replicas * degrees.tp
    if ranks % degrees.expert_ranks == 0:
        return None
    legal = [d for d in divisors(ranks) if ranks % (d * degrees.expert_tp) == 0]
    return Rejected(
        rule="ep_within_replicas",
        detail=f"ep={degrees.ep} x etp={degrees.expert_tp} makes {degrees.expert_ranks} ranks that hold all "
        f"experts, which must divide the {ranks} of dp x cp x tp (those that share out state, if any do).",
        legal=nearest_values(legal or [1], degrees.ep),
        fix="--fix ep=",
    )


def experts_need_sequence_parallel(problem: PlanningProblem, degrees: Degrees) -> Rejected | None:
    """Experts in fewer shards than the rest meet each token once only where tp ranks hold other tokens."""
    if degrees.expert_tp == degrees.tp or degrees.sequence_parallel:
        return None
    return Rejected(
        rule="etp_needs_sequence_parallel",
        detail=f"etp={degrees.expert_tp} differs from tp={degrees.tp}, and without sequence parallelism all "
        "tensor-parallel ranks send the same tokens.",
        legal=f"sequence_parallel=true, or etp={degrees.tp}",
        fix="--fix sequence_parallel=true",
    )


SPREAD_RULES = (
    context_attends,
    context_divides,
    context_heads,
    experts_divide,
    experts_within_replicas,
    experts_need_sequence_parallel,
)
