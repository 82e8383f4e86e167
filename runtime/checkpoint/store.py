"""Committed checkpoints on disk: their files, the commit that proves them whole, and whose run they are.

    CHECKPOINTS/step-00000120/shard-00003.safetensors   tensors that rank 3 wrote
                              index.json                where tensors lie, plain values, identity of the run
                              COMMIT                    size and SHA-256 of every other file

All files are written into `step-00000120.tmp`, COMMIT last; one rename publishes the step (`publish_step`).
A step can be resumed from exactly if its COMMIT verifies. A step whose COMMIT is missing or does not verify
(an incomplete copy, a damaged disk) is reported by name and set aside. Only folders whose name ends in `.tmp`
are deleted without being asked. This module does not need torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.foundation.decode import (
    decode_json,
    digest,
    encode,
    load_json,
    load_json_object,
    read_text,
    to_json,
    write_atomic,
)
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.run_files import CHECKPOINTS, LOCK, OPTIONS
from planner.strategy.plan import Plan

CHECKPOINT_SCHEMA = 1
COMMIT = "COMMIT"
INDEX = "index.json"
DAMAGED = ".damaged"
"""Suffix of a step that did not verify when a run resumed from an older one."""
UNFINISHED = ".tmp"
"""Suffix of a step that is being written or removed; nothing resumes from it."""
MAX_INDEX_BYTES = 1 << 32
"""Largest index that is read. 70B parameters with AdamW on 512 ranks need 110 MB, about 75 bytes a box."""
MAX_HASH_THREADS = 8
"""Files that are hashed at the same time; SHA-256 releases the interpreter lock."""
Value = bool | int | float | str | None


@frozen
class Chunk:
    """A box of a tensor: the file that holds it, its offset in the whole tensor, and its shape."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """The suffix of the tensor's name in the file."""
        return ",".join(map(str, self.offset))


@frozen
class StoredTensor:
    """A whole tensor as chunks that cover every element once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@frozen
class CheckpointIndex:
    """index.json: everything of a checkpoint but the tensors' contents.

    `run` is the identity of the run (see `plan_identity`), `values` the plain values of the state by name.
    """

    schema_version: int
    step: int
    world: int
    run: dict[str, Value]
    values: dict[str, Value]
    tensors: dict[str, StoredTensor]


@frozen
class FileDigest:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@frozen
class Commit:
    """COMMIT: the digest of every other file in the folder of a step."""

    schema_version: int
    step: int
    files: dict[str, FileDigest]


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def unfinished_folder(folder: Path, step: int) -> Path:
    """The folder in which the checkpoint of `step` is written before it is published."""
    return folder / f"{step_folder(folder, step).name}{UNFINISHED}"


def publish_step(
    folder: Path, index: CheckpointIndex, shards: Mapping[str, FileDigest], *, keep: int
) -> None:
    """Commit the files in `unfinished_folder`, publish the step, and remove all but the newest `keep` steps.

    `shards` are the digests of the tensor files, which must be on the disk. The index is written, then
    COMMIT, then the folder is synced and renamed: a crash at any point leaves older steps as they were.
    """
    temporary, final = unfinished_folder(folder, index.step), step_folder(folder, index.step)
    write_atomic(temporary / INDEX, index_text(index))
    files = {**shards, INDEX: digest_file(temporary / INDEX)}
    commit = Commit(schema_version=CHECKPOINT_SCHEMA, step=index.step, files=files)
    write_atomic(temporary / COMMIT, to_json(commit))
    _sync_folder(temporary)
    if final.exists():
        remove_step(final)
    temporary.rename(final)
    _sync_folder(folder)
    for old in committed_folders(folder)[keep:]:
        remove_step(old)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_index(path: Path) -> CheckpointIndex:
    """Read the index of a step."""
    text = read_text(path / INDEX, MAX_INDEX_BYTES)
    return decode_json(CheckpointIndex, text, source=str(path / INDEX))


def index_text(index: CheckpointIndex) -> str:
    """An index as JSON without spaces: it has a line for every box of every tensor."""
    return json.dumps(encode(index), separators=(",", ":"), allow_nan=False) + "\n"


def digest_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(bytes=file.tell(), sha256=sha256)


def remove_step(folder: Path) -> None:
    """Delete a step. Renaming it first keeps an interrupted removal from leaving what looks like a step."""
    removed = folder.with_name(f"{folder.name}.removed{UNFINISHED}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Delete `step-*.tmp`, the folders of interrupted saves and removals, and nothing else."""
    for path in folder.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a step that cannot be resumed from, so that it no longer counts as a step. Nothing is deleted.

    `step-00000120` becomes `step-00000120.damaged`, or `step-00000120.2.damaged` if that name is taken.
    """
    names = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(2)))
    free = (path.with_name(name + DAMAGED) for name in names)
    return path.rename(next(aside for aside in free if not aside.exists()))


def step_folders(folder: Path) -> list[Path]:
    """Folders of all saved steps, newest first, including those that cannot be resumed from."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and not path.suffix]
    return sorted(found, key=lambda path: path.name, reverse=True)


def committed_folders(folder: Path) -> list[Path]:
    """Folders of steps with a COMMIT, newest first. Their contents are not verified."""
    return [path for path in step_folders(folder) if (path / COMMIT).exists()]


def verify(path: Path) -> list[Problem]:
    """List the faults of a saved step: a missing or unreadable COMMIT, and files that differ from it."""
    if not (path / COMMIT).exists():
        return [
            Problem(
                where=str(path / COMMIT),
                fault="is missing, so nothing proves that this step is whole.",
                fix="if the folder is an incomplete copy, copy the file from where the step was saved",
            )
        ]
    try:
        commit = load_json(path / COMMIT, Commit)
    except InputError as error:
        return list(error.problems)
    with ThreadPoolExecutor(min(MAX_HASH_THREADS, os.cpu_count() or 1)) as pool:
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
class FoundCheckpoint:
    """The newest step that verifies, if any.

    `refused` are the faults of newer steps in words, `damaged` the folders of these steps.
    """

    path: Path | None
    refused: tuple[str, ...]
    damaged: tuple[Path, ...] = ()


def find_checkpoint(folder: Path) -> FoundCheckpoint:
    """Find the newest step below `folder` that verifies; every file of the candidates is read."""
    refused: list[str] = []
    damaged: list[Path] = []
    for path in step_folders(folder):
        problems = verify(path)
        if not problems:
            return FoundCheckpoint(path, tuple(refused), tuple(damaged))
        refused.extend(map(str, problems))
        damaged.append(path)
    return FoundCheckpoint(None, tuple(refused), tuple(damaged))


def plan_identity(plan: Plan) -> dict[str, Value]:
    """Facts of a plan that must not change when a run resumes: its model and its workload, by path.

    The model's name and sources and the workload's number of tokens may change.
    """
    model = dataclasses.replace(plan.model, name="", sources=())
    workload = dataclasses.replace(plan.workload, tokens=None)
    return flatten({"model": encode(model), "workload": encode(workload)})


def plan_facts(plan: Plan) -> dict[str, Value]:
    """The plan that a checkpoint was made by. A run may resume under another plan of the same identity."""
    return {"plan.label": plan.strategy.degrees.label(), "plan.digest": digest(plan.strategy)}


def flatten(value: Any, path: str = "") -> dict[str, Value]:
    """Nested plain data as values by dotted path."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: str(value) if isinstance(value, str) else value}
    found: dict[str, Value] = {}
    for key, item in parts:
        found |= flatten(item, f"{path}.{key}".strip("."))
    return found


def differing(own: Mapping[str, Value], other: Mapping[str, Value]) -> Iterator[tuple[str, str, str]]:
    """The facts in which two descriptions differ: name, own value, other value; a missing one is 'absent'."""
    for name in dict.fromkeys((*own, *other)):
        mine, theirs = own.get(name, "absent"), other.get(name, "absent")
        if mine != theirs:
            yield name, repr(mine), repr(theirs)


def check_identity(path: Path, saved: Mapping[str, Value], own: Mapping[str, Value]) -> None:
    """Raise InputError with every fact in which a checkpoint and this run differ."""
    problems = [
        Problem(
            where=f"{path}: {name}",
            fault=f"is {theirs} in the checkpoint, {mine} now.",
            fix="resume with the model, workload, data and seed of the run, or start a new run",
        )
        for name, mine, theirs in differing(own, saved)
        if not name.startswith("plan.")
    ]
    if problems:
        raise InputError(*problems)


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """A whole checkpoint: its step, the ranks that wrote it, its size, and the plan it was made by."""

    path: Path
    step: int
    world: int
    bytes: int
    plan_label: str
    by_this_plan: bool
    facts: dict[str, Value]


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands: its newest whole checkpoint, if any, and the faults of newer ones.

    `options` are the training options of the latest launch, None if they were not written. `is_running` is
    true if a process holds the lock of the run's folder.
    """

    checkpoint: CheckpointState | None
    refused: tuple[str, ...]
    options: dict[str, Any] | None
    is_running: bool

    @property
    def step(self) -> int:
        """The step that the run resumes from."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def read_run_state(run_dir: Path, plan: Plan) -> RunState:
    """Read where the run of `plan` stands. The newest checkpoint is verified; nothing is changed.

    Raises InputError if the checkpoint is of another model or workload than the plan.
    """
    found = find_checkpoint(run_dir / CHECKPOINTS)
    options = run_dir / OPTIONS
    return RunState(
        checkpoint=None if found.path is None else _checkpoint_state(found.path, plan),
        refused=found.refused,
        options=load_json_object(options) if options.exists() else None,
        is_running=_is_locked(run_dir / LOCK),
    )


def _checkpoint_state(path: Path, plan: Plan) -> CheckpointState:
    index = load_index(path)
    of_plan = {name: value for name, value in index.run.items() if name.startswith(("model.", "workload."))}
    check_identity(path, of_plan, plan_identity(plan))
    commit = load_json(path / COMMIT, Commit)
    return CheckpointState(
        path=path,
        step=index.step,
        world=index.world,
        bytes=sum(file.bytes for file in commit.files.values()),
        plan_label=str(index.run.get("plan.label", "unknown")),
        by_this_plan=index.run.get("plan.digest") == plan_facts(plan)["plan.digest"],
        facts=index.run,
    )


def _is_locked(lock: Path) -> bool:
    """True if a running process holds the lock of a run folder."""
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
