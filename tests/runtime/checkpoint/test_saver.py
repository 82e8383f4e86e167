"""Saves in the background: what is saved, who waits for whom, and what is left after a kill at any point."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from planner.foundation.errors import InputError
from runtime.checkpoint import dcp, store
from runtime.checkpoint.checkpoint import CheckpointSaver, load_checkpoint
from runtime.checkpoint.dcp import JsonSavePlanner
from runtime.checkpoint.store import (
    committed_folders,
    find_checkpoint,
    load_index,
    remove_unfinished,
    step_folder,
)
from runtime.launch.local_ranks import RunFailedError, Send, run_local
from runtime.launch.process_group import join_group
from tests.runtime.ranks import on_ranks

WHOLE = torch.arange(64, dtype=torch.float32).reshape(8, 8)


def _saver(folder: Path, *, background: bool = True) -> CheckpointSaver:
    return CheckpointSaver(folder, keep=2, background=background, device=torch.device("cpu"))


def _state(step: int) -> dict[str, Any]:
    """A weight of which each rank holds some rows, one that all hold, and a value."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    weight = distribute_tensor(WHOLE + step, mesh, [Shard(0)], src_data_rank=None)
    return {"weight": weight, "bias": torch.full((3,), float(step)), "lr": step / 8}


def _loaded(path: Path) -> dict[str, Any]:
    empty = {"weight": torch.zeros(8, 8), "bias": torch.zeros(3), "lr": 0.0}
    return load_checkpoint(path, load_index(path), empty)


def _check_whole(path: Path, step: int) -> None:
    found = _loaded(path)
    assert torch.equal(found["weight"], WHOLE + step)
    assert torch.equal(found["bias"], torch.full((3,), float(step)))
    assert found["lr"] == step / 8


def _hold(gate: threading.Event, of: Callable[..., Any]) -> Callable[..., Any]:
    """`of`, once the gate is open."""

    def held(*given: Any) -> Any:
        assert gate.wait(30)
        return of(*given)

    return held


def test_training_goes_on_while_its_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(rank: int) -> Any:
        gate = threading.Event()
        held = _hold(gate, dcp.write_safetensors)
        monkeypatch.setattr(dcp, "write_safetensors", held)
        saver, state = _saver(tmp_path), _state(1)
        saver.save(state, step=1, run={})
        early = (saver.published, committed_folders(tmp_path))
        state["weight"].to_local().fill_(-1)
        state["bias"].fill_(-1)
        gate.set()
        saver.save(_state(2), step=2, run={})
        names = [path.name for path in committed_folders(tmp_path)]
        saver.wait()
        return [early == (None, []), "step-00000001" in names, str(saver.published), saver.waited_s > 0]

    assert on_ranks(body, 2) == [[True, True, str(step_folder(tmp_path, 2)), True]] * 2
    _check_whole(step_folder(tmp_path, 1), 1)
    _check_whole(step_folder(tmp_path, 2), 2)


def test_plans_are_sent_once_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(rank: int) -> list[int]:
        sent: list[int] = []
        plan = JsonSavePlanner.create_local_plan

        def counted(self: JsonSavePlanner) -> Any:
            found = plan(self)
            sent.append(len(found.items))
            return found

        monkeypatch.setattr(JsonSavePlanner, "create_local_plan", counted)
        saver = _saver(tmp_path)
        for step in (1, 2, 3):
            saver.save(_state(step), step=step, run={})
        saver.save({**_state(4), "more": torch.ones(2)}, step=4, run={})
        saver.wait()
        return sent

    assert on_ranks(body, 2) == [[3, 0, 0, 4]] * 2
    _check_whole(step_folder(tmp_path, 3), 3)
    _check_whole(step_folder(tmp_path, 4), 4)
    assert load_index(step_folder(tmp_path, 4)).tensors["more"].shape == (2,)


def test_without_a_thread_save_returns_with_the_step(tmp_path: Path) -> None:
    def body(rank: int) -> Any:
        saver = _saver(tmp_path, background=False)
        saver.save(_state(1), step=1, run={})
        return [str(saver.published), threading.active_count()]

    assert on_ranks(body, 2) == [[str(step_folder(tmp_path, 1)), 1]] * 2
    _check_whole(step_folder(tmp_path, 1), 1)


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_is_full_for_one_rank_fails_the_step_for_all(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(rank: int) -> Any:
        saver = _saver(tmp_path, background=background)
        saver.save(_state(1), step=1, run={})
        saver.wait()

        def full(path: Path, entries: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        if rank == 1:
            monkeypatch.setattr(dcp, "write_safetensors", full)
        with pytest.raises(InputError) as caught:
            saver.save(_state(2), step=2, run={})
            saver.wait()
        return [str(caught.value), saver.failed]

    for text, failed in on_ranks(body, 2):
        assert "shard-00001.safetensors: cannot be written: No space left on device" in text
        assert not failed
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    _check_whole(step_folder(tmp_path, 1), 1)


def test_a_file_that_reads_back_otherwise_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(rank: int) -> str:
        def spoil(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

        monkeypatch.setattr(dcp, "_drop_from_page_cache", spoil)
        with pytest.raises(InputError) as caught:
            _saver(tmp_path, background=False).save(_state(1), step=1, run={})
        return str(caught.value)

    assert "reads back different from what was written" in on_ranks(body, 1)[0]
    assert committed_folders(tmp_path) == []


# --------------------------------------------------------------------------------------------- kills

Place = tuple[int, object, str, int, int]
"""The rank that is killed, the name that is patched, on which call of it, and the newest step afterwards."""
KILLS: dict[str, Place] = {
    "planning": (1, JsonSavePlanner, "create_local_plan", 1, 1),
    "folder made": (0, dcp.SafetensorsWriter, "write_data", 1, 1),
    "only the header written": (0, dcp, "_content", 1, 1),
    "half a file written": (1, dcp, "_content", 2, 1),
    "before reading back": (1, dcp, "digest_file", 1, 1),
    "before the index": (0, store, "write_atomic", 1, 1),
    "before COMMIT": (0, store, "write_atomic", 2, 1),
    "before the rename": (0, store, "_sync_folder", 1, 1),
    "after the rename": (0, store, "_sync_folder", 2, 2),
    "before old steps are removed": (0, store, "committed_folders", 1, 2),
}


def _kill_in(owner: object, name: str, call: int) -> None:
    """From now on this process is killed as it begins the given call of a function."""
    original, calls = getattr(owner, name), iter(range(1, 100))

    def deadly(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(owner, name, deadly)


@pytest.mark.parametrize("when", KILLS)
def test_kill_9_at_any_moment_leaves_a_whole_step(when: str, tmp_path: Path) -> None:
    victim, owner, name, call, newest = KILLS[when]
    folder = tmp_path / "checkpoints"

    def body(rank: int, send: Send) -> None:
        torch.set_num_threads(1)
        join_group("gloo", timeout_s=60)
        saver = _saver(folder)
        saver.save(_state(1), step=1, run={})
        saver.wait()
        if rank == victim:
            _kill_in(owner, name, call)
        saver.save(_state(2), step=2, run={})
        saver.wait()
        raise AssertionError("nobody was killed")

    with pytest.raises(RunFailedError, match=f"rank {victim} was killed by SIGKILL"):
        run_local(body, 2, log_dir=tmp_path / "logs", on_message=lambda *_: None)
    found = find_checkpoint(folder)
    assert (found.path, found.refused) == (step_folder(folder, newest), ())
    _check_whole(step_folder(folder, newest), newest)
    remove_unfinished(folder)
    assert {path.name for path in folder.iterdir()} == {f"step-{n:08d}" for n in range(1, newest + 1)}
