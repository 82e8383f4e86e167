"""How few samples of layers tell of all: the adaptive profile against the whole grid, on this CPU.

The whole grid of a model's layers is measured twice, a case after its first time, so that the machine's own
noise is known. Then the profiler's scheduler takes cases from the first time as if it measured, until its
target; what it did not take is predicted by the cost model from what it took, and compared with what was
measured: the error that counts, weighed by what a layer class takes of a pass through the model. Beside it
stand the error that the scheduler itself claims (held out), that of the corners alone, that of every case at
one length without context parallelism (all that a profile had before), and that of as many cases at random.

    python -m bench.layers [--model NAME] [--seq N ...] [--cp N ...] [--ep N ...] [--out FILE]
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.foundation.decode import write_atomic

if TYPE_CHECKING:
    from planner.profile.profile import LayerSample
    from runtime.profiler.layer_family import LayerFamily
    from runtime.profiler.layers import LayerCase
    from runtime.profiler.profile_cases import Reading

Error = tuple[float, float]
"""A relative error, and how much its layer class takes of a pass through the model."""

TARGETS = (0.05, 0.1, 0.15, 0.2, 0.3)
DRAWS = 5


class Replayed:
    """A family whose cases were measured before; it measures from the record."""

    def __init__(self, family: LayerFamily, record: Mapping[LayerCase, LayerSample]) -> None:
        self.family, self.record = family, record
        self.taken: list[LayerCase] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def cases(self) -> Sequence[LayerCase]:
        return list(self.record)

    def measure(self, cases: Sequence[LayerCase]) -> Iterator[Reading]:
        from runtime.profiler.profile_cases import Reading

        for case in cases:
            self.taken.append(case)
            yield Reading(samples=(self.record[case],))


class Nobody:
    """Watches a scheduler and says nothing."""

    def settled(self, family: str, case: str, reading: Reading) -> None: ...

    def ahead(self, cases: int, left_s: float | None) -> None: ...


def family_of(
    model: str, seqs: Sequence[int], cps: Sequence[int], eps: Sequence[int], device: str
) -> LayerFamily:
    """The layers of a model as `plan profile` measures them on a local cluster of four."""
    import dataclasses

    from planner.hardware.catalog import load_model
    from planner.hardware.cluster_text import parse_cluster
    from runtime.profiler.layer_family import LayerFamily
    from runtime.profiler.scope import default_scope

    cluster = parse_cluster(device)
    of = cluster.groups[0].device
    scope = default_scope(4, seqs, quick=False, micro_batches=(1, 2, 4, 8))
    scope = dataclasses.replace(scope, cps=tuple(cps), eps=tuple(eps))
    kind = "cpu" if of.name == "cpu" else "cuda"
    return LayerFamily(load_model(model), of.usual_precision, kind, of, scope)


def measured_twice(family: LayerFamily) -> tuple[dict[LayerCase, LayerSample], dict[LayerCase, LayerSample]]:
    """Every case, one time and another."""
    from planner.profile.profile import LayerSample

    times: list[dict[LayerCase, LayerSample]] = []
    for _ in range(2):
        cases = family.cases()
        found: dict[LayerCase, LayerSample] = {}
        for case, reading in zip(cases, family.measure(cases), strict=True):
            if not reading.skipped:
                (sample,) = reading.samples
                assert isinstance(sample, LayerSample), "layers alone were measured"
                found[case] = sample
        times.append(found)
    return times[0], times[1]


def errors(
    family: LayerFamily, taken: Sequence[LayerCase], record: Mapping[LayerCase, LayerSample]
) -> list[Error]:
    """Errors of forward and backward of every case that was not taken, from those that were."""
    from planner.cost.stage.layer_samples import at_usual_speed

    even = dict(zip(record, at_usual_speed(list(record.values())), strict=True))
    known, weights = [even[case] for case in taken], family.weights(list(record.values()))
    found: list[Error] = []
    for case in record:
        if case in taken:
            continue
        cost = family.prediction.cost(case, known)
        if cost is not None:
            sample = even[case]
            ratios = cost.forward_s / sample.forward_s, cost.backward_s / sample.backward_s
            found += [(abs(ratio - 1), weights[sample.kind, sample.shape_key]) for ratio in ratios]
    return found


def adaptive(family: LayerFamily, record: Mapping[LayerCase, LayerSample], target: float) -> dict[str, Any]:
    """What the scheduler takes to a target, what it claims, and what is true of the rest."""
    from runtime.profiler.scheduler import Scheduler

    replayed = Replayed(family, record)
    scheduler = Scheduler([replayed], target, 3600.0, Nobody())
    scheduler.run()
    claimed = family.held_out_error([record[case] for case in replayed.taken])
    return {
        "target": target,
        "taken": len(replayed.taken),
        "of": len(record),
        "claimed": claimed,
        "others": summary(errors(family, replayed.taken, record)),
        "at_random": summary(_drawn(family, record, len(replayed.taken))),
    }


def _drawn(family: LayerFamily, record: Mapping[LayerCase, LayerSample], count: int) -> list[Error]:
    cases = list(record)
    draws = (random.Random(seed).sample(cases, count) for seed in range(DRAWS))
    return [error for draw in draws for error in errors(family, draw, record)]


def summary(found: Sequence[Error]) -> dict[str, float | int]:
    """Median and mean of errors, and the mean by weights."""
    if not found:
        return {"count": 0}
    each = [error for error, _ in found]
    weighed = sum(error * weight for error, weight in found) / sum(weight for _, weight in found)
    median, mean = statistics.median(each), statistics.fmean(each)
    return {"count": len(found), "median": median, "mean": mean, "weighed": weighed}


def report(family: LayerFamily) -> dict[str, Any]:
    """All figures of one model."""
    from planner.cost.stage.layer_samples import at_usual_speed
    from runtime.profiler.layers import corners

    first, second = measured_twice(family)
    both = [case for case in first if case in second]
    even = at_usual_speed([*(first[case] for case in both), *(second[case] for case in both)])
    weights, again = family.weights(even), []
    for a, b in zip(even[: len(both)], even[len(both) :], strict=True):
        ratios = b.forward_s / a.forward_s, b.backward_s / a.backward_s
        again += [(abs(ratio - 1), weights[a.kind, a.shape_key]) for ratio in ratios]
    seeds = corners(list(first))
    longest = max(case.seq for case in first)
    plain = [case for case in first if (case.seq, case.cp, case.ep) == (longest, 1, 1)]
    return {
        "cases": len(first),
        "again": summary(again),
        "held_out_of_all": family.held_out_error(list(first.values())),
        "corners": {"taken": len(seeds), "others": summary(errors(family, seeds, first))},
        "one_length": {"taken": len(plain), "others": summary(errors(family, plain, first))},
        "adaptive": [adaptive(family, first, target) for target in TARGETS],
    }


@click.command()
@click.option("--model", default="shardwise-demo", show_default=True)
@click.option("--seq", "seqs", multiple=True, type=int, default=(128, 512), show_default=True)
@click.option("--cp", "cps", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--ep", "eps", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--cluster", default="local:4", show_default=True, help="The device that is measured.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False))
def main(
    model: str,
    seqs: tuple[int, ...],
    cps: tuple[int, ...],
    eps: tuple[int, ...],
    cluster: str,
    out: Path | None,
) -> None:
    """Samples of layers: how many tell of all."""
    found = report(family_of(model, seqs, cps, eps, cluster))
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "model": model, "seqs": seqs} | found
    click.echo(json.dumps(found, indent=1))
    if out is not None:
        write_atomic(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
