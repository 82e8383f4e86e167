"""An interrupted run is the run that was not, bit for bit: metrics, weights, optimizer, random state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.advice.replanning import read_bytes_by_stage_rank
from planner.profile.choose import shipped_profile
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.checkpoint.checkpoint import save_checkpoint
from runtime.checkpoint.dcp import JsonLoadPlanner, SafetensorsReader
from runtime.checkpoint.store import find_checkpoint, load_index, step_folder
from runtime.launch.process_group import own_rank
from runtime.train.data.documents import shipped_corpus
from runtime.train.data.prepare import DataOptions
from runtime.train.options import TrainOptions
from runtime.train.session import restore, training_state
from runtime.train.train import run_training
from tests.plans import make_plan, split, tiny_llama, tiny_mixtral
from tests.runtime.ranks import OPTIONS, batch_of, make_executor, on_ranks, slice_of

MODEL = tiny_llama(vocab=258)
EXPERTS = tiny_mixtral(vocab=258)
PLANS: dict[str, Plan] = {
    "zero3": make_plan(MODEL, Degrees(dp_shard=2, zero=Zero(3), micro_batch=1)),
    "pp2": make_plan(MODEL, Degrees(pp=2, micro_batch=1, num_micro_batches=2)),
    "tp2-sp": make_plan(MODEL, Degrees(tp=2, micro_batch=2, sequence_parallel=True)),
    "interleaved": make_plan(
        MODEL, Degrees(pp=2, chunks=2, schedule=Schedule.INTERLEAVED, micro_batch=1, num_micro_batches=2)
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((shipped_corpus() / "pride_and_prejudice.txt").read_text()[:20_000])
    return str(file)


def _train(plan: Plan, text: str, run_dir: Path, steps: int, **given: Any) -> None:
    options = TrainOptions(
        steps=steps,
        run_dir=str(run_dir),
        data=DataOptions(data=(text,), tokenizer="byte"),
        lr=1e-2,
        warmup=2,
    )
    run_training(plan, replace(options, **given), shown=False)


def _metrics(run_dir: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def _files(run_dir: Path, step: int) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint: all tensors of all ranks, and the index."""
    commit = json.loads((step_folder(run_dir / "checkpoints", step) / "COMMIT").read_text())
    return {name: file["sha256"] for name, file in commit["files"].items()}


@pytest.mark.parametrize(("name", "steps"), [("zero3", 20), *((n, 6) for n in PLANS if n != "zero3")])
def test_all_steps_are_half_of_them_twice(name: str, steps: int, text: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    _train(plan, text, tmp_path / "straight", steps, checkpoint_every=steps // 3)
    _train(plan, text, tmp_path / "halves", steps // 2, sync_checkpoints=True)
    _train(plan, text, tmp_path / "halves", steps, resume=True, lr=None, warmup=None)
    assert _metrics(tmp_path / "halves") == _metrics(tmp_path / "straight")
    assert len({loss for _, loss, _, _ in _metrics(tmp_path / "straight")}) == steps
    files = _files(tmp_path / "halves", steps)
    assert files == _files(tmp_path / "straight", steps)
    assert {"index.json", "shard-00000.safetensors", "shard-00001.safetensors"} == files.keys()


def test_random_state_goes_on_where_it_was(tmp_path: Path) -> None:
    plan = PLANS["zero3"]

    def start(rank: int) -> list[float]:
        executor = make_executor(plan)
        torch.manual_seed(100 + rank)
        torch.rand(rank + 1)
        save_checkpoint(tmp_path, training_state(executor, OPTIONS), step=0, run={})
        drawn: list[float] = torch.rand(4).tolist()
        return drawn

    def go_on(rank: int) -> list[float]:
        path = find_checkpoint(tmp_path).path
        assert path is not None
        executor = make_executor(plan)
        restore(path, load_index(path), executor, OPTIONS)
        drawn: list[float] = torch.rand(4).tolist()
        return drawn

    first = on_ranks(start, 2)
    assert first[0] != first[1]
    assert on_ranks(go_on, 2) == first


def test_a_rank_reads_what_it_holds_and_no_more(tmp_path: Path) -> None:
    """ZeRO 3 over four ranks: each reads a quarter of what one rank alone reads."""
    alone = make_plan(MODEL, Degrees(micro_batch=2))
    shared = make_plan(MODEL, Degrees(dp_shard=4, zero=Zero(3), micro_batch=1))

    def start(rank: int) -> Any:
        executor = make_executor(alone)
        executor.step(slice_of(executor, batch_of(alone, 0)))
        save_checkpoint(tmp_path, executor.state_dict(), step=1, run={})
        return _read_bytes(executor, tmp_path)

    def go_on(rank: int) -> Any:
        return _read_bytes(make_executor(shared), tmp_path)

    whole = on_ranks(start, 1)[0]
    parts = on_ranks(go_on, 4)
    assert whole > 4 * 12 * MODEL.params_total / 4
    assert max(parts) <= 1.05 * whole / 4 + 4096


READERS: dict[str, Plan] = {
    "zero0": make_plan(MODEL, Degrees(dp_replicate=2, micro_batch=1)),
    "zero3-tp2": make_plan(MODEL, Degrees(tp=2, dp_shard=2, zero=Zero(3), micro_batch=1)),
    "pp2-uneven": make_plan(MODEL, Degrees(pp=2, micro_batch=1, num_micro_batches=2), split(1, 3)),
    "experts": make_plan(EXPERTS, Degrees(dp_shard=2, ep=2, zero=Zero(1), micro_batch=1)),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_rank_reads_is_predicted(name: str, tmp_path: Path) -> None:
    """Of a checkpoint that one rank wrote; states beside weights and moments are no bytes to speak of."""
    plan = READERS[name]
    alone = make_plan(plan.model, Degrees(micro_batch=2))

    def start(rank: int) -> Any:
        executor = make_executor(alone)
        executor.step(slice_of(executor, batch_of(alone, 0)))
        save_checkpoint(tmp_path, executor.state_dict(), step=1, run={})

    def go_on(rank: int) -> Any:
        return _read_bytes(make_executor(plan), tmp_path)

    on_ranks(start, 1)
    degrees = plan.strategy.degrees
    read = on_ranks(go_on, degrees.world)
    problem = replace(plan.problem, profile=shipped_profile("cpu"))
    predicted = read_bytes_by_stage_rank(problem, plan.strategy)
    for rank, size in enumerate(predicted):
        own = [read[each] for each in degrees.ranks_of_pp_rank(rank)]
        assert own == [pytest.approx(size, rel=0.02)] * len(own)


def _read_bytes(executor: Any, folder: Path) -> int:
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = SafetensorsReader(step_folder(folder, 1))
    load(executor.state_dict(), storage_reader=reader, planner=JsonLoadPlanner())
    assert own_rank() == torch.distributed.get_rank()
    return reader.read_bytes
