"""The file of a traced model: what `plan trace` writes, and `--model` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from planner.foundation.decode import decode, load_json_object, to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from planner.model.traced_layer import TracedLayer

KEY = "traced_model"
MOST_LAYERS = 100_000
MOST_BYTES = 8 * 1024 * 1024
"""A traced model has as many entries as it has layer classes: a hundred classes are a few hundred KiB."""


@frozen
class TracedFile:
    """The document: a version and the model."""

    traced_model: ModelSpec
    schema_version: int = 1


def write_traced_model(model: ModelSpec, path: Path) -> None:
    """Writes a traced model, whole or not at all."""
    write_atomic(path, to_json(TracedFile(traced_model=model)))


def read_traced_model(path: Path) -> ModelSpec | None:
    """The traced model in a JSON file; None where the file holds something else, such as a config.json.

    Raises InputError with every fault of a file that says that it is one.
    """
    table = load_json_object(path, MOST_BYTES)
    if KEY not in table:
        return None
    document = decode(TracedFile, table, source=str(path))
    problems = [Problem(where=f"{path}: {where}", fault=fault) for where, fault in _faults(document)]
    if problems:
        raise InputError(*problems)
    return document.traced_model


def _faults(document: TracedFile) -> Iterator[tuple[str, str]]:
    model = document.traced_model
    if document.schema_version != 1:
        yield "schema_version", f"{document.schema_version} is not known; this version reads 1."
    if model.vocab or model.learned_positions:
        yield KEY, "has an embedding of ours, which a traced model has not."
    if not model.segments:
        yield f"{KEY}.segments", "is empty: a model has layers."
    for index, segment in enumerate(model.segments):
        where = f"{KEY}.segments.{index}"
        if not 1 <= segment.count <= MOST_LAYERS:
            yield f"{where}.count", f"{segment.count} is not between 1 and {MOST_LAYERS} layers."
        if not isinstance(segment.block, TracedLayer):
            yield f"{where}.block", "is no traced layer."
            continue
        yield from ((f"{where}.block.{name}", fault) for name, fault in _layer_faults(segment.block))
        if segment.block.tokens != model.max_positions:
            yield (
                f"{where}.block.tokens",
                f"{segment.block.tokens} differs from the model's {model.max_positions}.",
            )


def _layer_faults(layer: TracedLayer) -> Iterator[tuple[str, str]]:
    if layer.tokens < 1:
        yield "tokens", f"{layer.tokens} is not a number of tokens."
    figures = ("params", "tensors", "core_flops", "moved_values", "saved_values", "input_values")
    for name in (*figures, "message_values", "shared_params", "operators"):
        if getattr(layer, name) < 0:
            yield name, f"{getattr(layer, name)} is negative."
    for index, product in enumerate(layer.products):
        if min(product.m, product.n, product.k, product.count) <= 0:
            yield f"products.{index}", "has a dimension or count that is not positive."
