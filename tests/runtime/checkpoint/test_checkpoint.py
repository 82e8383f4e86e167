"""Checkpoints: any layout reads any other, a step exists only whole, damage is refused."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from planner.foundation.errors import InputError
from runtime.checkpoint import dcp, store
from runtime.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from runtime.checkpoint.store import (
    COMMIT,
    committed_folders,
    find_checkpoint,
    load_index,
    remove_step,
    remove_unfinished,
    set_aside,
    step_folder,
    verify,
)
from runtime.launch.local_ranks import Send, run_local
from runtime.launch.process_group import join_group

WEIGHT = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)
BIAS = torch.arange(5, dtype=torch.bfloat16)
Layout = tuple[tuple[int, ...], tuple[Placement, ...]]
LAYOUTS: dict[str, Layout] = {
    "one": ((1,), (Replicate(),)),
    "rows": ((4,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "both": ((2, 2), (Shard(0), Shard(1))),
    "copies": ((2, 2), (Replicate(), Shard(0))),
}


def _state(layout: Layout, *, filled: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", layout[0])
    weight = distribute_tensor(WEIGHT.clone(), mesh, layout[1])
    bias = distribute_tensor(BIAS.clone(), mesh, [Replicate()] * (len(layout[0]) - 1) + [Shard(0)])
    state: dict[str, Any] = {
        "model": {"weight": weight, "bias": bias},
        "optimizer": {"step": torch.tensor(3.0), "groups": [{"lr": 0.5}]},
        "position": 24,
    }
    if not filled:
        weight.to_local().fill_(-1)
        bias.to_local().fill_(-1)
        state |= {"optimizer": {"step": torch.tensor(0.0), "groups": [{"lr": 0.0}]}, "position": 0}
    return state


def _run(layout: Layout, logs: Path, body: Callable[[dict[str, Any]], Any], *, filled: bool) -> list[Any]:
    """What `body` returns on every rank, given this rank's state."""
    answers: dict[int, Any] = {}

    def rank_body(rank: int, send: Send) -> None:
        join_group("gloo", 30)
        send({"answer": body(_state(layout, filled=filled))})

    world = torch.Size(layout[0]).numel()
    run_local(rank_body, world, log_dir=logs, on_message=lambda rank, m: answers.update({rank: m["answer"]}))
    return [answers[rank] for rank in range(world)]


@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_reads_any_other(source: str, tmp_path: Path) -> None:
    _run(
        LAYOUTS[source],
        tmp_path / "logs",
        lambda state: str(save_checkpoint(tmp_path / "c", state, step=3, run={})),
        filled=True,
    )
    found = find_checkpoint(tmp_path / "c")
    assert found.path == step_folder(tmp_path / "c", 3)
    index = load_index(found.path)
    volume = sum(torch.Size(chunk.shape).numel() for chunk in index.tensors["model/weight"].chunks)
    assert volume == WEIGHT.numel(), "every element is stored once, whatever was replicated"

    def load(state: dict[str, Any]) -> Any:
        assert found.path is not None
        state = load_checkpoint(found.path, index, state)
        weight, bias = state["model"]["weight"].full_tensor(), state["model"]["bias"].full_tensor()
        same = torch.equal(weight, WEIGHT) and torch.equal(bias, BIAS)
        return [
            same,
            float(state["optimizer"]["step"]),
            state["optimizer"]["groups"][0]["lr"],
            state["position"],
        ]

    for target, layout in LAYOUTS.items():
        answers = _run(layout, tmp_path / "logs", load, filled=False)
        assert answers == [[True, 3.0, 0.5, 24]] * len(answers), target


def _save(folder: Path, step: int, **values: float) -> Path:
    return save_checkpoint(folder, {"w": WEIGHT + step, **values}, step=step, run={"model": "m"})


def test_the_newest_whole_step_is_found_and_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        _save(tmp_path, step)
    assert [path.name for path in committed_folders(tmp_path)] == ["step-00000010", "step-00000002"]
    assert find_checkpoint(tmp_path).path == step_folder(tmp_path, 10)


def test_a_step_without_commit_is_refused_and_never_deleted(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (_save(tmp_path, 2) / COMMIT).unlink()
    step_folder(tmp_path, 3).with_suffix(".tmp").mkdir()
    found = find_checkpoint(tmp_path)
    assert (found.path, found.damaged) == (step_folder(tmp_path, 1), (step_folder(tmp_path, 2),))
    assert "step-00000002/COMMIT: is missing" in found.refused[0]
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert [path.name for path in committed_folders(tmp_path)] == ["step-00000001"]


def test_steps_set_aside_keep_their_files_and_each_a_name_of_its_own(tmp_path: Path) -> None:
    asides = []
    for content in ("first", "second", "third"):
        step = step_folder(tmp_path, 7)
        step.mkdir()
        (step / "file").write_text(content)
        asides.append(set_aside(step))
    assert [path.name for path in asides] == [f"step-00000007{n}.damaged" for n in ("", ".2", ".3")]
    assert [(path / "file").read_text() for path in asides] == ["first", "second", "third"]
    assert find_checkpoint(tmp_path).path is None


def test_a_removal_cut_short_leaves_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", lambda *_, **__: None)
        remove_step(path)
    found = find_checkpoint(tmp_path)
    assert (found.path, found.refused) == (step_folder(tmp_path, 1), ())
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("owner", "crash_in"), [(dcp, "write_safetensors"), (store, "write_atomic"), (store, "_sync_folder")]
)
def test_a_crash_before_the_commit_leaves_the_old_step(
    owner: object, crash_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, crash_in, crash)
        with pytest.raises(KeyboardInterrupt):
            _save(tmp_path, 2)
    assert find_checkpoint(tmp_path).path == step_folder(tmp_path, 1)
    remove_unfinished(tmp_path)
    _save(tmp_path, 2)
    assert find_checkpoint(tmp_path).path == step_folder(tmp_path, 2)


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    _save(tmp_path, 1, lr=0.5)
    path = _save(tmp_path, 1, lr=0.25)
    assert load_index(path).values == {"lr": 0.25}
    assert verify(path) == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "does not match the checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), r"has \d+ bytes, its COMMIT says \d+"),
        (Path.unlink, "is missing, though its COMMIT lists it"),
    ],
)
@pytest.mark.parametrize("file", ["shard-00000.safetensors", "index.json"])
def test_damage_is_refused_by_name(
    damage: Callable[[Path], Any], message: str, file: str, tmp_path: Path
) -> None:
    _save(tmp_path, 1)
    damage(_save(tmp_path, 2) / file)
    found = find_checkpoint(tmp_path)
    assert found.path == step_folder(tmp_path, 1)
    assert len(found.refused) == 1
    assert file in found.refused[0]
    assert re.search(message, found.refused[0])


def test_a_broken_commit_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / COMMIT).write_text(json.dumps({"step": 1}))
    found = find_checkpoint(tmp_path)
    assert found.path is None
    assert "COMMIT" in found.refused[0]


def test_what_does_not_fit_the_model_is_listed(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    state = {"w": torch.zeros(7, 5), "v": torch.zeros(2), "lr": 0.1}
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, load_index(path), state)
    text = str(caught.value)
    assert "holds w as [7, 6], this model has [7, 5]" in text
    assert "lacks the tensor v" in text
    assert "lacks lr" in text


def test_a_full_disk_is_named_and_leaves_the_old_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "shard"))

    monkeypatch.setattr(dcp, "write_safetensors", full)
    with pytest.raises(InputError, match="shard: cannot be written: No space left on device"):
        _save(tmp_path, 2)
    assert find_checkpoint(tmp_path).path == step_folder(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "the room is given back"


def test_nothing_is_pickled(tmp_path: Path) -> None:
    names = sorted(path.name for path in _save(tmp_path, 1).iterdir())
    assert names == ["COMMIT", "index.json", "shard-00000.safetensors"]
