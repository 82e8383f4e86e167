"""Hostile configs of every family: refused at the path of the fault, at once, and never by another error."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.foundation.errors import InputError
from planner.model.huggingface import FAMILIES, WRAPPERS, read_config, read_config_file
from planner.model.huggingface.family import MAX_LAYERS
from tests.model_configs import MAKERS

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
GEMMA: dict[str, Any] = {**MIXTRAL, "model_type": "gemma2"}
for key in ("num_local_experts", "num_experts_per_tok"):
    del GEMMA[key]

VALUES: list[Any] = [
    None, -1, 0, 1, 3, 7, 10**9, 1e9, True, "", "silu", "full_attention", "x" * 10_000, "MME*-", "M" * 20_000,
    [], [1], [None], [[]], ["x"], ["full_attention"] * 4, [0] * 1_000_000, ["full_attention"] * 1_000_000,
    [[["global"], 2]], [[["global"], 10**9]], {}, {"a": [{}]}, float("nan"), float("inf"), 10**50, 10**5000,
]  # fmt: skip


def faults(config: dict[str, Any], arch: str | None = None) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_config(config, source="c", name="x", arch=arch)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: is 1000000000"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers: is"),
        ({"num_local_experts": 10**12}, "num_local_experts: is"),
        ({"num_local_experts": -4}, "num_local_experts: is -4"),
        ({"num_local_experts": 0}, "num_local_experts: is 0, but layers have experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: is 5 of 4 experts"),
        ({"num_experts_per_tok": [2]}, "num_experts_per_tok: is a list of 1"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads: is 7, which does not"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: is 3, which does not"),
        ({"sliding_window": -1}, "sliding_window: is -1"),
        ({"sliding_window": "4096"}, "sliding_window: is '4096'"),
        ({"head_dim": float("nan")}, "head_dim: is nan"),
        ({"rope_parameters": [1]}, "rope_parameters: is a list of 1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: is inf"),
        ({"num_experts": 8}, "num_experts: is 8, but num_local_experts is 4, and both mean the same"),
        ({"hidden_act": "silo"}, "hidden_act: is 'silo'"),
    ],
)
def test_a_bad_value_is_refused_at_its_key(change: dict[str, Any], where: str) -> None:
    found = faults({**MIXTRAL, **change})
    assert len(found) == 1 and found[0].startswith(f"c: {where}")
    assert len(found[0]) < 400


@pytest.mark.parametrize(
    ("listed", "where"),
    [
        (["full_attention"] * 1_000_000, "layer_types: is a list of 1000000"),
        (["full_attention"] * 3, "layer_types: has 3 items for 4 layers"),
        (["full_attention"] * 3 + ["full_atention"], "layer_types[3]: is 'full_atention'"),
        (["full_attention"] * 3 + [None], "layer_types[3]: is None"),
        (["full_attention"] * 3 + ["chunked_attention"] * 2, "layer_types: has 5 items"),
        (["linear_attention"] * 4, "layer_types: names 'linear_attention', which this family does not have"),
        ("full_attention", "layer_types: is 'full_attention'"),
        ({"0": "full_attention"}, "layer_types: is a table of 1"),
    ],
)
def test_a_bad_list_of_layers_is_refused_at_its_item(listed: Any, where: str) -> None:
    found = faults({**GEMMA, "layer_types": listed})
    assert found[0].startswith(f"c: {where}") and len(found[0]) < 400


@pytest.mark.parametrize("pattern", ["MMX", "M" * 5_000_000, "MM", 5, ["M"]])
def test_a_bad_pattern_of_layers_is_refused(pattern: Any) -> None:
    config = {**MIXTRAL, "model_type": "nemotron_h", "hybrid_override_pattern": pattern}
    assert "c: hybrid_override_pattern: " in "\n".join(faults(config))


@pytest.mark.parametrize("types", [[[["global"], 10**9]], [[["x"], 4]], [["global", 4]], [1], [[[], 4]], "x"])
def test_a_bad_repetition_of_attention_types_is_refused(types: Any) -> None:
    config = {"model_type": "gpt_neo", "hidden_size": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 9}
    assert faults({**config, "attention_types": types})[0].startswith("c: attention_types")


def test_missing_keys_are_all_named() -> None:
    for model_type, family in FAMILIES.items():
        text = "\n".join(faults({"model_type": model_type}))
        for fact in ("hidden", "heads", "vocab"):
            if fact in family.defaults and fact not in family.needless:
                assert f"c: {family.names_of(fact)[0]}: is missing." in text, model_type


def test_random_damage_to_any_family_is_an_input_error_or_a_model() -> None:
    random_ = random.Random(5)
    read = refused = 0
    for _ in range(1500):
        model_type = random_.choice(list(MAKERS))
        family = FAMILIES[model_type]
        config = {"model_type": model_type, **MAKERS[model_type](random_)}
        keys = [*family.all_names, *family.inert, "auto_map", "layer_types", "text_config", "model_type"]
        for _ in range(random_.randint(0, 3)):
            config[random_.choice(keys)] = random_.choice(VALUES)
        if random_.random() < 0.2:
            config = {"model_type": random_.choice([*WRAPPERS, "new", 5]), "text_config": config}
        try:
            model = read_config(config, source="c", name="x")
            assert model.params_total >= model.params_active > 0
            read += 1
        except InputError as error:
            assert all(str(problem).startswith("c: ") for problem in error.problems)
            assert len(str(error)) < 5000
            refused += 1
    assert read > 200 and refused > 200


def test_a_deep_or_huge_file_of_any_family_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "gemma3", "text_config": ' * 10_000 + "1" + "}" * 10_000)
    with pytest.raises(InputError, match=r"config\.json"):
        read_config_file(file)
    with file.open("wb") as handle:
        handle.truncate(100 * 1024 * 1024)
    with pytest.raises(InputError, match="at most"):
        read_config_file(file)


CODE = {"AutoModelForCausalLM": "modeling_evil.Evil"}


def test_a_config_that_points_at_code_is_refused_unless_its_architecture_is_named() -> None:
    config = {**MIXTRAL, "auto_map": CODE}
    (fault,) = faults(config)
    assert fault.startswith("c: auto_map: ") and "--arch mixtral" in fault and "never run" in fault
    model = read_config(config, source="c", name="x", arch="mixtral")
    assert model.params_total == read_config(MIXTRAL, source="c", name="x").params_total
    assert any("not run" in note for note in model.sources)


def test_code_in_a_nested_text_model_is_refused_at_its_path() -> None:
    text = {**MIXTRAL, "auto_map": CODE}
    assert faults({"model_type": "x", "text_config": text})[0].startswith("c: text_config.auto_map: ")
    outer = {"model_type": "x", "auto_map": CODE, "text_config": MIXTRAL}
    assert faults(outer)[0].startswith("c: auto_map: ")
    assert read_config(outer, source="c", name="x", arch="mixtral").model_type == "mixtral"


def test_an_unknown_architecture_is_read_as_the_one_that_is_named() -> None:
    config = {**MIXTRAL, "model_type": "our_own"}
    assert "--arch" in faults(config)[0]
    assert read_config(config, source="c", name="x", arch="mixtral").layers == 4
    (fault,) = faults(config, arch="mixtrall")
    assert fault.startswith("--arch: ") and "mixtral" in fault


def test_the_command_line_reads_a_config_as_the_architecture_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**MIXTRAL, "model_type": "our_own", "auto_map": CODE}))
    refused = CliRunner().invoke(cli, ["show", "model", str(file)])
    assert refused.exit_code == 2
    shown = CliRunner().invoke(cli, ["show", "model", str(file), "--arch", "mixtral", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["model_type"] == "mixtral"
    asked = ["--cluster", "1x8:h100", "--seq", "128", "--batch", "8", "--fix", "dp=8"]
    estimate = ["estimate", "--model", str(file), *asked]
    assert CliRunner().invoke(cli, estimate).exit_code == 2
    assert CliRunner().invoke(cli, [*estimate, "--arch", "mixtral"]).exit_code == 0
    assert CliRunner().invoke(cli, ["napkin", "--model", str(file), "--arch", "mixtral"]).exit_code == 0
    assert CliRunner().invoke(cli, ["show", "device", "h100", "--arch", "llama"]).exit_code == 2
