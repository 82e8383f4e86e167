"""run-ID.wandb: what W&B keeps of a run on disk, its history, settings and machine.

Blocks of 32 KiB, the first with a header of 7 bytes (":W&B", 0xbee1 and the version 0). A record lies in
one piece or several, no piece across blocks; each has its CRC-32, its length and its kind (LevelDB's log
format with zlib's checksum). A record is a protobuf message of wandb_internal.proto (github.com/wandb/wandb,
MIT), of which four fields are read here. Offline runs of wandb 0.31 leave no other file with these.

What a killed run did not finish is left out, and all behind a piece that is not what was written.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from planner.foundation.errors import InputError, Problem

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32 * 1024
PIECE = struct.Struct("<IHB")
"""A piece's checksum, length and kind."""
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4

HISTORY, CONFIG, RUN, ENVIRONMENT = 2, 5, 17, 26
"""Fields of a Record."""
ITEM, KEY, NESTED_KEY, VALUE_JSON = 1, 1, 2, 16
"""Fields of HistoryRecord and ConfigRecord, and of their items."""
BOOLEAN, INTEGER, NUMBER, TEXT, JSON = 4, 5, 6, 7, 8
"""Fields of a history's item that has a value of its own kind in place of JSON."""
RUN_CONFIG, GPU_TYPE, GPU_COUNT = 4, 18, 19
"""Fields of RunRecord and EnvironmentRecord."""

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
"""Kinds of values of a protobuf message."""


class WandbFile(NamedTuple):
    """Of a run the figures of each logged step and its settings, both by dotted path; `cut_off` where the
    file ends within a record, or a piece is not what was written."""

    steps: list[dict[str, Any]]
    settings: dict[str, str]
    cut_off: bool


def read_wandb_file(path: Path) -> WandbFile:
    """What the file at `path` tells. Raises InputError where it is none of W&B's, or holds nothing whole."""
    steps: list[dict[str, Any]] = []
    settings: dict[str, str] = {}
    cut_off, records = False, 0
    try:
        with path.open("rb") as file:
            if file.read(len(HEADER)) != HEADER:
                raise InputError(Problem(where=str(path), fault="is no file of a run that W&B wrote."))
            for record in _records(file):
                cut_off = record is None
                if record is not None:
                    records += 1
                    _add(record, steps, settings)
    except OSError as error:
        raise InputError(Problem(where=str(path), fault=f"cannot be read: {error.strerror}.")) from None
    except (ValueError, TypeError, AttributeError, IndexError, struct.error, RecursionError):
        # values of another kind than their field's, lengths beyond the record, texts that are none
        raise InputError(Problem(where=str(path), fault="has records that are none of W&B's.")) from None
    if not records:
        raise InputError(Problem(where=str(path), fault="ends before its first record."))
    return WandbFile(steps, settings, cut_off)


def _records(file: BinaryIO) -> Iterator[bytes | None]:
    """The records of a file; in the end None where one is not whole."""
    parts: list[bytes] = []
    position = len(HEADER)
    while True:
        left = BLOCK - position % BLOCK
        if left < PIECE.size:
            file.read(left)
            position += left
            continue
        head = file.read(PIECE.size)
        if not head and not parts:
            return
        if len(head) < PIECE.size:
            break
        checksum, length, kind = PIECE.unpack(head)
        data = file.read(length)
        if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            break
        if (kind in (WHOLE, FIRST)) == bool(parts):
            break
        parts.append(data)
        position += PIECE.size + length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []
    yield None


def _add(record: bytes, steps: list[dict[str, Any]], settings: dict[str, str]) -> None:
    """Adds what a record tells."""
    for field, value in _fields(record):
        if field == HISTORY:
            steps.append(dict(_items(value)))
        elif field == CONFIG:
            _add_settings(value, settings)
        elif field == RUN:
            for own, config in _fields(value):
                if own == RUN_CONFIG:
                    _add_settings(config, settings)
        elif field == ENVIRONMENT:
            for own, machine in _fields(value):
                if own == GPU_TYPE and machine:
                    settings["gpu"] = machine.decode()
                elif own == GPU_COUNT and machine:
                    settings["gpu_count"] = str(machine)


def _add_settings(config: bytes, settings: dict[str, str]) -> None:
    """Adds the scalars of a ConfigRecord, W&B's own left out."""
    for path, value in _items(config):
        for name, scalar in _scalars(path, value):
            if scalar is not None and name.partition(".")[0] != "_wandb":
                settings[name] = str(scalar).lower() if isinstance(scalar, bool) else str(scalar)


def _scalars(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The scalars within a value, by path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(f"{path}.{key}", inner)
    elif not isinstance(value, list):
        yield path, value


def _items(record: bytes) -> Iterator[tuple[str, Any]]:
    """Path and value of each item of a HistoryRecord, or of each update of a ConfigRecord."""
    for field, item in _fields(record):
        if field != ITEM:
            continue
        path: list[str] = []
        value: Any = None
        for own, raw in _fields(item):
            if own in (KEY, NESTED_KEY):
                path.append(raw.decode())
            elif own in (VALUE_JSON, JSON):
                value = json.loads(raw)
            elif own == TEXT:
                value = raw.decode()
            elif own == BOOLEAN:
                value = bool(raw)
            elif own == INTEGER:  # zigzag
                value = raw >> 1 ^ -(raw & 1)
            elif own == NUMBER:
                (value,) = struct.unpack("<d", raw)
        yield ".".join(path), value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: integers, and bytes for all else."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(message, place)
            yield field, value
            continue
        if kind == BYTES:
            size, place = _varint(message, place)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            size = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"values of kind {kind}")
        if place + size > len(message):
            raise ValueError("a value that is cut off")
        yield field, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the least first, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
