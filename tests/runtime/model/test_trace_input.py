"""`plan trace`: what it is given as text, and the road from a module to a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.foundation.errors import InputError
from runtime.model.trace_input import load_factory, parse_inputs, trace_factory


def test_inputs_are_tensors_on_meta() -> None:
    image, ids = parse_inputs(("1x3x224x224", "4x2048:int64"))
    assert (tuple(image.shape), image.dtype, image.is_meta) == ((1, 3, 224, 224), torch.float32, True)
    assert (tuple(ids.shape), ids.dtype) == ((4, 2048), torch.int64)


def test_every_wrong_input_is_named() -> None:
    wrong = ("", "x", "1xtwo", "1x-2", "0x3", "1x2:float", "9999999x9999999x9999999", "1" + "x1" * 9, "²")
    with pytest.raises(InputError) as caught:
        parse_inputs(("1x2", *wrong))
    assert len(caught.value.problems) == len(wrong)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder with a module of one's own; its name is new in every test, since imports are remembered."""
    name = "mine_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(5)])\n"
        "def reads_values_while_it_builds():\n"
        "    return nn.Sequential(nn.Dropout(torch.linspace(0, 0.5, 3)[1].item()), nn.Linear(8, 8))\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise KeyError('weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["trace", *words], prog_name="plan")


def test_a_module_of_ones_own_is_traced_and_planned(folder: str, tmp_path: Path) -> None:
    result = run(f"{folder}:small", "--input", "2x8", "-o", "small.json")
    assert result.exit_code == 0, result.output
    assert "360" in result.stdout and "--seq 1" in result.stdout
    line = "estimate --model small.json --cluster 1x2:a100-sxm-80gb --seq 1 --batch 8 --fix dp=2 --json"
    answer = CliRunner().invoke(cli, line.split(), prog_name="plan")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["model"]["params_total"] == 5 * 72


def test_json_is_the_model(folder: str) -> None:
    result = run(f"{folder}:small", "--input", "2x8", "-o", "small.json", "--name", "mine", "--json")
    document = json.loads(result.stdout)
    assert document["name"] == "mine"
    assert [segment["count"] for segment in document["segments"]] == [5]


def test_a_module_that_reads_values_while_it_builds_is_built_for_real(folder: str) -> None:
    factory = load_factory(f"{folder}:reads_values_while_it_builds")
    assert trace_factory(factory, parse_inputs(("1x8",)), name="real", tokens=None).params_total == 72


@pytest.mark.parametrize(
    ("factory", "word"),
    [
        ("{}", "MODULE:FACTORY"),
        ("{}:small.more", "MODULE:FACTORY"),
        ("{}:smal", "did you mean"),
        ("{}_absent:small", "cannot be imported"),
        ("{}:number", "not an nn.Module"),
        ("{}:broken", "KeyError"),
    ],
)
def test_faults_of_the_factory_are_said_without_a_traceback(folder: str, factory: str, word: str) -> None:
    result = run(factory.format(folder), "--input", "1x8", "-o", "out.json")
    assert result.exit_code == 2
    assert word in result.stderr and "Traceback" not in result.stderr
    assert not Path("out.json").exists()


def test_the_output_is_a_json_file(folder: str) -> None:
    result = run(f"{folder}:small", "--input", "2x8", "-o", "small.toml")
    assert result.exit_code == 2 and "small.json" in result.stderr
