"""Which modules of a Hugging Face model get PEFT's adapters for ours, and how ours lie in them.

A module that is one of our projections has the same adapter, A [r, in] and B [out, r]. One that holds several
of them, row after row, has one adapter for all k that are adapted, of rank k r:

    A = [A_1; ...; A_k]     B = the rows of projection m: B_m in columns [m r, (m + 1) r), else zero

which gives each its own B_m A_m x. PEFT's own adapter of such a module is of rank r, with one A for all: read
from there, each projection begins with a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from planner.model.spec import ModelSpec
from planner.model.workload import Adapters
from runtime.model.block import Block
from runtime.model.huggingface.key_map import Mapped, Piece, key_map
from runtime.model.huggingface.names import PROJECTIONS
from runtime.model.huggingface.read import Box
from runtime.model.lora import adapted_modules
from runtime.model.transformer import build_transformer


@dataclass(frozen=True, slots=True)
class PeftModule:
    """A module with an adapter: its name, its outputs and inputs, and the adapted projections that it holds.

    `members` are their paths (`layers.0.attention.wq`) with the pieces of their rows; `rank` is ours.
    """

    name: str
    shape: tuple[int, int]
    members: tuple[tuple[str, tuple[Piece, ...]], ...]
    rank: int

    @property
    def written_rank(self) -> int:
        """The rank of the adapter that is written for it."""
        return self.rank * len(self.members)

    @property
    def fused(self) -> bool:
        """Whether it holds more rows than those of one adapted projection."""
        return self.shape[0] > sum(piece.rows for piece in self.members[0][1])

    def join(self, halves: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Its A and B, from those of its members by their paths."""
        whole_a = torch.cat([halves[path][0] for path, _ in self.members])
        whole_b = torch.zeros(self.shape[0], self.written_rank)
        for place, (path, pieces) in enumerate(self.members):
            for piece in pieces:
                own = halves[path][1][piece.first : piece.first + piece.rows]
                whole_b[piece.begin : piece.begin + piece.rows, self._columns(place)] = own
        return whole_a, whole_b

    def box_of_a(self, path: str, box: Box, file_rank: int) -> Box:
        """Where a part of a member's A lies in that of a file."""
        (begin, end), inputs = box
        first = self._columns(self._place(path)).start if file_rank != self.rank else 0
        return (first + begin, first + end), inputs

    def boxes_of_b(self, path: str, box: Box, file_rank: int) -> Iterator[tuple[slice, Box]]:
        """Rows of a part of a member's B, and where these lie in that of a file."""
        (begin, end), (left, right) = box
        place = self._place(path)
        first = self._columns(place).start if file_rank != self.rank else 0
        for piece in self.members[place][1]:
            low, high = max(begin, piece.first), min(end, piece.first + piece.rows)
            if low < high:
                shift = piece.begin - piece.first
                columns = (first + left, first + right)
                yield slice(low - begin, high - begin), ((low + shift, high + shift), columns)

    def left_over(self, whole_b: Tensor) -> Tensor:
        """What of a file's B no member takes; zero where they take all that counts."""
        rest = whole_b.clone()
        for place, (_, pieces) in enumerate(self.members):
            taken = self._columns(place) if whole_b.shape[1] != self.rank else slice(None)
            for piece in pieces:
                rest[piece.begin : piece.begin + piece.rows, taken] = 0.0
        return rest

    def _place(self, path: str) -> int:
        return [member for member, _ in self.members].index(path)

    def _columns(self, place: int) -> slice:
        return slice(place * self.rank, (place + 1) * self.rank)


def peft_modules(model: ModelSpec, adapters: Adapters) -> list[PeftModule]:
    """The modules that get adapters. Raises InputError for a family whose names are not known."""
    wanted = set(_adapted_paths(model, adapters.modules))
    known = key_map(model)
    by_key: dict[str, list[Mapped]] = {}
    for mapped in known.parameters:
        if mapped.name.removesuffix(".weight") in wanted:
            by_key.setdefault(mapped.pieces[0].key, []).append(mapped)
    modules = []
    for key, members in by_key.items():
        shape = known.shapes[key]
        outputs, inputs = shape[::-1] if key in known.transposed else shape
        pieces = tuple((mapped.name.removesuffix(".weight"), mapped.pieces) for mapped in members)
        modules.append(PeftModule(key.removesuffix(".weight"), (outputs, inputs), pieces, adapters.rank))
    return modules


def targets(model: ModelSpec, names: Iterable[str]) -> dict[str, str]:
    """For each of some modules the end of its name by which PEFT finds it, and none that is not meant."""
    meant = set(names)
    everywhere = {key.removesuffix(".weight") for key in key_map(model).shapes if key.endswith(".weight")}
    others = sorted(everywhere - meant)

    @cache
    def means(end: str) -> bool:
        return not any(other.endswith(f".{end}") for other in others)

    return {name: next(filter(means, _ends(name)), name) for name in meant}


def named_modules(model: ModelSpec, found: Iterable[str]) -> list[str]:
    """What `--lora-modules` calls the modules that have adapters in a file; empty where one is not known."""
    paths: dict[str, list[str]] = {}
    for mapped in key_map(model).parameters:
        path = mapped.name.removesuffix(".weight").split(".", 2)[-1]
        if path in PROJECTIONS:
            paths.setdefault(mapped.pieces[0].key.removesuffix(".weight"), []).append(PROJECTIONS[path])
    given = set(found)
    names = [name for module, ours in paths.items() if module in given for name in ours]
    return list(dict.fromkeys(names)) if given <= paths.keys() else []


def _ends(name: str) -> Iterator[str]:
    """The last parts of a name, from one part on."""
    parts = name.split(".")
    return (".".join(parts[-count:]) for count in range(1, len(parts)))


def _adapted_paths(model: ModelSpec, modules: str) -> Iterator[str]:
    layers = build_transformer(model, 0, model.layers, True, True, seq=1).layers
    for name, block in layers.named_children():
        assert isinstance(block, Block)
        yield from (f"layers.{name}.{path}" for path in adapted_modules(block, modules))
