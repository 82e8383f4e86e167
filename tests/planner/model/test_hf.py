"""config.json: exact parameter counts for every config of the catalog, and hostile ones refused."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from planner.foundation.errors import InputError
from planner.hardware.catalog import data_folder
from planner.model.feed_forward import Activation
from planner.model.huggingface import (
    FAMILIES,
    MAX_CONFIG_BYTES,
    read_config,
    read_config_file,
    read_model_toml,
)
from planner.model.spec import Norm

COUNTS = list(
    csv.DictReader((Path(__file__).parents[2] / "data" / "model_params.csv").read_text().splitlines())
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 512,
}


def faults(config: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_config(config, source="config.json", name="test")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("row", COUNTS, ids=[row["name"] for row in COUNTS])
def test_parameter_counts_equal_those_of_the_built_models(row: dict[str, str]) -> None:
    model = read_config_file(data_folder() / "models" / f"{row['name']}.json")
    assert model.params_total == int(row["params_total"])
    assert model.params_active == int(row["params_active"])
    assert row["params_embedding"] in ("", str(model.params_embedding))
    assert model.layers == int(row["layers"])


def test_the_counts_cover_every_shipped_config() -> None:
    shipped = {path.stem for path in (data_folder() / "models").glob("*.json")}
    assert shipped - {row["name"] for row in COUNTS} == {"shardwise-demo"}


def test_a_llama_config_becomes_its_spec() -> None:
    model = read_config({**LLAMA, "rope_theta": 5e5, "attention_bias": True}, source="c", name="x")
    block = model.block(0)
    assert (model.name, model.model_type, model.layers, model.vocab) == ("x", "llama", 8, 512)
    assert (block.mixer.heads, block.mixer.kv_heads, block.mixer.head_dim) == (8, 4, 32)
    assert block.mixer.qkv_bias and block.mixer.out_bias and not block.mlp.bias
    assert block.mlp.gated and block.mlp.activation is Activation.SILU
    assert model.norm is Norm.RMSNORM and model.rope_theta == 5e5
    assert model.learned_positions == 0 and not model.tied_embeddings


def test_a_gpt2_config_becomes_its_spec() -> None:
    model = read_config(GPT2, source="c", name="x")
    block = model.block(0)
    assert block.mlp.width == 256 and not block.mlp.gated and block.mlp.bias
    assert block.mlp.activation is Activation.GELU_TANH
    assert model.norm is Norm.LAYERNORM
    assert model.learned_positions == 128 and model.tied_embeddings


def test_defaults_are_those_of_the_family() -> None:
    short = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read_config(short, source="c", name="x").block(0).mixer.kv_heads == 8
    explicit = read_config({**GPT2, "n_inner": 100, "tie_word_embeddings": False}, source="c", name="x")
    assert explicit.block(0).mlp.width == 100 and not explicit.tied_embeddings


def test_synonyms_are_read_and_must_agree() -> None:
    config = {**GPT2, "hidden_size": 64}
    assert read_config(config, source="c", name="x").hidden == 64
    assert "both mean the same" in faults({**GPT2, "hidden_size": 65})[0]
    nested = {**LLAMA, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}
    assert read_config(nested, source="c", name="x").rope_theta == 7e5


def test_what_is_not_described_is_said() -> None:
    """Keys in the sources; ways to stretch rotary frequencies where it is said what cannot be trained."""
    known = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
    config = {**LLAMA, "rope_scaling": known, "some_new_key": 1}
    model = read_config(config, source="c", name="x", sources=("here",))
    notes = " ".join(model.sources)
    assert notes.startswith("here") and "some_new_key" in notes and "rope_scaling" not in notes
    assert not model.arithmetic.unexpressed
    other = read_config({**config, "rope_scaling": {"rope_type": "spiral"}}, source="c", name="x")
    assert "rotary frequencies are stretched by 'spiral'" in " ".join(other.arithmetic.unexpressed)
    assert read_config(LLAMA, source="c", name="x", sources=("here",)).sources == ("here",)


@pytest.mark.parametrize(
    "key", [key for key in LLAMA if key not in ("model_type", "max_position_embeddings")]
)
@pytest.mark.parametrize(
    "value",
    [0, -1, True, 1.5, 256.0, "8", [8], {"a": 1}, 10**30, float("nan"), float("inf"), 10**4000],
    ids=lambda value: repr(value)[:8],
)
def test_a_bad_number_is_refused_at_its_key(key: str, value: object) -> None:
    found = faults({**LLAMA, key: value})
    assert len(found) == 1
    assert found[0].startswith(f"config.json: {key}: is ")
    assert len(found[0]) < 300


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "initializer_range"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1e-5", True, 1e300, [1e-5]])
def test_a_bad_real_number_is_refused_at_its_key(key: str, value: object) -> None:
    assert faults({**LLAMA, key: value})[0].startswith(f"config.json: {key}: is ")


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [0, 1, "true", 1.0, []])
def test_a_flag_is_true_or_false(key: str, value: object) -> None:
    assert "true or false" in faults({**LLAMA, key: value})[0]


def test_all_faults_are_reported_at_once() -> None:
    found = faults({"model_type": "llama", "hidden_size": -1, "num_hidden_layers": "8", "hidden_act": "silo"})
    text = "\n".join(found)
    assert len(found) == 6
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert f"config.json: {key}: " in text
    assert "did you mean 'silu'" in text


def test_heads_that_do_not_fit_are_refused_with_what_would() -> None:
    assert "1, 2, 4, 8" in faults({**LLAMA, "num_key_value_heads": 3})[0]
    assert "does not divide" in faults({**LLAMA, "num_attention_heads": 7, "num_key_value_heads": 7})[0]
    assert "does not divide" in faults({**GPT2, "n_head": 5})[0]
    assert "even" in faults({**LLAMA, "head_dim": 33})[0]
    assert read_config({**LLAMA, "head_dim": 128}, source="c", name="x").block(0).mixer.query_width == 1024


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_a_config_that_points_at_code_is_refused(key: str) -> None:
    assert "never run" in faults({**LLAMA, key: {"AutoModel": "modeling.Evil"}})[0]
    assert read_config({**LLAMA, "trust_remote_code": False}, source="c", name="x").layers == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_local_experts", 8),
        ("sliding_window", 4096),
        ("is_encoder_decoder", True),
        ("text_config", {"hidden_size": 8}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", 3),
        ("rope_parameters", 5),
    ],
)
def test_what_changes_the_cost_and_is_not_modelled_is_refused(key: str, value: object) -> None:
    assert faults({**LLAMA, key: value})[0].startswith(f"config.json: {key}: ")


@pytest.mark.parametrize("value", ["llamma", "qwen9", "", 5, None, ["llama"], {"a": 1}, "x" * 10**6])
def test_an_unknown_architecture_names_the_known(value: object) -> None:
    (fault,) = faults({**LLAMA, "model_type": value})
    assert "model_type" in fault and f"{len(FAMILIES)} in all" in fault and len(fault) < 1000
    assert "did you mean 'llama'" in faults({**LLAMA, "model_type": "llamma"})[0]


def test_a_misspelt_key_is_found_whether_it_is_needed_or_not() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "hidden_size"} | {"hiden_size": 256}
    assert "hiden_size" in faults(config)[0]
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert "did you mean 'num_key_value_heads'" in faults({**config, "num_key_value_head": 4})[0]


def write(folder: Path, text: str) -> Path:
    file = folder / "config.json"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        '{"a": ' * 10_000 + "1" + "}" * 10_000,
        '{"hidden_size": ' + "9" * 10_000 + "}",
        '{"model_type": "llama", "hidden_size": 1e999}',
        '{"model_type": "llama", "hidden_size": NaN}',
        '{"model_type": "llama", "model_type": "gpt2"}',
        json.dumps({"model_type": "llama", **{f"hidden_sizes{i}": i for i in range(50_000)}}),
    ],
    ids=["empty", "cut", "list", "null", "deep", "digits", "inf", "nan", "twice", "many-keys"],
)
def test_a_hostile_file_is_an_input_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config_file(write(tmp_path, text))
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as handle:
        handle.truncate(100 * 1024 * 1024)
    with pytest.raises(InputError, match=f"at most {MAX_CONFIG_BYTES} bytes"):
        read_config_file(file)


def test_random_damage_never_escapes_as_another_error() -> None:
    """Any value at any key gives a ModelSpec or an InputError, nothing else."""
    random_ = random.Random(7)
    values: list[Any] = [
        None,
        -1,
        0,
        3,
        1e9,
        True,
        "",
        "silu",
        [],
        [1],
        {},
        {"a": [{}]},
        float("nan"),
        10**50,
    ]
    read = refused = 0
    for _ in range(2000):
        config = dict(random_.choice((LLAMA, GPT2)))
        keys = [name for kind in ("llama", "gpt2") for name in FAMILIES[kind].all_names]
        keys += ["auto_map", "layer_types", "rope_parameters", "rope_scaling", "model_type", "text_config"]
        for _ in range(random_.randint(1, 4)):
            config[random_.choice(keys)] = random_.choice(values)
        try:
            read_config(config, source="c", name="x")
            read += 1
        except InputError:
            refused += 1
    assert read > 50 and refused > 50


def test_the_folder_of_a_config_names_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    write(folder, json.dumps(LLAMA))
    assert read_config_file(folder).name == "my-model"
    assert read_config_file(folder / "config.json").name == "my-model"
    with pytest.raises(InputError, match="no such file"):
        read_config_file(tmp_path / "absent" / "config.json")


def test_a_model_may_be_toml_with_the_same_keys_and_no_others(tmp_path: Path) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in LLAMA.items()]
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(['name = "mine"', 'sources = ["made up"]', *lines]))
    model = read_model_toml(file)
    assert (model.name, model.sources, model.layers) == ("mine", ("made up",), 8)
    file.write_text("\n".join(["hiden_act = 'silu'", "name = 5", "sources = 'x'", *lines]))
    with pytest.raises(InputError) as caught:
        read_model_toml(file)
    text = str(caught.value)
    assert "did you mean 'hidden_act'" in text and "name" in text and "sources" in text
