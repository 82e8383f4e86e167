"""Writes a checkpoint for torch.distributed.checkpoint: `runtime.checkpoint` says into what files."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from planner.codec import to_json, write_atomic
from planner.errors import InputError, Problem
from runtime.committed import (
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
    remove_step,
    step_folder,
)
from runtime.exchange import own_rank
from runtime.safetensors_file import Entry, write_safetensors


class JsonSavePlanner(DefaultSavePlanner):
    """DCP's planner over flat state, with plain values as JSON and without boxes of no elements.

    Where a tensor has fewer rows than ranks, some hold an empty box that begins where another's full one
    does, and DCP tells boxes apart by their beginnings.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

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
class _Place:
    """Where a box was written, with the digest of its whole file."""

    file: str
    digest: FileDigest


@dataclass(frozen=True, slots=True)
class _Plain:
    """A value that belongs into the index."""

    value: Value


class SafetensorsWriter(StorageWriter):
    """Writes one step aside, verifies it, and publishes it by a rename, then drops all but the newest `keep`.

    With `staged`, each rank first copies what it has to write into host memory and then calls it: from
    there on the state may change. Without, tensors are taken one by one as they are written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        run: dict[str, Value],
        keep: int,
        staged: Callable[[], None] | None = None,
    ) -> None:
        assert keep >= 2, keep
        self.final = step_folder(folder, step)
        self.temporary = self.final.with_name(self.final.name + ".tmp")
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
        tensors = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO]
        results = [
            WriteResult(item.index, 0, _plain(item, planner))
            for item in plan.items
            if item.type is WriteItemType.BYTE_IO
        ]
        entries = [_entry(item, planner) for item in tensors]
        if self.staged is not None:
            entries = _stage(entries)
            self.staged()
        if entries:
            place = self._write(f"shard-{own_rank():05d}.safetensors", entries)
            results += [
                WriteResult(item.index, entry.bytes, place)
                for item, entry in zip(tensors, entries, strict=True)
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, name: str, entries: Sequence[Entry]) -> _Place:
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
        return _Place(name, digest)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once every file of every rank is whole on the disk."""
        written = list(itertools.chain.from_iterable(results))
        places = [result.storage_data for result in written if isinstance(result.storage_data, _Place)]
        index = self._index(metadata, written, world=len(results))
        write_atomic(self.temporary / INDEX, index_text(index))
        files = {place.file: place.digest for place in places}
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

    def _index(self, metadata: Metadata, written: list[WriteResult], *, world: int) -> CheckpointIndex:
        files: dict[tuple[str, tuple[int, ...]], str] = {}
        values: dict[str, Value] = {}
        for result in written:
            if isinstance(result.storage_data, _Plain):
                values[result.index.fqn] = result.storage_data.value
            else:
                files[result.index.fqn, tuple(result.index.offset or ())] = result.storage_data.file
        tensors = {
            name: _stored(name, stored, files)
            for name, stored in sorted(metadata.state_dict_metadata.items())
            if isinstance(stored, TensorStorageMetadata)
        }
        return CheckpointIndex(
            schema_version=CHECKPOINT_SCHEMA,
            step=self.step,
            world=world,
            run=self.run,
            values=dict(sorted(values.items())),
            tensors=tensors,
        )


def _plain(item: WriteItem, planner: SavePlanner) -> _Plain:
    text = planner.resolve_data(item)
    assert isinstance(text, io.BytesIO)
    return _Plain(json.loads(text.getvalue()))


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
