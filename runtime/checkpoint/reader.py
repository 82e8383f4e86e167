"""Reads a checkpoint for torch.distributed.checkpoint, of every box the needed slice alone."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from runtime.checkpoint.store import (
    COMMIT,
    CheckpointIndex,
    Chunk,
    load_index,
)


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
