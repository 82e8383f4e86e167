"""Committed checkpoints on disk: their files, the proof that they are whole, and how they are found.

    CHECKPOINTS/step-00000120/shard-00003.safetensors   tensors of rank 3
                              index.json                what lies where, plain values, whose run it is
                              COMMIT                    size and SHA-256 of every other file

All of it is written in `step-00000120.tmp`, COMMIT last, and appears by one rename. A step can be resumed
from exactly if its COMMIT verifies. A step whose COMMIT is missing or does not verify (an incomplete copy, a
damaged disk) is refused by name and set aside; only folders whose name ends in `.tmp` are deleted unasked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from planner.foundation.decode import decode_json, encode, load_json, read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen

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
