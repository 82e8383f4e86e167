"""`plan web` with the planner behind it: what the form asks for is what `plan compare` would answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.commands.hardware.web import answers, compared, planned, typed
from planner.foundation.errors import InputError
from planner.report.web.app import SupersededError, listen
from planner.report.web.requests import Asked, arguments, read_query
from planner.sizing import search
from planner.strategy.plan import decode_plan
from tests.html_reader import Reader

SMALL = {
    "model": "tinyllama-1.1b", "seq": "2048", "batch": "64", "tokens": "1B", "device": "",
    "instance": "2*aws/p4d.24xlarge", "provider": "aws", "nodes": "1",
}  # fmt: skip


def asked(**values: str) -> Asked:
    return read_query([*{**SMALL, **values}.items()])


def never() -> bool:
    return False


def test_the_answer_is_that_of_plan_compare() -> None:
    found = compared(asked(), None, never, {})
    line = ["compare", *arguments(asked()), "--json"]
    result = CliRunner().invoke(cli, line, prog_name="plan")
    assert result.exit_code == 0, result.output
    options = json.loads(result.stdout)["options"]
    assert [o["cluster"] for o in options] == [o.cluster for o in found.options]
    assert [o["cost_usd"] for o in options] == [o.cost_usd for o in found.options]
    assert {o.nodes for o in found.options} == {1, 2}


def test_the_page_of_plan_compare_is_a_file(tmp_path: Path) -> None:
    page = tmp_path / "choices.html"
    line = ["compare", *arguments(asked()), "--html", str(page), "--json"]
    result = CliRunner().invoke(cli, line, prog_name="plan")
    assert result.exit_code == 0, result.output
    document = Reader(page.read_text(encoding="utf-8"))
    rows = [value for value in document.ids if value.startswith("o") and value[1:].isdigit()]
    assert len(rows) == len(json.loads(result.stdout)["options"]) > 2
    assert "The cheapest way that keeps a deadline of 30 days is " in document.text
    assert not [value for _, name, value in document.attributes if name == "href" and value[:1] not in "#d"]


def test_limits_tokens_and_pricing_change_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    known: search.Known = {}
    compared(asked(), None, never, known)
    other = asked(deadline="3d", budget="2000", tokens="3B", pricing="on-demand")
    fresh = compared(other, None, never, {})

    def searched(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(search, "scout_device", searched)
    assert compared(other, None, never, known) == fresh
    with pytest.raises(AssertionError, match="searched again"):
        compared(asked(seq="1024"), None, never, known)


def test_a_search_that_is_overtaken_stops() -> None:
    with pytest.raises(SupersededError):
        compared(asked(), None, lambda: True, {})


def test_the_plan_of_an_option_is_a_whole_plan() -> None:
    option = compared(asked(), None, never, {}).options[0]
    plan = decode_plan(json.loads(planned(asked(), option, None)), source="plan.json")
    assert plan.cluster.name == option.cluster and plan.strategy.degrees.world == option.devices
    assert plan.estimate.step_time_s <= option.step_time_s * 1.001


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seq", "many", "'--seq'"), ("seq", "0", "'--seq'"), ("tokens", "lots", "--tokens: 'lots'"),
        ("deadline", "soon", "--deadline: 'soon'"), ("budget", "-5", "--budget: '-5'"),
        ("method", "wish", "'--method'"), ("pricing", "free", "'--pricing'"), ("nodes", "1.5", "'--nodes'"),
        ("provider", "awz", "--provider"), ("tokens", "--help", "--tokens: '--help'"),
    ],
)  # fmt: skip
def test_bad_input_has_the_words_of_the_command_line(field: str, value: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        compared(asked(**{field: value}), None, never, {})


def test_the_form_at_first_is_one_that_compare_takes() -> None:
    assert typed(arguments(read_query([])))["model"] == "llama-3-8b"
    known = answers((), None)
    assert "llama-3-8b" in known.models and "h100-sxm-80gb" in known.choices()["Devices"]


def test_a_port_that_is_taken_is_an_error_of_the_user() -> None:
    taken = listen(0)
    port = taken.getsockname()[1]
    result = CliRunner().invoke(cli, ["web", "--no-open", "--port", str(port)], prog_name="plan")
    taken.close()
    assert result.exit_code == 2
    assert f"--port: {port} on 127.0.0.1 cannot be had" in result.output


def test_a_model_that_cannot_be_read_is_told_before_serving() -> None:
    result = CliRunner().invoke(cli, ["web", "--no-open", "--port", "0", "--model", "no/such.toml"])
    assert result.exit_code == 2 and "no/such.toml" in result.output


def test_the_command_prints_its_address_serves_and_ends() -> None:
    line = [sys.executable, "-m", "planner.cli", "web", "--no-open", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", ran.stdout.readline())
        assert address is not None
        with urllib.request.urlopen(
            f"{address[0]}comparison.csv?{'&'.join(f'{k}={v}' for k, v in SMALL.items())}"
        ) as a:
            assert a.status == 200 and a.read().count(b"\n") > 2
        ran.send_signal(signal.SIGINT)
        assert ran.wait(timeout=30) in (0, 130)
        assert "Traceback" not in ran.stderr.read()
