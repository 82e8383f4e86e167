"""Measures the structure of the code: its size, its rooms, who imports whom, and how its docstrings begin.

    python -m bench.structure [--list NAME]

Imports count wherever they stand: at the top of a module, inside a function, or for type checking alone. A
single importer is a module that exactly one other module of the product imports. `entered by one solve`
counts
the modules of which any function runs while `plan solve` plans Llama-3-8B on 8 H100. NAME lists the members
of
one figure: flat, long, single, circles, questions.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import networkx as nx

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("planner", "runtime")
LONGEST_LINES = 500
ENTRANCES = ("__init__", "__main__", "cli")
"""Modules that may lie flat in a package, and that need no importer."""
QUESTION = re.compile(r"(What|Whether|Which|How)\b")
SOLVE = [
    "solve",
    "--model",
    "llama-3-8b",
    "--cluster",
    "1x8:h100-sxm-80gb",
    "--seq",
    "8192",
    "--batch",
    "128",
    "--json",
]
TRACE = """
import json, sys, threading
entered = set()
def called(frame, event, argument):
    if event == "call":
        entered.add(str(frame.f_globals.get("__name__", "")))
from planner.cli import main
sys.setprofile(called); threading.setprofile(called)
sys.argv[0] = "plan"
try:
    main()
finally:
    sys.setprofile(None)
    names = sorted(n for n in entered if n.split(".")[0] in ("planner", "runtime"))
    sys.stderr.write("\\n" + json.dumps(names))
"""


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name; a package is its `__init__`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The product's modules that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known:
                    yield whole
                elif node.module in known:
                    yield node.module


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Docstrings of a module's functions and classes, its own, and those beneath constants and fields."""
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for statement in body if isinstance(body, list) else ():
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip()


def entered_by_solve() -> list[str]:
    """Modules of which a function ran in one `plan solve`."""
    done = subprocess.run(
        [sys.executable, "-c", TRACE, *SOLVE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names: list[str] = json.loads(done.stderr.rsplit("\n", 1)[1])
    return names


@click.command()
@click.option(
    "--list", "listed", type=click.Choice(["flat", "long", "single", "circles", "questions", "solve"])
)
def main(listed: str | None) -> None:
    """Prints the figures of the code's structure."""
    known = modules()
    trees = {name: ast.parse(path.read_text()) for name, path in known.items()}
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    graph.add_edges_from(
        (name, other) for name, tree in trees.items() for other in imports(name, tree, known) if other != name
    )
    lines = {name: len(path.read_text().splitlines()) for name, path in known.items()}
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    flat = [
        n for n, path in known.items() if n.count(".") == 1 and path.stem not in ENTRANCES
    ]  # rooms are packages: their path's stem is __init__
    single = [
        name
        for name, path in known.items()
        if graph.in_degree(name) == 1 and path.stem not in ENTRANCES and ".commands." not in name
    ]
    questions = [
        f"{name}: {text.splitlines()[0]}"
        for name, tree in trees.items()
        for text in docstrings(tree)
        if QUESTION.match(text)
    ]
    solve = entered_by_solve()
    members = {
        "flat": flat,
        "long": [f"{n} {lines[n]}" for n in known if lines[n] > LONGEST_LINES],
        "single": [f"{name} <- {next(iter(graph.predecessors(name)))}" for name in single],
        "circles": [" ".join(circle) for circle in circles],
        "questions": questions,
        "solve": solve,
    }
    if listed:
        click.echo("\n".join(members[listed]))
        return
    for package in PACKAGES:
        own = [name for name in known if name.split(".")[0] == package]
        click.echo(
            f"{package}: {len(own)} modules, {sum(lines[n] for n in own)} lines,"
            f" {sum(n.startswith(package + '.') for n in flat)} flat"
        )
    tests = list((ROOT / "tests").rglob("*.py"))
    click.echo(f"tests: {len(tests)} files, {sum(len(p.read_text().splitlines()) for p in tests)} lines")
    click.echo(f"both: {len(known)} modules, {sum(lines.values())} lines, longest {max(lines.values())}")
    click.echo(f"with a single importer, commands aside: {len(single)}")
    click.echo(f"entered by one solve: {len(solve)}")
    click.echo(f"circles of imports: {len(circles)}")
    click.echo(f"docstrings that begin with What, Whether, Which or How: {len(questions)}")


if __name__ == "__main__":
    main()
