"""Reader and writer of checkpoints for torch.distributed.checkpoint (DCP).

DCP's planner decides who writes which box of which tensor and what a rank of another layout has to read.
DCP's own storage pickles metadata and plain values into files. This one keeps

    tensors          shard-RANK.safetensors, each box under NAME@OFFSET
    plain values     index.json
    metadata         index.json: global shape and type of each tensor; offset, shape and file of its boxes

so that nothing that is read can run code. `store` publishes what is written here.

A safetensors file is written as a stream, one tensor after another, hashed on its way to the disk:

    8 bytes    N, the length of the header, little endian
    N bytes    JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, padded with spaces
    the rest   the tensors' bytes in C order, little endian; offsets count from here

The safetensors library takes all tensors in host memory at once, and older versions copy them once more. In
a stream, a tensor has to be there only while it is written. Wide types come first, so that every tensor lies
at a multiple of its element's size, as memory maps need it.
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

from planner.foundation.errors import InputError
from runtime.checkpoint.store import (
    CHECKPOINT_SCHEMA,
    COMMIT,
    CheckpointIndex,
    Chunk,
    FileDigest,
    StoredTensor,
    Value,
    digest_file,
    load_index,
    publish_step,
    unfinished_folder,
)
from runtime.launch.process_group import own_rank

ALIGNMENT_BYTES = 8
_SAFETENSORS_TYPES = {
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
class TensorEntry:
    """A tensor to be written: its name in the file, its type and shape, and a function that fetches it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Iterable[TensorEntry]) -> FileDigest:
    """Write a safetensors file, wait until the disk has it, and return the digest of the data handed over.

    Each entry is fetched when its turn comes and dropped after it. Raises OSError if the disk is full.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for block in itertools.chain([_header(ordered)], map(_content, ordered)):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return FileDigest(bytes=file.tell(), sha256=digest.hexdigest())
    except OSError as error:  # `write` does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _header(entries: Iterable[TensorEntry]) -> bytes:
    begin, table = 0, {}
    for entry in entries:
        end = begin + entry.bytes
        table[entry.name] = {
            "dtype": _SAFETENSORS_TYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def _content(entry: TensorEntry) -> Any:
    tensor = entry.fetch().detach().cpu().contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), (entry.name, tensor.shape)
    return tensor.reshape(-1).view(torch.uint8).numpy()


class JsonLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner for a flat state whose plain values are JSON."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        items = [i for i in plan.items if i.type is LoadItemType.BYTE_IO or math.prod(i.lengths) > 0]
        return replace(plan, items=items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = json.loads(value.getvalue())


class SafetensorsReader(StorageReader):
    """Reads a committed step, of every box only the needed slice. `read_bytes` counts the bytes read."""

    def __init__(self, path: Path, index: CheckpointIndex | None = None) -> None:
        self.path = path
        self.index = index or load_index(path)
        self.read_bytes = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is made for one step: there is nothing to reset."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """There is nothing to set up: files are opened when they are needed."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return (Path(checkpoint_id) / COMMIT).is_file()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index as DCP's metadata."""
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
        return _completed(None)

    def _chunk(self, name: str, item: ReadItem) -> Chunk:
        offset = tuple(item.storage_index.offset or ())
        chunks = self.index.tensors[name].chunks
        hint = item.storage_index.index
        if hint is not None and chunks[hint].offset == offset:
            return chunks[hint]
        return next(chunk for chunk in chunks if chunk.offset == offset)

    def _copy(self, source: Any, item: ReadItem, planner: LoadPlanner) -> None:
        box = tuple(
            slice(begin, begin + size) for begin, size in zip(item.storage_offsets, item.lengths, strict=True)
        )
        part: Tensor = source[box]
        self.read_bytes += part.nbytes
        target = planner.resolve_tensor(item)
        with torch.no_grad():
            target.copy_(part)
        planner.commit_tensor(item, target)


def _completed(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


class JsonSavePlanner(DefaultSavePlanner):
    """DCP's save planner for a flat state, with plain values as JSON and without empty boxes.

    A tensor with fewer rows than ranks leaves some ranks an empty box that begins where another rank's full
    box does, and DCP tells boxes apart by their offsets.

    With `plan_cache_key`, plans are cached from one save to the next and sent again only when a rank's boxes
    change. For 70B parameters with AdamW over 64 ranks (140,000 boxes), planning keeps the first rank busy
    for 25 s (measured on one core): once a launch instead of at every save.
    """

    def __init__(self, plan_cache_key: str | None = None) -> None:
        super().__init__(
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
            enable_plan_caching=plan_cache_key is not None,
        )
        if plan_cache_key is not None:
            self._cached_plans_key = plan_cache_key

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [i for i in plan.items if i.tensor_data is None or math.prod(i.tensor_data.chunk.sizes) > 0]
        return replace(plan, items=items)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(json.dumps(object).encode())
        return object


@dataclass(frozen=True, slots=True)
class _RankFile:
    """What one rank has written: the digest of its file, None without tensors, and its plain values."""

    digest: FileDigest | None
    values: dict[str, Value]


class SafetensorsWriter(StorageWriter):
    """Writes one step into its unfinished folder, reads it back, and publishes it.

    With `staged`, each rank first copies its tensors into host memory and then calls `staged`: from there on
    the state may change. Without it, tensors are fetched one by one as they are written.
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
        self.folder, self.temporary = folder, unfinished_folder(folder, step)
        self.planner = planner
        self.step, self.run, self.keep, self.staged = step, run, keep, staged

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is made for one step: there is nothing to reset."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """There is nothing to set up: the folder is made once all ranks have a plan."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # a step is never chosen by a path: it has a number and belongs to a run

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before any other rank writes: make the unfinished folder, empty."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, read it back, and compare."""
        values = {
            item.index.fqn: _value(item, planner) for item in plan.items if item.type is WriteItemType.BYTE_IO
        }
        entries = [_entry(item, planner) for item in plan.items if item.type is not WriteItemType.BYTE_IO]
        if self.staged is not None:
            entries = _stage(entries)
            self.staged()
        name = shard_file(own_rank())
        written = _RankFile(self._write(self.temporary / name, entries) if entries else None, values)
        # One result a rank: the first rank knows from the plan where each box is.
        result = WriteResult(MetadataIndex(name), sum(entry.bytes for entry in entries), written)
        return _completed([result])

    def _write(self, path: Path, entries: Sequence[TensorEntry]) -> FileDigest:
        digest = write_safetensors(path, entries)
        _drop_from_page_cache(path)
        if digest_file(path) != digest:
            raise InputError.at(
                path,
                "reads back different from what was written.",
                fix="check the disk or file system, or choose another --run-dir",
            )
        return digest

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once the files of all ranks are on the disk: publish the step."""
        written: list[_RankFile] = [result.storage_data for of_rank in results for result in of_rank]
        shards = {shard_file(rank): one.digest for rank, one in enumerate(written) if one.digest is not None}
        publish_step(self.folder, self._index(metadata, written), shards, keep=self.keep)

    def _index(self, metadata: Metadata, written: list[_RankFile]) -> CheckpointIndex:
        files = {
            (item.index.fqn, tuple(item.index.offset or ())): shard_file(rank)
            for rank, plan in enumerate(self.planner.global_plan)
            for item in plan.items
        }
        values = {name: value for one in written for name, value in one.values.items()}
        tensors = {
            name: _stored_tensor(name, stored, files)
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
    """Name of the file that a rank writes."""
    return f"shard-{rank:05d}.safetensors"


def _value(item: WriteItem, planner: SavePlanner) -> Value:
    text = planner.resolve_data(item)
    assert isinstance(text, io.BytesIO)
    value: Value = json.loads(text.getvalue())
    return value


def _entry(item: WriteItem, planner: SavePlanner) -> TensorEntry:
    data = item.tensor_data
    assert data is not None

    def fetch() -> Tensor:
        found = planner.resolve_data(item)
        assert isinstance(found, Tensor)
        return found

    chunk = Chunk(file="", offset=tuple(data.chunk.offsets), shape=tuple(data.chunk.sizes))
    name = f"{item.index.fqn}@{chunk.key}"
    return TensorEntry(name=name, dtype=data.properties.dtype, shape=chunk.shape, fetch=fetch)


def _stage(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Copy all tensors to host memory; a copy is released when it has been written."""
    copies: dict[str, Tensor] = {}
    for entry in entries:
        source = entry.fetch().detach()
        copies[entry.name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        copies[entry.name].copy_(source, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return [replace(entry, fetch=partial(copies.pop, entry.name)) for entry in entries]


def _stored_tensor(
    name: str, stored: TensorStorageMetadata, files: dict[tuple[str, tuple[int, ...]], str]
) -> StoredTensor:
    chunks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks)
    return StoredTensor(
        dtype=str(stored.properties.dtype).removeprefix("torch."),
        shape=tuple(stored.size),
        chunks=tuple(Chunk(file=files[name, offset], offset=offset, shape=shape) for offset, shape in chunks),
    )


def _drop_from_page_cache(path: Path) -> None:
    """Make the next read of a file come from the disk, where the system can do that."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
