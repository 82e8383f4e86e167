"""Adapters and merged weights beside those of peft itself, on tiny random models of transformers.

    python3 -m venv /tmp/peft && /tmp/peft/bin/pip install '.[runtime]' transformers peft
    PYTHONPATH=. /tmp/peft/bin/python -m bench.peft_check [--family NAME ...] [--ranks N ...] [-o FILE]

For each family and number of ranks (one, or two by tensor parallelism), in fp32, by the commands themselves:

    trained     `plan train` trains adapters; peft loads what it leaves in RUN_DIR/adapter
    begun       peft makes adapters at random; `plan train --adapters-from` begins with them
    merged      `plan export-weights --merge-adapters` beside peft's merge_and_unload

Figures are the largest differences of logits on the same tokens, over the largest logit, between peft on the
model of transformers and our transformer with the run's adapters; of merged weights, over the largest weight.
`loss` and `gradient` are relative differences of a step's loss and gradient norm on the plan's ranks from
peft's; a module that holds several projections has other gradients there, and none are compared. `moved` is
how far adapters changed the logits: nothing would be shown where that is small.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional

from planner.cli import cli
from planner.commands.shared.text import table
from planner.foundation.decode import write_atomic
from planner.foundation.errors import InputError
from planner.strategy.plan import Plan, load_plan
from runtime.checkpoint.huggingface import AdapterFolder, read_adapters
from runtime.model.huggingface.files import WeightFolder
from runtime.model.huggingface.names import names_of
from runtime.model.lora import apply_lora, peft_modules
from runtime.model.transformer import build_transformer, materialize
from runtime.train.data.documents import shipped_corpus
from runtime.train.executor import Executor
from runtime.train.session import load_into
from tests.runtime.hf_models import make_model
from tests.runtime.ranks import OPTIONS, batch_of, on_ranks, slice_of

RESULTS = Path(__file__).parent / "results"
FAMILIES = {
    "llama": "all",
    "qwen2": "qv",
    "qwen3": "q_proj,o_proj,down_proj",
    "mixtral": "all",
    "gpt2": "all",
    "phi3": "qv",
    "deepseek_v3": "attention",
    "deepseek_v3-groups": "q_a_proj,kv_a_proj_with_mqa,kv_b_proj",
    "deepseek_v3-direct": "qv",
}
"""Models of tests.runtime.hf_models and the modules that get adapters in each. MLPs of deepseek are left out:
see `runtime.checkpoint.huggingface.MISREAD_BY_PEFT`."""
RANK, ALPHA, SEQ, BATCH = 4, 12.0, 24, 4
TOLERANCE, LEAST_MOVED = 1e-4, 1e-2
UNCHANGED = "1e-30"
"""A learning rate that changes no weight."""


@dataclass(frozen=True)
class Case:
    """A model of transformers in a folder, and where its runs and files are."""

    family: str
    ranks: int
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def plan(self) -> Plan:
        """The plan of this case, made by `plan estimate`."""
        file = self.folder / "plan.json"
        degrees = ["--fix", f"tp={self.ranks}", "--fix", "micro_batch=2"]
        lora = ["--method", "lora", "--lora-rank", str(RANK), "--lora-modules", FAMILIES[self.family]]
        cluster = ["--cluster", f"local:{self.ranks}", "--seq", str(SEQ), "--batch", str(BATCH)]
        command(
            "estimate",
            "--model",
            str(self.base),
            *cluster,
            "--precision",
            "fp32",
            *lora,
            *degrees,
            "-o",
            str(file),
        )
        return load_plan(file)

    def train(self, name: str, *given: str) -> Path:
        """A run of `plan train`, by its folder."""
        text = self.folder / "text.txt"
        text.write_text((shipped_corpus() / "pride_and_prejudice.txt").read_text()[:20_000])
        run_dir = self.folder / name
        data = ["--data", str(text), "--tokenizer", "byte", "--init-from", str(self.base)]
        command("train", str(self.folder / "plan.json"), "--run-dir", str(run_dir), *data, *given)
        return run_dir


def command(*args: str) -> None:
    """Runs `plan`; its output is shown only where it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main(list(args))
    except SystemExit as end:
        if end.code not in (0, None):
            raise click.ClickException(f"plan {' '.join(args)}: {said.getvalue()[-2000:]}") from None


def own_logits(plan: Plan, base: Path, halves: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of our transformer with the folder's weights and these halves of adapters."""
    spec = plan.model
    model = build_transformer(spec, 0, spec.layers, True, True, seq=SEQ)
    materialize(model, spec, prefix="", seed=0, device="cpu")
    model.tie()
    weights = WeightFolder(base, spec)
    buffers = ((name, b) for name, b in model.named_buffers() if name.endswith(".correction"))
    for name, tensor in (*model.named_parameters(), *buffers):
        weights.fill(name, tensor)
    for name, part in model.parts():
        apply_lora(name, part, plan.workload, alpha=ALPHA, seed=0)
    own = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert own.keys() == halves.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(halves[name])
        return model(tokens)


def by_transformers(folder: Path) -> Any:
    """The model of transformers in a folder of this check's own: safetensors, and no code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )


def with_peft(base: Path, adapter: Path) -> Any:
    """The model of transformers with peft's adapters of a folder; a key that is missing is an error."""
    from peft import PeftModel

    plain = by_transformers(base)
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        adapted = PeftModel.from_pretrained(plain, adapter, is_trainable=True, local_files_only=True)
    return adapted.train(False)


def make_adapters(case: Case, plan: Plan, like: Path, folder: Path) -> None:
    """Adapters that peft makes and saves, of the modules of a run's, both halves drawn at random."""
    from peft import LoraConfig, get_peft_model

    plain = by_transformers(case.base)
    modules = json.loads((like / "adapter_config.json").read_text())["target_modules"]
    turned = bool(names_of(plan.model).transposed)
    model = get_peft_model(
        plain, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, fan_in_fan_out=turned)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(_rows_adapted(plan, name, len(parameter))[:, None])
    model.save_pretrained(folder)


def _rows_adapted(plan: Plan, name: str, rows: int) -> Tensor:
    """1 for the rows of a module that are those of an adapted projection, 0 for the others."""
    assert plan.workload.adapters is not None
    kept = torch.zeros(rows)
    for module in peft_modules(plan.model, plan.workload.adapters):
        if f".{module.name}." in name:
            for _, pieces in module.members:
                for piece in pieces:
                    kept[piece.begin : piece.begin + piece.rows] = 1.0
    return kept


def on_plan(plan: Plan, base: Path, adapter: Path) -> tuple[float, float]:
    """A step's loss and gradient norm on the ranks of a plan that begins with adapters of a folder."""

    def body(rank: int) -> tuple[float, float]:
        executor = Executor(plan, device="cpu", seed=0, optimizer_options=OPTIONS, lora_alpha=ALPHA)
        load_into(executor, base)
        AdapterFolder(adapter, plan, alpha=ALPHA).fill(executor.weight_tensors())
        executor.weights_filled()
        result = executor.step(slice_of(executor, batch_of(plan, 0)))
        return result.loss, result.grad_norm

    loss, norm = on_ranks(body, plan.strategy.degrees.world)[0]
    return loss, norm


def by_peft(model: Any, tokens: Tensor) -> tuple[float, float]:
    """The same of peft's model."""
    logits = model(tokens[:, :-1]).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), float(torch.stack([g.norm() for g in grads]).norm())


def checkpoint_of(run_dir: Path) -> Path:
    """The last checkpoint of a run."""
    return max((each for each in (run_dir / "checkpoints").iterdir() if each.is_dir()), key=lambda p: p.name)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def merged_apart(case: Case, run_dir: Path, model: Any, tokens: Tensor) -> tuple[float, float]:
    """How far our merged weights, and their logits, are from peft's."""
    out = case.folder / "merged"
    command("export-weights", str(run_dir), "-o", str(out), "--merge-adapters", str(case.base))
    ours = by_transformers(out).train(False)
    theirs = model.merge_and_unload()
    weights, own = theirs.state_dict(), ours.state_dict()
    assert weights.keys() == own.keys()
    with torch.no_grad():
        return max(apart(own[k], weights[k]) for k in weights), apart(
            ours(tokens).logits, theirs(tokens).logits
        )


def check(case: Case) -> dict[str, Any]:
    """All figures of a family on some ranks."""
    experts = {"router_aux_loss_coef": 0.0} if case.family == "mixtral" else {}  # no part of logits' loss
    model = make_model(case.family, vocab_size=258, **experts)
    model.save_pretrained(case.base)
    plan = case.plan()
    run_dir = case.train("run", "--steps", "4", "--lr", "0.05", "--lora-alpha", str(ALPHA))
    begun = case.folder / "peft"
    make_adapters(case, plan, run_dir / "adapter", begun)
    given = ("--steps", "1", "--lr", UNCHANGED, "--lora-alpha", str(ALPHA))
    other = case.train("begun", "--adapters-from", str(begun), *given)
    tokens = batch_of(plan, 0)
    with torch.no_grad():
        plain = model(tokens[:, :-1]).logits
    row: dict[str, Any] = {"family": case.family, "modules": FAMILIES[case.family], "ranks": case.ranks}
    for name, folder, adapter in (("trained", run_dir, run_dir / "adapter"), ("begun", other, begun)):
        peft = with_peft(case.base, adapter)
        own = own_logits(plan, case.base, read_adapters(checkpoint_of(folder)), tokens[:, :-1])
        with torch.no_grad():
            theirs = peft(tokens[:, :-1]).logits
        row[name], row[f"{name}_moved"] = apart(own, theirs), apart(theirs, plain)
    (loss, norm), (their_loss, their_norm) = on_plan(plan, case.base, begun), by_peft(peft, tokens)
    row["loss"] = abs(loss - their_loss) / their_loss
    row["gradient"] = None if names_of(plan.model).fused else abs(norm - their_norm) / their_norm
    again = with_peft(case.base, run_dir / "adapter")
    row["merged_weights"], row["merged_logits"] = merged_apart(case, run_dir, again, tokens[:, :-1])
    return row


def _good(row: dict[str, Any]) -> bool:
    figures = [
        row[key] for key in ("trained", "begun", "loss", "gradient", "merged_weights", "merged_logits")
    ]
    moved = min(row["trained_moved"], row["begun_moved"])
    return moved >= LEAST_MOVED and all(figure is None or figure <= TOLERANCE for figure in figures)


@contextlib.contextmanager
def _case(family: str, ranks: int) -> Iterator[Case]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield Case(family, ranks, folder)
    finally:
        shutil.rmtree(folder)


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="Only these.")
@click.option("--ranks", multiple=True, type=click.IntRange(1), default=(1, 2), help="Default: 1 and 2.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="Where to write JSON.")
def main(families: tuple[str, ...], ranks: tuple[int, ...], output: Path | None) -> None:
    """Runs every case and prints its figures."""
    import peft
    import transformers

    rows = []
    for family in families or tuple(FAMILIES):
        for count in ranks:
            with _case(family, count) as case:
                try:
                    rows.append(check(case))
                except InputError as error:
                    raise click.ClickException(f"{family} on {count}: {error}") from None
            click.echo(json.dumps(rows[-1]), err=True)
    shown = ("trained", "begun", "loss", "gradient", "merged_weights", "merged_logits")
    click.echo(
        table(
            ("family", "modules", "ranks", *shown),
            [
                (*(row[k] for k in ("family", "modules", "ranks")), *map(_told, (row[k] for k in shown)))
                for row in rows
            ],
        )
    )
    summary = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "tolerance": TOLERANCE,
        "rows": rows,
    }
    write_atomic(output or RESULTS / f"{summary['date']}-peft.json", json.dumps(summary, indent=1) + "\n")
    raise SystemExit(0 if all(map(_good, rows)) else 4)


def _told(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.1e}"


if __name__ == "__main__":
    main()
