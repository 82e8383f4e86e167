"""Checkpoints of one plan under another: the whole state the same to the bit, the next steps the same.

Each plan is started once as a source (a few steps, a checkpoint, a few more) and once as a target, which
loads the checkpoints of all sources one after another into the same executor.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from planner.strategy.plan import Plan
from runtime.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from runtime.checkpoint.store import committed_folders, load_index
from runtime.launch.process_group import gather_json
from runtime.train.executor import Executor
from tests.runtime.ranks import make_executor, on_ranks, train

BEFORE, AFTER = 2, 3
"""Steps before the checkpoint, and steps after it that are compared."""
TOLERANCE = 1e-5
"""Relative. Another layout adds in another order; under the same plan nothing differs."""


@dataclass(frozen=True)
class Ran:
    """A state by the digest of all of it, and the losses and gradient norms of the steps after it."""

    digest: str
    after: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """What became of a checkpoint of `source` under `target`; `difference` is relative, the largest."""

    source: str
    target: str
    same_state: bool
    difference: float

    @property
    def good(self) -> bool:
        """Under the same plan every bit counts."""
        return self.same_state and self.difference <= (0.0 if self.source == self.target else TOLERANCE)


def state_digest(executor: Executor) -> str:
    """SHA-256 of the whole state, gathered from all ranks: weights, optimizer, step. Collective.

    Ranks that hold the same part must hold the same bits, and the parts must cover every tensor.
    """
    own = {name: _box(value) for name, value in executor.state_dict().items()}
    parts = gather_json(own)
    whole = hashlib.sha256()
    for name in sorted({name for part in parts for name in part}):
        boxes = [part[name] for part in parts if name in part]
        whole.update(f"{name} {boxes[0]['dtype']} {boxes[0]['whole']}".encode())
        whole.update(_assemble(name, boxes).tobytes())
    return whole.hexdigest()


def _box(value: torch.Tensor) -> dict[str, Any]:
    """This rank's part of a tensor, as plain data."""
    local, offset = value, (0,) * value.dim()
    if isinstance(value, DTensor):
        local = value.to_local()
        _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    content = local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(value.dtype),
        "bytes": value.dtype.itemsize,
        "whole": tuple(value.shape),
        "shape": tuple(local.shape),
        "offset": tuple(offset),
        "content": base64.b64encode(content).decode(),
    }


def _assemble(name: str, boxes: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    """The bytes of a tensor of which `boxes` are parts: its shape, and the bytes of an element."""
    size = boxes[0]["bytes"]
    whole = np.zeros((*boxes[0]["whole"], size), dtype=np.uint8)
    seen = np.zeros((*boxes[0]["whole"], 1), dtype=bool)
    for box in boxes:
        place = tuple(slice(o, o + n) for o, n in zip(box["offset"], box["shape"], strict=True))
        content = np.frombuffer(base64.b64decode(box["content"]), dtype=np.uint8)
        content = content.reshape(*box["shape"], size)
        assert ((whole[place] == content) | ~seen[place]).all(), f"ranks differ in {name}"
        whole[place], seen[place] = content, True
    assert seen.all(), f"parts of {name} are missing"
    return whole


def load_newest(executor: Executor, folder: Path) -> None:
    """The newest checkpoint of a folder, into this layout."""
    path = committed_folders(folder)[0]
    executor.load_state_dict(load_checkpoint(path, load_index(path), executor.state_dict()))


def _after(executor: Executor) -> list[float]:
    return [value for pair in train(executor, executor.steps_done, AFTER) for value in pair]


def start(plan: Plan, folder: Path) -> Ran:
    """Trains a plan, saves it in `folder`, and trains on."""

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        train(executor, 0, BEFORE)
        save_checkpoint(folder, executor.state_dict(), step=BEFORE, run={})
        return [state_digest(executor), _after(executor)]

    digest, after = _first(on_ranks(body, plan.strategy.degrees.world))
    return Ran(digest, tuple(after))


def go_on(plan: Plan, folders: Sequence[Path]) -> list[Ran]:
    """Loads each folder's checkpoint in turn under `plan`, and trains on."""

    def body(rank: int) -> Any:
        executor, found = make_executor(plan), []
        for folder in folders:
            load_newest(executor, folder)
            assert executor.steps_done == BEFORE
            found.append([state_digest(executor), _after(executor)])
        return found

    answers = _first(on_ranks(body, plan.strategy.degrees.world))
    return [Ran(digest, tuple(after)) for digest, after in answers]


def _first(answers: Sequence[Any]) -> Any:
    assert all(answer == answers[0] for answer in answers), "ranks do not agree"
    return answers[0]


def reshard(
    plans: Mapping[str, Plan],
    folder: Path,
    wanted: Callable[[str, str], bool] = lambda source, target: True,
    told: Callable[[str], None] = lambda text: None,
) -> list[Pair]:
    """Every wanted ordered pair of plans, which must be of one model and workload."""
    sources: dict[str, Ran] = {}
    for name, plan in plans.items():
        sources[name] = start(plan, folder / name)
        told(f"saved {name}")
    pairs: list[Pair] = []
    for target, plan in plans.items():
        names = [source for source in plans if wanted(source, target)]
        ran = go_on(plan, [folder / name for name in names])
        pairs += [_compare(name, target, sources[name], r) for name, r in zip(names, ran, strict=True)]
        told(f"loaded {len(names)} under {target}")
    return pairs


def _compare(source: str, target: str, before: Ran, after: Ran) -> Pair:
    difference = max(abs(a - b) / abs(a) for a, b in zip(before.after, after.after, strict=True))
    return Pair(source, target, before.digest == after.digest, difference)


def resumes_exactly(plan: Plan, folder: Path, steps: int) -> bool:
    """Whether `steps` steps are half of them, a checkpoint, a new executor and the other half: every bit."""

    def body(rank: int) -> Any:
        straight = make_executor(plan)
        train(straight, 0, steps // 2)
        save_checkpoint(folder, straight.state_dict(), step=steps // 2, run={})
        resumed = make_executor(plan)
        load_newest(resumed, folder)
        ran = [train(executor, steps // 2, steps - steps // 2) for executor in (straight, resumed)]
        return ran[0] == ran[1] and state_digest(straight) == state_digest(resumed)

    return all(on_ranks(body, plan.strategy.degrees.world))
