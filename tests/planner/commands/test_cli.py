"""The command line: help of every command, exit codes, JSON alone on stdout, no traceback for a user."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from planner.cli import COMMANDS, cli
from planner.commands.shared.options import ProblemInputs, ProblemOptions, load_problem, problem_options
from planner.foundation.errors import CheckError, InfeasibleError, InputError, Problem
from planner.model.workload import Precision


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="plan")


def run_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def command(name: str) -> click.Command:
    module, attribute = COMMANDS[name][0].split(":")
    found: click.Command = getattr(importlib.import_module(module), attribute)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: plan {name}")
    assert command(name).help
    assert (
        COMMANDS[name][1] in run("--help").stdout.replace("\n          ", " ") or len(COMMANDS[name][1]) > 60
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    options = [parameter for parameter in command(name).params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options if not option.hidden)


def test_help_and_no_arguments() -> None:
    assert run("--help").exit_code == 0
    assert run("-h").stdout == run("--help").stdout
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lst"], "Did you mean 'list'"),
        (["frobnicate"], "Legal here: demo, list"),
        (["--frobnicate"], "No such option"),
        (["list"], "models"),
        (["list", "model"], "models"),
        (["list", "models", "--jsn"], "--json"),
        (["show", "model"], "NAME"),
        (["show", "thing", "x"], "model"),
        (["show", "model", "lama-3-8b"], "llama-3-8b"),
        (["show", "model", "./absent/config.json"], "no such file"),
        (["show", "model", "x" * 5000], "neither a name nor a path"),
        (["show", "model", "gpt2", "--seq", "0"], "x>=1"),
        (["show", "device", "h100", "--seq", "8"], "--seq"),
        (["show", "device", "h101"], "h100"),
        (["show", "instance", "p5.48xlage"], "p5.48xlarge"),
        (["show", "cluster", "0x8:h100"], "1 to 1000000"),
        (["show", "cluster", ""], "NODESxGPUS"),
        (["check"], "PLAN"),
        (["check", "absent.json"], "no such file"),
        (["check", "/dev/zero"], "a file was expected"),
    ],
)
def test_wrong_use_is_exit_2_with_a_clear_text_on_stderr(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema_version": 99}', '{"schema_version": true}', '{"a": ' * 50_000]
)
def test_a_broken_plan_is_exit_2(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    result = run("check", str(file))
    assert result.exit_code == 2
    assert "plan.json" in result.stderr and len(result.stderr) < 3000


def test_all_problems_are_listed_each_on_its_line(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": -1, "vocab_size": "many"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("show", "model", str(tmp_path))
    lines = result.stderr.splitlines()
    assert result.exit_code == 2
    assert len(lines) == 5
    assert all(line.startswith("error: ") and "config.json: " in line for line in lines)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Makes `plan check` raise what a test puts into the list."""
    errors: list[BaseException] = []

    def fail(path: Path) -> None:
        raise errors[0]

    monkeypatch.setattr("planner.strategy.plan.load_plan", fail)
    yield errors


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError(Problem(where="a", fault="b.")), 2, "error: a: b."),
        (InfeasibleError("nothing fits"), 3, "error: nothing fits"),
        (CheckError("does not hold"), 4, "error: does not hold"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("odd\nthing"), 1, "internal error: ValueError: odd thing (set SHARDWISE_DEBUG=1"),
        (RecursionError(), 1, "internal error: RecursionError"),
    ],
)
def test_errors_become_exit_codes(
    failing: list[BaseException], error: BaseException, code: int, said: str
) -> None:
    failing.append(error)
    result = run("check", "plan.json")
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_the_traceback_can_be_seen(failing: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    failing.append(ValueError("odd"))
    monkeypatch.setenv("SHARDWISE_DEBUG", "1")
    result = run("check", "plan.json")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_command_may_return_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command("check"), "callback", lambda **values: 5)
    assert run("check", "plan.json").exit_code == 5
    monkeypatch.setattr(command("check"), "callback", lambda **values: None)
    assert run("check", "plan.json").exit_code == 0


@pytest.mark.parametrize(
    ("what", "least"),
    [
        ("models", 25),
        ("devices", 40),
        ("instances", 182),
        ("networks", 20),
        ("schedules", 3),
        ("profiles", 0),
    ],
)
def test_lists(what: str, least: int) -> None:
    rows = run_json("list", what)[what]
    assert len(rows) >= least
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    text = run("list", what).stdout
    assert all(name in text for name in names)


def test_show_model_has_the_keys_of_the_contract() -> None:
    shown = run_json("show", "model", "llama-3-8b")
    keys = """name model_type params_total params_active params_embedding layers hidden heads kv_heads vocab
    flops_per_token_forward sources"""
    assert set(keys.split()) <= set(shown)
    assert shown["params_total"] == 8_030_261_248
    assert (shown["layers"], shown["heads"], shown["kv_heads"], shown["vocab"]) == (32, 32, 8, 128256)
    weights = 2 * (shown["params_active"] - shown["params_embedding"])
    assert 1.0 < shown["flops_per_token_forward"] / weights < 1.2
    longer = run_json("show", "model", "llama-3-8b", "--seq", "8192")
    assert longer["flops_per_token_forward"] > shown["flops_per_token_forward"]
    assert "8.03B" in run("show", "model", "llama-3-8b").stdout


def test_show_device_instance_and_cluster() -> None:
    assert run_json("show", "device", "h100")["peak_bf16_flops"] == 989e12
    assert run_json("show", "instance", "p5.48xlarge")["as_of"]
    cluster = run_json("show", "cluster", "16*p5.48xlarge")
    assert cluster["devices"] == 128 and cluster["price_usd_per_hour"] == pytest.approx(880.64)
    for kind, name in (("device", "h100"), ("instance", "p5.48xlarge"), ("cluster", "2x8:a100")):
        assert "sources" in run("show", kind, name).stdout or kind == "instance"


def test_doctor_reports_what_is_there() -> None:
    report = run_json("doctor")
    states = {finding["what"]: finding["state"] for finding in report["findings"]}
    assert report["can_plan"] and states["pydantic"] == states["HiGHS"] == "ok"
    assert report["machine"]["usable_cores"] >= 1 and report["machine"]["memory_bytes"] > 2**28


def test_doctor_without_torch_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    version = metadata.version

    def without_torch(name: str) -> str:
        if name in ("torch", "tokenizers", "safetensors"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_torch)
    result = run("doctor")
    assert result.exit_code == 0
    assert "shardwise[runtime]" in result.stdout
    report = run_json("doctor")
    assert report["can_plan"] and not report["can_train"] and report["torch"] is None


OPTIONS = ProblemOptions(
    model="llama-3-8b",
    cluster="1x8:h100",
    seq=2048,
    batch=16,
    tokens="300B",
    precision=None,
    optimizer="adamw",
    method="pretrain",
    profile=None,
    memory_limit="72GiB",
)


def changed(**values: Any) -> ProblemOptions:
    return ProblemOptions(**{**{n: getattr(OPTIONS, n) for n in OPTIONS.__dataclass_fields__}, **values})


def test_the_common_options_become_a_problem() -> None:
    problem = load_problem(OPTIONS)
    assert problem.model.name == "llama-3-8b" and problem.cluster.devices == 8
    assert problem.workload.tokens == 300 * 10**9 and problem.memory_limit_bytes == 72 * 2**30
    assert problem.workload.precision is Precision.BF16
    assert load_problem(changed(cluster="1x8:v100")).workload.precision is Precision.FP16
    assert load_problem(changed(cluster="1x8:v100", precision="fp32")).workload.precision is Precision.FP32


def test_all_faults_of_the_common_options_are_reported_at_once(tmp_path: Path) -> None:
    options = changed(
        model="gpt2",
        seq=2048,
        cluster="0x8:h100",
        tokens="many",
        memory_limit="0GiB",
        profile=tmp_path / "absent.json",
    )
    with pytest.raises(InputError) as caught:
        load_problem(options)
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for said in ("--seq", "1024", "--cluster", "--tokens", "--memory-limit", "absent.json"):
        assert said in text


def test_the_decorator_passes_options_json_and_the_commands_own() -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @click.option("--top", type=int, default=3)
    @problem_options
    def sample(options: ProblemOptions, as_json: bool, top: int) -> None:
        seen.update(options=options, as_json=as_json, top=top, problem=load_problem(options))

    words = [
        "--model",
        "gpt2",
        "--cluster",
        "1x8:h100",
        "--seq",
        "128",
        "--batch",
        "8",
        "--json",
        "--top",
        "5",
    ]
    result = CliRunner().invoke(sample, words)
    assert result.exit_code == 0, result.output
    assert (seen["as_json"], seen["top"], seen["options"].batch) == (True, 5, 8)
    assert isinstance(seen["problem"], ProblemInputs)
    for missing in ("--model", "--cluster", "--seq", "--batch"):
        index = words.index(missing)
        cut = words[:index] + words[index + 2 :]
        assert CliRunner().invoke(sample, cut).exit_code == 2
    for flag, value in (("--precision", "fp7"), ("--optimizer", "lion"), ("--method", "x"), ("--seq", "0")):
        assert CliRunner().invoke(sample, [*words, flag, value]).exit_code == 2


def test_the_entry_point_survives_a_closed_pipe() -> None:
    code = "from planner.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "list", "instances"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    text = process.stderr.read().decode()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in text
