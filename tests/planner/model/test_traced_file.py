"""The file of a traced model: what is read back, and what is refused with the path of the fault."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from planner.foundation.decode import encode
from planner.foundation.errors import InputError
from planner.hardware.catalog import load_model
from planner.model.spec import ModelSpec, Norm, Segment
from planner.model.traced_layer import MatrixProduct, TracedLayer
from planner.model.traced_model import TracedFile, read_traced_model, write_traced_model

LAYER = TracedLayer(
    key="traced-1",
    tokens=8,
    params=100,
    tensors=2,
    products=(MatrixProduct(m=8.0, n=10.0, k=10.0),),
    core_flops=5.0,
    moved_values=40.0,
    saved_values=80.0,
    input_values=80.0,
    message_values=81.0,
)
MODEL = ModelSpec(
    name="mine",
    model_type="traced",
    hidden=10,
    vocab=0,
    max_positions=8,
    learned_positions=0,
    rope_theta=0.0,
    norm=Norm.LAYERNORM_WITHOUT_PARAMETERS,
    norm_eps=0.0,
    initializer_range=0.0,
    tied_embeddings=False,
    segments=(Segment(block=LAYER, count=3),),
    final_norms=0,
)


def test_a_traced_model_is_read_by_the_option_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    write_traced_model(MODEL, path)
    assert load_model(str(path)) == MODEL
    assert MODEL.params_total == 300


def test_figures_of_a_layer() -> None:
    assert LAYER.stream_width == 11  # 81 values of 8 tokens, rounded up
    assert LAYER.matmul_flops_forward(16) == 2 * 2 * 8 * 10 * 10
    assert MODEL.flops_per_token_forward(8) == 3 * (1600 + 5) / 8


def test_another_json_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"model_type": "llama"}')
    assert read_traced_model(path) is None


def written(tmp_path: Path, model: ModelSpec, **top: Any) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**encode(TracedFile(traced_model=model)), **top}))
    return path


def with_layer(**changes: Any) -> ModelSpec:
    return dataclasses.replace(
        MODEL, segments=(Segment(block=dataclasses.replace(LAYER, **changes), count=1),)
    )


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (with_layer(params=-1), "segments.0.block.params"),
        (with_layer(saved_values=-1.0), "segments.0.block.saved_values"),
        (with_layer(tokens=0), "segments.0.block.tokens"),
        (with_layer(tokens=9), "segments.0.block.tokens"),
        (with_layer(products=(MatrixProduct(m=0.0, n=1.0, k=1.0),)), "segments.0.block.products.0"),
        (dataclasses.replace(MODEL, segments=()), "segments"),
        (dataclasses.replace(MODEL, segments=(Segment(block=LAYER, count=10**12),)), "segments.0.count"),
        (dataclasses.replace(MODEL, segments=(Segment(block=LAYER, count=0),)), "segments.0.count"),
        (dataclasses.replace(MODEL, vocab=7), "traced_model"),
    ],
)
def test_impossible_figures_are_refused(tmp_path: Path, model: ModelSpec, where: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(str(written(tmp_path, model)))
    assert where in str(caught.value)


def test_unknown_versions_and_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="schema_version"):
        load_model(str(written(tmp_path, MODEL, schema_version=2)))
    with pytest.raises(InputError, match="unknown key"):
        load_model(str(written(tmp_path, MODEL, extra=1)))
