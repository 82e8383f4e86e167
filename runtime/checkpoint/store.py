"""Committed checkpoints on disk: their files, the proof that they are whole, and how they are found.

    CHECKPOINTS/step-00000120/shard-00003.safetensors   tensors of rank 3
                              index.json                what lies where, plain values, whose run it is
                              COMMIT                    size and SHA-256 of every other file

All of it is written in `step-00000120.tmp`, COMMIT last, and appears by one rename. A step can be resumed
from exactly if its COMMIT verifies. A step whose COMMIT is missing or does not verify (an incomplete copy, a
damaged disk) is refused by name and set aside; only folders whose name ends in `.tmp` are deleted unasked.

The identity of a run, and where it stands: read from its folder without torch and without changing it.

Flat facts identify a checkpoint's run: those that must not change when it goes on, and the plan that made
it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.foundation.decode import decode_json, digest, encode, load_json, load_json_object, read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.run_files import CHECKPOINTS, LOCK, OPTIONS
from planner.strategy.plan import Plan

CHECKPOINT_SCHEMA = 1
COMMIT = "COMMIT"
INDEX = "index.json"
DAMAGED = ".damaged"
"""Suffix of the folder of a step that did not verify when a run went on from an older one."""
UNFINISHED = ".tmp"
"""Suffix of the folder of a step that is being written or removed; nothing resumes from one."""
BLOCK_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 32
"""About 75 bytes a box: 70B parameters with AdamW, sharded over 512 ranks, need 110 MB."""
MOST_READERS = 8
"""Files that are hashed at once; SHA-256 lets go of the interpreter."""
Value = bool | int | float | str | None


@frozen
class Chunk:
    """A box of a tensor: which file holds it, where it begins in the whole tensor, its shape."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """The suffix of the tensor's name in the file."""
        return ",".join(map(str, self.offset))


@frozen
class StoredTensor:
    """A whole tensor, in chunks that cover it once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@frozen
class CheckpointIndex:
    """Everything of a checkpoint that is not a tensor's content. `run` says whose run it is."""

    schema_version: int
    step: int
    world: int
    run: dict[str, Value]
    values: dict[str, Value]
    tensors: dict[str, StoredTensor]


@frozen
class FileDigest:
    """Size and content of a file."""

    bytes: int
    sha256: str


@frozen
class Commit:
    """The proof that a step is whole: the digest of every file in its folder."""

    schema_version: int
    step: int
    files: dict[str, FileDigest]


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}"


def load_index(path: Path) -> CheckpointIndex:
    """The index of a step."""
    text = read_text(path / INDEX, MAX_INDEX_BYTES)
    return decode_json(CheckpointIndex, text, source=str(path / INDEX))


def index_text(index: CheckpointIndex) -> str:
    """An index as JSON without spaces: it has a line for every box of every tensor."""
    return json.dumps(encode(index), separators=(",", ":"), allow_nan=False) + "\n"


def digest_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file, read in blocks."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileDigest(bytes=size, sha256=digest.hexdigest())


def remove_step(folder: Path) -> None:
    """Deletes a step, renamed first: a removal that is cut short leaves nothing that looks like a step."""
    removed = folder.with_name(f"{folder.name}.removed{UNFINISHED}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def step_folders(folder: Path) -> list[Path]:
    """Folders of all saved steps, newest first, whether or not they can be resumed from."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and not path.suffix]
    return sorted(found, key=lambda path: path.name, reverse=True)


def committed_folders(folder: Path) -> list[Path]:
    """Folders of steps that carry a COMMIT, newest first. Their content is not verified yet."""
    return [path for path in step_folders(folder) if (path / COMMIT).exists()]


def remove_unfinished(folder: Path) -> None:
    """Deletes `step-*.tmp`, the folders of saves and removals that were cut short, and nothing else."""
    for path in folder.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Renames a step that cannot be resumed from, so that it no longer counts as one. Nothing is deleted.

    `step-00000120` becomes `step-00000120.damaged`, or `step-00000120.2.damaged` where that name is taken.
    """
    names = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(2)))
    free = (path.with_name(name + DAMAGED) for name in names)
    return path.rename(next(aside for aside in free if not aside.exists()))


def verify(path: Path) -> list[Problem]:
    """The faults of a saved step: a COMMIT that is missing or unreadable, each file that differs from it."""
    if not (path / COMMIT).exists():
        return [
            Problem(
                where=str(path / COMMIT),
                fault="is missing, so that nothing proves this step whole.",
                fix="copy it from where this step was saved, if the folder is an incomplete copy",
            )
        ]
    try:
        commit = load_json(path / COMMIT, Commit)
    except InputError as error:
        return list(error.problems)
    with ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file: _compare(path / file[0], file[1]), commit.files.items())
        return list(itertools.chain.from_iterable(found))


def _compare(path: Path, want: FileDigest) -> list[Problem]:
    if not path.is_file():
        return [Problem(where=str(path), fault="is missing, though its COMMIT lists it.")]
    size = path.stat().st_size
    if size != want.bytes:
        return [Problem(where=str(path), fault=f"has {size} bytes, its COMMIT says {want.bytes}.")]
    if digest_file(path) != want:
        return [Problem(where=str(path), fault="does not match the checksum in its COMMIT.")]
    return []


@dataclass(frozen=True, slots=True)
class Found:
    """The newest step that verifies (if there is one), why newer ones were passed over, and their folders."""

    path: Path | None
    refused: tuple[str, ...]
    damaged: tuple[Path, ...] = ()


def find_checkpoint(folder: Path) -> Found:
    """The newest whole step below `folder`; every file is read to verify it."""
    refused: list[str] = []
    damaged: list[Path] = []
    for path in step_folders(folder):
        problems = verify(path)
        if not problems:
            return Found(path, tuple(refused), tuple(damaged))
        refused.extend(map(str, problems))
        damaged.append(path)
    return Found(None, tuple(refused), tuple(damaged))


def plan_identity(plan: Plan) -> dict[str, Value]:
    """The facts that a plan fixes: its model but for the name, its workload but for the tokens."""
    model = dataclasses.replace(plan.model, name="", sources=())
    workload = dataclasses.replace(plan.workload, tokens=None)
    return dict(_flat({"model": encode(model), "workload": encode(workload)}, ""))


def _flat(value: Any, prefix: str) -> list[tuple[str, Value]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}".strip("."))]
    if isinstance(value, (list, tuple)):
        return [pair for place, item in enumerate(value) for pair in _flat(item, f"{prefix}.{place}")]
    return [(prefix, str(value) if isinstance(value, str) else value)]


def check_identity(path: Path, saved: Mapping[str, Value], own: Mapping[str, Value]) -> None:
    """Raises InputError with every fact in which a checkpoint and this run differ, both values named."""
    names = [name for name in (*own, *(n for n in saved if n not in own)) if not name.startswith("plan.")]
    problems = [
        Problem(
            where=f"{path}: {name}",
            fault=f"is {saved.get(name, 'absent')!r} in the checkpoint, {own.get(name, 'absent')!r} now.",
            fix="resume with the model, workload, data and seed of the run, or start a new one",
        )
        for name in names
        if saved.get(name, "absent") != own.get(name, "absent")
    ]
    if problems:
        raise InputError(*problems)


def check_same_run(path: Path, saved: Mapping[str, Value], plan: Plan) -> None:
    """Raises InputError where a checkpoint is of another model or workload than a plan."""
    of_plan = {name: value for name, value in saved.items() if name.startswith(("model.", "workload."))}
    check_identity(path, of_plan, plan_identity(plan))


def plan_facts(plan: Plan) -> dict[str, Value]:
    """By which plan a checkpoint was made; a run may go on under another one."""
    return {"plan.label": plan.strategy.degrees.label(), "plan.digest": digest(plan.strategy)}


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """A whole checkpoint: its step, the ranks that wrote it, its size, and the plan by which it was made."""

    path: Path
    step: int
    world: int
    bytes: int
    plan_label: str
    by_this_plan: bool
    facts: dict[str, Value]


@dataclass(frozen=True, slots=True)
class RunState:
    """The newest whole checkpoint, where there is one, and why newer ones were passed over.

    `options` is what the latest launch was told beside its plan; None where it was not written down. `going`
    says that a process holds the folder now.
    """

    checkpoint: CheckpointState | None
    refused: tuple[str, ...]
    options: dict[str, Any] | None
    going: bool

    @property
    def step(self) -> int:
        """The step that the run goes on from."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def read_run_state(run_dir: Path, plan: Plan) -> RunState:
    """Where the run of `plan` stands. Every file of the newest checkpoint is read to verify it.

    Raises InputError where the checkpoint is of another model or workload than the plan.
    """
    found = find_checkpoint(run_dir / CHECKPOINTS)
    options = run_dir / OPTIONS
    return RunState(
        checkpoint=None if found.path is None else _checkpoint(found.path, plan),
        refused=found.refused,
        options=load_json_object(options) if options.exists() else None,
        going=_held(run_dir / LOCK),
    )


def _checkpoint(path: Path, plan: Plan) -> CheckpointState:
    index = load_index(path)
    check_same_run(path, index.run, plan)
    commit, now = load_json(path / COMMIT, Commit), plan_facts(plan)
    return CheckpointState(
        path=path,
        step=index.step,
        world=index.world,
        bytes=sum(file.bytes for file in commit.files.values()),
        plan_label=str(index.run.get("plan.label", "unknown")),
        by_this_plan=index.run.get("plan.digest") == now["plan.digest"],
        facts=index.run,
    )


def _held(lock: Path) -> bool:
    """Whether a running process holds the lock of a run folder."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False
