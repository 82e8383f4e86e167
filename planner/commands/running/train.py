"""`plan train`: executes a plan on real ranks, checkpoints, logs, resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option

if TYPE_CHECKING:
    from planner.strategy.plan import Plan
    from runtime.train.data.prepare import DataOptions
    from runtime.train.metrics import TrainSummary


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps from the beginning of training. Default: the workload's tokens.",
)
@click.option(
    "--data",
    metavar="PATH[:WEIGHT]",
    multiple=True,
    help="A text, .jsonl, .jsonl.gz, .parquet or .arrow file, a folder of them, or a folder of "
    "`datasets.save_to_disk`. Repeatable, with weights for a mixture. Default: the public-domain novel "
    "that ships with this program.",
)
@click.option(
    "--text-key", default="text", show_default=True, metavar="KEY", help="The key or column with the text."
)
@click.option(
    "--prompt-key",
    metavar="KEY",
    help="Fine-tuning: what is read, but not trained on. With --completion-key.",
)
@click.option("--completion-key", metavar="KEY", help="Fine-tuning: what is trained on. With --prompt-key.")
@click.option(
    "--messages-key",
    metavar="KEY",
    help="Fine-tuning: the key or column with conversations, lists of {role, content} or {from, value}, "
    "written by the tokenizer's own chat template (ChatML where it has none).",
)
@click.option(
    "--train-on",
    type=click.Choice(["assistant", "all"]),
    help="Of conversations: what the assistant said ({% generation %} blocks of the template, else by "
    "prefixes), or every token. Default: assistant.",
)
@click.option(
    "--document-mask",
    is_flag=True,
    help="Attention stays within a document, and learned positions begin anew there (rotary ones tell only "
    "distances). Default: it goes over the borders of packed documents, as GPT-3's did and as a plan's times "
    "and FLOPs are counted.",
)
@click.option(
    "--data-cache",
    metavar="DIR",
    help="Where tokenized data goes, for runs to share. Default: the run folder.",
)
@click.option(
    "--run-dir",
    default="runs/train",
    show_default=True,
    metavar="DIR",
    help="Where checkpoints, metrics.jsonl, summary.json and timeline.json go.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in the run folder.")
@click.option(
    "--init-from",
    metavar="FOLDER",
    help="Begin with the weights of a Hugging Face folder (*.safetensors), not with random ones.",
)
@click.option(
    "--adapters-from",
    metavar="FOLDER",
    help="Begin with the adapters of a PEFT folder, beside the weights of --init-from. With --method lora.",
)
@click.option(
    "--seed", default=0, show_default=True, metavar="N", help="Of the weights and the data's order."
)
@click.option(
    "--tokenizer",
    default="bpe",
    show_default=True,
    metavar="bpe|byte|PATH",
    help="Byte pairs merged up to the model's vocabulary, plain bytes, or a tokenizer.json or its folder.",
)
@click.option(
    "--end-of-text", metavar="TOKEN", help="The token that ends a document. Default: as the tokenizer says."
)
@click.option(
    "--checkpoint-every",
    default=0,
    metavar="N",
    help="Save every N steps, besides at the end. 0: at the end only.",
    show_default=True,
)
@click.option("--keep", default=2, show_default=True, metavar="N", help="Checkpoints that stay, at least 2.")
@click.option(
    "--sync-checkpoints",
    is_flag=True,
    help="Wait until a checkpoint is on the disk. Default: copy the state, and write it behind the steps.",
)
@click.option("--lr", type=float, metavar="RATE", help="Peak learning rate. Default: by model size.")
@click.option("--min-lr-ratio", type=float, metavar="R", help="The decay ends at R x lr. Default: 0.1.")
@click.option("--warmup", type=int, metavar="N", help="Steps of linear warm-up. Default: 1 % of the decay.")
@click.option(
    "--decay-steps",
    type=int,
    metavar="N",
    help="Step at which the cosine ends. Default: the workload's tokens, else --steps but at least 1000.",
)
@click.option("--weight-decay", type=float, metavar="W", help="Of matrices. Default: 0.1.")
@click.option(
    "--compile/--no-compile",
    default=None,
    help="torch.compile for each block and the loss. Default: on CUDA where Triton is, not on a CPU.",
)
@click.option("--clip", type=float, metavar="NORM", help="Limit of the gradient norm. Default: 1.0.")
@click.option(
    "--lora-alpha", type=float, metavar="A", help="Adapters count A / rank times. Default: twice the rank."
)
@click.option(
    "--hang-timeout",
    type=float,
    metavar="SECONDS",
    help="A rank that does not answer for so long ends the run. Default: by the predicted step time.",
)
@click.option("--any-device", is_flag=True, help="Run it on other devices than it was made for.")
@click.option(
    "--log",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb", "mlflow"]),
    help="A tracker beside metrics.jsonl. Repeatable.",
)
@click.option(
    "--profile-steps",
    default=0,
    show_default=True,
    metavar="N",
    help="Steps that torch's profiler traces, into RUN_DIR/profile.",
)
@click.option(
    "--backend",
    type=click.Choice(["native", "transformers"]),
    default="native",
    show_default=True,
    help="Whose modules are trained: this program's, or Hugging Face Transformers'.",
)
@click.option(
    "--hf-config",
    metavar="PATH",
    help="The config.json, or its folder, that --backend transformers builds from.",
)
@click.option(
    "--memory-snapshot",
    is_flag=True,
    help="Write the allocations of a step to RUN_DIR/memory.",
)
@json_option
def train(plan_file: Path, steps: int | None, as_json: bool, **given: Any) -> int:
    """Execute a plan on real ranks: train, checkpoint, log, resume.

    On one machine the ranks are started here. Under torchrun (on several nodes, say) this process is one
    of them. SIGTERM and Ctrl-C finish the step, save, and end with exit code 0. Exit code 4 where a rank
    died, the loss was not finite, or something else was executed than planned.
    """
    from planner.commands.shared.text import print_json
    from planner.commands.shared.with_torch import require_torch
    from planner.strategy.engines.native import (
        check_executed,
        check_executed_offload,
        check_executed_workload,
    )
    from planner.strategy.plan import load_plan
    from planner.strategy.plan_check import check_schedule_table, check_sound

    require_torch("train")
    plan = load_plan(plan_file)
    check_sound(plan)
    _check_backend(given.pop("backend"), given["hf_config"])
    if given["hf_config"] is None:
        check_executed(plan.model, "train")
    check_schedule_table(plan)
    check_executed_offload(plan.strategy)
    check_executed_workload(plan.model, plan.workload, plan.strategy.degrees)

    from planner.foundation.decode import encode
    from runtime.train.options import TrainOptions
    from runtime.train.train import run_training

    given["data"] = _data_options(given)
    options = TrainOptions(steps=steps if steps is not None else _all_steps(plan), **given)
    summary = run_training(plan, options)
    if summary is None:  # another rank than 0 under torchrun
        return 0
    if as_json:
        print_json(encode(summary))
    else:
        click.echo(_report(summary, options.run_dir))
    return 4 if summary.executed_differences else 0


def _check_backend(backend: str, hf_config: str | None) -> None:
    """Raises InputError where one of the two options is given without the other."""
    from planner.foundation.errors import InputError, Problem

    if backend == "transformers" and hf_config is None:
        fault = "builds from a config.json, and none is named."
        raise InputError(Problem(where="--backend transformers", fault=fault, fix="add --hf-config PATH"))
    if backend == "native" and hf_config is not None:
        fault = "is given, and the native backend builds from the plan's own model."
        raise InputError(Problem(where="--hf-config", fault=fault, fix="add --backend transformers"))


def _data_options(given: dict[str, Any]) -> DataOptions:
    """The options that are about data, taken out of all that were given."""
    from runtime.train.data.chat import TrainOn
    from runtime.train.data.documents import Columns
    from runtime.train.data.prepare import DataOptions

    keys = {name: given.pop(f"{name}_key") for name in ("text", "prompt", "completion", "messages")}
    train_on = given.pop("train_on")
    return DataOptions(
        data=given.pop("data"),
        tokenizer=given.pop("tokenizer"),
        end_of_text=given.pop("end_of_text"),
        columns=Columns(**keys, train_on=None if train_on is None else TrainOn(train_on)),
    )


def _all_steps(plan: Plan) -> int:
    """The steps that the workload's tokens take. Raises InputError where it names none."""
    from planner.foundation.errors import InputError, Problem

    tokens = plan.workload.tokens
    if tokens is None:
        raise InputError(
            Problem(
                where="--steps",
                fault="is not given, and the plan's workload names no tokens.",
                fix="add --steps N, or solve with --tokens",
            )
        )
    return -(-tokens // plan.workload.tokens_per_step)


def _report(summary: TrainSummary, run_dir: str) -> str:
    """The end of a run in words: losses, predicted against measured, and where everything is."""
    from planner.commands.shared.text import pairs, table
    from planner.foundation.units import format_bytes, format_seconds

    def error(value: float | None) -> str:
        return "-" if value is None else f"{value:+.1%}"

    measured_s, measured_bytes = summary.measured_step_time_s, summary.measured_peak_memory_bytes
    rows = [
        (
            "step time",
            format_seconds(summary.predicted_step_time_s),
            "-" if measured_s is None else format_seconds(measured_s),
            error(summary.step_time_error),
        ),
        (
            "peak memory",
            format_bytes(summary.predicted_peak_memory_bytes),
            "-" if measured_bytes is None else format_bytes(measured_bytes),
            error(summary.peak_memory_error),
        ),
    ]
    differences = "; ".join(summary.executed_differences)
    facts = [
        ("plan", f"{summary.plan} on {summary.world} ranks ({summary.device})"),
        ("executed", f"NOT as planned: {differences}" if differences else "as planned (read back)"),
        ("steps", f"{summary.first_step} to {summary.last_step} ({summary.status})"),
        ("loss", f"{_loss(summary.first_loss)} -> {_loss(summary.last_loss)}"),
        (
            "MFU",
            "unknown (no peak is known for this device)" if summary.mfu is None else f"{summary.mfu:.1%}",
        ),
        ("goodput", f"{summary.goodput:.1%} of {format_seconds(summary.wall_s)}"),
        ("cost", _dollars(summary)),
        ("data", summary.data),
        ("checkpoint", summary.checkpoint),
        ("checkpoints took", format_seconds(summary.checkpoint_wait_s)),
        ("run folder", run_dir),
    ]
    if summary.cost_usd is not None:
        rows.append(_cost_row(summary))
    rows += _cause_rows(summary)
    return pairs(facts) + "\n\n" + table(("", "predicted", "measured", "error"), rows)


def _dollars(summary: TrainSummary) -> str:
    """What the run has cost, and what it will where it is not over."""
    from planner.foundation.units import format_seconds, format_usd

    if summary.cost_usd is None:
        return "unknown: the plan's cluster has no price (solve with --prices FILE)"
    spent = f"{format_usd(summary.cost_usd)} for {format_seconds(summary.wall_s)}"
    if summary.status == "finished":
        return spent
    return f"{spent}, {format_usd(summary.expected_cost_usd)} expected for all steps"


def _cost_row(summary: TrainSummary) -> tuple[str, str, str, str]:
    """Dollars predicted for the steps that were done, beside those spent."""
    from planner.foundation.units import format_usd

    predicted, spent = summary.predicted_cost_usd, summary.cost_usd
    error = f"{predicted / spent - 1:+.1%}" if predicted is not None and spent else "-"
    return (f"cost of {summary.last_step} steps", format_usd(predicted), format_usd(spent), error)


def _cause_rows(summary: TrainSummary) -> list[tuple[str, str, str, str]]:
    """Where the recorded step's time went, the mean of all ranks, beside the prediction."""
    from planner.foundation.units import format_seconds

    ranks, predicted = summary.causes_by_rank, summary.predicted_causes
    rows = []
    for cause in ("compute", "wait", "gradient_sums", "optimizer"):
        seconds = [getattr(rank, f"{cause}_s") for rank in ranks]
        measured = format_seconds(sum(seconds) / len(seconds)) if seconds else "-"
        rows.append(
            (f"  {cause.replace('_', ' ')}", format_seconds(getattr(predicted, f"{cause}_s")), measured, "")
        )
    return rows


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
