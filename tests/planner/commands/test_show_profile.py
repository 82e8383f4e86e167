"""`plan show profile`, `plan list profiles` and what `plan doctor` says of profiles."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.commands.hardware.show_profile import MOST_ROWS, find_profile
from planner.cost.constants import MEASURED, MEMORY_SPECS, TIME_SPECS, spec_of
from planner.foundation.decode import to_json
from planner.hardware.catalog import load_model, profile_files
from planner.profile.coverage import noisy
from planner.profile.profile import FamilyFit, LayerKind, Profile, load_profile

NAMES = [path.stem for path in profile_files()]
CPU = next(p for p in map(load_profile, profile_files()) if p.device == "cpu")
CPU_NAME = next(path.stem for path in profile_files() if load_profile(path) == CPU)
WIDTH = 120


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def text_of(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def document_of(*words: str) -> Any:
    return json.loads(text_of(*words, "--json"))


def written(profile: Profile, folder: Path) -> str:
    path = folder / "mine.json"
    path.write_text(to_json(profile), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_profile_is_shown_whole(name: str) -> None:
    profile = find_profile(name)
    text = text_of("show", "profile", name)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert profile.name in text and profile.created in text
    for constant in profile.constants:
        assert constant.name in text and spec_of(constant.name).text(constant.value) in text
    document = document_of("show", "profile", name)
    assert len(document["layers"]) == len(profile.layers)
    assert document["measured"] == profile.measured
    assert all(constant["meaning"] for constant in document["constants"])


def test_layers_are_told_with_rate_and_spread() -> None:
    lines = text_of("show", "profile", CPU_NAME).splitlines()
    sample = next(s for s in CPU.layers if s.kind is LayerKind.BLOCK and s.recompute == "none" and s.tp == 2)
    model = load_model("shardwise-demo")
    block, tokens = model.segments[0].block, sample.micro_batch * sample.seq
    flops = block.matmul_flops_forward(tokens) + block.attention_flops_forward(tokens, sample.seq)
    rate = 3 * flops / sample.tp / (sample.forward_s + sample.backward_s)
    shown = next(line for line in lines if f"{rate / 1e9:.3g} GFLOP/s" in line)
    assert shown.startswith("tp 2") and f"{sample.micro_batch} x {sample.seq}" in shown
    assert "block of shardwise-demo, fp32" in lines


def test_collectives_are_told_as_bandwidth_by_size() -> None:
    document = document_of("show", "profile", CPU_NAME)
    for sample, shown in zip(CPU.comms, document["comms"], strict=True):
        ranks = sample.ranks
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "p2p": 1.0}.get(str(sample.op), (ranks - 1) / ranks)
        assert shown["bus_bytes_per_s"] == pytest.approx(share * sample.bytes / sample.seconds)
    text = text_of("show", "profile", CPU_NAME)
    assert "groups of 2, 2 at once" in text and "reduce-scatter" in text and "16 MiB" in text


def test_what_is_doubtful_is_told(tmp_path: Path) -> None:
    layers = tuple(dataclasses.replace(s, spread=0.01) for s in CPU.layers)
    loud = (dataclasses.replace(layers[0], spread=0.4), *layers[1:])
    odd = dataclasses.replace(
        CPU,
        layers=loud,
        comms=(),
        rates=(),
        skipped=("head at tp 8: too little memory",),
        created="2020-01-01T00:00:00Z",
    )
    assert noisy(odd) == [loud[0]]
    text = text_of("show", "profile", written(odd, tmp_path))
    assert "1 embedding" in text and "Skipped: head at tp 8" in text and "months ago" in text
    assert " 40 % !" in text
    document = document_of("show", "profile", written(odd, tmp_path))
    assert document["noisy_samples"] == 1 and len(document["warnings"]) == 3
    quiet = dataclasses.replace(odd, layers=layers, skipped=(), created=f"{datetime.date.today()}T00:00:00Z")
    assert "mind" not in text_of("show", "profile", written(quiet, tmp_path)).split()


def test_many_cases_that_were_skipped_for_one_reason_are_told_together(tmp_path: Path) -> None:
    left = (*(f"block tp{n}: no time was left" for n in range(9)), "21 more cases: no time was left")
    skipped = (*left, "copies: pinned: no accelerator", "odd", "2 more cases: no peace")
    fit = FamilyFit(family="layers", cases=12, taken=9, error=0.04)
    path = written(dataclasses.replace(CPU, skipped=skipped, fits=(fit,)), tmp_path)
    found = document_of("show", "profile", path)["warnings"]
    assert "Skipped 30 cases: no time was left (block tp0 and so on)." in found
    assert "Skipped 2 cases: no peace." in found
    assert "Skipped: copies: pinned: no accelerator" in found and "Skipped: odd" in found
    assert "9 of 12 cases measured; left out, a sample is predicted 4.0 % off" in text_of(
        "show", "profile", path
    )


def test_a_long_profile_says_what_it_leaves_out(tmp_path: Path) -> None:
    many = tuple(dataclasses.replace(s, seq=s.seq * 2**n) for n in range(3) for s in CPU.layers)
    text = text_of("show", "profile", written(dataclasses.replace(CPU, layers=many, rates=()), tmp_path))
    assert f"and {len(many) - MOST_ROWS} more layer samples" in text
    assert text.count(" x 256") + text.count(" x 512") + text.count(" x 1,024") == MOST_ROWS


def test_names_are_forgiving_and_files_are_taken(tmp_path: Path) -> None:
    assert find_profile(CPU_NAME.upper().replace("-", "_")) == CPU
    assert find_profile(written(CPU, tmp_path)) == CPU


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("h100-sxm-80gb-reference", "Did you mean h100-sxm-80gb-reference-runs"),
        ("cpu", "plan list profiles"),
        ("cpu-xenon", f"Did you mean {CPU_NAME}"),
        ("zzz", "plan list profiles"),
        ("nowhere.json", "no such file"),
        ("/", "/"),
        ("", "plan list profiles"),
        ("x" * 5000, "plan list profiles"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(name: str, told: str) -> None:
    result = run("show", "profile", name)
    assert result.exit_code == 2 and told in result.stderr


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"layers": []}')
    result = run("show", "profile", str(path))
    assert result.exit_code == 2 and "schema_version" in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("show device h100 --html x.html", "--html belong to `show profile`"),
        ("show model gpt-2-124m --model x", "belong to `show profile`"),
        (f"show profile {NAMES[0]} --seq 4", "--seq belongs to `show model`"),
        (f"show profile {NAMES[0]} --arch llama", "--arch belongs"),
        (f"show profile {NAMES[0]} --model gpt-99", "no model 'gpt-99'"),
    ],
)
def test_options_of_other_entries_are_refused(words: str, told: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2 and told in result.stderr


def test_a_model_outside_the_catalog_names_its_layers(tmp_path: Path) -> None:
    own = tuple(dataclasses.replace(s, shape_key=s.shape_key.replace("h256", "h264")) for s in CPU.layers)
    path = written(dataclasses.replace(CPU, layers=own), tmp_path)
    text = text_of("show", "profile", path)
    assert (
        "block h264-a8x32-kv4-g704-silu-rmsnorm-b000, fp32" in text and "FLOP/s" not in text.split("head")[1]
    )
    folder = tmp_path / "own"
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 264, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 512,
        "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    named = document_of("show", "profile", path, "--model", str(folder))
    assert named["models"] == ["own"]
    assert {layer["class"] for layer in named["layers"]} == {
        "embedding of own",
        "block of own",
        "head of own",
    }


def test_the_page_is_written_where_asked(tmp_path: Path) -> None:
    page = tmp_path / "profile.html"
    result = run("show", "profile", CPU_NAME, "--html", str(page))
    assert result.exit_code == 0 and "wrote" in result.stderr
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run("show", "profile", CPU_NAME, "--html", str(tmp_path)).exit_code == 2


def test_the_list_says_what_each_speaks_for() -> None:
    rows = {row["name"]: row for row in document_of("list", "profiles")["profiles"]}
    assert sorted(rows) == sorted(NAMES)
    cpu = rows[CPU_NAME]
    assert cpu["models"] == ["shardwise-demo"] and cpu["precisions"] == ["fp32"] and cpu["measured"]
    assert cpu["layer_samples"] == len(CPU.layers) and cpu["age"]
    assert rows["h100-sxm-80gb-reference-runs"]["fitted_runs"] == 16
    text = text_of("list", "profiles")
    assert max(map(len, text.splitlines())) <= WIDTH
    unwrapped = " ".join(text.split())
    for part in ("fitted to 16 runs", "layers of", "shardwise-demo", "torch 2."):
        assert part in unwrapped


def test_every_constant_that_a_profile_can_hold_has_a_meaning() -> None:
    names = {*TIME_SPECS, *MEMORY_SPECS, *MEASURED}
    assert all(spec_of(name).description for name in names)
    assert not set(MEASURED) & {*TIME_SPECS, *MEMORY_SPECS}
    assert spec_of("unheard_of").description == ""
    root = Path(__file__).parents[3]
    asked = re.compile(r"constant\(\s*\"([a-z_]+)\"")
    sources = [path for folder in ("planner", "runtime") for path in (root / folder).rglob("*.py")]
    found = {name for path in sources for name in asked.findall(path.read_text(encoding="utf-8"))}
    assert "gemm_flops" in found and all(spec_of(name).description for name in found)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("gemm_flops", 6.94e10, "69.4 GFLOP/s"),
        ("memory_bytes_per_s", 3.35e12, "3.35 TB/s"),
        ("context_bytes", 2.0**30, "1 GiB"),
        ("grad_bytes", 4.0, "4"),
        ("step_s", 0.0135, "13.5 ms"),
        ("step_s", 0.0, "0"),
        ("clip_s_per_param", 2.9e-10, "2.9e-10 s a parameter"),
        ("gemm_scale", 1.0818, "1.082"),
    ],
)
def test_constants_are_told_in_their_units(name: str, value: float, told: str) -> None:
    assert spec_of(name).text(value) == told


def test_the_doctor_says_whether_a_profile_speaks_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, str]:
        findings = document_of("doctor")["findings"]
        return next(finding for finding in findings if finding["what"] == "profile")

    monkeypatch.setattr("planner.commands.running.doctor._torch_facts", lambda: None)
    monkeypatch.setattr("planner.hardware.local_machine.accelerators", list)
    monkeypatch.setattr("planner.hardware.local_machine.cpu_title", lambda: "Z80")
    other = found()
    assert other["state"] == "note" and "this is Z80" in other["detail"] and "plan profile" in other["fix"]
    monkeypatch.setattr(
        "planner.hardware.local_machine.accelerators", lambda: [("NVIDIA H100 80GB HBM3", 81559)]
    )
    fitted = found()
    assert fitted["state"] == "note" and "fitted to runs on h100-sxm-80gb" in fitted["detail"]
    monkeypatch.setattr("planner.hardware.local_machine.accelerators", lambda: [("NVIDIA H200", 143771)])
    none = found()
    assert "none is shipped" in none["detail"] and "plan profile" in none["fix"]


def test_the_readme_has_a_command_for_every_shipped_profile_and_all_of_them_parse() -> None:
    text = (Path(__file__).parents[3] / "profiles" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for name in NAMES:
        assert any(f"`{name}.json`" in row for row in rows)
    commands = [
        command.split() for command in re.findall(r"`plan ((?:profile|calibrate) [^`]+ -o [^`]+)`", text)
    ]
    assert len(commands) == 4
    for name, *words in commands:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        context = command.make_context(name, words)
        assert str(context.params["output"]).startswith("profiles/measured/")
