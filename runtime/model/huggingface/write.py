"""Writes weights as a Hugging Face folder: config.json, model-0000x-of-0000N.safetensors and their index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from planner.foundation.decode import write_atomic
from planner.foundation.errors import InputError, Problem
from planner.model.spec import ModelSpec
from runtime.model.huggingface.key_map import KeyMap, Mapped, Piece, key_map
from runtime.model.huggingface.read import INDEX

SHARD_BYTES = 5_000_000_000
"""A file holds tensors up to this together, as transformers writes them (max_shard_size)."""

ReadParameter = Callable[[str], Tensor]
"""Our whole parameter of a name, on the CPU."""


def write_weights(
    read: ReadParameter,
    spec: ModelSpec,
    folder: Path,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes the model's folder, aside first and then renamed, and returns the weight files.

    One file's tensors are in memory at a time. Raises InputError where the folder exists and is not empty,
    or the disk is full.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(Problem(where=str(folder), fault="exists already.", fix="name another folder"))
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        names = _write_files(read, spec, aside, dtype, shard_bytes)
        write_atomic(aside / "config.json", json.dumps(dict(config), indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(Problem(where=str(folder), fault=f"cannot be written: {error}.")) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [folder / name for name in names]


def _write_files(
    read: ReadParameter, spec: ModelSpec, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> list[str]:
    wanted = key_map(spec)
    groups = list(_grouped(wanted, dtype.itemsize, shard_bytes))
    names = _file_names(len(groups))
    tensors = _Assembler(read, wanted, dtype)
    total = 0
    for name, keys in zip(names, groups, strict=True):
        held = {key: tensors.assemble(key) for key in keys}
        total += sum(tensor.nbytes for tensor in held.values())
        save_file(held, folder / name, metadata={"format": "pt"})
    if len(groups) > 1:
        places = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return names


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _grouped(wanted: KeyMap, itemsize: int, limit: int) -> Iterator[list[str]]:
    """Keys in the model's order, as many a file as fit; a tensor that is larger has a file of its own."""
    keys: list[str] = []
    filled = 0
    for key, shape in wanted.shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if keys and filled + size > limit:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += size
    yield keys


class _Assembler:
    """Puts tensors of theirs together from parameters of ours, of which it keeps the last one read."""

    def __init__(self, read: ReadParameter, wanted: KeyMap, dtype: torch.dtype) -> None:
        self.read, self.wanted, self.dtype = read, wanted, dtype
        self.parts: dict[str, list[tuple[Mapped, Piece]]] = {}
        for mapped in wanted.parameters:
            for piece in mapped.pieces:
                self.parts.setdefault(piece.key, []).append((mapped, piece))
        self.last: tuple[str, Tensor] | None = None

    def assemble(self, key: str) -> Tensor:
        turned = key in self.wanted.transposed
        shape = self.wanted.shapes[key]
        whole = torch.empty(shape[::-1] if turned else shape, dtype=self.dtype)
        for mapped, piece in self.parts[key]:
            if piece.stacked:
                return self._parameter(mapped.name)[piece.first].to(self.dtype).contiguous()
            rows = self._parameter(mapped.name)[piece.first : piece.first + piece.rows]
            whole[piece.begin : piece.begin + piece.rows] = rows.to(self.dtype)
        return whole.T.contiguous() if turned else whole

    def _parameter(self, name: str) -> Tensor:
        if self.last is None or self.last[0] != name:
            self.last = (name, self.read(name))
        return self.last[1]
