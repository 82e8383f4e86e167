"""Saving and loading: each rank writes what it holds as safetensors, with global offsets in an index.

A step is written aside as `step-N.tmp`, synced, renamed, and only then committed (`runtime.committed`
describes the files). The index speaks of global shapes and offsets, so a checkpoint can be read by any
other layout of the same model. Nothing is pickled.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
    remove_step,
    step_folder,
)
from runtime.exchange import agree, gather_json, own_rank

State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of a tensor: `local` begins at `offset` of a tensor of shape `shape`."""

    local: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def _leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        elif isinstance(value, (list, tuple)):
            yield from _leaves({str(index): item for index, item in enumerate(value)}, name)
        else:
            yield name, value


def _rebuild(state: Any, replace: Callable[[str, Any], Any], prefix: str = "") -> Any:
    """A copy of nested state in which every leaf is what `replace` makes of its name and old value."""

    def below(key: object, value: Any) -> Any:
        return _rebuild(value, replace, f"{prefix}/{key}" if prefix else str(key))

    if isinstance(state, Mapping):
        return {key: below(key, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(below(index, item) for index, item in enumerate(state))
    return replace(prefix, state)


def _shard(tensor: torch.Tensor | Shard) -> Shard:
    """This rank's box of a tensor. A plain tensor is its own only box."""
    if isinstance(tensor, Shard):
        return tensor
    if not isinstance(tensor, DTensor):
        return Shard(tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape))
    local = tensor.to_local().detach()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == tuple(local.shape), (tensor.placements, shape, local.shape)
    return Shard(local, tuple(offset), tuple(tensor.shape))


def _split(state: State) -> tuple[dict[str, Shard], dict[str, Value]]:
    """The tensors and the plain values of nested state, by path."""
    shards, values = {}, {}
    for name, leaf in _leaves(state):
        if isinstance(leaf, (torch.Tensor, Shard)):
            shards[name] = _shard(leaf)
        else:
            assert leaf is None or isinstance(leaf, (bool, int, float, str)), (name, type(leaf))
            values[name] = leaf
    return shards, values


def save_checkpoint(folder: Path, state: State, *, step: int, run: dict[str, Value], keep: int = 2) -> Path:
    """Writes `state` of all ranks as the checkpoint of `step`, commits it, and drops all but the newest.

    Every rank calls it. `keep` (at least 2) checkpoints stay. Raises InputError on every rank if one of
    them cannot write; then the step does not exist and older ones are untouched.
    """
    assert keep >= 2, keep
    final = step_folder(folder, step)
    temporary = final.with_name(final.name + ".tmp")
    try:
        _save_aside_and_commit(temporary, final, state, step=step, run=run, keep=keep)
    except InputError:
        if own_rank() == 0:  # a full disk gets its room back
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _save_aside_and_commit(
    temporary: Path, final: Path, state: State, *, step: int, run: dict[str, Value], keep: int
) -> None:
    agree(lambda: _fresh(temporary), first_only=True)
    shards, values = _split(state)
    mine, tensors = _divide(shards)
    rank = own_rank()
    report = agree(lambda: _write_shard(temporary, _shard_file(rank), mine))
    files = {_shard_file(r): FileDigest(**found) for r, found in enumerate(report) if found}
    index = CheckpointIndex(
        schema_version=CHECKPOINT_SCHEMA,
        step=step,
        world=len(report),
        run=run,
        values=_merge(gather_json(values)),
        tensors=tensors,
    )
    agree(lambda: _commit(temporary, final, index, files, keep), first_only=True)


def _shard_file(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def _fresh(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _divide(shards: dict[str, Shard]) -> tuple[dict[str, torch.Tensor], dict[str, StoredTensor]]:
    """What this rank has to write, and the whole list of tensors.

    Ranks that hold the same box take turns: box k goes to the holder number k modulo their count.
    """
    held = {
        name: [str(s.local.dtype).removeprefix("torch."), s.shape, s.offset, tuple(s.local.shape)]
        for name, s in shards.items()
        if s.local.numel()
    }
    holders: dict[str, dict[tuple[tuple[int, ...], ...], list[int]]] = {}
    about: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, boxes in enumerate(gather_json(held)):
        for name, (dtype, shape, offset, size) in boxes.items():
            about[name] = (dtype, tuple(shape))
            holders.setdefault(name, {}).setdefault((tuple(offset), tuple(size)), []).append(rank)
    turn = itertools.count()
    mine, tensors = {}, {}
    for name in sorted(about):
        chunks = []
        for (offset, size), ranks in sorted(holders[name].items()):
            owner = ranks[next(turn) % len(ranks)]
            chunk = Chunk(file=_shard_file(owner), offset=offset, shape=size)
            chunks.append(chunk)
            if owner == own_rank():
                mine[f"{name}@{chunk.key}"] = shards[name].local.cpu().contiguous()
        tensors[name] = StoredTensor(dtype=about[name][0], shape=about[name][1], chunks=tuple(chunks))
    return mine, tensors


def _merge(parts: list[dict[str, Value]]) -> dict[str, Value]:
    """Plain values of all ranks by name; ranks that hold the same name must agree."""
    merged: dict[str, Value] = {}
    for part in parts:
        for name, value in part.items():
            assert merged.setdefault(name, value) == value, (name, value, merged[name])
    return merged


def _write_shard(temporary: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    if not tensors:
        return None
    try:
        save_file(tensors, temporary / name)
    except SafetensorError as error:  # it wraps the operating system's error in words
        raise InputError(Problem(where=str(temporary / name), fault=f"cannot be written: {error}.")) from None
    _sync(temporary / name)
    found = digest_file(temporary / name)
    return {"bytes": found.bytes, "sha256": found.sha256}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(
    temporary: Path, final: Path, index: CheckpointIndex, files: dict[str, FileDigest], keep: int
) -> None:
    write_atomic(temporary / INDEX, to_json(index))
    files = {**files, INDEX: digest_file(temporary / INDEX)}
    _sync(temporary)
    if final.exists():
        remove_step(final)
    temporary.rename(final)
    _sync(final.parent)
    commit = Commit(schema_version=CHECKPOINT_SCHEMA, step=index.step, files=files)
    write_atomic(final / COMMIT, to_json(commit))
    _sync(final)
    for old in committed_folders(final.parent)[keep:]:
        remove_step(old)


def load_checkpoint(path: Path, index: CheckpointIndex, state: State) -> dict[str, Any]:
    """`state` with every tensor filled from the checkpoint, in place, and every plain value replaced.

    The layout of `state` may be another one than that which was saved. Raises InputError with every
    tensor that the checkpoint lacks or holds in another shape.
    """
    shards, values = _split(state)
    problems = [*_shape_problems(path, index, shards)]
    problems += [
        Problem(where=str(path), fault=f"lacks {name}.") for name in values if name not in index.values
    ]
    if problems:
        raise InputError(*problems)
    files: dict[str, Any] = {}
    for name, shard in shards.items():
        _fill(path, files, name, index.tensors.get(name), shard)

    def replace(name: str, old: Any) -> Any:
        return old if isinstance(old, (torch.Tensor, Shard)) else index.values[name]

    result: dict[str, Any] = _rebuild(state, replace)
    return result


def _shape_problems(path: Path, index: CheckpointIndex, shards: dict[str, Shard]) -> Iterator[Problem]:
    for name, shard in shards.items():
        stored = index.tensors.get(name)
        if stored is None and shard.local.numel():
            yield Problem(where=str(path), fault=f"lacks the tensor {name}.")
        elif stored is not None and stored.shape != shard.shape:
            yield Problem(
                where=str(path),
                fault=f"holds {name} as {list(stored.shape)}, this model has {list(shard.shape)}.",
            )


def _fill(path: Path, files: dict[str, Any], name: str, stored: StoredTensor | None, shard: Shard) -> None:
    if stored is None:
        return
    filled = 0
    with torch.no_grad():
        for chunk in stored.chunks:
            box = _overlap(chunk, shard)
            if box is None:
                continue
            if chunk.file not in files:
                files[chunk.file] = safe_open(path / chunk.file, framework="pt")
            source = files[chunk.file].get_slice(f"{name}@{chunk.key}")
            target = _cut(shard.local, shard.offset, box)
            target.copy_(_read(source, chunk, box))
            filled += target.numel()
    assert filled == shard.local.numel(), f"{path}: {name} is covered {filled} of {shard.local.numel()}"


Box = tuple[tuple[int, int], ...]


def _overlap(chunk: Chunk, shard: Shard) -> Box | None:
    """The part of the whole tensor that both hold, as (begin, end) per dimension; None if there is none."""
    box = tuple(
        (max(a, b), min(a + m, b + n))
        for a, m, b, n in zip(chunk.offset, chunk.shape, shard.offset, shard.local.shape, strict=True)
    )
    return None if any(begin >= end for begin, end in box) else box


def _cut(local: torch.Tensor, offset: tuple[int, ...], box: Box) -> torch.Tensor:
    return local[tuple(slice(b - o, e - o) for (b, e), o in zip(box, offset, strict=True))]


def _read(source: Any, chunk: Chunk, box: Box) -> torch.Tensor:
    cut = tuple(slice(b - o, e - o) for (b, e), o in zip(box, chunk.offset, strict=True))
    piece: torch.Tensor = source[cut]
    return piece
