"""Time of collectives: curves, the form between nodes, and the laws that both keep."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest

from planner.cost.communication.collectives import CommModel, Group
from planner.cost.evaluate import CostModel
from planner.hardware import measured_tables as measured
from planner.hardware.catalog import device_names
from planner.hardware.cluster import ClusterSpec, Link
from planner.hardware.cluster_text import parse_cluster
from planner.hardware.measured_rows import CollectiveRow
from planner.hardware.measured_tables import CollectiveCurves, curves_of, wire_factor
from planner.profile.profile import PROFILE_SCHEMA, CommSample, Constant, Op, Profile
from planner.strategy.strategy import Degrees, Zero
from tests.planner import instances

MIB = 1024**2
SIZES = [2.0**exponent for exponent in range(5, 36)]
CURVED = [name for name in device_names() if curves_of(name)]


def model_of(cluster: str | ClusterSpec) -> CommModel:
    on = parse_cluster(cluster, "test") if isinstance(cluster, str) else cluster
    return CommModel(instances.problem(on=on))


def between(ranks: int, nodes: int | None) -> Group:
    return Group(ranks=ranks, groups=1, spans_nodes=True, nodes=nodes)


def inside(ranks: int) -> Group:
    return Group(ranks=ranks, groups=1, spans_nodes=False)


def test_the_devices_that_have_curves() -> None:
    assert len(CURVED) == 10
    assert {"a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm-80gb", "h100-sxm-96gb-500w", "gb200"} <= set(CURVED)
    assert curves_of("l40s") is None, "its host is broken"
    assert curves_of("h100-pcie-80gb") is None and curves_of("no-such-device") is None


@pytest.mark.parametrize("name", CURVED)
def test_a_curve_never_falls_with_the_message(name: str) -> None:
    curves = curves_of(name)
    assert curves is not None
    for op, ranks in itertools.product(Op, (2, 3, 4, 5, 6, 8, 12, 16, 72)):
        seconds = [curves.seconds(op, ranks, size)[0] for size in SIZES]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(seconds))
        assert all(math.isfinite(s) and s > 0 for s in seconds)


@pytest.mark.parametrize("name", CURVED)
def test_a_curve_has_no_cliffs(name: str) -> None:
    """Across every sample, and beyond both ends, a step of 1 % in bytes changes the time by little."""
    curves = curves_of(name)
    assert curves is not None
    for op, ranks in itertools.product(Op, (2, 3, 8, 9)):
        for size in (512.0 * 4.0**k for k in range(12)):
            below, above = (curves.seconds(op, ranks, size * f)[0] for f in (0.995, 1.005))
            assert 1 - 1e-12 <= above / below < 1.03


def test_a_curve_gives_back_what_was_measured() -> None:
    """At samples that rise, exactly; the bus bandwidth of the table follows from the time."""
    curves = curves_of("h100-sxm-80gb")
    assert curves is not None
    rows = [r for r in measured.collectives("h100_sxm") if r.bytes >= MIB]
    assert len(rows) == 60
    for row in rows:
        seconds, origin = curves.seconds(Op(row.op), row.ranks, row.bytes)
        assert origin == "interpolated", "another host's measurement is never called measured"
        assert seconds == pytest.approx(row.latency_us / 1e6, rel=1e-9)
        assert wire_factor(Op(row.op), row.ranks) * row.bytes / seconds / 1e9 == pytest.approx(
            row.busbw_gb_per_s, rel=0.01
        )


def test_a_group_between_measured_sizes_lies_between_them() -> None:
    curves = curves_of("b200-sxm")
    assert curves is not None
    for op, size in itertools.product((Op.ALL_REDUCE, Op.ALL_GATHER), (1e3, 1e6, 1e9)):
        rates = [wire_factor(op, n) * size / curves.seconds(op, n, size)[0] for n in (4, 5, 6, 7, 8)]
        assert min(rates[0], rates[-1]) <= min(rates) and max(rates) <= max(rates[0], rates[-1])
        assert curves.seconds(op, 6, size)[1] == ("interpolated" if size < 5e8 else "fitted")


def test_beyond_the_largest_group_bandwidth_stays_and_latency_grows() -> None:
    curves = curves_of("gb200")
    assert curves is not None
    assert curves.ranks(Op.ALL_REDUCE) == [2, 4]
    small = [curves.seconds(Op.ALL_REDUCE, n, 1024)[0] for n in (4, 8, 16, 32, 72)]
    assert small == sorted(small) and small[-1] < 10 * small[0]
    rates = [
        wire_factor(Op.ALL_GATHER, n) * 2**34 / curves.seconds(Op.ALL_GATHER, n, 2**34)[0] for n in (4, 72)
    ]
    assert rates[1] == pytest.approx(rates[0], rel=0.02)
    assert curves.seconds(Op.ALL_GATHER, 72, MIB)[1] == "fitted"


def test_a_send_moves_as_much_each_way_as_an_all_to_all_of_two() -> None:
    curves = curves_of("a100-sxm-80gb")
    assert curves is not None
    assert curves.seconds(Op.P2P, 2, 3e6) == curves.seconds(Op.ALL_TO_ALL, 2, 6e6)


def test_noise_is_made_to_rise_by_means() -> None:
    """Two falling neighbours share their geometric mean."""
    times = (10.0, 8.0, 20.0)
    rows = [
        CollectiveRow(
            table="t", nccl="2", op="all_reduce", ranks=2, bytes=2**k, latency_us=t, busbw_gb_per_s=1.0
        )
        for k, t in zip((10, 12, 14), times, strict=True)
    ]
    curves = CollectiveCurves(rows)
    first, second, third = (curves.seconds(Op.ALL_REDUCE, 2, 2**k)[0] * 1e6 for k in (10, 12, 14))
    assert first == pytest.approx(80**0.5) and second == pytest.approx(80**0.5) and third == pytest.approx(20)


def test_the_shipped_curve_is_used_inside_a_node_only_on_the_devices_own_link() -> None:
    size = 64.0 * MIB
    curves = curves_of("h100-sxm-80gb")
    assert curves is not None
    cost = model_of("2x8:h100-sxm-80gb@ndr400x8").cost(Op.ALL_REDUCE, size, inside(8))
    assert (cost.seconds, cost.origin) == curves.seconds(Op.ALL_REDUCE, 8, size)
    beyond = model_of("1x16:h100-sxm-80gb").cost(Op.ALL_REDUCE, size, inside(16))
    assert beyond.origin == "fitted" and beyond.seconds > 5 * cost.seconds, "16 in a host: PCIe"
    free = model_of("2x8:h100-sxm-80gb@none")
    assert all(free.cost(op, size, inside(8)).seconds == 0 for op in Op)
    assert all(free.cost(op, size, between(16, 2)).seconds == 0 for op in Op)


def test_a_mixed_cluster_runs_at_its_slower_devices_curve() -> None:
    size = 64.0 * MIB
    costs = [
        model_of(name).cost(Op.ALL_GATHER, size, inside(8)).seconds
        for name in (
            "1x8:a100-sxm-80gb",
            "1x8:h100-sxm-80gb",
            "1x8:a100-sxm-80gb@hdr200x8+1x8:h100-sxm-80gb@ndr400x8",
        )
    ]
    assert costs[2] == max(costs[:2])
    mixed = model_of("1x8:a100-sxm-80gb@hdr200x8+1x8:mi300x@ndr400x8")
    assert mixed.cost(Op.ALL_GATHER, size, inside(8)).origin != "interpolated", "one kind has no curve"
    alone = model_of("1x1:l4@eth100+1x8:h100-sxm-80gb@ndr400x8")
    assert alone.cost(Op.ALL_GATHER, size, inside(8)).seconds == costs[1], "it has no neighbours"


def test_a_link_that_the_user_states_is_taken_as_stated() -> None:
    """No curve and no share: latency and bandwidth, as the cluster file says."""
    on = parse_cluster("2x8:h100-sxm-80gb@ndr400x8", "test")
    stated = Link(name="ours", latency_s=2e-6, bytes_per_s=1e11)
    cost = model_of(dataclasses.replace(on, intra=stated)).cost(Op.ALL_GATHER, 8e8, inside(8))
    assert cost.seconds == pytest.approx(7 * 2e-6 + 7 / 8 * 8e8 / 1e11)
    assert cost.origin == "datasheet"


def test_origins_say_how_good_a_figure_is() -> None:
    size = 8.0 * MIB
    for cluster, spans, origin in (
        ("2x8:h100-sxm-80gb@ndr400x8", False, "interpolated"),
        ("2x8:h100-sxm-80gb@ndr400x8", True, "fitted"),
        ("2x8:h100-sxm-80gb@eth100", True, "datasheet"),
        ("2x8:mi300x@ndr400x8", False, "fitted"),
        ("2x8:gaudi3@ndr400x8", False, "datasheet"),
    ):
        group = between(16, 2) if spans else inside(8)
        assert model_of(cluster).cost(Op.ALL_REDUCE, size, group).origin == origin, cluster


NAMED = (
    "4x8:h100-sxm-80gb@ndr400x8", "4x8:a100-sxm-80gb@hdr200x8", "4x8:mi300x@eth100x1", "4x4:l40s@roce200x8",
    "4x8:gaudi3@ndr400x8",
)  # fmt: skip


@pytest.mark.parametrize("cluster", NAMED)
def test_more_bytes_never_take_less_time_between_nodes(cluster: str) -> None:
    comms = model_of(cluster)
    for op, (ranks, nodes) in itertools.product(Op, ((2, 2), (4, 4), (16, 4), (32, 4), (6, 2), (8, None))):
        seconds = [comms.cost(op, size, between(ranks, nodes)).seconds for size in SIZES]
        assert all(a <= b for a, b in itertools.pairwise(seconds))


@pytest.mark.parametrize("cluster", NAMED)
def test_faster_links_are_never_slower(cluster: str) -> None:
    """Inside and between nodes, in bandwidth, in latency and in the share that is reached."""
    on = parse_cluster(cluster, "test")
    for key in ("intra", "inter"):
        link = getattr(on, key)
        changes = [{"bytes_per_s": 2 * link.bytes_per_s}, {"latency_s": link.latency_s / 2}]
        changes += [{"share": min(1.0, 1.1 * link.share)}] if link.share else []
        for change, op, size in itertools.product(changes, Op, SIZES[::4]):
            faster = dataclasses.replace(on, **{key: dataclasses.replace(link, **change)})
            for group in (between(16, 4), between(4, 4), *([inside(4)] if on.intra.share else [])):
                slow_s, fast_s = (model_of(c).cost(op, size, group).seconds for c in (on, faster))
                assert fast_s <= slow_s * (1 + 1e-12), (change, op, size)


def test_speeds_times_k_are_times_over_k() -> None:
    """Homogeneity, of the form with shares too."""
    on = parse_cluster("4x8:mi300x@hdr200x8", "test")
    links = {
        key: dataclasses.replace(
            getattr(on, key),
            bytes_per_s=3 * (getattr(on, key).bytes_per_s or 0),
            latency_s=getattr(on, key).latency_s / 3,
        )
        for key in ("intra", "inter")
    }
    fast = dataclasses.replace(on, intra=links["intra"], inter=links["inter"])
    for op, size, group in itertools.product(Op, SIZES[::3], (inside(8), between(32, 4), between(4, 4))):
        slow_s, fast_s = (model_of(c).cost(op, size, group).seconds for c in (on, fast))
        assert fast_s == pytest.approx(slow_s / 3, rel=1e-9)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_where_no_curve_says_otherwise() -> None:
    """Exactly in the analytic form, inside nodes and between; curves may beat it (in-switch sums)."""
    comms = model_of("4x8:mi300x@hdr200x8")
    for size, group in itertools.product(
        SIZES[::3], (inside(8), between(32, 4), between(4, 4), between(6, 2))
    ):
        parts = [comms.cost(op, size, group).seconds for op in (Op.REDUCE_SCATTER, Op.ALL_GATHER)]
        assert comms.cost(Op.ALL_REDUCE, size, group).seconds == pytest.approx(sum(parts))
    for name in CURVED:
        curves = curves_of(name)
        assert curves is not None
        parts = [curves.seconds(op, 4, 2**29)[0] for op in (Op.REDUCE_SCATTER, Op.ALL_GATHER)]
        assert 0.6 < curves.seconds(Op.ALL_REDUCE, 4, 2**29)[0] / sum(parts) < 1.1


def test_more_nodes_for_the_same_ranks_are_never_faster() -> None:
    comms = model_of("8x8:h100-sxm-80gb@hdr200x8")
    for op, size in itertools.product((Op.ALL_REDUCE, Op.ALL_GATHER, Op.ALL_TO_ALL), (1e6, 1e8, 1e10)):
        seconds = [comms.cost(op, size, between(8, nodes)).seconds for nodes in (2, 4, 8)]
        assert seconds == sorted(seconds)


def test_large_messages_reach_the_share_of_the_ports() -> None:
    """One rank a node: the port's rate. All ranks of 4 nodes: (n - 1) / (k - 1) of it, or the inner link."""
    comms = model_of("4x8:h100-sxm-80gb@hdr200x8")
    size, port = 2.0**38, 0.81 * 25e9
    rate = 2 * 3 / 4 * size / comms.cost(Op.ALL_REDUCE, size, between(4, 4)).seconds
    assert rate == pytest.approx(port, rel=1e-3)
    rate = 2 * 31 / 32 * size / comms.cost(Op.ALL_REDUCE, size, between(32, 4)).seconds
    assert rate == pytest.approx(port * 31 / 3, rel=1e-3)
    two = model_of("2x8:h100-sxm-80gb@ndr400x8")
    rate = 2 * 15 / 16 * size / two.cost(Op.ALL_REDUCE, size, between(16, 2)).seconds
    assert rate == pytest.approx(445e9, rel=1e-2), "the link inside the node is the slower"
    rate = 24 / 32 * size / comms.cost(Op.ALL_TO_ALL, size, between(32, 4)).seconds
    assert rate == pytest.approx(port, rel=1e-3), "3 of 4 bytes leave through the port"


def test_without_nodes_a_group_has_as_many_as_it_can() -> None:
    comms = model_of("4x8:h100-sxm-80gb@hdr200x8")
    for ranks, nodes in ((3, 3), (4, 4), (32, 4)):
        assert comms.cost(Op.ALL_REDUCE, 1e8, between(ranks, None)) == comms.cost(
            Op.ALL_REDUCE, 1e8, between(ranks, nodes)
        )


@pytest.mark.parametrize(
    ("system", "mean_error"),
    [("p5", 0.15), ("p6-b200", 0.20), ("p4de", 0.35), ("two nodes at Nebius", 0.12)],
)
def test_published_all_reduces_over_nodes_are_met(system: str, mean_error: float) -> None:
    """MLE, AWSD and NBH (profiles/measured/internode.csv), from 1 KiB to 16 GiB, by mean log error."""
    rows = [
        row for row in measured.internode() if row.system.startswith(system) and "contain" not in row.system
    ]
    assert len(rows) >= 4
    errors = []
    for row in rows:
        comms = model_of(f"{row.nodes}x{row.ranks // row.nodes}:{row.device}@{row.network}")
        seconds = comms.cost(Op(row.op), row.bytes, between(row.ranks, row.nodes)).seconds
        errors.append(abs(math.log(seconds * 1e6 / row.latency_us)))
    assert statistics.mean(errors) < mean_error
    large = [e for e, row in zip(errors, rows, strict=True) if row.bytes >= 512 * MIB]
    assert max(large) < 0.15


def test_an_unknown_communication_raises() -> None:
    """It never costs nothing."""
    curves = curves_of("h100-sxm-80gb")
    assert curves is not None
    with pytest.raises(ValueError, match="broadcast"):
        wire_factor("broadcast", 8)
    with pytest.raises(KeyError):
        curves.seconds("broadcast", 8, 1e6)
    for group in (inside(8), between(16, 2)):
        with pytest.raises((ValueError, KeyError)):
            model_of("2x8:mi300x@hdr200x8").cost("broadcast", 1e6, group)  # type: ignore[arg-type]


def sample(op: Op, ranks: int, *, size: int, seconds: float, groups: int = 1, **where: int) -> CommSample:
    return CommSample(
        op=op, ranks=ranks, groups=groups, bytes=size, seconds=seconds, spread=0.0, samples=3, **where
    )


def measured_on(cluster: str, *samples: CommSample) -> CommModel:
    problem = instances.problem(on=parse_cluster(cluster, "test"))
    device = problem.cluster.groups[0].device
    profile = Profile(
        schema_version=PROFILE_SCHEMA,
        name="",
        device=device.name,
        device_title=device.title,
        backend="nccl",
        created="",
        versions={},
        devices_per_node=problem.cluster.devices_per_node,
        slots_per_node=None,
        layers=(),
        comms=samples,
        contention=(),
        constants=(),
    )
    return CommModel(dataclasses.replace(problem, profile=profile))


def test_groups_over_nodes_cost_what_was_measured_of_them() -> None:
    """And those over as many nodes as nobody measured, what the form says."""
    over_two = [
        sample(Op.ALL_REDUCE, 4, size=size, seconds=size * 1e-7, groups=2, nodes=2, stride=2)
        for size in (MIB, 16 * MIB)
    ]
    comm, plain = measured_on("4x4:h100-sxm-80gb@hdr200x8", *over_two), model_of("4x4:h100-sxm-80gb@hdr200x8")
    group = Group(ranks=4, groups=1, spans_nodes=True, nodes=2, stride=2)
    cost = comm.cost(Op.ALL_REDUCE, MIB, group)
    assert (cost.seconds, cost.origin) == (pytest.approx(MIB * 1e-7), "measured")
    assert comm.cost(Op.ALL_REDUCE, 4 * MIB, group).origin == "interpolated"
    over_four = dataclasses.replace(group, nodes=4, stride=4)
    assert comm.cost(Op.ALL_REDUCE, MIB, over_four) == plain.cost(Op.ALL_REDUCE, MIB, over_four)
    within = Group(ranks=4, groups=1, spans_nodes=False)
    assert comm.cost(Op.ALL_REDUCE, MIB, within) == plain.cost(Op.ALL_REDUCE, MIB, within)


def test_groups_are_priced_by_the_most_like_them() -> None:
    """First as far apart, then as many at work."""
    comm = measured_on(
        "1x8:h100-sxm-80gb",
        sample(Op.ALL_GATHER, 2, size=MIB, seconds=1e-3, groups=1),
        sample(Op.ALL_GATHER, 2, size=MIB, seconds=2e-3, groups=4),
        sample(Op.ALL_GATHER, 2, size=MIB, seconds=3e-3, groups=4, stride=4),
    )

    def seconds(groups: int, stride: int) -> float:
        group = Group(ranks=2, groups=groups, spans_nodes=False, stride=stride)
        return comm.cost(Op.ALL_GATHER, MIB, group).seconds

    assert [seconds(1, 1), seconds(3, 1), seconds(4, 1)] == [1e-3, 2e-3, 2e-3]
    assert [seconds(1, 4), seconds(4, 8)] == [3e-3, 3e-3]


def test_a_sample_of_no_time_is_no_sample() -> None:
    comm = measured_on("1x8:h100-sxm-80gb", sample(Op.ALL_GATHER, 2, size=MIB, seconds=0.0))
    assert comm.cost(Op.ALL_GATHER, MIB, inside(2)) == model_of("1x8:h100-sxm-80gb").cost(
        Op.ALL_GATHER, MIB, inside(2)
    )


def test_copies_of_a_large_unit_have_a_rate_of_their_own_where_one_was_measured() -> None:
    """0.1 ms and 1 ns a byte up to a million of them, 5 ns beyond; without that, 1 ns for all."""
    line = {"fsdp_gather_unit_s": 1e-4, "fsdp_gather_copy_s_per_byte": 1e-9}
    bend = {"fsdp_gather_bend_bytes": 1e6, "fsdp_gather_beyond_s_per_byte": 5e-9}
    degrees = Degrees(dp_shard=4, zero=Zero.PARAMETERS)

    def copied_s(values: dict[str, float], size_bytes: float) -> float:
        constants = tuple(
            Constant(name=name, value=value, origin="measured") for name, value in values.items()
        )
        problem = instances.problem(on=instances.cluster(per_node=4))
        asked = dataclasses.replace(problem, profile=instances.profile(constants=constants))
        messages = CostModel(asked).layout(degrees).messages
        return messages.gather(size_bytes / messages.value_bytes).host_s

    assert copied_s(line | bend, 4e5) == pytest.approx(5e-4) == copied_s(line, 4e5)
    assert copied_s(line | bend, 1e6) == pytest.approx(1.1e-3)
    assert copied_s(line | bend, 3e6) == pytest.approx(1.11e-2)
    assert copied_s(line, 3e6) == pytest.approx(3.1e-3)
