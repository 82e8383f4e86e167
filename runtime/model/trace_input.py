"""What `plan trace` is given as text: a factory of modules, and the shapes of its inputs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planner.foundation.errors import InputError, Problem
from planner.model.spec import ModelSpec
from runtime.model.trace import trace_module

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
MOST_DIMENSIONS = 8
MOST_VALUES = 2**48


def parse_inputs(texts: Sequence[str]) -> list[Tensor]:
    """Tensors on meta from texts such as `1x3x224x224` and `1x2048:int64`. InputError has every fault."""
    problems: list[Problem] = []
    tensors: list[Tensor] = []
    for text in texts:
        shape_text, _, dtype = text.partition(":")
        sizes = shape_text.lower().split("x")
        if not all(size.isascii() and size.isdigit() and 0 < len(size) < 13 for size in sizes):
            problems.append(_input_fault(text, "is not a shape.", "sizes joined by x: 1x3x224x224"))
            continue
        shape = [int(size) for size in sizes]
        values = 1
        for size in shape:
            values *= size
        if not 0 < values <= MOST_VALUES or len(shape) > MOST_DIMENSIONS:
            problems.append(
                _input_fault(text, f"has {values} values in {len(shape)} dimensions.", "sizes above 0")
            )
        elif dtype and dtype not in DTYPES:
            problems.append(_input_fault(text, f"names no dtype '{dtype}'.", ", ".join(DTYPES)))
        else:
            tensors.append(torch.empty(shape, dtype=DTYPES[dtype or "float32"], device="meta"))
    if problems:
        raise InputError(*problems)
    return tensors


def _input_fault(text: str, fault: str, legal: str) -> Problem:
    return Problem(where=f"--input {text[:60]}", fault=fault, legal=legal)


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Imports look into the current folder first, as `python -m` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def load_factory(text: str) -> Callable[[], Any]:
    """The callable that MODULE:FACTORY names. Importing MODULE runs its code."""
    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute.isidentifier():
        raise InputError(Problem(where=text[:80], fault="is not of the form MODULE:FACTORY."))
    with _current_folder_first():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the user's own code runs here, and may raise anything
            raise InputError(
                Problem(
                    where=module_name,
                    fault=f"cannot be imported: {_line(error)}.",
                    fix="run plan trace in the folder that holds the module, and name it without .py",
                )
            ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise InputError(
            Problem(
                where=module_name,
                fault=f"has no '{attribute}' that can be called.",
                fix=f"did you mean {module_name}:{near[0]}" if near else "",
            )
        )
    factory: Callable[[], Any] = found
    return factory


def trace_factory(
    factory: Callable[[], Any], inputs: Sequence[Tensor], *, name: str, tokens: int | None
) -> ModelSpec:
    """Builds the module, on meta where its code allows that, and traces it."""
    with _current_folder_first():
        return trace_module(_build(factory), inputs, name=name, tokens=tokens)


def _build(factory: Callable[[], Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            module = factory()
    except Exception:  # code that reads values while it builds, which tensors on meta have not
        try:
            module = factory()
        except Exception as error:
            raise InputError(
                Problem(
                    where="the factory",
                    fault=f"failed: {_line(error)}.",
                    fix="name a function that needs no arguments",
                )
            ) from error
    if not isinstance(module, nn.Module):
        raise InputError(
            Problem(where="the factory", fault=f"made a {type(module).__name__}, not an nn.Module.")
        )
    return module


def _line(error: Exception) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().rstrip(".").splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
