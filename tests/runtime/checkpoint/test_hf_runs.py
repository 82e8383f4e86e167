"""Runs that begin with a Hugging Face folder, and end as one."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planner.cli import cli
from planner.foundation.errors import InputError
from planner.model.huggingface import read_config_file
from planner.model.spec import ModelSpec
from planner.model.workload import AdapterModules, Adapters
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Zero
from runtime.checkpoint.huggingface import read_adapters
from runtime.model.huggingface.names import names_of
from runtime.train.data.documents import shipped_corpus
from runtime.train.data.prepare import DataOptions
from runtime.train.options import TrainOptions
from runtime.train.train import run_training
from tests.plans import make_plan
from tests.runtime.hf_models import make_model

LAYOUT = Degrees(tp=2, micro_batch=2, num_micro_batches=2)
UNCHANGED = 1e-30
"""A learning rate that changes no weight."""


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Models hold themselves by their hooks, and ranks that later tests fork would inherit them."""
    yield
    gc.collect()


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


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt2"])
def test_adapters_are_merged_into_the_weights_that_they_stand_beside(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of latent attention, and of projections that the family keeps in one matrix."""
    base, out, run_dir = tmp_path / "base", str(tmp_path / "out"), tmp_path / "run"
    make_model(family, vocab_size=258).save_pretrained(base)
    run_dir.mkdir()
    plan = make_plan(read_config_file(base), LAYOUT, adapters=Adapters(rank=2, modules=AdapterModules.ALL))
    run_training(plan, options(run_dir, base, steps=2, lr=1e-2, lora_alpha=6.0), shown=False)
    assert plan_command("export-weights", str(run_dir), "-o", out) == 2
    assert "name their folder with --merge-adapters" in " ".join(capsys.readouterr().err.split())
    other = make_model(family, vocab_size=258)
    other.get_input_embeddings().weight.data.mul_(2.0)
    other.save_pretrained(tmp_path / "other")
    merged = ("--merge-adapters", str(tmp_path / "other"))
    assert plan_command("export-weights", str(run_dir), "-o", out, *merged) == 2
    assert "trained beside weights" in capsys.readouterr().err
    assert plan_command("export-weights", str(run_dir), "-o", out, "--merge-adapters", str(base)) == 0
    if family == "deepseek_v3":
        _begin_with_its_adapters(run_dir, base, tmp_path / "next")
    tokens = torch.randint(258, (2, 24), generator=torch.Generator().manual_seed(3))
    (path,) = [each for each in (run_dir / "checkpoints").iterdir() if each.is_dir()]
    with torch.no_grad():
        plain = make_model(family, vocab_size=258).from_pretrained(base).eval()
        whole = plain.from_pretrained(out).eval()(tokens).logits
        assert (plain(tokens).logits - whole).abs().max() > 1e-3, "training changed something"
        _put_beside(plain, read_adapters(path), read_config_file(base), scale=3.0)
        torch.testing.assert_close(plain(tokens).logits, whole, rtol=1e-5, atol=1e-5)


def _begin_with_its_adapters(run_dir: Path, base: Path, other: Path) -> None:
    """A run in another layout that begins with a run's files for PEFT, and ends with the same."""
    adapters = run_dir / "adapter"
    config = json.loads((adapters / "adapter_config.json").read_text())
    latent = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
    assert config["target_modules"] == sorted(["down_proj", "gate_proj", *latent, "up_proj"])
    plan = make_plan(
        read_config_file(base),
        Degrees(pp=3, micro_batch=2, num_micro_batches=2),
        adapters=Adapters(rank=2, modules=AdapterModules.ALL),
    )
    other.mkdir()
    given = options(other, base, lora_alpha=6.0, adapters_from=str(adapters))
    run_training(plan, given, shown=False)
    before, after = (load_file(each / "adapter_model.safetensors") for each in (adapters, other / "adapter"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    changed = dataclasses.replace(given, lora_alpha=4.0, run_dir=str(other / "again"))
    with pytest.raises(
        InputError, match=r"by 3, the run scales its adapters by 2\. Fix: give --lora-alpha 6"
    ):
        run_training(plan, changed, shown=False)
    with pytest.raises(InputError, match="takes them from the run's own checkpoint"):
        run_training(plan, dataclasses.replace(given, resume=True), shown=False)


def _put_beside(model: Any, halves: dict[str, torch.Tensor], spec: ModelSpec, scale: float) -> None:
    """Adds the results of adapters to those of a transformers model's own projections."""
    names = names_of(spec)
    for name in [n.removesuffix(".lora_a") for n in halves if n.endswith(".lora_a")]:
        a, b = halves[f"{name}.lora_a"], halves[f"{name}.lora_b"]
        _, layer, inner = name.split(".", 2)
        fused = next((f for f in names.fused if inner in f.members), None)
        theirs = names.layer.format(layer) + (fused.name if fused else names.block[inner])
        first, last = 0.0, 1.0
        if fused:
            place = fused.members.index(inner)
            first, last = place / len(fused.members), (place + 1) / len(fused.members)

        def beside(
            _module: Any, args: Any, y: Any, *, a: Any = a, b: Any = b, cut: Any = (first, last)
        ) -> Any:
            rows = [round(end * y.shape[-1]) for end in cut]
            y[..., rows[0] : rows[1]] += scale * (args[0] @ a.T) @ b.T
            return y

        model.get_submodule(theirs).register_forward_hook(beside)
