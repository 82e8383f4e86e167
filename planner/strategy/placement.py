"""Where pipeline ranks lie in a cluster of several groups of devices, and what each sees of it.

Ranks are laid over the groups in the order of `Degrees.device_order`, world / pp devices to a pipeline rank:

    pp=4 on 16x8:a100 + 16x8:h100      ranks 0 and 1 on A100, 2 and 3 on H100
    device_order=1,0                   ranks 0 and 1 on H100, 2 and 3 on A100

A rank that lies in one group has that group's device, links, memory limit and profile; to other groups it
sends over the cluster's link between nodes. One that straddles groups (pp=1, or where a group's devices are
no multiple of world / pp) shares its micro-batches and state out evenly over unequal devices: the slowest
device, the cluster's link between nodes and the least limit of the groups that it touches govern it. That is
legal for any pp: engines run it as they run pp=1, and its cost, not a rule, says that it is seldom a good
idea.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate, pairwise

from planner.foundation.errors import InputError, Problem
from planner.hardware.cluster import ClusterSpec, DeviceGroup, slowest_link
from planner.job.problem import PlanningProblem
from planner.profile.profile import Profile
from planner.strategy.strategy import Degrees

Groups = tuple[int, ...]
"""Groups of a cluster, by their place in it, ascending."""


def rank_groups(cluster: ClusterSpec, degrees: Degrees) -> tuple[Groups, ...]:
    """The groups in which each pipeline rank has devices; all, where degrees do not match the cluster."""
    every = tuple(range(len(cluster.groups)))
    order = degrees.device_order or every
    if len(every) == 1 or degrees.world != cluster.devices or sorted(order) != list(every):
        return (every,) * degrees.pp
    bounds = list(pairwise(accumulate((cluster.groups[g].devices for g in order), initial=0)))
    per = degrees.world // degrees.pp
    return tuple(
        tuple(sorted(g for g, (first, end) in zip(order, bounds, strict=True) if first < b and a < end))
        for a, b in ((rank * per, (rank + 1) * per) for rank in range(degrees.pp))
    )


def stage_groups(cluster: ClusterSpec, degrees: Degrees, stages: int) -> tuple[Groups, ...]:
    """The groups in which each stage has devices; all, where degrees have no place for so many stages."""
    every, groups = tuple(range(len(cluster.groups))), rank_groups(cluster, degrees)
    ranks = [degrees.pp_rank_of_stage(stage) for stage in range(stages)] if degrees.pp > 0 else []
    if stages != degrees.stages or not ranks or min(ranks) < 0 or max(ranks) >= degrees.pp:
        return (every,) * stages
    return tuple(groups[rank] for rank in ranks)


def is_mixed(cluster: ClusterSpec) -> bool:
    """Whether some nodes differ from others in more than their number."""
    return len({_kind(group) for group in cluster.groups}) > 1


def device_names(cluster: ClusterSpec, groups: Groups) -> str:
    """The devices of some groups by name, joined with `+`."""
    return "+".join(dict.fromkeys(cluster.groups[g].device.name for g in groups))


def seen_from(problem: PlanningProblem, groups: Groups) -> PlanningProblem:
    """The problem as ranks on these groups meet it: their device, links, limit and profile.

    Of one kind, all nodes of the cluster count as such: what is sent leaves them by their own ports. Where no
    other kind exists it is the problem itself.
    """
    cluster, limits = problem.cluster, _limits_bytes(problem)
    limit = min(limits[g] for g in groups)
    if len(groups) == len(cluster.groups) or _all_alike(problem):
        same = limit == problem.memory_limit_bytes
        return problem if same else dataclasses.replace(problem, memory_limit_bytes=limit)
    profiles = _profiles(problem)
    seen = dataclasses.replace(
        problem,
        cluster=_seen_cluster(cluster, groups),
        memory_limit_bytes=limit,
        device_profiles=(),
        device_limits_bytes=(),
    )
    slowest = next(g for g in groups if cluster.groups[g].device == seen.device)
    return dataclasses.replace(seen, profile=profiles[slowest])


def rank_limits_bytes(problem: PlanningProblem, degrees: Degrees) -> tuple[int, ...]:
    """The memory limit of each pipeline rank's devices."""
    limits = _limits_bytes(problem)
    return tuple(min(limits[g] for g in groups) for groups in rank_groups(problem.cluster, degrees))


def parse_device_order(text: str, cluster: ClusterSpec, where: str = "--fix device_order") -> Groups:
    """`1,0`, or the devices' names: the groups of a cluster in an order. Raises InputError."""
    names = [group.device.name for group in cluster.groups]
    order = [_group_of(piece.strip(), names) for piece in text.split(",")]
    if None in order or sorted(g for g in order if g is not None) != list(range(len(names))):
        listed = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
        raise InputError(
            Problem(
                where=f"{where}={text[:80]}",
                fault=f"is no order of the {len(names)} groups of {cluster.name}.",
                legal=f"each of {listed} once, joined with commas: its number, or a name that is there once",
            )
        )
    return tuple(g for g in order if g is not None)


def _group_of(piece: str, names: list[str]) -> int | None:
    if piece.isdigit() and len(piece) < 6:
        return int(piece)
    return names.index(piece) if names.count(piece) == 1 else None


def _kind(group: DeviceGroup) -> DeviceGroup:
    """The group but for the number of its nodes."""
    return dataclasses.replace(group, nodes=1)


def _all_alike(problem: PlanningProblem) -> bool:
    """Whether all groups are of one kind, whose links are the cluster's."""
    first, *others = problem.cluster.groups
    if any(_kind(other) != _kind(first) for other in others) or first.intra or first.inter:
        return False
    profiles, limits = _profiles(problem), _limits_bytes(problem)
    return len(set(limits)) == 1 and all(profile == profiles[0] for profile in profiles)


def _seen_cluster(cluster: ClusterSpec, groups: Groups) -> ClusterSpec:
    own = [cluster.groups[g] for g in groups]
    joined = [group.intra or cluster.intra for group in own if group.devices_per_node > 1]
    seen = [dataclasses.replace(group, intra=None, inter=None) for group in own]
    if len({_kind(group) for group in own}) == 1:
        nodes = sum(group.nodes for group in cluster.groups)
        seen = [dataclasses.replace(seen[0], nodes=nodes)]
    return dataclasses.replace(
        cluster,
        groups=tuple(seen),
        intra=slowest_link(joined) if joined else cluster.intra,
        inter=(own[0].inter if len(own) == 1 else None) or cluster.inter,
    )


def _limits_bytes(problem: PlanningProblem) -> tuple[int, ...]:
    """The memory limit of each group."""
    known = dict(problem.device_limits_bytes)
    return tuple(known.get(g.device.name, problem.memory_limit_bytes) for g in problem.cluster.groups)


def _profiles(problem: PlanningProblem) -> tuple[Profile | None, ...]:
    """The profile of each group: of one for all, samples hold for its own device alone."""
    known, names = dict(problem.device_profiles), [group.device.name for group in problem.cluster.groups]
    return tuple(known[name] if name in known else _of_device(problem.profile, name) for name in names)


def _of_device(profile: Profile | None, device: str) -> Profile | None:
    measured = profile is not None and bool(profile.layers or profile.comms)
    return profile if profile is None or not measured or profile.device == device else None
