"""Round trips and determinism: what is written reads back the same, and is the same in every process."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest

from planner.cost.evaluate import CostModel
from planner.foundation.decode import decode, decode_json, encode, to_json
from planner.hardware.catalog import device_names, load_device, load_model, model_index, profile_files
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_text import parse_cluster
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Method, Optimizer, Precision, Workload
from planner.profile.profile import Profile, load_profile
from planner.search.solve import make_plan
from planner.search.space import shapes
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import decode_plan, encode_plan
from planner.strategy.schedule.schedules import parse_table, print_table
from planner.strategy.strategy import Degrees, Schedule, Strategy, even_stages
from tests.planner import instances
from tests.planner.cost.test_simulate import random_table


def there_and_back(kind: type, value: object) -> None:
    """Through plain data and through text; the text of the copy is the text of the value."""
    assert decode(kind, encode(value), source="test") == value
    text = to_json(value)
    again = decode_json(kind, text, source="test")
    assert again == value and to_json(again) == text


@pytest.mark.parametrize("name", sorted(model_index()))
def test_models(name: str) -> None:
    there_and_back(ModelSpec, load_model(name))


@pytest.mark.parametrize("seed", range(30))
def test_random_models(seed: int) -> None:
    """Of every kind of mixer and MLP, several classes in any order."""
    there_and_back(ModelSpec, instances.random_problem(seed, mixed=True).model)


@pytest.mark.parametrize("name", device_names())
def test_clusters(name: str) -> None:
    for text in (f"1x2:{name}", f"2x4:{name}@ndr400x8", f"2x1:{name}@none"):
        there_and_back(ClusterSpec, parse_cluster(text, "test"))
    there_and_back(type(load_device(name).device()), load_device(name).device())


@pytest.mark.parametrize("path", profile_files(), ids=lambda path: path.stem)
def test_profiles(path: Any) -> None:
    there_and_back(Profile, load_profile(path))


def test_workloads() -> None:
    for precision in Precision:
        for optimizer in Optimizer:
            there_and_back(Workload, Workload(seq=7, batch=3, precision=precision, optimizer=optimizer))
    for method in Method:
        there_and_back(Workload, Workload(seq=7, batch=3, precision=Precision.BF16, method=method, tokens=9))


@pytest.mark.parametrize("seed", range(40))
def test_custom_tables(seed: int) -> None:
    """Any order of actions on any ranks, pairs and split backwards."""
    draw = random.Random(seed)
    ranks = draw.randint(1, 5)
    table = random_table(draw, ranks, ranks + draw.randint(0, 3), draw.randint(1, 12))
    assert parse_table(print_table(table)) == table
    assert print_table(parse_table(print_table(table))) == print_table(table)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_plans(schedule: Schedule) -> None:
    """A strategy of every schedule, with every recompute option, as plan.json."""
    problem = instances.problem(of=instances.model(layers=8), batch=16)
    found = list(shapes(problem, parse_fixed_choices((f"schedule={schedule}",))))
    legal = [shape for shape in found if isinstance(shape, Degrees)]
    draw = random.Random(0)
    for degrees in draw.sample(legal, 4):
        stages = even_stages(8, degrees.stages, draw.choice(list(Recompute)))
        evaluation = CostModel(problem).evaluate(Strategy(degrees=degrees, stages=stages))
        plan = make_plan(problem, evaluation, None, {}, ())
        text = json.dumps(encode_plan(plan))
        again = decode_plan(json.loads(text), source="test")
        assert again == plan
        assert json.dumps(encode_plan(again)) == text


def test_a_lost_figure_is_seen() -> None:
    """The check itself: a value that its text does not carry fails it."""
    value = instances.problem().model
    with pytest.raises(AssertionError):
        assert (
            decode(ModelSpec, encode(dataclasses.replace(value, vocab=value.vocab + 1)), source="t") == value
        )


COMMANDS = (
    "estimate --model llama-3-8b --cluster 2x8:h100-sxm-80gb --seq 4096 --batch 64 --fix tp=2 --fix pp=4 "
    "--fix schedule=interleaved --fix chunks=2 --json",
    "solve --model shardwise-demo --cluster 1x4:a100-sxm-80gb --seq 256 --batch 16 --reproducible --json",
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:3]))
def test_the_same_bytes_in_every_process(command: str) -> None:
    """Whatever the seed of the hashes of strings, on which the order of sets depends."""
    answers = []
    for seed in ("1", "2", "77"):
        done = subprocess.run(
            [sys.executable, "-m", "planner.cli", *command.split()],
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        answers.append(done.stdout)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) > 1000
