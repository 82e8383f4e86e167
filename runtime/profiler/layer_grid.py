"""Which cases of a model's layers there are: every class at several lengths, micro-batches and ways to shard.

Embedding and head do not see context and expert parallelism, whose ranks are measured of blocks alone: those
with attention by every exchange, those with experts as whole experts and, under sequence parallelism, in no
shards besides. Blocks that recompute, that share out a sequence or experts, or that are compiled are measured
at two micro-batches, the first and (of more than two) the last but one: their times and bytes are lines, like
those of the plain ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from planner.model.attention import CpExchange
from planner.model.feed_forward import Experts
from planner.model.saved_tensors import Recompute
from planner.model.spec import Block, ModelSpec
from planner.model.workload import Precision
from planner.profile.profile import LayerKind
from planner.strategy.engines.runtime_support import context_not_executed
from planner.strategy.parallel_rules import SPREAD_RULES
from runtime.profiler.measure_layers import LayerCase, divides
from runtime.profiler.timed_plans import bench_plan


def layer_cases(
    model: ModelSpec,
    seqs: Sequence[int],
    widths: Sequence[int],
    micro_batches: Sequence[int],
    cps: Sequence[int] = (1,),
    eps: Sequence[int] = (1,),
    compiled: Sequence[bool] = (False,),
) -> list[LayerCase]:
    """All cases whose sizes the shards divide; those that plans need most come first, compiled ones, which
    take longest to begin, last."""
    fewer = [micro_batches[0], *micro_batches[1:][-2:][:1]]
    found = []
    for seq in seqs:
        plain = list(_plain(model, seq, widths))
        found += [
            dataclasses.replace(case, micro_batch=micro_batch)
            for case in plain
            for micro_batch in (micro_batches if case.recompute is Recompute.NONE else fewer)
        ]
        special = [*_spread(plain, model, cps, eps), *(_compiled(plain) if True in compiled else [])]
        found += [
            dataclasses.replace(case, micro_batch=micro_batch) for case in special for micro_batch in fewer
        ]
    if False not in compiled:
        found = [case for case in found if case.compiled]
    legal = [case for case in found if _legal(case, model)]
    return sorted(legal, key=lambda case: (case.compiled, case.cp > 1 or case.ep > 1))


def _plain(model: ModelSpec, seq: int, widths: Sequence[int]) -> Iterator[LayerCase]:
    """One micro-batch of each layer class, with each width and recompute."""
    first = next(iter(model.classes()))
    blocks = ["" if key == first else key for key in model.classes()]
    kinds = [(LayerKind.EMBEDDING, ""), *((LayerKind.BLOCK, key) for key in blocks), (LayerKind.HEAD, "")]
    for tp, parallel, (kind, block) in itertools.product(widths, (False, True), kinds):
        if not divides(model, tp) or (parallel and (tp == 1 or seq % tp)):
            continue
        for recompute in Recompute if kind is LayerKind.BLOCK else [Recompute.NONE]:
            yield LayerCase(
                kind=kind,
                recompute=recompute,
                tp=tp,
                sequence_parallel=parallel,
                micro_batch=1,
                seq=seq,
                block=block,
            )


def _spread(
    plain: Sequence[LayerCase], model: ModelSpec, cps: Sequence[int], eps: Sequence[int]
) -> Iterator[LayerCase]:
    """The blocks of ranks that share out sequences, or experts."""
    blocks = [c for c in plain if c.kind is LayerKind.BLOCK and c.recompute is Recompute.NONE]
    for case, cp, exchange in itertools.product(blocks, (cp for cp in cps if cp > 1), CpExchange):
        yield dataclasses.replace(case, cp=cp, cp_exchange=exchange)
    routed = [case for case in blocks if isinstance(_mlp(case, model), Experts)]
    for case, ep in itertools.product(routed, (ep for ep in eps if ep > 1)):
        yield dataclasses.replace(case, ep=ep)
        if case.tp > 1:
            yield dataclasses.replace(case, ep=ep, etp=1)


def _compiled(plain: Sequence[LayerCase]) -> Iterator[LayerCase]:
    """The layers that torch.compile changes: blocks, and the passes of the head's loss."""
    for case in plain:
        if case.kind is not LayerKind.EMBEDDING:
            yield dataclasses.replace(case, compiled=True)


def _mlp(case: LayerCase, model: ModelSpec) -> object:
    block = model.classes()[case.block] if case.block else model.segments[0].block
    return block.mlp if isinstance(block, Block) else None


def _legal(case: LayerCase, model: ModelSpec) -> bool:
    """Whether a plan with these shards could be trained."""
    degrees = case.degrees()
    if case.sequence_parallel and case.seq // case.cp % case.tp:
        return False
    problem = bench_plan(model, degrees, case.seq, Precision.FP32).problem
    broken = any(rule(problem, degrees) for rule in SPREAD_RULES)
    return not broken and not context_not_executed(model, degrees)


def corners(cases: Sequence[LayerCase]) -> list[LayerCase]:
    """Of each layer class the cases between which all others lie.

    Unsplit (or of the smallest width) and keeping everything: its shortest and longest sequences in the
    smallest and largest micro-batch. Of every other way to run it that differs in one thing alone, the most
    of it: the smallest shape, where its host's part shows, and the largest.
    """
    by_class: dict[tuple[LayerKind, str], list[LayerCase]] = {}
    for case in cases:
        by_class.setdefault((case.kind, case.block), []).append(case)
    found: list[LayerCase] = []
    for own in by_class.values():
        plain = min(own, key=_ways)
        alike = [case for case in own if _ways(case) == _ways(plain)]
        ends = [max(case.seq for case in alike), min(case.seq for case in alike)]
        for seq in dict.fromkeys(ends):
            batches = [case.micro_batch for case in alike if case.seq == seq]
            found += [c for c in alike if c.seq == seq and c.micro_batch in (min(batches), max(batches))]
        found += _farthest(own, plain)
    return found


def _ways(case: LayerCase) -> tuple[bool, int, int, int, bool, int, str]:
    """How a case is run besides its tokens, the plainest first."""
    recompute = list(Recompute).index(case.recompute)
    exchange = str(case.cp_exchange) if case.cp > 1 else ""
    shards = case.ep * 1000 + (case.etp or 0)
    return case.compiled, case.cp, shards, recompute, case.sequence_parallel, case.tp, exchange


def _farthest(own: Sequence[LayerCase], plain: LayerCase) -> list[LayerCase]:
    """The smallest and the largest shape of each way to run a class that changes one thing, of widths and
    ranks with the most."""
    ways: dict[object, list[LayerCase]] = {}
    for case in own:
        changed = {
            "recompute": case.recompute if case.recompute is not plain.recompute else None,
            "tp": case.sequence_parallel if case.tp != plain.tp else None,
            "cp": case.cp_exchange if case.cp != plain.cp else None,
            "ep": case.etp is None if case.ep != plain.ep else None,
            "compiled": True if case.compiled is not plain.compiled else None,
        }
        what = {name: value for name, value in changed.items() if value is not None}
        # Experts in no shards besides need a width to be split by.
        if len(what) == 1 or (what.keys() == {"tp", "ep"} and case.etp is not None):
            ways.setdefault(tuple(what.items()), []).append(case)
    found: list[LayerCase] = []
    for cases in ways.values():
        most = max((case.tp, case.cp, case.ep) for case in cases)
        ranked = sorted(
            (case for case in cases if (case.tp, case.cp, case.ep) == most),
            key=lambda case: (case.micro_batch * case.seq, case.seq),
        )
        found += dict.fromkeys((ranked[-1], ranked[0]))
    return found
