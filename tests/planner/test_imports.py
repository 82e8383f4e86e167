"""What may import what, and that planning needs no torch: by reading the source, and by running it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "torch",
    "numpy",
    "pandas",
    "networkx",
    "pulp",
    "highspy",
    "pydantic",
    "rich",
    "scipy",
    "altair",
    "plotly",
    "jinja2",
    "starlette",
    "uvicorn",
    "yaml",
}
MEETS_RUNTIME = {
    *("profile", "profile_ranks", "profile_request", "profile_session"),
    *("train", "demo", "rehearse", "rehearsing", "trace", "export_weights", "replan_run"),
}
"""Commands whose bodies may import runtime; nothing else in planner may."""

NOT_AT_IMPORT = {"TYPE_CHECKING", "__name__"}
"""Conditions of blocks that do not run when a module is imported."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module]
    return []


def at_import(path: Path) -> list[str]:
    """Modules that importing a file imports; functions, TYPE_CHECKING and `main` guards do not count."""
    found: list[str] = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and NOT_AT_IMPORT.intersection(ast.unparse(node.test).split()):
            return
        found.extend(imported(node))
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def anywhere(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [name for node in ast.walk(tree) for name in imported(node)]


def top(name: str) -> str:
    return name.split(".")[0]


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport os\nif TYPE_CHECKING:\n    import torch\n"
        "try:\n    import numpy.linalg\nexcept ImportError:\n    pass\ndef f():\n    import pandas\n"
        "class C:\n    import pulp\n"
    )
    assert at_import(file) == ["typing", "os", "numpy.linalg", "pulp"]
    assert {"torch", "pandas"} <= set(anywhere(file))


@pytest.mark.parametrize("path", sources("planner"), ids=module_name)
def test_planner_never_imports_torch_or_runtime(path: Path) -> None:
    names = {top(name) for name in at_import(path)}
    assert not names & {"torch", "runtime"}
    if not ("commands" in path.parts and path.stem in MEETS_RUNTIME):
        assert not {top(name) for name in anywhere(path)} & {"torch", "runtime"}


@pytest.mark.parametrize("path", [p for p in sources("planner") if "report" not in p.parts], ids=module_name)
def test_planner_imports_heavy_packages_only_in_functions(path: Path) -> None:
    assert not {top(name) for name in at_import(path)} & HEAVY


@pytest.mark.parametrize("path", sources("planner/commands"), ids=module_name)
def test_a_command_imports_the_planner_only_in_its_body(path: Path) -> None:
    allowed = ("planner.commands", "planner.foundation.errors", "planner.cli")
    assert all(name.startswith(allowed) for name in at_import(path) if top(name) == "planner")


def test_the_command_line_imports_click_and_errors_at_most() -> None:
    names = at_import(ROOT / "planner" / "cli.py")
    assert [name for name in names if top(name) == "planner"] == ["planner.foundation.errors"]
    assert {top(name) for name in names} - sys.stdlib_module_names == {"click", "planner"}


@pytest.mark.parametrize("path", sources("planner/cost"), ids=module_name)
def test_the_cost_model_never_imports_the_search(path: Path) -> None:
    above = ("planner.search", "planner.export", "planner.report", "planner.commands", "planner.cli")
    assert not [name for name in anywhere(path) if name.startswith(above)]


@pytest.mark.parametrize("path", sources("planner/search"), ids=module_name)
def test_the_search_never_imports_what_stands_above_it(path: Path) -> None:
    above = ("planner.export", "planner.report", "planner.commands", "planner.cli")
    assert not [name for name in anywhere(path) if name.startswith(above)]


@pytest.mark.parametrize("path", sources("runtime"), ids=module_name)
def test_the_runtime_never_imports_the_search(path: Path) -> None:
    assert not [name for name in anywhere(path) if name.startswith(("planner.search", "planner.export"))]
    assert not [name for name in at_import(path) if name.startswith(("planner.commands", "planner.cli"))]


def run_python(code: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, json\nfrom planner.cli import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print(); print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    loaded = set(json.loads(run_python(code).splitlines()[-1]))
    assert "click" in loaded
    assert not loaded & HEAVY
    assert "runtime" not in loaded


BLOCKED = """
import sys, json
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'runtime'):
            raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Block())
from planner.cli import cli
codes = []
for line in json.loads(sys.argv[1]):
    try:
        cli.main(line)
    except SystemExit as stop:
        codes.append(stop.code)
print()
print(json.dumps(codes))
"""

PROBLEM = ["--model", "llama-3-8b", "--cluster", "1x8:h100", "--seq", "2048", "--batch", "16"]
PLANNING = [
    ["list", "models"],
    ["list", "devices"],
    ["show", "model", "llama-3-8b"],
    ["show", "cluster", "16*p5.48xlarge"],
    ["doctor"],
]
PLANNED = {
    "estimate": ["estimate", *PROBLEM, "--fix", "tp=8"],
    "solve": ["solve", *PROBLEM, "--fix", "pp=1", "-o", "PLAN"],
    "explain": ["explain", "PLAN"],
    "check": ["check", "PLAN"],
    "report": ["report", "PLAN"],
    "export": ["export", "PLAN", "--to", "slurm", "-o", "JOB"],
    "import": ["import", "DS", "--from", "deepspeed", *PROBLEM[:6], "--no-best"],
}
"""Planning commands in the order in which they work on one plan; those that exist are run."""


def test_every_planning_command_runs_without_torch(tmp_path: Path) -> None:
    lines = [*PLANNING]
    if "solve" in COMMANDS:
        lines += [line for name, line in PLANNED.items() if name in COMMANDS]
    plan = str(tmp_path / "plan.json")
    config, job = tmp_path / "ds_config.json", str(tmp_path / "job")
    config.write_text(json.dumps({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 1}))
    files = {"PLAN": plan, "DS": str(config), "JOB": job}
    lines = [[files.get(word, word) for word in line] for line in lines]
    answer = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(lines)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    codes = json.loads(answer.stdout.splitlines()[-1])
    assert codes == [0] * len(lines), (list(zip(codes, lines, strict=False)), answer.stderr)
