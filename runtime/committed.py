"""Committed checkpoints on disk: their files, the proof that they are whole, and how they are found.

    CHECKPOINTS/step-00000120/shard-00003.safetensors   tensors of rank 3
                              index.json                what lies where, plain values, whose run it is
                              COMMIT                    size and SHA-256 of every other file

All of it is written in `step-00000120.tmp`, COMMIT last, and appears by one rename. A step exists exactly if
its COMMIT verifies.
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

from planner.codec import decode_json, encode, load_json, noun, read_text
from planner.errors import InputError, Problem

CHECKPOINT_SCHEMA = 1
COMMIT = "COMMIT"
INDEX = "index.json"
DAMAGED = ".damaged"
"""Suffix of the folder of a step that did not verify when a run went on from an older one."""
BLOCK_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 32
"""About 75 bytes a box: 70B parameters with AdamW, sharded over 512 ranks, need 110 MB."""
MOST_READERS = 8
"""Files that are hashed at once; SHA-256 lets go of the interpreter."""
Value = bool | int | float | str | None


@noun
class Chunk:
    """A box of a tensor: which file holds it, where it begins in the whole tensor, its shape."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """The suffix of the tensor's name in the file."""
        return ",".join(map(str, self.offset))


@noun
class StoredTensor:
    """A whole tensor, in chunks that cover it once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@noun
class CheckpointIndex:
    """Everything of a checkpoint that is not a tensor's content. `run` says whose run it is."""

    schema_version: int
    step: int
    world: int
    run: dict[str, Value]
    values: dict[str, Value]
    tensors: dict[str, StoredTensor]


@noun
class FileDigest:
    """Size and content of a file."""

    bytes: int
    sha256: str


@noun
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
    """Takes the commit away first, so that a removal cut short leaves no step that looks whole."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def committed_folders(folder: Path) -> list[Path]:
    """Folders of steps that carry a COMMIT, newest first. Their content is not verified yet."""
    found = [path.parent for path in folder.glob(f"step-*/{COMMIT}") if not path.parent.suffix]
    return sorted(found, key=lambda path: path.name, reverse=True)


def sweep(folder: Path) -> None:
    """Removes what a save that was cut short left behind: `*.tmp`, and steps without COMMIT."""
    for path in folder.glob("step-*"):
        if path.suffix != DAMAGED and (path.suffix == ".tmp" or not (path / COMMIT).exists()):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Takes a damaged step out of the count of those that are kept; nothing of it is deleted."""
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def verify(path: Path) -> list[Problem]:
    """What is wrong with a committed step: nothing, or each file that differs from its COMMIT."""
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
    """The newest step that verifies (if there is one), and which newer ones were passed over and why."""

    path: Path | None
    refused: tuple[str, ...]
    damaged: tuple[Path, ...] = ()


def find_checkpoint(folder: Path) -> Found:
    """The newest whole step below `folder`; every file is read to verify it."""
    refused: list[str] = []
    damaged: list[Path] = []
    for path in committed_folders(folder):
        problems = verify(path)
        if not problems:
            return Found(path, tuple(refused), tuple(damaged))
        refused.extend(map(str, problems))
        damaged.append(path)
    return Found(None, tuple(refused), tuple(damaged))
