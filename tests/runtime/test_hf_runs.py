"""Runs that begin with a Hugging Face folder, and end as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planner.cli import cli
from planner.errors import InputError
from planner.hf import read_config_file
from planner.plan import Plan
from planner.strategy import Degrees, Zero
from runtime.data.prepare import DataOptions
from runtime.data.sources import shipped_corpus
from runtime.options import TrainOptions
from runtime.train import run_training
from tests.plans import make_plan
from tests.runtime.hf_models import make_model

LAYOUT = Degrees(tp=2, micro_batch=2, num_micro_batches=2)
UNCHANGED = 1e-30
"""A learning rate that changes no weight."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny phi3, whose projections are fused, with the vocabulary of bytes and a tokenizer's file."""
    folder = tmp_path_factory.mktemp("phi3")
    make_model("phi3", vocab_size=258).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step, from the folder's weights to the same."""
    run_dir = tmp_path_factory.mktemp("run")
    summary = run_training(plan_of(source), options(run_dir, source), shown=False)
    assert summary is not None
    assert summary.executed_differences == ()
    return run_dir


def plan_of(folder: Path) -> Plan:
    return make_plan(read_config_file(folder), LAYOUT)


def options(run_dir: Path, source: Path, **given: Any) -> TrainOptions:
    text = run_dir / "text.txt"
    text.write_text((shipped_corpus() / "pride_and_prejudice.txt").read_text()[:5_000])
    facts = {
        "steps": 1,
        "data": DataOptions(data=(str(text),), tokenizer="byte"),
        "lr": UNCHANGED,
        "init_from": str(source),
    }
    return TrainOptions(run_dir=str(run_dir), **{**facts, **given})


def plan_command(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(list(args))
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_run_that_changes_nothing_ends_as_the_folder_that_it_began_with(
    source: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert plan_command("export-weights", str(run), "-o", str(out), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["dtype"], facts["files"]) == (1, "float32", ["model.safetensors"])
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (out / "tokenizer.json").read_text() == "{}"


def test_export_in_another_number_format_says_so_in_the_config(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert plan_command("export-weights", str(run), "-o", str(out), "--dtype", "bfloat16") == 0
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_wrong_exports_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert plan_command("export-weights", str(run), "-o", out, "--step", "7") == 2
    assert "7 is not saved" in capsys.readouterr().err
    other = make_model("phi3", vocab_size=258, num_hidden_layers=2).config
    other.save_pretrained(tmp_path)
    assert plan_command("export-weights", str(run), "-o", out, "--config", str(tmp_path)) == 2
    assert "segments.0.count: is 2, the plan's model has 3" in capsys.readouterr().err
    assert plan_command("export-weights", str(tmp_path), "-o", out) == 2
    assert plan_command("export-weights", str(run), "-o", str(run)) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_folder_of_another_model_is_refused_before_anything_runs(source: Path, tmp_path: Path) -> None:
    make_model("phi3", vocab_size=258, intermediate_size=40).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"mlp\.width: is 40, the plan's model has 48"):
        run_training(plan_of(source), options(tmp_path, tmp_path), shown=False)


def test_a_run_that_goes_on_takes_no_weights_from_elsewhere(source: Path, run: Path) -> None:
    with pytest.raises(InputError, match="is given with --resume"):
        run_training(plan_of(source), options(run, source, resume=True, steps=2), shown=False)


def test_a_pipeline_of_sharded_stages_begins_as_one_process_does(source: Path, tmp_path: Path) -> None:
    one = Degrees(micro_batch=8, num_micro_batches=1)
    six = Degrees(pp=3, dp_shard=2, zero=Zero.PARAMETERS, micro_batch=1, num_micro_batches=4)
    losses = []
    for number, layout in enumerate((one, six)):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        plan = make_plan(read_config_file(source), layout)
        summary = run_training(plan, options(run_dir, source), shown=False)
        assert summary is not None
        losses.append(summary.first_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
