"""Committed checkpoints on disk: their files, the proof that they are whole, and how they are found.

    CHECKPOINTS/step-00000120/shard-00003.safetensors   tensors of rank 3
                              index.json                what lies where, plain values, whose run it is
                              COMMIT                    size and SHA-256 of every other file

All of it is written in `step-00000120.tmp`, COMMIT last, and appears by one rename. A step can be resumed
from exactly if its COMMIT verifies. A step whose COMMIT is missing or does not verify (an incomplete copy, a
damaged disk) is refused by name and set aside; only folders whose name ends in `.tmp` are deleted unasked.

Safetensors files, written as a stream: one tensor after another, hashed on its way to the disk.

    8 bytes    N, the length of the header, little endian
    N bytes    JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, padded with spaces
    the rest   the tensors' bytes in C order, little endian; offsets count from here

The library writes a dictionary of tensors that are all in host memory at once, and older versions copy them
all once more. Here a tensor has to be there only while it is written. Wide types come first, so that every
tensor lies at a multiple of its element's size, as memory maps want it.
Format: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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


ALIGNMENT_BYTES = 8
_OWN_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: its name in the file, what it is, and how to get its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Iterable[Entry]) -> FileDigest:
    """Writes a file and waits until the disk has it; returns size and SHA-256 of what was handed over.

    Each entry is fetched when its turn comes and dropped after it. Raises OSError where the disk is full.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for block in itertools.chain([_header(ordered)], map(_bytes, ordered)):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return FileDigest(bytes=file.tell(), sha256=digest.hexdigest())
    except OSError as error:  # `write` does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _header(entries: Iterable[Entry]) -> bytes:
    begin, table = 0, {}
    for entry in entries:
        end = begin + entry.bytes
        table[entry.name] = {
            "dtype": _OWN_NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def _bytes(entry: Entry) -> Any:
    tensor = entry.fetch().detach().cpu().contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), (entry.name, tensor.shape)
    return tensor.reshape(-1).view(torch.uint8).numpy()
