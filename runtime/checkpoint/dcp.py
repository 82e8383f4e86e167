"""Reads a checkpoint for torch.distributed.checkpoint, of every box the needed slice alone.

Writes a checkpoint for torch.distributed.checkpoint: `runtime.checkpoint.checkpoint` says into what
files.

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
import io
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from planner.foundation.decode import to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from runtime.checkpoint.store import (
    CHECKPOINT_SCHEMA,
    COMMIT,
    INDEX,
    CheckpointIndex,
    Chunk,
    Commit,
    FileDigest,
    StoredTensor,
    Value,
    committed_folders,
    digest_file,
    index_text,
    load_index,
    remove_step,
    step_folder,
)
from runtime.launch.process_group import own_rank

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


class JsonLoadPlanner(DefaultLoadPlanner):
    """DCP's planner over flat state, with plain values from JSON."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return replace(plan, items=[item for item in plan.items if _wanted(item)])

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = json.loads(value.getvalue())


def _wanted(item: ReadItem) -> bool:
    return item.type is LoadItemType.BYTE_IO or math.prod(item.lengths) > 0


class SafetensorsReader(StorageReader):
    """Reads a committed step, of every box the needed slice alone. `read_bytes` counts them."""

    def __init__(self, path: Path, index: CheckpointIndex | None = None) -> None:
        self.path = path
        self.index = index or load_index(path)
        self.read_bytes = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is made for one step."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing to do: files are opened as they are met."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return (Path(checkpoint_id) / COMMIT).is_file()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index, as DCP's planner wants it."""
        stored: dict[str, Any] = {name: BytesStorageMetadata() for name in self.index.values}
        for name, tensor in self.index.tensors.items():
            stored[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, tensor.dtype)),
                size=torch.Size(tensor.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
                    for chunk in tensor.chunks
                ],
            )
        return Metadata(stored)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = {}
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(json.dumps(self.index.values[name]).encode()))
                continue
            chunk = self._chunk(name, item)
            by_file.setdefault(chunk.file, []).append((item, chunk))
        for file, items in by_file.items():
            with safe_open(self.path / file, framework="pt") as source:
                for item, chunk in items:
                    self._copy(source.get_slice(f"{item.storage_index.fqn}@{chunk.key}"), item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, name: str, item: ReadItem) -> Chunk:
        offset = tuple(item.storage_index.offset or ())
        chunks = self.index.tensors[name].chunks
        hint = item.storage_index.index
        if hint is not None and chunks[hint].offset == offset:
            return chunks[hint]
        return next(chunk for chunk in chunks if chunk.offset == offset)

    def _copy(self, source: Any, item: ReadItem, planner: LoadPlanner) -> None:
        cut = tuple(
            slice(begin, begin + size) for begin, size in zip(item.storage_offsets, item.lengths, strict=True)
        )
        piece: Tensor = source[cut]
        self.read_bytes += piece.nbytes
        target = planner.resolve_tensor(item)
        with torch.no_grad():
            target.copy_(piece)
        planner.commit_tensor(item, target)


class JsonSavePlanner(DefaultSavePlanner):
    """DCP's planner over flat state, with plain values as JSON and without boxes of no elements.

    Where a tensor has fewer rows than ranks, some hold an empty box that begins where another's full one
    does, and DCP tells boxes apart by their beginnings.

    `remembered` names plans that are kept from one save to the next: while no rank's boxes change, none is
    sent again. For 70B parameters with AdamW over 64 ranks (140,000 boxes), the first rank was busy with
    them for 25 s (measured on one core): once a launch instead of at every save.
    """

    def __init__(self, remembered: str | None = None) -> None:
        super().__init__(
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
            enable_plan_caching=remembered is not None,
        )
        if remembered is not None:
            self._cached_plans_key = remembered

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return replace(plan, items=[item for item in plan.items if _elements(item)])

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(json.dumps(object).encode())
        return object


def _elements(item: WriteItem) -> int:
    """Elements of the box that an item writes; 1 for a plain value."""
    return 1 if item.tensor_data is None else math.prod(item.tensor_data.chunk.sizes)


@dataclass(frozen=True, slots=True)
class _Written:
    """What one rank has written: its file, if it had tensors to write, and values for the index."""

    digest: FileDigest | None
    values: dict[str, Value]


class SafetensorsWriter(StorageWriter):
    """Writes one step aside, verifies it, and publishes it by a rename, then drops all but the newest `keep`.

    With `staged`, each rank first copies what it has to write into host memory and then calls it: from
    there on the state may change. Without, tensors are taken one by one as they are written.
    """

    def __init__(
        self,
        folder: Path,
        planner: JsonSavePlanner,
        *,
        step: int,
        run: dict[str, Value],
        keep: int,
        staged: Callable[[], None] | None = None,
    ) -> None:
        assert keep >= 2, keep
        self.final = step_folder(folder, step)
        self.temporary = self.final.with_name(self.final.name + ".tmp")
        self.planner = planner
        self.step, self.run, self.keep, self.staged = step, run, keep, staged

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is made for one step."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the folder is made once all ranks have a plan."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # never chosen by a path alone: a step has a number and belongs to a run

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before any other goes on: an empty folder aside."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file, reads it back and compares."""
        values = {
            item.index.fqn: _value(item, planner) for item in plan.items if item.type is WriteItemType.BYTE_IO
        }
        entries = [_entry(item, planner) for item in plan.items if item.type is not WriteItemType.BYTE_IO]
        if self.staged is not None:
            entries = _stage(entries)
            self.staged()
        name = shard_file(own_rank())
        written = _Written(self._write(name, entries) if entries else None, values)
        # One result a rank: where each box is, the first rank knows from the plan.
        result = WriteResult(MetadataIndex(name), sum(entry.bytes for entry in entries), written)
        done: Future[list[WriteResult]] = Future()
        done.set_result([result])
        return done

    def _write(self, name: str, entries: Sequence[Entry]) -> FileDigest:
        digest = write_safetensors(self.temporary / name, entries)
        _forget_cached(self.temporary / name)
        if digest_file(self.temporary / name) != digest:
            raise InputError(
                Problem(
                    where=str(self.temporary / name),
                    fault="reads back otherwise than it was written.",
                    fix="check the disk or file system, or choose another --run-dir",
                )
            )
        return digest

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once every file of every rank is whole on the disk."""
        written: list[_Written] = [result.storage_data for of_rank in results for result in of_rank]
        index = self._index(metadata, written)
        write_atomic(self.temporary / INDEX, index_text(index))
        files = {shard_file(rank): one.digest for rank, one in enumerate(written) if one.digest is not None}
        files[INDEX] = digest_file(self.temporary / INDEX)
        commit = Commit(schema_version=CHECKPOINT_SCHEMA, step=self.step, files=files)
        write_atomic(self.temporary / COMMIT, to_json(commit))
        self._publish()

    def _publish(self) -> None:
        _sync(self.temporary)
        if self.final.exists():
            remove_step(self.final)
        self.temporary.rename(self.final)
        _sync(self.final.parent)
        for old in committed_folders(self.final.parent)[self.keep :]:
            remove_step(old)

    def _index(self, metadata: Metadata, written: list[_Written]) -> CheckpointIndex:
        files = {
            (item.index.fqn, tuple(item.index.offset or ())): shard_file(rank)
            for rank, plan in enumerate(self.planner.global_plan)
            for item in plan.items
        }
        values = {name: value for one in written for name, value in one.values.items()}
        tensors = {
            name: _stored(name, stored, files)
            for name, stored in sorted(metadata.state_dict_metadata.items())
            if isinstance(stored, TensorStorageMetadata)
        }
        return CheckpointIndex(
            schema_version=CHECKPOINT_SCHEMA,
            step=self.step,
            world=len(written),
            run=self.run,
            values=dict(sorted(values.items())),
            tensors=tensors,
        )


def shard_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"shard-{rank:05d}.safetensors"


def _value(item: WriteItem, planner: SavePlanner) -> Value:
    text = planner.resolve_data(item)
    assert isinstance(text, io.BytesIO)
    value: Value = json.loads(text.getvalue())
    return value


def _entry(item: WriteItem, planner: SavePlanner) -> Entry:
    about = item.tensor_data
    assert about is not None

    def fetch() -> Tensor:
        found = planner.resolve_data(item)
        assert isinstance(found, Tensor)
        return found

    chunk = Chunk(file="", offset=tuple(about.chunk.offsets), shape=tuple(about.chunk.sizes))
    return Entry(
        name=f"{item.index.fqn}@{chunk.key}",
        dtype=about.properties.dtype,
        shape=chunk.shape,
        fetch=fetch,
    )


def _stage(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of copies in host memory; each copy goes when it has been written."""
    copies: dict[str, Tensor] = {}
    for entry in entries:
        source = entry.fetch().detach()
        copies[entry.name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        copies[entry.name].copy_(source, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return [replace(entry, fetch=partial(copies.pop, entry.name)) for entry in entries]


def _stored(
    name: str, about: TensorStorageMetadata, files: dict[tuple[str, tuple[int, ...]], str]
) -> StoredTensor:
    chunks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in about.chunks)
    return StoredTensor(
        dtype=str(about.properties.dtype).removeprefix("torch."),
        shape=tuple(about.size),
        chunks=tuple(Chunk(file=files[name, offset], offset=offset, shape=shape) for offset, shape in chunks),
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _forget_cached(path: Path) -> None:
    """Asks for the next read of a file to come from the disk, where the system knows how."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
