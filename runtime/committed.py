"""Committed checkpoints on disk: their files, the proof that they are whole, and how they are found.

    CHECKPOINTS/step-00000120/shard-00003.safetensors   tensors of rank 3
                              index.json                what lies where, plain values, whose run it is
                              COMMIT                    size and SHA-256 of every other file, written last

A step exists exactly if its COMMIT verifies.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from planner.codec import load_json, noun
from planner.errors import InputError, Problem

CHECKPOINT_SCHEMA = 1
COMMIT = "COMMIT"
INDEX = "index.json"
BLOCK_BYTES = 1 << 20
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
    return load_json(path / INDEX, CheckpointIndex)


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
    found = [path.parent for path in folder.glob(f"step-*/{COMMIT}") if not path.parent.name.endswith(".tmp")]
    return sorted(found, key=lambda path: path.name, reverse=True)


def sweep(folder: Path) -> None:
    """Removes what a save that was cut short left behind: `*.tmp`, and steps without COMMIT."""
    for path in folder.glob("step-*"):
        if path.name.endswith(".tmp") or not (path / COMMIT).exists():
            shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> list[Problem]:
    """What is wrong with a committed step: nothing, or each file that differs from its COMMIT."""
    try:
        commit = load_json(path / COMMIT, Commit)
    except InputError as error:
        return list(error.problems)
    return [problem for name, want in commit.files.items() for problem in _compare(path / name, want)]


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
    """The newest step that verifies (if there is one), and why newer ones were passed over."""

    path: Path | None
    refused: tuple[str, ...]


def find_checkpoint(folder: Path) -> Found:
    """The newest whole step below `folder`; every file is read to verify it."""
    refused: list[str] = []
    for path in committed_folders(folder):
        problems = verify(path)
        if not problems:
            return Found(path, tuple(refused))
        refused.extend(map(str, problems))
    return Found(None, tuple(refused))
