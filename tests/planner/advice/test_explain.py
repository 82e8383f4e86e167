"""What binds, what more buys, why not, the front, and differences of plans, on small problems."""

from __future__ import annotations

import dataclasses

import pytest

from planner.advice.explain import explain, losers, stage_figures, what_binds
from planner.advice.plan_diff import plan_diff
from planner.advice.resolve import Clock, Effort, front, resolved
from planner.advice.what_if import faster_devices, faster_links, faster_network, with_nodes
from planner.advice.why_not import Answer, why_not
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.stage.peak_memory import memory_band, safe_peak_bytes
from planner.foundation.errors import InputError
from planner.foundation.units import GIB, MIB
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.search.solve import SolveOptions, solve
from planner.strategy.estimate import TIME_CAUSES, Verdict
from planner.strategy.fixed_choices import (
    FIX_KEYS,
    FixedChoices,
    choice_text,
    chosen_value,
    keeps_choices,
    nearest_first,
    parse_choice,
    parse_fixed_choices,
    possible_values,
)
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances

EFFORT = Effort(each_s=0.5, total_s=None)


def problem_of(**values: object) -> PlanningProblem:
    """Two nodes of two devices, a model whose activations press on the limit."""
    defaults: dict[str, object] = {
        "of": instances.model(layers=6, hidden=512, vocab=8192),
        "on": instances.cluster(nodes=2, per_node=2),
        "seq": 2048,
        "batch": 8,
        "limit_bytes": 2 * GIB,
    }
    return instances.problem(**(defaults | values))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def problem() -> PlanningProblem:
    return problem_of()


@pytest.fixture(scope="module")
def plan(problem: PlanningProblem) -> Plan:
    return solve(problem, SolveOptions(pins=FixedChoices(), gap_tolerance=0.0, rounds=100, nodes=None))


@pytest.fixture(scope="module")
def evaluation(problem: PlanningProblem, plan: Plan) -> Evaluation:
    return CostModel(problem).evaluate(plan.strategy)


def test_what_binds_adds_up_to_the_step(problem: PlanningProblem, evaluation: Evaluation) -> None:
    binds = what_binds(problem, evaluation)
    assert sum(bind.seconds for bind in binds) == pytest.approx(evaluation.estimate.step_time_s)
    assert sum(bind.share for bind in binds) == pytest.approx(1.0)
    assert [bind.seconds for bind in binds] == sorted((bind.seconds for bind in binds), reverse=True)
    assert "that are safe" in next(bind for bind in binds if bind.resource == "memory").detail


def test_headroom_is_what_the_verdict_leaves(problem: PlanningProblem, evaluation: Evaluation) -> None:
    """A peak larger by the least headroom is the largest that is SAFE."""
    least = min(figure.headroom_bytes for figure in stage_figures(problem, evaluation))
    error = memory_band(problem, evaluation.estimate.coverage)
    peak = evaluation.estimate.peak_memory_bytes + least
    assert peak * (1 + error.upper) == pytest.approx(problem.memory_limit_bytes, rel=1e-6)


def test_runners_up_lose_by_causes_that_add_up(
    problem: PlanningProblem, plan: Plan, evaluation: Evaluation
) -> None:
    found = losers(problem, evaluation, plan.alternatives)
    assert len(found) == len(plan.alternatives) >= 2
    for lost, other in zip(found, plan.alternatives, strict=True):
        assert lost.step_time_s == pytest.approx(other.step_time_s)
        assert sum(lost.causes_s.values()) == pytest.approx(lost.slower_s, abs=1e-9)
        assert lost.slower_s >= 0 and max(lost.causes_s.values()) > 0


def test_more_of_anything_that_cannot_hurt_does_not(
    problem: PlanningProblem, plan: Plan, evaluation: Evaluation
) -> None:
    found = explain(problem, evaluation, plan.alternatives, EFFORT)
    assert found.best is not None
    assert found.best.step_time_s <= evaluation.estimate.step_time_s * (1 + 1e-9)
    more = {each.change: each for each in found.more}
    assert len(more) == 6
    for name, each in more.items():
        if name != "one more node":
            assert each.gain is not None and each.gain >= -1e-9, name
            assert each.step_time_s is not None and each.same_plan_s is not None
            assert each.step_time_s <= each.same_plan_s * (1 + 1e-9)
    faster = more["devices 10 % faster"]
    assert faster.gain is not None and 0 < faster.gain < 0.11


def test_what_more_buys_is_what_solving_it_gives(problem: PlanningProblem, evaluation: Evaluation) -> None:
    """The answer for one more GiB is a plan of the changed problem, as fast as its own evaluation."""
    found = explain(problem, evaluation, (), EFFORT)
    more = found.more[0]
    assert more.change == "1 GiB more a device" and more.strategy is not None
    roomy = dataclasses.replace(problem, memory_limit_bytes=problem.memory_limit_bytes + GIB)
    again = CostModel(roomy).evaluate(more.strategy).estimate
    assert again.verdict is Verdict.SAFE and again.step_time_s == pytest.approx(more.step_time_s)


def test_faster_links_and_devices_speed_up_what_they_should() -> None:
    """Half the time of messages in a node; a tenth off compute; the network alone changes nothing else."""
    problem = problem_of(on=instances.cluster(nodes=2, per_node=2, inter_bytes_per_s=1e8))
    strategy = solve(
        problem, SolveOptions(pins=parse_fixed_choices(("tp=2", "pp=1")), time_limit_s=1)
    ).strategy
    before = CostModel(problem).evaluate(strategy).estimate.breakdown

    def after(changed: PlanningProblem | None) -> dict[str, float]:
        assert changed is not None
        breakdown = CostModel(changed).evaluate(strategy).estimate.breakdown
        return {cause: getattr(breakdown, cause) for cause in TIME_CAUSES}

    links = after(faster_links(problem, 2.0, strategy.degrees))
    assert links["tp_comm_s"] == pytest.approx(before.tp_comm_s / 2, rel=0.01)  # the loss's own stay
    assert links["compute_s"] == pytest.approx(before.compute_s)
    assert links["dp_comm_s"] == pytest.approx(before.dp_comm_s)  # one rank a node: the network's alone
    assert after(faster_devices(problem, 1.1))["compute_s"] == pytest.approx(before.compute_s / 1.1)
    network = after(faster_network(problem, 2.0))
    assert network["dp_comm_s"] < before.dp_comm_s
    assert network["tp_comm_s"] == pytest.approx(before.tp_comm_s)


@pytest.mark.parametrize(("network", "gain"), [(1e12, 2.0), (0.5e10, 1.5), (1e9, 1.0)])
def test_faster_links_speed_up_a_ring_as_far_as_they_bind_it(network: float, gain: float) -> None:
    """Four ranks on two nodes: a ring at the lesser of the link's 1e10 and three times a port."""
    on = instances.cluster(nodes=2, per_node=2, inter_bytes_per_s=network, latency_s=1e-9)
    problem = problem_of(on=on)
    degrees = Degrees(dp_shard=4, zero=Zero.PARAMETERS, num_micro_batches=2)
    strategy = Strategy(degrees=degrees, stages=even_stages(problem.model.layers, 1))
    changed = faster_links(problem, 2.0, degrees)
    assert changed is not None
    sent = [CostModel(p).layout(degrees).messages.gather(1e9).dp_s for p in (problem, changed)]
    assert sent[0] / sent[1] == pytest.approx(gain, rel=1e-3)
    evaluated = [CostModel(p).evaluate(strategy).estimate.step_time_s for p in (problem, changed)]
    assert evaluated[1] <= evaluated[0]


def test_changes_without_meaning_are_none() -> None:
    one = instances.problem(on=instances.cluster(nodes=1, per_node=1))
    assert faster_links(one, 2.0, Degrees()) is None and faster_network(one, 2.0) is None
    local = dataclasses.replace(one, cluster=dataclasses.replace(one.cluster, name="local:1"))
    assert with_nodes(local, 2) is None


@pytest.mark.parametrize("name", ["1x8:h100-sxm-80gb", "2x8:h100-sxm-80gb@ndr400x8", "2*p5.48xlarge"])
def test_more_nodes_are_what_the_grammar_reads(name: str) -> None:
    cluster = parse_cluster(name)
    problem = dataclasses.replace(instances.problem(), cluster=cluster)
    more = with_nodes(problem, 4)
    assert more is not None
    again = parse_cluster(more.cluster.name)
    assert again.groups == more.cluster.groups
    assert again.inter.name == more.cluster.inter.name
    assert again.inter.bytes_per_s == more.cluster.inter.bytes_per_s
    assert more.cluster.devices == 32
    assert more.cluster.price_usd_per_hour == pytest.approx(again.price_usd_per_hour)
    assert with_nodes(problem, cluster.groups[0].nodes) is problem


def test_every_choice_of_a_plan_is_its_own(
    problem: PlanningProblem, plan: Plan, evaluation: Evaluation
) -> None:
    """By every key of --fix; and the plan keeps what it chose."""
    own = 0
    for key in FIX_KEYS:
        value = chosen_value(plan.strategy, key)
        if value is None:
            continue
        answer = why_not(problem, evaluation, choice_text(key, value), Clock(EFFORT), ())
        assert answer.answer is Answer.OWN and answer.step_time_s is None
        assert keeps_choices(plan.strategy, parse_fixed_choices((choice_text(key, value),)))
        own += 1
    assert own >= len(FIX_KEYS) - 2


def test_other_choices_are_solved_or_break_a_rule(problem: PlanningProblem, evaluation: Evaluation) -> None:
    """No choice beats the optimum; causes add up; what is infeasible names feasible values, nearest first."""
    answers = set()
    for key in ("tp", "pp", "zero", "micro_batch", "recompute", "schedule", "sequence_parallel"):
        for value in possible_values(problem, key):
            answer = why_not(problem, evaluation, choice_text(key, value), Clock(EFFORT), ())
            answers.add(answer.answer)
            assert answer.answer is not Answer.FASTER
            if answer.answer is Answer.SLOWER:
                assert answer.strategy is not None and answer.causes_s is not None
                assert chosen_value(answer.strategy, key) == value
                extra_s = answer.step_time_s - evaluation.estimate.step_time_s  # type: ignore[operator]
                assert sum(answer.causes_s.values()) == pytest.approx(extra_s, abs=1e-9)
    assert answers >= {Answer.OWN, Answer.SLOWER}


def test_an_infeasible_choice_names_values_that_have_a_plan(
    problem: PlanningProblem, evaluation: Evaluation
) -> None:
    answer = why_not(problem, evaluation, "tp=3", Clock(EFFORT), ())
    assert answer.answer is Answer.INFEASIBLE and answer.binding is not None
    assert answer.binding.rule == "tp_divides_heads"
    assert answer.legal and "3" not in answer.legal
    for value in answer.legal:
        pins = parse_fixed_choices((f"tp={value}",))
        assert resolved(problem, pins, Clock(EFFORT)) is not None
    assert "4" not in answer.legal  # nodes of two devices


def test_a_choice_that_does_not_fit_says_by_how_much(plan: Plan) -> None:
    problem = problem_of(limit_bytes=1100 * MIB)
    strategy = solve(problem, SolveOptions(pins=FixedChoices(), time_limit_s=1)).strategy
    evaluation = CostModel(problem).evaluate(strategy)
    answer = why_not(problem, evaluation, "dp=4", Clock(EFFORT), ())
    fits = answer.answer is not Answer.INFEASIBLE
    if fits:
        answer = why_not(problem, evaluation, "zero=0", Clock(EFFORT), ())
    assert answer.answer is Answer.INFEASIBLE or answer.slower is not None
    tight = why_not(problem, evaluation, "micro_batch=8", Clock(EFFORT), ())
    assert tight.answer is Answer.INFEASIBLE and tight.binding is not None
    assert tight.binding.rule == "memory" and (tight.binding.short_bytes or 0) > 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("tpp=2", "Did you mean tp?"),
        ("tp", "KEY=VALUE"),
        ("zero=7", "Legal here: 3, 2, 1, 0"),
        ("tp=0", "Legal here: 1"),
        ("schedule=zebra", "Legal here: gpipe"),
        ("sequence_parallel=2", "Legal here: false, true"),
        ("=", "no choice is called ''"),
        ("tp=" + "9" * 400, "not a whole number"),
    ],
)
def test_wrong_keys_and_values_are_input_errors(problem: PlanningProblem, typed: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_choice(typed, problem, "--why-not")
    assert said in str(caught.value) and str(caught.value).startswith("--why-not ")


def test_values_are_offered_nearest_first() -> None:
    assert nearest_first([1, 2, 4, 8], 3) == [4, 2, 1, 8]
    assert nearest_first([0, 1, 2, 3], 3) == [2, 1, 0]
    assert nearest_first(["none", "full"], "full") == ["none"]


def test_the_front_falls_to_the_least_memory_and_is_no_plan_s_better(
    problem: PlanningProblem, evaluation: Evaluation
) -> None:
    found = front(problem, evaluation, EFFORT)
    assert found.solved == found.asked
    times = [point.step_time_s for point in found.points]
    needs = [point.needed_bytes for point in found.points]
    assert len(found.points) >= 3
    assert times == sorted(times) and needs == sorted(needs, reverse=True)
    assert times[0] == pytest.approx(evaluation.estimate.step_time_s)
    assert needs[-1] == found.least_bytes
    for point in found.points:
        assert point.headroom_bytes == problem.memory_limit_bytes - point.needed_bytes >= 0
        tight = dataclasses.replace(problem, memory_limit_bytes=point.needed_bytes)
        assert CostModel(tight).evaluate(point.strategy).estimate.verdict is Verdict.SAFE


def test_a_plan_does_not_differ_from_itself(plan: Plan) -> None:
    found = plan_diff(plan, plan)
    assert not found.inputs and not found.strategy and not found.stages
    assert found.faster == 0 and found.ratio == 1.0
    assert all(amount.difference == 0 for amount in (*found.causes, *found.memory))


def test_differences_of_two_plans_add_up(problem: PlanningProblem, plan: Plan) -> None:
    other = solve(problem, SolveOptions(pins=parse_fixed_choices(("schedule=gpipe", "pp=4")), time_limit_s=2))
    found = plan_diff(plan, other)
    assert found.faster == 1 and not found.inputs
    assert {each.path for each in found.strategy} >= {"pp"}
    *causes, step = found.causes
    assert sum(cause.difference for cause in causes) == pytest.approx(step.difference, abs=1e-9)
    assert found.mostly == max(causes, key=lambda cause: cause.difference).name
    assert found.statement.startswith("A is faster") and "mostly" in found.statement
    assert plan_diff(other, plan).faster == 2


def test_plans_of_other_batches_are_compared_a_token(plan: Plan) -> None:
    twice = problem_of(batch=16)
    other = solve(twice, SolveOptions(pins=FixedChoices(), time_limit_s=1))
    found = plan_diff(plan, other)
    assert [each.path for each in found.inputs] == ["workload.batch"]
    per_token = other.estimate.step_time_s / 16 / (plan.estimate.step_time_s / 8)
    assert found.ratio == pytest.approx(per_token)
    assert found.faster == (0 if abs(per_token - 1) <= 1e-3 else 1 if per_token > 1 else 2)


@pytest.mark.parametrize("seed", [1, 5, 9, 14])  # their plans have stages on devices of both kinds
def test_headroom_is_of_the_limit_of_a_stage_s_own_devices(seed: int) -> None:
    asked = instances.two_kinds(seed)
    plan = solve(asked, SolveOptions(pins=FixedChoices()))
    done = CostModel(asked).evaluate(plan.strategy)
    band = memory_band(asked, done.estimate.coverage)
    assert len({stage.memory_limit_bytes for stage in done.stages}) > 1
    for figure, stage in zip(stage_figures(asked, done), done.stages, strict=True):
        safe = safe_peak_bytes(stage.memory_limit_bytes or 0, band)
        assert figure.headroom_bytes == pytest.approx(safe - stage.memory.total_bytes, abs=1)
        assert figure.headroom_bytes >= -1
