"""Writes the answers of a fixed list of commands into a folder, and compares two such folders byte by byte.

    python -m bench.answers write FOLDER [--only NAME ...]
    python -m bench.answers compare BEFORE AFTER [--present] [--text]

A change of structure must leave every answer as it was. Write the answers of the code before and of the code
after (from its own checkout and environment), then compare. Each command runs in a process of its own, inside
the folder, with `--reproducible` where it searches, so that nothing in its output depends on the clock.
Documents (`.json`, exported files) must be equal; printed text (`.txt`) is shown as a difference to read.
"""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bench" / "data"
H100 = "h100-sxm-80gb"

SOLVE = {
    "llama-2-7b": "--model llama-2-7b --cluster 1x8:a100-sxm-40gb --seq 4096 --batch 64",
    "llama-3-8b": f"--model llama-3-8b --cluster 4x8:{H100}@ndr400x8 --seq 8192 --batch 512",
    "llama-3-8b-lora": f"--model llama-3-8b --cluster 1x8:{H100} --seq 2048 --batch 64 --method lora",
    "llama-3-8b-fp8": f"--model llama-3-8b --cluster 2x8:{H100} --seq 8192 --batch 256 --precision fp8",
    "llama-3-70b-slow": "--model llama-3-8b --cluster 2x8:a100-sxm-40gb@eth100 --seq 4096 --batch 64",
    "llama-3-70b": f"--model llama-3-70b --cluster 8x8:{H100} --seq 8192 --batch 256 --tokens 1T",
    "llama-3-70b-zero1": "--model llama-3-70b --cluster 8x8:a100-sxm-80gb --seq 4096 --batch 256"
    " --fix zero=1",
    "llama-3-70b-cost": "--model llama-3-70b --cluster 16*p5.48xlarge --seq 8192 --batch 512 --tokens 1T"
    " --objective cost --deadline 120",
    "llama-3-70b-megatron": f"--model llama-3-70b --cluster 8x8:{H100} --seq 8192 --batch 256"
    " --engine megatron",
    "llama-3-8b-torchtitan": f"--model llama-3-8b --cluster 2x8:{H100} --seq 8192 --batch 128"
    " --engine torchtitan",
    "gpt3-175b": "--model gpt3-175b --cluster 128x8:a100-sxm-80gb@hdr200x8 --seq 2048 --batch 1536",
    "mixed": "--model llama-2-70b --cluster 2x8:a100-sxm-80gb+2x8:h100-sxm-80gb --seq 4096 --batch 256",
    "gemma-3-27b": f"--model gemma-3-27b --cluster 4x8:{H100} --seq 8192 --batch 256 --fix pp=4",
    "mixtral": f"--model mixtral-8x7b --cluster 4x8:{H100} --seq 4096 --batch 256",
    "deepseek-v3": f"--model deepseek-v3 --cluster 32x8:{H100} --seq 4096 --batch 2048 --fix pp=8",
    "llama-3-405b": f"--model llama-3.1-405b --cluster 64x8:{H100} --seq 8192 --batch 512 --engine native",
    "long": f"--model llama-3-8b --cluster 4x8:{H100} --seq 131072 --batch 32",
    "offload": "--model llama-3-8b --cluster 1x8:a100-sxm-40gb --seq 4096 --batch 64 --memory-limit 20GiB",
    "infeasible": f"--model llama-3.1-405b --cluster 1x8:{H100} --seq 8192 --batch 64",
    "llama-2-7b-deepspeed": "--model llama-2-7b --cluster 2x8:a100-sxm-80gb --seq 4096 --batch 64"
    " --engine deepspeed",
    "local": "--model shardwise-demo --cluster local:4 --seq 256 --batch 16",
}
"""Arguments of `plan solve`, by the name of the answer."""

MAIN_PLAN = "llama-3-8b"
OTHER_PLAN = "llama-3-70b"

COMMANDS = {
    "estimate-8b": f"estimate --model llama-3-8b --cluster 1x8:{H100} --seq 8192 --batch 64 --fix zero=3"
    " --fix recompute=full",
    "estimate-a100": "estimate --model gpt3-175b --cluster 128x8:a100-sxm-80gb@hdr200x8 --seq 2048"
    " --batch 1536 --fix tp=8 --fix pp=16 --fix dp=8 --fix micro_batch=1 --fix recompute=full --fix zero=1",
    "estimate-illegal": f"estimate --model llama-3-8b --cluster 1x8:{H100} --seq 8192 --batch 64 --fix tp=7",
    "estimate-moe": f"estimate --model mixtral-8x7b --cluster 4x8:{H100} --seq 4096 --batch 256 --fix ep=8"
    " --fix pp=2 --fix zero=1",
    "napkin": "napkin --model 7B --device a100-sxm-40gb",
    "scaling": "scaling --budget-usd 1M --device h100 --params 8B",
    "show-model": "show model deepseek-v3",
    "show-device": "show device h100",
    "show-cluster": "show cluster 16*p5.48xlarge",
    "list-models": "list models",
    "list-devices": "list devices",
    "list-instances": "list instances",
    "size": "size --model llama-3-8b --tokens 100B --deadline 30d --seq 8192 --batch 512"
    f" --cluster 8x8:{H100}"
    " --cluster 8*p4d.24xlarge",
    "size-lora": "size --model llama-3-8b --method lora --tokens 50M --epochs 3 --batch 128 --deadline 12h"
    " --device h100 --device a100-sxm-80gb",
    "compare": "compare --model llama-3-8b --tokens 1T --deadline 30d --device h100 --device a100-sxm-80gb",
    "validate-h100": f"validate {DATA / 'h100_reference.csv'}",
    "validate-sweeps": f"validate {DATA / 'layout_sweeps.csv'}",
    "validate-gpt": f"validate {DATA / 'small_gpt.csv'}",
    "validate-tables": f"validate {DATA / 'tables.csv'}",
    "calibrate": f"calibrate {DATA / 'h100_reference.csv'} -o calibrated.json",
    "validate-calibrated": f"validate {DATA / 'h100_reference.csv'} --profile calibrated.json",
    "doctor-plan": f"check {MAIN_PLAN}.plan.json",
    "explain": f"explain {MAIN_PLAN}.plan.json --why-not tp=4 --why-not zero=3",
    "explain-pipeline": f"explain {OTHER_PLAN}.plan.json",
    "diff": f"diff {MAIN_PLAN}.plan.json {OTHER_PLAN}.plan.json",
    "rehearse": f"rehearse {MAIN_PLAN}.plan.json --fake",
}
"""Other commands, by the name of the answer; each runs once for its JSON and once for its text."""

EXPORTS = {
    "deepspeed": "llama-2-7b-deepspeed",
    "megatron": "llama-3-70b-megatron",
    "torchtitan": "llama-3-8b-torchtitan",
    "accelerate": "llama-2-7b-deepspeed",
    "slurm": MAIN_PLAN,
    "kubernetes": MAIN_PLAN,
    "skypilot": "llama-3-70b-cost",
}
"""Which plan is exported to which target, into a folder of the target's name."""


def _run(folder: Path, name: str, arguments: list[str]) -> None:
    """Runs one command in `folder` and keeps what it printed, and how it ended."""
    command = [sys.executable, "-m", "planner.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    (folder / name).write_text(done.stdout)
    (folder / f"{name}.end.txt").write_text(f"exit code {done.returncode}\n{done.stderr}")
    click.echo(f"{name}: exit code {done.returncode}", err=True)


def _solve(folder: Path, name: str) -> None:
    asked = SOLVE[name].split()
    written = ["-o", f"{name}.plan.json"]
    _run(folder, f"{name}.solve.json", ["solve", *asked, "--reproducible", "--json", *written])
    _run(folder, f"{name}.solve.txt", ["solve", *asked, "--reproducible"])


def _other(folder: Path, name: str) -> None:
    asked = COMMANDS[name].split()
    _run(folder, f"{name}.json", [*asked, "--json"])
    _run(folder, f"{name}.txt", asked)


def _export(folder: Path, target: str) -> None:
    _run(
        folder,
        f"export-{target}.txt",
        ["export", f"{EXPORTS[target]}.plan.json", "--to", target, "-o", target],
    )


@click.group()
def main() -> None:
    """Answers of a fixed list of commands, to compare two states of the code."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="Only the answers of these names.")
def write(folder: Path, only: tuple[str, ...]) -> None:
    """Writes all answers into FOLDER."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def wanted(names: dict[str, str]) -> Iterator[str]:
        return (name for name in names if not only or name in only)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: _solve(folder, name), wanted(SOLVE)))
        list(pool.map(lambda name: _other(folder, name), wanted(COMMANDS)))
        list(pool.map(lambda name: _export(folder, name), wanted(EXPORTS)))


@main.command()
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
@click.option("--present", is_flag=True, help="Compare only the answers that AFTER holds.")
@click.option("--text", is_flag=True, help="Show the differences of printed text too.")
def compare(before: Path, after: Path, present: bool, text: bool) -> None:
    """Compares two folders; exit code 1 where a document differs or is missing."""
    folders = (after,) if present else (before, after)
    names = sorted({str(p.relative_to(f)) for f in folders for p in f.rglob("*") if p.is_file()})
    different = [name for name in names if _content(before / name) != _content(after / name)]
    documents = [name for name in different if not name.endswith(".txt")]
    for name in different if text else documents:
        old, new = (_content(folder / name).splitlines() for folder in (before, after))
        click.echo(
            "\n".join(difflib.unified_diff(old, new, f"before/{name}", f"after/{name}", "", "", 1, ""))
        )
    click.echo(
        f"{len(names)} answers: {len(names) - len(different)} equal,"
        f" {len(documents)} documents and {len(different) - len(documents)} texts differ"
    )
    sys.exit(1 if documents else 0)


def _content(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    main()
