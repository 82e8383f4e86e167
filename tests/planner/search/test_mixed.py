"""Mixed clusters: each pipeline rank has the times, links and memory limit of its own kind of device."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.not_modelled import not_modelled
from planner.foundation.units import GIB
from planner.hardware.catalog import load_model, profile_files
from planner.hardware.cluster import ClusterSpec, DeviceGroup, Link
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import JobOverheads, PlanningProblem
from planner.model.sublayer import Recompute
from planner.model.workload import Workload
from planner.profile.profile import Op, load_profile
from planner.search.space import shapes
from planner.search.verify import memory_faults
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.placement import device_names, rank_groups, rank_limits_bytes, seen_from, stage_groups
from planner.strategy.rules import broken_rule, broken_rules
from planner.strategy.strategy import (
    Degrees,
    Offload,
    Schedule,
    Stage,
    Strategy,
    Zero,
    even_stages,
    offloaded,
    sized_stages,
)
from tests.planner import instances

SLOW = DeviceGroup(device=instances.device(name="slow"), nodes=1, devices_per_node=4)
FAST = dataclasses.replace(SLOW, device=instances.device(flops=3e12, bandwidth=4e11, name="fast"))
SCHEDULES = (
    (Schedule.ONE_F_ONE_B, 1),
    (Schedule.GPIPE, 1),
    (Schedule.INTERLEAVED, 2),
    (Schedule.ZB_H1, 1),
    (Schedule.ZBV, 2),
    (Schedule.DUALPIPEV, 2),
)


def on(*groups: DeviceGroup) -> ClusterSpec:
    return dataclasses.replace(instances.cluster(), groups=groups)


def problem(*groups: DeviceGroup, layers: int = 12, **more: object) -> PlanningProblem:
    of = instances.model(layers=layers, hidden=128)
    return dataclasses.replace(instances.problem(of=of, on=on(*groups), batch=16, seq=512), **more)


def pipeline(pp: int = 2, world: int = 8, **more: object) -> Degrees:
    """pp ranks over `world` devices, data parallelism for the rest."""
    dp = world // pp
    degrees = Degrees(pp=pp, dp_shard=dp, zero=Zero.OPTIMIZER, num_micro_batches=16 // dp)
    return dataclasses.replace(degrees, **more)


def evaluated(of: PlanningProblem, degrees: Degrees, stages: tuple[Stage, ...] | None = None) -> Evaluation:
    stages = stages or even_stages(of.model.layers, degrees.stages)
    strategy = Strategy(degrees=degrees, stages=stages)
    assert broken_rules(of, strategy) == []
    return CostModel(of).evaluate(strategy)


def named(text: str, model: str = "llama-2-70b", batch: int = 128, **more: object) -> PlanningProblem:
    """A problem on catalog devices, with the memory limit of each group."""
    cluster = parse_cluster(text, "test")
    limits = {group.device.name: group.device.usable_memory_bytes for group in cluster.groups}
    return dataclasses.replace(
        PlanningProblem(
            model=load_model(model),
            workload=Workload(seq=4096, batch=batch),
            cluster=cluster,
            profile=None,
            memory_limit_bytes=min(limits.values()),
            device_limits_bytes=tuple(limits.items()),
        ),
        **more,
    )


# Where ranks lie


@pytest.mark.parametrize(
    ("sizes", "order", "pp", "expected"),
    [
        ((2, 2), (), 1, [(0, 1)]),
        ((2, 2), (), 4, [(0,), (0,), (1,), (1,)]),
        ((2, 2), (1, 0), 4, [(1,), (1,), (0,), (0,)]),
        ((3, 1), (), 4, [(0,), (0,), (0,), (1,)]),
        ((3, 1), (), 2, [(0,), (0, 1)]),
        ((3, 1), (1, 0), 2, [(0, 1), (0,)]),
        ((1, 2, 1), (), 2, [(0, 1), (1, 2)]),
        ((1, 2, 1), (2, 0, 1), 2, [(0, 2), (1,)]),
        ((4,), (), 4, [(0,)] * 4),
    ],
)
def test_ranks_are_laid_over_groups_in_their_order(
    sizes: tuple[int, ...], order: tuple[int, ...], pp: int, expected: list[tuple[int, ...]]
) -> None:
    """`sizes` are nodes of four devices."""
    cluster = on(*(dataclasses.replace(SLOW, nodes=nodes) for nodes in sizes))
    degrees = pipeline(pp, 4 * sum(sizes), device_order=order)
    assert list(rank_groups(cluster, degrees)) == expected


@pytest.mark.parametrize(
    ("schedule", "chunks", "expected"),
    [
        (Schedule.INTERLEAVED, 2, ["slow", "fast", "slow", "fast"]),
        (Schedule.ZBV, 2, ["slow", "fast", "fast", "slow"]),
    ],
)
def test_all_stages_of_a_rank_are_on_its_devices(
    schedule: Schedule, chunks: int, expected: list[str]
) -> None:
    done = evaluated(problem(SLOW, FAST), pipeline(schedule=schedule, chunks=chunks))
    assert [stage.device for stage in done.stages] == expected
    inner = [stage.forward_s for stage in done.stages]
    assert (inner[1] < inner[0]) and len(inner) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"pp": 0},
        {"pp": -2, "chunks": -1},
        {"schedule": Schedule.ZBV, "pp": 1, "chunks": 4},
        {"schedule": Schedule.ZBV, "pp": 2, "chunks": 3},
        {"device_order": (0, 5)},
        {"device_order": (7,)},
    ],
)
def test_degrees_that_break_rules_have_a_place_too(wrong: dict[str, object]) -> None:
    """Rules and checks ask for it before they know better: nothing is raised."""
    degrees = dataclasses.replace(pipeline(), **wrong)
    of = problem(SLOW, FAST)
    for stages in (0, 2, 4, 6):
        placed = stage_groups(of.cluster, degrees, stages)
        assert len(placed) == stages and set(placed) <= {(0,), (1,), (0, 1)}
    if degrees.pp > 0:
        split = offloaded(even_stages(12, 2), Offload.OPTIMIZER)
        assert broken_rules(of, Strategy(degrees=degrees, stages=split))


# Laws


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@pytest.mark.parametrize("parts", [(1, 1), (1, 3), (2, 1, 1)])
def test_groups_of_one_device_are_a_uniform_cluster(
    parts: tuple[int, ...], schedule: Schedule, chunks: int
) -> None:
    """To the digit, whatever lies over the border of two groups, in any order."""
    nodes = sum(parts)
    whole = problem(dataclasses.replace(SLOW, nodes=nodes))
    split = problem(*(dataclasses.replace(SLOW, nodes=n) for n in parts))
    for pp in (2, 4):
        degrees = pipeline(pp, 4 * nodes, schedule=schedule, chunks=chunks)
        degrees = dataclasses.replace(degrees, micro_batch=1, num_micro_batches=16)
        sized = [
            dataclasses.replace(p, workload=Workload(seq=512, batch=degrees.batch)) for p in (whole, split)
        ]
        first = evaluated(sized[0], degrees)
        for order in itertools.permutations(range(len(parts))):
            again = evaluated(sized[1], dataclasses.replace(degrees, device_order=order))
            assert (again.estimate, again.stages) == (first.estimate, first.stages)


def test_named_groups_of_one_device_are_a_uniform_cluster() -> None:
    degrees = Degrees(tp=8, pp=4, dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=64)
    texts = ("8x8:h100-sxm-80gb", "4x8:h100-sxm-80gb+4x8:h100-sxm-80gb", "1x8:h100+7x8:h100-sxm-80gb")
    done = [evaluated(named(text), degrees) for text in texts]
    assert done[0].estimate == done[1].estimate == done[2].estimate
    assert done[0].stages == done[1].stages == done[2].stages


def random_groups(draw: random.Random) -> list[DeviceGroup]:
    """Three groups of four nodes in all, of different devices and links of their own."""
    groups = []
    for number, nodes in enumerate((1, 1, 2)):
        device = instances.device(
            flops=10 ** draw.uniform(11, 13),
            bandwidth=10 ** draw.uniform(10, 12),
            memory_bytes=draw.choice([1, 2, 4]) * GIB,
            name=f"kind-{number}",
        )
        intra = Link(name="own", latency_s=1e-6, bytes_per_s=10 ** draw.uniform(10, 11.5))
        inter = Link(name="own", latency_s=1e-5, bytes_per_s=10 ** draw.uniform(9, 10))
        groups.append(DeviceGroup(device=device, nodes=nodes, devices_per_node=4, intra=intra, inter=inter))
    return groups


def limits_of(groups: list[DeviceGroup]) -> dict[str, object]:
    limits = {group.device.name: group.device.usable_memory_bytes for group in groups}
    return {"memory_limit_bytes": min(limits.values()), "device_limits_bytes": tuple(limits.items())}


@pytest.mark.parametrize("seed", range(20))
def test_listing_and_names_of_groups_change_nothing(seed: int) -> None:
    """Symmetry: groups are permuted, and the order with them; devices are renamed."""
    draw = random.Random(seed)
    groups = random_groups(draw)
    schedule, chunks = draw.choice(SCHEDULES)
    pp = draw.choice([1, 2, 4]) if chunks == 1 else draw.choice([2, 4])
    degrees = pipeline(pp, 16, schedule=schedule, chunks=chunks, num_micro_batches=16)
    order = draw.sample(range(3), 3)
    places = draw.sample(range(3), 3)  # the new list has at place i the group that was at places[i]
    listed = [groups[place] for place in places]
    device = dataclasses.replace(listed[0].device, name="a-new-name")
    listed[0] = dataclasses.replace(listed[0], device=device)
    work = Workload(seq=512, batch=degrees.batch)
    first = evaluated(
        problem(*groups, workload=work, **limits_of(groups)),
        dataclasses.replace(degrees, device_order=tuple(order)),
    )
    again = evaluated(
        problem(*listed, workload=work, **limits_of(listed)),
        dataclasses.replace(degrees, device_order=tuple(places.index(group) for group in order)),
    )
    assert first.estimate == again.estimate
    strip = [[dataclasses.replace(s, device="") for s in done.stages] for done in (first, again)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("seed", range(30))
def test_a_mixed_cluster_lies_between_all_slow_and_all_fast(seed: int) -> None:
    draw = random.Random(seed)
    fast = dataclasses.replace(
        SLOW, device=instances.device(flops=1e12 * draw.uniform(1, 9), bandwidth=1e11 * draw.uniform(1, 9))
    )
    schedule, chunks = draw.choice(SCHEDULES)
    degrees = pipeline(draw.choice([2, 4]), schedule=schedule, chunks=chunks, num_micro_batches=16)
    work = Workload(seq=draw.choice([64, 512, 2048]), batch=degrees.batch)
    recompute = draw.choice(list(Recompute))
    stages = even_stages(12, degrees.stages, recompute)
    twice = [dataclasses.replace(group, nodes=2) for group in (SLOW, fast)]
    steps = [
        evaluated(problem(*groups, workload=work), degrees, stages).estimate.step_time_s
        for groups in ((twice[0],), (SLOW, fast), (twice[1],))
    ]
    assert steps[0] >= steps[1] >= steps[2]
    assert steps[0] > steps[2]


def test_stages_on_the_faster_device_take_less_time() -> None:
    """And what each stage takes is what it takes in a cluster of its device alone."""
    degrees = pipeline(4)
    mixed = evaluated(problem(SLOW, FAST), degrees)
    alone = {
        group.device.name: evaluated(problem(dataclasses.replace(group, nodes=2)), degrees).stages
        for group in (SLOW, FAST)
    }
    assert [stage.device for stage in mixed.stages] == ["slow", "slow", "fast", "fast"]
    for index, stage in enumerate(mixed.stages):
        assert stage == alone[stage.device][index]
    assert alone["fast"][1].forward_s < alone["slow"][1].forward_s


def test_layers_follow_the_speed_of_devices() -> None:
    """A balanced split beats the even one on A100 and H100, and lies between the clusters of one kind."""
    of = named("2x8:a100-sxm-80gb@ndr400x8+2x8:h100-sxm-80gb@ndr400x8", batch=64)
    degrees = Degrees(tp=8, pp=4, micro_batch=4, num_micro_batches=16, sequence_parallel=True)
    even = evaluated(of, degrees)
    rate = even.stages[1].time_s / even.stages[2].time_s
    assert 1.3 < rate < 3.2, "between the two the peak ratio is 3.2"
    slow = round(40 / (1 + rate))
    sizes = (slow, slow, 40 - slow, 40 - slow)
    balanced = evaluated(of, degrees, sized_stages(sizes))
    assert balanced.estimate.step_time_s < 0.85 * even.estimate.step_time_s
    assert balanced.estimate.mfu is not None and even.estimate.mfu is not None
    assert balanced.estimate.mfu > even.estimate.mfu
    wrong = evaluated(of, degrees, sized_stages(sizes[::-1]))
    assert wrong.estimate.step_time_s > even.estimate.step_time_s
    turned = dataclasses.replace(degrees, device_order=(1, 0))
    assert evaluated(of, turned, sized_stages(sizes[::-1])).estimate.step_time_s == pytest.approx(
        balanced.estimate.step_time_s, rel=0.05
    )


# Memory


def test_each_rank_has_its_own_limit() -> None:
    """A stage that fits into 80 GB and not into 40 GB."""
    of = named("2x8:a100-sxm-40gb+2x8:a100-sxm-80gb", "llama-13b", batch=16)
    degrees = Degrees(tp=8, pp=4, num_micro_batches=16)
    heavy = sized_stages((2, 4, 4, 30), Recompute.NONE)
    order = [dataclasses.replace(degrees, device_order=order) for order in ((0, 1), (1, 0))]
    full = dataclasses.replace(of, workload=dataclasses.replace(of.workload, seq=4 * 4096))
    fits, not_fits = (evaluated(full, each, heavy) for each in order)
    small, large = (group.device.usable_memory_bytes for group in of.cluster.groups)
    assert small < fits.stages[3].memory.total_bytes < large
    assert [stage.memory_limit_bytes for stage in fits.stages] == [small, small, large, large]
    assert fits.estimate.verdict is not Verdict.NO
    assert not_fits.estimate.verdict is Verdict.NO
    assert not_fits.estimate.memory_limit_bytes == small
    assert memory_faults(full, fits) == []
    assert "pipeline rank 3" in memory_faults(full, not_fits)[0]


def test_the_fullest_rank_is_the_one_nearest_to_its_limit() -> None:
    """Not the one with most bytes; its limit is the estimate's."""
    limits = {"memory_limit_bytes": GIB, "device_limits_bytes": (("slow", 8 * GIB), ("fast", GIB))}
    done = evaluated(problem(SLOW, FAST, **limits), pipeline(), sized_stages((10, 2)))
    first, last = (stage.memory.total_bytes for stage in done.stages)
    assert first / 8 < last and done.estimate.peak_memory_bytes == last
    assert done.estimate.memory_limit_bytes == 1 * GIB
    assert rank_limits_bytes(problem(SLOW, FAST, **limits), pipeline()) == (8 * GIB, 1 * GIB)
    assert rank_limits_bytes(problem(SLOW, FAST, **limits), pipeline(1)) == (1 * GIB,)


@pytest.mark.parametrize("seed", range(20))
def test_the_verdict_is_the_worst_of_all_ranks(seed: int) -> None:
    """As judged rank by rank from the stages' own figures and limits."""
    draw = random.Random(seed)
    groups = random_groups(draw)
    degrees = pipeline(4, 16, num_micro_batches=16)
    work = Workload(seq=2048, batch=degrees.batch)
    scale = 10 ** draw.uniform(-1.0, 0.7)
    limits = tuple((g.device.name, round(g.device.usable_memory_bytes * scale)) for g in groups)
    of = problem(*groups, workload=work, memory_limit_bytes=GIB, device_limits_bytes=limits)
    done = evaluated(of, degrees)
    low, high = done.estimate.peak_memory_interval_bytes or (0, 0)
    peak = done.estimate.peak_memory_bytes
    shares = [s.memory.total_bytes / (s.memory_limit_bytes or 0) for s in done.stages]
    assert max(shares) == pytest.approx(peak / done.estimate.memory_limit_bytes)
    worst = max(shares)
    expected = (
        Verdict.SAFE if worst * high / peak <= 1 else Verdict.RISKY if worst * low / peak <= 1 else Verdict.NO
    )
    assert done.estimate.verdict is expected


# Ranks that straddle groups


def test_a_rank_that_straddles_groups_is_governed_by_the_slowest() -> None:
    """Its figures are those of the slow device and of the least limit; the other rank keeps its own."""
    groups = (dataclasses.replace(SLOW, nodes=1), dataclasses.replace(FAST, nodes=3))
    limits = {"memory_limit_bytes": 4 * GIB, "device_limits_bytes": (("fast", 9 * GIB),)}
    degrees = pipeline(2, 16, num_micro_batches=2)
    of = problem(*groups, **limits)
    done = evaluated(of, degrees)
    alone = evaluated(problem(dataclasses.replace(SLOW, nodes=4)), degrees)
    assert [stage.device for stage in done.stages] == ["slow+fast", "fast"]
    assert [stage.memory_limit_bytes for stage in done.stages] == [4 * GIB, 9 * GIB]
    assert done.stages[0].time_s == alone.stages[0].time_s
    assert done.stages[1].time_s < alone.stages[1].time_s
    strategy = done.strategy
    assert "one stage" in "; ".join(not_modelled(of, strategy))
    whole = dataclasses.replace(strategy, degrees=pipeline(4, 16, num_micro_batches=4))
    assert "one stage" not in "; ".join(not_modelled(of, whole))


def test_without_a_pipeline_the_slowest_device_sets_the_pace() -> None:
    slow, mixed, fast = (
        evaluated(problem(*groups), pipeline(1)).estimate.step_time_s
        for groups in (
            (dataclasses.replace(SLOW, nodes=2),),
            (SLOW, FAST),
            (dataclasses.replace(FAST, nodes=2),),
        )
    )
    assert slow == mixed > fast


# Links, profiles, shared costs


def test_each_rank_sends_over_its_own_links() -> None:
    of = named("2x8:a100-sxm-80gb+2x8:h100-sxm-80gb")
    degrees = Degrees(tp=4, pp=2, dp_shard=4, zero=Zero.OPTIMIZER, num_micro_batches=32)
    for shape, text in zip(
        CostModel(of).rank_layouts(degrees), ("4x8:a100-sxm-80gb", "4x8:h100-sxm-80gb"), strict=True
    ):
        alone = CostModel(named(text)).layout(degrees)
        assert shape.messages.over_tp(Op.ALL_REDUCE) == alone.messages.over_tp(Op.ALL_REDUCE)
        assert shape.messages.p2p_s() == alone.messages.p2p_s()
        key = next(iter(shape.classes))
        assert shape.reduces[shape.block_units[key]] == alone.reduces[alone.block_units[key]]


def test_a_group_of_one_node_is_still_part_of_a_cluster() -> None:
    """Constants that were fitted to a network hold for it, and those of one node alone do not."""
    of = named("1x8:a100-sxm-80gb+1x8:h100-sxm-80gb")
    assert {seen_from(of, (group,)).cluster.network for group in (0, 1)} == {"hdr200x8"}


def test_costs_of_a_kind_are_shared() -> None:
    model = CostModel(problem(SLOW, FAST))
    first, second = model.rank_layouts(pipeline(4)), model.rank_layouts(pipeline(2))
    assert first[0] is first[1] and first[2] is first[3] and first[0] is not first[2]
    assert first[0].layer_model is second[0].layer_model is not first[2].layer_model
    uniform = CostModel(problem(dataclasses.replace(SLOW, nodes=2)))
    assert len({id(shape) for shape in uniform.rank_layouts(pipeline(4))}) == 1
    assert uniform.seen_from((0,)) is uniform


def test_equal_kinds_that_are_listed_apart_share_their_model() -> None:
    model = CostModel(problem(SLOW, FAST, SLOW))
    assert model.seen_from((0,)) is model.seen_from((2,))
    assert model.seen_from((0, 1, 2)) is model


def test_a_measured_profile_speaks_for_its_own_device() -> None:
    loaded = [load_profile(path) for path in profile_files()]
    measured, fitted = (next(p for p in loaded if bool(p.layers) is found) for found in (True, False))
    own = dataclasses.replace(measured, device="slow")
    of = problem(SLOW, FAST, profile=own)
    assert seen_from(of, (0,)).profile is own and seen_from(of, (1,)).profile is None
    of = problem(SLOW, FAST, profile=fitted)
    assert seen_from(of, (0,)).profile is fitted and seen_from(of, (1,)).profile is fitted
    of = problem(SLOW, FAST, profile=None, device_profiles=(("slow", None), ("fast", fitted)))
    assert seen_from(of, (0,)).profile is None and seen_from(of, (1,)).profile is fitted


def test_what_is_known_least_sets_the_interval() -> None:
    """The half width of a mixed estimate is no less than that of either kind alone."""
    of = named("2x8:a100-sxm-80gb+2x8:h100-sxm-80gb")
    fitted = next(p for p in map(load_profile, profile_files()) if p.device == "h100-sxm-80gb")
    degrees = Degrees(tp=8, pp=4, num_micro_batches=128)
    known = dataclasses.replace(of, device_profiles=(("a100-sxm-80gb", None), ("h100-sxm-80gb", fitted)))
    done = evaluated(known, degrees).estimate
    half = done.step_time_interval_s[1] / done.step_time_s - 1
    alone = evaluated(named("4x8:h100-sxm-80gb", profile=fitted), degrees).estimate
    assert half > 1.5 * (alone.step_time_interval_s[1] / alone.step_time_s - 1)
    assert done.coverage.fitted > 0.2 and done.coverage.datasheet > 0.2
    assert "by runs" in "; ".join(not_modelled(known, Strategy(degrees=degrees, stages=even_stages(80, 4))))


def test_what_a_job_loses_depends_on_the_devices_of_each_rank() -> None:
    """Groups of one device lose what a uniform cluster does; each rank copies over its own host link."""
    said = JobOverheads(checkpoint_every=100, storage_bytes_per_s=1e18, device_spread=0.01)
    degrees = Degrees(tp=8, pp=4, num_micro_batches=128)
    texts = ("4x8:h100", "2x8:h100+2x8:h100", "2x8:a100-sxm-80gb+2x8:h100", "4x8:a100-sxm-80gb")
    jobs = [evaluated(named(text, overheads=said), degrees, sized_stages((8, 30, 21, 21))) for text in texts]
    fast, split, mixed, slow = (done.estimate.job for done in jobs)
    assert fast is not None and split == fast
    turned = dataclasses.replace(degrees, device_order=(1, 0))
    waits = [job.checkpoint_wait_s or 0.0 for job in (fast, mixed, slow) if job]
    assert 0 < waits[0] < waits[1] == waits[2], "an A100 holds the largest stage"
    light = evaluated(named(texts[2], overheads=said), turned, sized_stages((36, 36, 4, 4))).estimate.job
    heavy = evaluated(named(texts[2], overheads=said), degrees, sized_stages((36, 36, 4, 4))).estimate.job
    assert light and heavy and light.checkpoint_wait_s and heavy.checkpoint_wait_s
    assert light.checkpoint_wait_s < 0.7 * heavy.checkpoint_wait_s


# Rules


def test_tensor_parallelism_stays_in_the_nodes_of_every_group() -> None:
    of = problem(dataclasses.replace(SLOW, devices_per_node=8), dataclasses.replace(FAST, devices_per_node=6))
    for tp, legal in ((2, True), (6, False), (8, False), (4, False)):
        degrees = Degrees(tp=tp, pp=7 if tp == 2 else 1)
        rejected = broken_rule(of, degrees)
        broken = [r.rule for r in broken_rules(of, Strategy(degrees=degrees, stages=even_stages(12, 1)))]
        assert ("tp_within_node" in broken) is not legal, tp
        assert rejected is not None or legal


def test_the_order_names_each_group_once() -> None:
    of = problem(SLOW, FAST)
    assert broken_rule(of, pipeline(device_order=(1, 0))) is None
    for order in ((0,), (0, 0), (0, 2), (0, 1, 2), (-1, 0)):
        rejected = broken_rule(of, pipeline(device_order=order))
        assert rejected is not None and rejected.rule == "device_order"
        assert "0 (slow), 1 (fast)" in rejected.legal


def test_only_ranks_that_offload_need_a_known_host_link() -> None:
    linked = dataclasses.replace(FAST.device, host_link_bytes_per_s=5e10)
    of = problem(SLOW, dataclasses.replace(FAST, device=linked))
    stages = even_stages(12, 2)
    for index, legal in ((0, False), (1, True)):
        chosen = list(stages)
        chosen[index] = offloaded((stages[index],), Offload.OPTIMIZER)[0]
        rules = [r.rule for r in broken_rules(of, Strategy(degrees=pipeline(), stages=tuple(chosen)))]
        assert (rules == []) is legal and (legal or rules == ["offload_link_known"])
        if legal:
            done = CostModel(of).evaluate(Strategy(degrees=pipeline(), stages=tuple(chosen)))
            assert done.estimate.memory is not None and done.estimate.memory.hosted_bytes >= 0


def test_every_legal_shape_of_a_mixed_cluster_is_evaluated() -> None:
    """Uneven groups, every schedule that is searched: the causes add up and stages have a place."""
    of = problem(dataclasses.replace(SLOW, devices_per_node=2), dataclasses.replace(FAST, devices_per_node=4))
    legal = [shape for shape in shapes(of, FixedChoices()) if isinstance(shape, Degrees)]
    assert len(legal) > 20
    for degrees in legal[::3]:
        done = evaluated(of, degrees)
        assert done.estimate.breakdown.total_s == pytest.approx(done.estimate.step_time_s)
        expected = [device_names(of.cluster, groups) for groups in rank_groups(of.cluster, degrees)]
        assert [s.device for s in done.stages] == [
            expected[degrees.pp_rank_of_stage(index)] for index in range(degrees.stages)
        ]
