"""Models of the catalog: what is read equals what was recorded from built models, and names find them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from planner.foundation.decode import decode, load_toml_object
from planner.foundation.errors import InputError
from planner.hardware import catalog
from planner.model.arithmetic import RopeKind
from planner.model.huggingface import FAMILIES, WRAPPERS, read_config

FOLDER = catalog.data_folder() / "models"
INDEX = catalog.model_index()
COUNTS = list(
    csv.DictReader((Path(__file__).parents[2] / "data" / "model_params.csv").read_text().splitlines())
)


def test_the_index_decodes_strictly_to_what_is_served() -> None:
    tables = load_toml_object(FOLDER / "index.toml")
    assert decode(dict[str, catalog.ModelEntry], tables, source="index.toml") == INDEX


def test_every_config_has_its_entry_and_every_entry_its_config() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(INDEX)
    assert len(INDEX) > 110


@pytest.mark.parametrize("name", INDEX)
def test_the_reader_agrees_with_the_record(name: str) -> None:
    entry, model = INDEX[name], catalog.load_model(name)
    assert (model.params_total, model.params_active) == (entry.params_total, entry.params_active)
    assert (model.model_type, model.layers, model.hidden) == (entry.model_type, entry.layers, entry.hidden)
    assert (model.vocab, model.max_positions) == (entry.vocab, entry.max_positions)


@pytest.mark.parametrize("row", COUNTS, ids=[row["name"] for row in COUNTS])
def test_the_record_is_that_of_the_built_models(row: dict[str, str]) -> None:
    entry = INDEX[row["name"]]
    assert (entry.params_total, entry.params_active) == (int(row["params_total"]), int(row["params_active"]))


@pytest.mark.parametrize("name", INDEX)
def test_a_config_holds_no_key_that_would_have_to_be_explained(name: str) -> None:
    config = json.loads((FOLDER / f"{name}.json").read_text())
    notes = read_config(config, source="c", name=name).sources
    assert not [note for note in notes if "not read" in note or "not described" in note]
    assert config["model_type"] in {*FAMILIES, *WRAPPERS}


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("llama3-8b", "llama-3-8b"),
        ("Llama-3.1-70B", "llama-3.1-70b"),
        ("gpt3-175b", "gpt-3-175b"),
        ("mixtral", "mixtral-8x7b-v0.1"),
        ("mistral-7b", "mistral-7b-v0.1"),
        ("deepseek-v3", "deepseek-v3-671b-r1"),
        ("DeepSeek-R1", "deepseek-v3-671b-r1"),
        ("qwen2.5-72b", "qwen2.5-72b"),
        ("qwen3-30b", "qwen3-30b-a3b"),
        ("gpt-oss", "gpt-oss-120b"),
        ("bloom", "bloom-176b"),
        ("falcon", "falcon-7b"),
        ("bert", "bert-base-uncased"),
        ("kimi-k2", "kimi-k2-1t-a32b"),
        ("llama-4-scout", "llama-4-scout-17b-16e-text"),
        ("gemma3-27b", "gemma-3-27b-text"),
        ("phi4", "phi-4-14b"),
        ("command-r-plus", "command-r-104b"),
    ],
)
def test_names_that_people_type_find_their_model(typed: str, name: str) -> None:
    assert catalog.load_model(typed).name == name


def test_an_architecture_named_for_a_catalog_model_is_read_as_that() -> None:
    assert catalog.load_model("llama-2-7b", arch="mistral").model_type == "mistral"
    with pytest.raises(InputError, match="--arch"):
        catalog.load_model("llama-2-7b", arch="lama")


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("qwen2-7b", 1e6), ("qwen2.5-14b", 1e6), ("qwen3-8b", 1e6), ("qwen3-235b-a22b", 1e6),
        ("qwen3-coder-480b-a35b", 1e7), ("qwen3-next-80b-a3b", 1e7), ("olmo-2-7b-1124", 5e5),
        ("phi-4-14b", 250_000.0), ("moonlight-16b-a3b", 50_000.0), ("mistral-nemo-12b", 1e6),
        ("glm-4.5-355b-a32b", 1e6), ("smollm3-3b", 5e6), ("mistral-7b-v0.1", 1e4), ("llama-3-8b", 5e5),
    ],
)  # fmt: skip
def test_rotary_bases_are_those_of_the_published_configs(name: str, base: float) -> None:
    """Not those that a library has where a config says none. Where they were read is in the index."""
    assert catalog.load_model(name).rope_theta == base
    assert base in (1e4, 5e5) or any("rope_theta" in source for source in INDEX[name].sources)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *(("llama-3.1-8b", 8.0), ("llama-3.1-70b", 8.0), ("llama-3.1-405b", 8.0), ("llama-3.3-70b", 8.0)),
        ("llama-3.2-1b", 32.0),
    ],
)
def test_llamas_of_131072_positions_scale_their_rotary_frequencies(name: str, factor: float) -> None:
    scaling = catalog.load_model(name).arithmetic.rope_scaling
    assert scaling is not None and scaling.kind is RopeKind.LLAMA3
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (factor, 1.0, 4.0)
    assert scaling.original_positions == 8192
    assert catalog.load_model("llama-3-8b").arithmetic.rope_scaling is None
