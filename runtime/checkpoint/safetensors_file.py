"""Safetensors files, written as a stream: one tensor after another, hashed on its way to the disk.

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
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.store import FileDigest

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
