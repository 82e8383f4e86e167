"""Offloading: laws over a grid, closed forms, published runs, files, commands that refuse it."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.calibration.runs import read_runs
from planner.calibration.validate import validate
from planner.cli import cli
from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.memory.parameter_state import offloaded_states
from planner.cost.not_modelled import not_modelled
from planner.cost.stage.offload import WINDOW
from planner.foundation.errors import InfeasibleError, InputError
from planner.hardware.cluster_text import parse_cluster
from planner.job.engine_settings import Engine, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer, Precision
from planner.search.solve import SolveOptions, make_plan, solve
from planner.search.space import shapes
from planner.strategy.engines.native import check_executed_offload
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.plan import decode_plan, encode_plan, load_plan
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import (
    Degrees,
    Offload,
    OffloadCounts,
    RecomputeCounts,
    Stage,
    Strategy,
    Zero,
    even_stages,
    offloaded,
)
from tests.planner import instances

TABLES = Path(__file__).parents[3] / "bench" / "data" / "tables.csv"
HOST_LINK = 2e10


def problem(engine: Engine = Engine.NATIVE, precision: Precision = Precision.BF16) -> PlanningProblem:
    """Four devices with a host link, in nodes of two."""
    device = dataclasses.replace(instances.device(), host_link_bytes_per_s=HOST_LINK)
    found = instances.problem(
        of=instances.model(layers=6),
        on=instances.cluster(nodes=2, per_node=2, of=device),
        precision=precision,
    )
    return dataclasses.replace(found, engine_settings=EngineSettings(engine=engine))


def evaluated(
    on: PlanningProblem, degrees: Degrees, counts: list[OffloadCounts], recompute: Recompute = Recompute.NONE
) -> Evaluation:
    """The estimate of even stages with these counts, a stage each."""
    stages = even_stages(on.model.layers, degrees.stages, recompute)
    each = tuple(dataclasses.replace(s, offload=c) for s, c in zip(stages, counts, strict=True))
    strategy = Strategy(degrees=degrees, stages=each)
    assert broken_rules(on, strategy) == []
    return CostModel(on).evaluate(strategy)


def grid(on: PlanningProblem, seed: int, count: int) -> list[Degrees]:
    """Some of the legal shapes of a problem."""
    legal = [shape for shape in shapes(on, FixedChoices()) if isinstance(shape, Degrees)]
    return random.Random(seed).sample(legal, count)


def hosted_bytes(done: Evaluation) -> int:
    assert done.estimate.memory is not None
    return done.estimate.memory.hosted_bytes


@pytest.mark.parametrize("engine", Engine)
def test_offloading_more_keeps_less_and_takes_longer(engine: Engine) -> None:
    """Device bytes never grow, host bytes never shrink, no step gets faster; any counts, any shape."""
    on, draw, smaller, slower = problem(engine), random.Random(7), 0, 0
    for degrees, recompute in product(grid(on, 3, 25), Recompute):
        sizes = [stage.layers for stage in even_stages(on.model.layers, degrees.stages)]
        counts = [OffloadCounts()] * len(sizes)
        before = evaluated(on, degrees, counts, recompute)
        assert hosted_bytes(before) == 0
        for kind in draw.sample(["optimizer", "activations"], 2):
            chosen = [draw.randint(0, size) for size in sizes]
            counts = [dataclasses.replace(c, **{kind: n}) for c, n in zip(counts, chosen, strict=True)]
            after = evaluated(on, degrees, counts, recompute)
            assert after.estimate.peak_memory_bytes <= before.estimate.peak_memory_bytes + len(sizes)
            assert hosted_bytes(after) >= hosted_bytes(before)
            assert (hosted_bytes(after) > 0) == any(dataclasses.astuple(c) != (0, 0) for c in counts)
            assert after.estimate.step_time_s >= before.estimate.step_time_s * (1 - 1e-9)
            smaller += after.estimate.peak_memory_bytes < before.estimate.peak_memory_bytes
            slower += after.estimate.step_time_s > before.estimate.step_time_s
            before = after
    assert smaller > 40 and slower > 40


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("offload", [Offload.OPTIMIZER, Offload.ACTIVATIONS])
def test_whole_stages_by_one_word(engine: Engine, offload: Offload) -> None:
    """Every moment fits into the peak, tenants add up, and causes add up to the step."""
    on = problem(engine)
    for degrees in grid(on, 5, 20):
        stages = offloaded(even_stages(on.model.layers, degrees.stages), offload)
        done = CostModel(on).evaluate(Strategy(degrees=degrees, stages=stages))
        memory = done.estimate.memory
        assert memory is not None
        assert max(moment.device_bytes for moment in memory.moments) <= done.estimate.peak_memory_bytes
        assert min(moment.host_bytes for moment in memory.moments) >= memory.hosted_bytes > 0
        assert done.estimate.breakdown.total_s == pytest.approx(done.estimate.step_time_s, rel=1e-9)
        for stage in done.stages:
            assert (stage.memory.optimizer_bytes == 0) == (offload is Offload.OPTIMIZER)
            assert min(dataclasses.astuple(stage.memory)) >= 0


def test_experts_and_parts_of_a_sequence_are_offloaded_by_the_shards_they_have() -> None:
    """With ep, state of experts is shared out over fewer ranks; all states of all ranks make one model's."""
    experts = Experts(count=8, topk=2, expert=Mlp(width=64, gated=True, activation=Activation.SILU))
    block = dataclasses.replace(instances.dense_block(64), mlp=experts)
    on = problem()
    on = dataclasses.replace(on, model=instances.model(blocks=[block] * 4))
    for pins in (FixedChoices(ep=2), FixedChoices(ep=4), FixedChoices(cp=2)):
        legal = [shape for shape in shapes(on, pins) if isinstance(shape, Degrees) and shape.pp == 1]
        assert legal, pins
        for degrees in legal:
            before, after = (evaluated(on, degrees, [OffloadCounts(optimizer=n)]) for n in (0, 4))
            assert after.estimate.peak_memory_bytes <= before.estimate.peak_memory_bytes
            if degrees.zero >= Zero.GRADIENTS and degrees.dp_replicate == 1 and degrees.tp == 1:
                nodes = on.cluster.devices // on.cluster.devices_per_node
                assert nodes * hosted_bytes(after) == pytest.approx(16 * on.model.params_total, rel=1e-6)


def test_more_memory_never_makes_a_plan_infeasible() -> None:
    """Of the device and of its node."""
    on, order = problem(), [Verdict.NO, Verdict.RISKY, Verdict.SAFE]
    degrees = Degrees(dp_shard=4, zero=Zero.PARAMETERS, micro_batch=2)
    counts = [OffloadCounts(optimizer=6, activations=3)]
    peak = evaluated(on, degrees, counts).estimate.peak_memory_bytes
    found = []
    for percent in range(60, 150, 3):
        limited = dataclasses.replace(on, memory_limit_bytes=peak * percent // 100)
        found.append(order.index(evaluated(limited, degrees, counts).estimate.verdict))
    assert found == sorted(found) and set(found) == {0, 1, 2}
    needed = evaluated(on, degrees, counts).estimate.memory
    assert needed is not None
    for size, verdict in ((needed.host_bytes - 1, Verdict.NO), (needed.host_bytes, Verdict.SAFE)):
        group = dataclasses.replace(on.cluster.groups[0], host_memory_bytes=size)
        roomy = dataclasses.replace(on, cluster=dataclasses.replace(on.cluster, groups=(group,)))
        assert evaluated(roomy, degrees, counts).estimate.verdict is verdict


def test_bytes_a_parameter_are_those_of_zero_offload() -> None:
    """16 bits on the device, native: and a shard of them; 12 bytes on the host, 4 more of gradients where
    they are shared out."""
    for engine, (zero, n) in product(Engine, ((Zero.NONE, 1), (Zero.OPTIMIZER, 4), (Zero.GRADIENTS, 4))):
        degrees = Degrees(dp_shard=n, dp_replicate=4 // n, zero=zero, micro_batch=2)
        device, host = (s.block for s in offloaded_states(problem(engine), degrees))
        assert device.weights == (2 + 2 / n if engine is Engine.NATIVE else 2) and device.optimizer == 0
        assert (device.grads == 0) == (zero is Zero.GRADIENTS)
        assert host.total == (16 if zero is Zero.GRADIENTS else 12) / n


def test_an_update_takes_the_longer_of_processors_and_link() -> None:
    """AdamW at the constant a parameter of the node; where the link is slow, weights in 16 bits over it."""
    on, degrees = problem(), Degrees(dp_shard=4, zero=Zero.GRADIENTS, micro_batch=2)
    params = on.model.params_total / 4
    for link, expected in ((HOST_LINK, 2 * params * 0.25e-9), (1e7, 2 * params / (0.8 * 1e7))):
        device = dataclasses.replace(on.cluster.groups[0].device, host_link_bytes_per_s=link)
        group = dataclasses.replace(on.cluster.groups[0], device=device)
        linked = dataclasses.replace(on, cluster=dataclasses.replace(on.cluster, groups=(group,)))
        done = evaluated(linked, degrees, [OffloadCounts(optimizer=6)])
        assert done.estimate.breakdown.optimizer_s == pytest.approx(expected, rel=1e-6)


def test_activations_behind_a_fast_link_take_no_time_and_a_window_of_memory() -> None:
    on, degrees = problem(), Degrees(dp_replicate=4, num_micro_batches=2)
    device = dataclasses.replace(on.cluster.groups[0].device, host_link_bytes_per_s=1e15)
    group = dataclasses.replace(on.cluster.groups[0], device=device)
    fast = dataclasses.replace(on, cluster=dataclasses.replace(on.cluster, groups=(group,)))
    counts = (0, WINDOW, WINDOW + 1, 6)
    none, some, more, all_ = (evaluated(fast, degrees, [OffloadCounts(activations=n)]) for n in counts)
    assert all_.estimate.step_time_s == none.estimate.step_time_s
    assert some.estimate.peak_memory_bytes == none.estimate.peak_memory_bytes
    one, freed = (none.estimate.peak_memory_bytes - each.estimate.peak_memory_bytes for each in (more, all_))
    block = hosted_bytes(all_) / 2 / 6
    assert one == pytest.approx(block, abs=2)
    # All but a window, until another moment is the fullest.
    assert (5 - WINDOW) * block < freed <= (6 - WINDOW) * block + 2


def test_updates_on_a_host_are_predicted_without_a_fit() -> None:
    """Llama-3.1-8B with its optimizer on the CPU, 8k to 256k tokens: ml-engineering's H200 and B200 runs."""
    runs = [run for run in read_runs([TABLES]).runs if "optimizer state on cpu" in run.words]
    rows = validate(runs, lambda device: None).rows
    assert len(rows) == 12
    assert all(row.error is not None and abs(row.error) < 0.25 for row in rows)
    long = [row.memory_error for row, run in zip(rows, runs, strict=True) if (run.seq_len or 0) >= 65536]
    assert len(long) == 8 and all(error is not None and abs(error) < 0.03 for error in long)


# Rules


def faults(on: PlanningProblem, counts: OffloadCounts) -> list[str]:
    degrees = Degrees(dp_shard=4, zero=Zero.GRADIENTS, micro_batch=2)
    stages = even_stages(on.model.layers, 1)
    each = tuple(dataclasses.replace(stage, offload=counts) for stage in stages)
    return [found.rule for found in broken_rules(on, Strategy(degrees=degrees, stages=each))]


def test_rules_of_offloading() -> None:
    on = problem()
    assert faults(on, OffloadCounts(optimizer=6, activations=6)) == []
    assert faults(on, OffloadCounts(optimizer=7)) == ["offload_counts"]
    assert faults(on, OffloadCounts(activations=-1)) == ["offload_counts"]
    unlinked = instances.problem(of=instances.model(layers=6), on=instances.cluster(nodes=2, per_node=2))
    assert faults(unlinked, OffloadCounts(activations=1)) == ["offload_link_known"]
    muon = dataclasses.replace(on, workload=dataclasses.replace(on.workload, optimizer=Optimizer.MUON))
    assert faults(muon, OffloadCounts(optimizer=6)) == ["offload_optimizer"]
    assert faults(muon, OffloadCounts(activations=6)) == []
    group = dataclasses.replace(on.cluster.groups[0], host_memory_bytes=1000)
    small = dataclasses.replace(on, cluster=dataclasses.replace(on.cluster, groups=(group,)))
    assert faults(small, OffloadCounts(optimizer=6)) == ["offload_fits_host"]


def test_what_is_left_out_of_offloading_is_said() -> None:
    on, degrees = problem(), Degrees(dp_replicate=4, micro_batch=2)
    for counts, phrases in ((OffloadCounts(), 0), (OffloadCounts(activations=1), 2)):
        strategy = evaluated(on, degrees, [counts]).strategy
        said = [phrase for phrase in not_modelled(on, strategy) if "a node" in phrase]
        assert len(said) == phrases


def test_a_cloud_instance_has_its_memory_and_a_device_its_host_link() -> None:
    cluster = parse_cluster("2*p5.48xlarge")
    assert cluster.host_memory_bytes_per_device == 256 * 2**30
    assert cluster.groups[0].device.host_link_bytes_per_s == 63e9
    assert parse_cluster("2x8:h100").host_memory_bytes_per_device is None


# Files and commands


def test_counts_come_back_from_plan_json() -> None:
    on = problem()
    degrees = Degrees(pp=2, dp_shard=2, zero=Zero.OPTIMIZER, micro_batch=2, num_micro_batches=2)
    counts = [OffloadCounts(optimizer=3), OffloadCounts(activations=2)]
    plan = make_plan(on, evaluated(on, degrees, counts), None, {}, ())
    document = json.loads(json.dumps(encode_plan(plan)))
    assert [stage["offload"] for stage in document["stages"]] == [
        {"optimizer": 3, "activations": 0},
        {"optimizer": 0, "activations": 2},
    ]
    assert decode_plan(document, source="plan.json") == plan
    for stage in document["stages"]:
        stage["offload"] = {}  # as earlier versions wrote it
    assert not decode_plan(document, source="plan.json").strategy.offloads
    check_executed_offload(plan.strategy)


def test_the_runtime_offloads_no_activations_of_blocks_that_recompute_selectively() -> None:
    kept = RecomputeCounts(none=1, selective=2, full=1)
    for activations, legal in ((0, True), (1, True), (2, False), (4, False)):
        stage = Stage(first=0, end=4, recompute=kept, offload=OffloadCounts(activations=activations))
        strategy = Strategy(degrees=Degrees(), stages=(stage,))
        if legal:
            check_executed_offload(strategy)
        else:
            with pytest.raises(InputError, match="recompute selectively"):
                check_executed_offload(strategy)


def best_by_hand(asked: PlanningProblem, pins: FixedChoices) -> float | None:
    """The least step time of all SAFE strategies that offload so: every cut, blocks with one other option."""
    model, found = CostModel(asked), []
    for degrees in shapes(asked, pins):
        if not isinstance(degrees, Degrees):
            continue
        for cut in combinations(range(1, asked.model.layers), degrees.stages - 1):
            ranges = list(pairwise((0, *cut, asked.model.layers)))
            for mix in product(*(one_option_mixes(end - first) for first, end in ranges)):
                stages = tuple(
                    Stage(first=first, end=end, recompute=counts)
                    for (first, end), counts in zip(ranges, mix, strict=True)
                )
                strategy = Strategy(degrees=degrees, stages=offloaded(stages, pins.offloaded))
                if not broken_rules(asked, strategy):
                    found.append(model.evaluate(strategy).estimate)
    return min((each.step_time_s for each in found if each.verdict is Verdict.SAFE), default=None)


def one_option_mixes(layers: int) -> list[RecomputeCounts]:
    """Blocks that keep all, beside blocks of one option that recomputes."""
    mixes = [RecomputeCounts(none=layers - n, selective=n) for n in range(layers + 1)]
    return mixes + [RecomputeCounts(none=layers - n, full=n) for n in range(1, layers + 1)]


@pytest.mark.parametrize("offload", ["optimizer", "activations"])
def test_the_search_finds_the_best_plan_that_offloads(offload: str) -> None:
    """By all cuts and mixes of small problems, under memory limits from roomy to too tight."""
    pins = parse_fixed_choices((f"offload={offload}", "schedule=1f1b", "tp=1"))
    options = SolveOptions(pins=pins, gap_tolerance=0.0, nodes=None)
    small = dataclasses.replace(problem(), model=instances.model(layers=3))
    peak = CostModel(small).evaluate(solve(small, options).strategy).estimate.peak_memory_bytes
    outcomes = []
    for factor in (4.0, 1.3, 1.0, 0.8, 0.3):
        tight = dataclasses.replace(small, memory_limit_bytes=int(factor * peak))
        best = best_by_hand(tight, pins)
        outcomes.append(best is not None)
        if best is None:
            with pytest.raises(InfeasibleError):
                solve(tight, options)
            continue
        plan = solve(tight, options)
        assert plan.estimate.step_time_s == pytest.approx(best, rel=1e-6)
        assert plan.solver is not None and plan.solver.lower_bound_s <= best * (1 + 1e-9)
        assert plan.strategy.offloads == (Offload(offload),)
    assert any(outcomes) and not all(outcomes)


def test_the_search_offloads_only_what_is_asked_for() -> None:
    assert solve(problem(), SolveOptions(pins=parse_fixed_choices(("offload=none",)))).strategy.offloads == ()
    assert solve(problem(), SolveOptions(pins=FixedChoices())).strategy.offloads == ()
    with pytest.raises(InputError, match="none, optimizer, activations"):
        parse_fixed_choices(("offload=everything",))
    unlinked = dataclasses.replace(problem(), cluster=instances.cluster(nodes=2, per_node=2))
    with pytest.raises(InfeasibleError, match="not known"):
        solve(unlinked, SolveOptions(pins=parse_fixed_choices(("offload=optimizer",))))


ESTIMATE = "estimate --model llama-3-8b --cluster 1*p5.48xlarge --seq 8192 --batch 8 --fix zero=2"


def test_estimate_offloads_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = [*ESTIMATE.split(), "--fix", "offload=optimizer", "-o", str(file)]
    ran = CliRunner().invoke(cli, options)
    assert ran.exit_code == 0, ran.output
    assert "of it offloaded" in ran.output and "not yet trained" not in ran.output
    assert load_plan(file).strategy.stages[0].offload == OffloadCounts(optimizer=32)
    ran = CliRunner().invoke(cli, ["check", str(file)])
    assert ran.exit_code == 0, ran.output


def test_estimate_of_processes_on_a_cpu_refuses() -> None:
    options = "estimate --model llama-3-8b --cluster local:2 --seq 128 --batch 8 --fix offload=activations"
    ran = CliRunner().invoke(cli, [*options.split(), "--json"])
    assert ran.exit_code == 3
    assert "offload_link_known" in [fault["rule"] for fault in json.loads(ran.stdout)["violations"]]
