"""Answers to infeasible problems: the binding limit binds, and every repair works when it is followed."""

from __future__ import annotations

import dataclasses

import pytest

from planner.advice.repairs import BEST, why_infeasible
from planner.advice.resolve import Effort
from planner.advice.what_if import with_limit
from planner.foundation.units import GIB, MIB, format_bytes
from planner.model.workload import Optimizer
from planner.search.least_memory import survey
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.strategy import Offload
from tests.planner import instances
from tests.planner.catalog_problems import problem
from tests.planner.infeasible import EFFORT, Case, case, check_case, feasible


def test_a_need_is_not_called_least_where_several_stages_a_rank_may_need_less() -> None:
    """Its first rank holds both ends in few blocks, as no plan of one stage a rank can."""
    asked = case(556)
    found = survey(asked.problem, asked.pins).need
    assert found is not None and not found.exact and found.strategy.degrees.chunks == 1
    check_case(556)


@pytest.mark.parametrize("block", range(8))
def test_the_limit_binds_and_repairs_repair(block: int) -> None:
    """40 random problems without a plan, in blocks of five of which several have a repair."""
    answers = [check_case(seed) for seed in range(5 * block, 5 * block + 5)]
    assert sum(bool(answer.repairs) for answer in answers) >= 3


def test_cases_are_short_of_memory_and_broken_by_rules() -> None:
    pins = [case(seed).fixes for seed in range(40)]
    assert any(not fixes for fixes in pins) and any(len(fixes) == 3 for fixes in pins)


def test_more_nodes_are_the_least_that_fit() -> None:
    spec = instances.model(layers=8, hidden=1024, vocab=8192)
    problem = instances.problem(of=spec, on=instances.cluster(per_node=2), batch=64, limit_bytes=1500 * MIB)
    answer = why_infeasible(problem, FixedChoices(), EFFORT)
    flags = [repair.flag for repair in (*answer.repairs, *answer.others)]
    nodes = next(int(flag.split()[-2]) for flag in flags if flag.startswith("--cluster"))
    assert nodes > 1
    for fewer in range(1, nodes):
        cluster = dataclasses.replace(
            problem.cluster, groups=(dataclasses.replace(problem.cluster.groups[0], nodes=fewer),)
        )
        assert feasible(dataclasses.replace(problem, cluster=cluster), FixedChoices()) is None


def test_the_longest_sequence_that_fits_is_offered() -> None:
    problem = instances.problem(seq=8192, batch=8, limit_bytes=700 * MIB)
    problem = dataclasses.replace(problem, model=instances.model(layers=4, hidden=512, vocab=8192))
    problem = dataclasses.replace(
        problem, workload=dataclasses.replace(problem.workload, optimizer=Optimizer.SGD)
    )
    answer = why_infeasible(problem, FixedChoices(), EFFORT)
    lengths = [int(r.flag.split()[1]) for r in (*answer.repairs, *answer.others) if r.kind == "--seq"]
    assert len(lengths) == 1
    longer = dataclasses.replace(problem.workload, seq=lengths[0] + 8192 // 16)
    assert feasible(dataclasses.replace(problem, workload=longer), FixedChoices()) is None


def test_a_batch_that_does_not_divide_names_the_nearest_on_both_sides() -> None:
    problem = instances.problem(batch=7)
    answer = why_infeasible(problem, parse_fixed_choices(("dp=4",)), EFFORT)
    assert answer.binding.rule == "batch_divides" and answer.binding.short_bytes is None
    flags = {repair.flag for repair in (*answer.repairs, *answer.others)}
    assert {"--batch 4", "--batch 8"} <= flags


def test_a_limit_above_what_the_device_has_is_never_among_the_cheapest() -> None:
    device = instances.device(memory_bytes=GIB)
    problem = instances.problem(
        of=instances.model(layers=8, hidden=1024, vocab=10240),
        on=instances.cluster(of=device),
        limit_bytes=GIB,
    )
    answer = why_infeasible(problem, FixedChoices(), EFFORT)
    assert answer.binding.needed_bytes is not None and answer.binding.needed_bytes > GIB
    assert not any(repair.kind == "--memory-limit" for repair in answer.repairs)
    other = next(repair for repair in answer.others if repair.kind == "--memory-limit")
    assert "devices that give a program" in other.change


def test_offloading_is_offered_as_an_estimate_while_the_search_does_not_take_it() -> None:
    device = dataclasses.replace(instances.device(), host_link_bytes_per_s=1e10)
    problem = instances.problem(
        of=instances.model(layers=8, hidden=1024, vocab=8192),
        on=instances.cluster(of=device),
        limit_bytes=1500 * MIB,
    )
    answer = why_infeasible(problem, FixedChoices(), EFFORT)
    offloads = [repair for repair in (*answer.repairs, *answer.others) if repair.kind == "offload"]
    assert offloads and all(repair.verified for repair in offloads)
    optimizer = next(repair for repair in offloads if Offload.OPTIMIZER in repair.strategy.offloads)
    assert "--fix offload=optimizer" in optimizer.flag


def test_without_a_clock_the_answer_is_the_same_every_time() -> None:
    asked: Case = case(2)
    effort = Effort(each_s=None, total_s=None)
    first, second = (why_infeasible(asked.problem, asked.pins, effort) for _ in range(2))
    assert repr(first) == repr(second)


def test_once_time_is_spent_there_are_still_repairs() -> None:
    asked = case(2)
    answer = why_infeasible(asked.problem, asked.pins, Effort(each_s=0.1, total_s=0.0))
    assert answer.repairs and len(answer.repairs) <= BEST
    assert all(repair.verified for repair in answer.repairs)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 7, 8])  # the others have no shape that keeps all rules
def test_kinds_of_devices_are_told_and_repaired_by_their_own_limits(seed: int) -> None:
    problem = instances.two_kinds(seed)
    need = survey(problem, FixedChoices()).need
    assert need is not None
    short = with_limit(problem, need.limit_bytes - 8 * MIB)
    answer = why_infeasible(short, FixedChoices(), EFFORT)
    binding, limits = answer.binding, [limit for _, limit in short.device_limits_bytes]
    assert binding.rule == "memory" and binding.limit_bytes in limits
    assert (binding.needed_bytes or 0) - (binding.limit_bytes or 0) == binding.short_bytes
    assert need.exact is (binding.short_bytes == 8 * MIB)
    assert all(repair.verified for repair in (*answer.repairs, *answer.others))


def test_more_memory_on_devices_of_several_kinds_is_told_as_more_of_each() -> None:
    asked = problem("llama-13b", "1x1:a100-sxm-80gb+1x1:a100-sxm-40gb", 2048, 2)
    answer = why_infeasible(asked, FixedChoices(), Effort(each_s=1.0, total_s=20.0))
    (larger,) = [repair for repair in answer.others if repair.kind == "--memory-limit"]
    assert larger.verified and larger.change.startswith("devices that give a program ")
    assert larger.change.endswith(f"{format_bytes(answer.binding.short_bytes or 0)} more each")


def test_long_after_its_time_the_search_for_repairs_asks_for_the_last_resort_alone() -> None:
    asked = case(2)
    answer = why_infeasible(asked.problem, asked.pins, Effort(each_s=0.1, total_s=1e-9))
    assert [repair.flag for repair in answer.repairs] == ["leave out every --fix"]
