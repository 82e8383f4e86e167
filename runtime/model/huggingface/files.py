"""Reads weights from a folder of safetensors into tensors of any layout: each rank its own slices only.

Files are opened lazily and nothing is unpickled.

Writes weights as a Hugging Face folder: config.json, model-0000x-of-0000N.safetensors and their index.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from planner.foundation.decode import load_json_object, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.model.spec import ModelSpec
from runtime.model.huggingface.names import BUFFERS, KeyMap, Mapped, Piece, key_map

INDEX = "model.safetensors.index.json"
SHOWN = 10
"""Keys that an error lists one by one, of each kind."""

Box = tuple[tuple[int, int], ...]
"""(begin, end) of each dimension."""


class WeightFolder:
    """The tensors of a Hugging Face folder, by their keys in `key_map`'s words."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        """Opens the folder. Raises InputError with every key that is missing, left over or mis-shaped."""
        self.folder, self.map = folder, key_map(spec)
        self._files: dict[str, Any] = {}
        found = {key: file for file, keys in files_of(folder).items() for key in keys}
        self._stored = _stored_names(found, self.map)
        self._file_of = {key: found[stored] for key, stored in self._stored.items()}
        _check_keys(folder, set(found), self._stored, self.map, tied=spec.tied_embeddings)
        self._check_shapes()

    def fill(self, name: str, tensor: Tensor) -> None:
        """Fills this rank's part of our parameter `name`, in place, in the tensor's own precision."""
        mapped = next(m for m in self.map.parameters if m.name == name)
        local, box = local_box(tensor)
        with torch.no_grad():
            for piece, target in self._pieces_within(mapped, local, box):
                target.copy_(piece)

    def _pieces_within(self, mapped: Mapped, local: Tensor, box: Box) -> Iterator[tuple[Tensor, Tensor]]:
        (first, end), *rest = box
        for piece in mapped.pieces:
            low, high = max(first, piece.first), min(end, piece.first + piece.rows)
            if low >= high:
                continue
            if piece.stacked:
                yield self._slice(piece.key, tuple(rest)), local[low - first]
                continue
            shift = piece.begin - piece.first
            yield (
                self._slice(piece.key, ((low + shift, high + shift), *rest)),
                local[low - first : high - first],
            )

    def _slice(self, key: str, box: Box) -> Tensor:
        turned = key in self.map.transposed
        cut = tuple(slice(begin, end) for begin, end in (box[::-1] if turned else box))
        part: Tensor = self._open(key).get_slice(self._stored[key])[cut]
        return part.T if turned else part

    def _open(self, key: str) -> Any:
        file = self._file_of[key]
        if file not in self._files:
            self._files[file] = open_file(self.folder / file)
        return self._files[file]

    def _check_shapes(self) -> None:
        problems = []
        for key, shape in self.map.shapes.items():
            found = tuple(self._open(key).get_slice(self._stored[key]).get_shape())
            if found != shape:
                problems.append(
                    Problem(
                        where=f"{self.folder / self._file_of[key]}: {key}",
                        fault=f"is of shape {list(found)}, the model has {list(shape)}.",
                    )
                )
        if problems:
            raise InputError(*_few(problems, str(self.folder), "tensors of another shape"))


def local_box(tensor: Tensor) -> tuple[Tensor, Box]:
    """What this rank holds of a tensor, and which part of the whole it is."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple((0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    box = tuple((begin, begin + size) for begin, size in zip(offset, shape, strict=True))
    return tensor.to_local().detach(), box


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(Problem(where=str(path), fault="is named in the index and missing.")) from None
    except (SafetensorError, OSError, struct.error) as error:
        raise InputError(Problem(where=str(path), fault=f"cannot be read as safetensors: {error}.")) from None


def files_of(folder: Path) -> dict[str, list[str]]:
    """The keys in each file: by the index where there is one, else by the files' own headers."""
    if not folder.is_dir():
        raise InputError(Problem(where=str(folder), fault="is not a folder."))
    if (folder / INDEX).exists():
        listed = load_json_object(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(_is_plain(name) for name in listed.values()):
            fault = "has no weight_map of keys to files of this folder."
            raise InputError(Problem(where=str(folder / INDEX), fault=fault))
        files: dict[str, list[str]] = {}
        for key, name in listed.items():
            files.setdefault(name, []).append(key)
        return {name: _held(folder / name, keys) for name, keys in files.items()}
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise _no_weights(folder)
    return {name: list(open_file(folder / name).keys()) for name in names}


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _held(path: Path, keys: list[str]) -> list[str]:
    """Keys that the index promises of a file. Raises InputError where the file does not hold them."""
    missing = sorted(set(keys) - set(open_file(path).keys()))
    if missing:
        fault = f"lacks {', '.join(missing[:SHOWN])}, which the index promises ({len(missing)} keys)."
        raise InputError(Problem(where=str(path), fault=fault))
    return keys


def _no_weights(folder: Path) -> InputError:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if not pickled:
        return InputError(Problem(where=str(folder), fault="holds no *.safetensors."))
    return InputError(
        Problem(
            where=str(folder),
            fault=f"holds {pickled[0]}, a pickle, which can run code when it is read; it is never opened.",
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(OTHER) writes safetensors",
        )
    )


def _stored_names(found: Mapping[str, str], wanted: KeyMap) -> dict[str, str]:
    """For each key its name in the files, which may lack the first part (base models are saved so)."""
    stored = {key: key if key in found else key.split(".", 1)[1] for key in wanted.shapes}
    return {key: name for key, name in stored.items() if name in found}


def _check_keys(
    folder: Path, found: set[str], stored: Mapping[str, str], wanted: KeyMap, *, tied: bool
) -> None:
    missing = [key for key in wanted.shapes if key not in stored]
    extra = found - set(stored.values())
    extra = {key for key in extra if not key.endswith(BUFFERS) and not (tied and key.startswith("lm_head."))}
    problems = [Problem(where=f"{folder}: {key}", fault="is missing.") for key in missing]
    problems = _few(problems, str(folder), "missing keys")
    left = [
        Problem(where=f"{folder}: {key}", fault="is in the files and not in the model.")
        for key in sorted(extra)
    ]
    problems += _few(left, str(folder), "keys that the model does not have")
    if problems:
        raise InputError(*problems)


def _few(problems: list[Problem], where: str, what: str) -> list[Problem]:
    """The first of many problems, and how many there are."""
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], Problem(where=where, fault=f"{len(problems)} {what} in all.")]


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
