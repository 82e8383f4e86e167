"""The ground: pins cover what is required, the readme's commands exist, nothing names a machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import click
import pytest

from planner.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    line.split("==")[0].lower().replace("_", "-"): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def test_every_requirement_is_pinned_exactly() -> None:
    project = PYPROJECT["project"]
    required = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    for requirement in required:
        name = re.split(r"[<>=!~ ]", requirement)[0].lower()
        assert re.fullmatch(r"[0-9][0-9a-z.]*", PINS[name]), requirement


def test_planning_does_not_require_torch() -> None:
    names = [re.split(r"[<>=!~ ]", requirement)[0] for requirement in PYPROJECT["project"]["dependencies"]]
    assert not {"torch", "tokenizers", "safetensors"} & set(names)
    assert len(names) <= 13  # the last of them reads and writes the YAML of engines and schedulers


def readme_lines() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return sorted({line.split("#")[0].strip() for line in lines if line.startswith("plan ")})


@pytest.mark.parametrize("line", readme_lines())
def test_a_command_of_the_readme_exists_with_its_flags(line: str) -> None:
    _, name, *words = shlex.split(line)
    assert name in COMMANDS
    module, attribute = COMMANDS[name][0].split(":")
    command: click.Command = getattr(import_module(module), attribute)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= known


def test_no_file_names_a_machine_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    words = ("/work" + "/", "shared" + "/data", "pypi" + ".org", "/opt/" + "wheels", "file" + ":///opt")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.stat().st_size < 2_000_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [word for word in words if word in text], name
