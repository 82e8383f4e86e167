"""`plan export-weights`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click

from planner.commands.shared.options import json_option


@click.command("export-weights")
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A new folder."
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The model's config.json. Default: the one that the run began with (plan train --init-from).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Number format of the weights. Default: the config's own, else float32.",
)
@click.option("--step", type=int, metavar="N", help="Which checkpoint. Default: the newest whole one.")
@click.option(
    "--merge-adapters",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Of a LoRA run: the folder of weights that it began with (plan train --init-from), into which its "
    "adapters are added.",
)
@json_option
def export_weights(
    run_dir: Path,
    output: Path,
    config: Path | None,
    dtype: str | None,
    step: int | None,
    merge_adapters: Path | None,
    as_json: bool,
) -> None:
    """Write a run's weights as a Hugging Face folder: config.json, safetensors, tokenizer.

    Names and layouts are those of transformers' own class of the model, which loads the folder as it is.
    """
    from planner.commands.shared.text import pairs, print_json
    from planner.commands.shared.with_torch import require_torch

    require_torch("export-weights")

    from runtime.checkpoint.huggingface import export_run

    done = export_run(run_dir, output, config=config, dtype=dtype, step=step, base=merge_adapters)
    for remark in done.remarks:
        click.echo(f"passed over: {remark}", err=True)
    facts = {
        "folder": str(done.folder),
        "step": done.step,
        "dtype": done.dtype,
        "files": [path.name for path in done.files],
    }
    if as_json:
        print_json(facts)
    else:
        files = f"{len(done.files)}, {sum(path.stat().st_size for path in done.files):,} bytes"
        click.echo(
            pairs(
                [
                    ("folder", facts["folder"]),
                    ("step", str(done.step)),
                    ("dtype", done.dtype),
                    ("files", files),
                ]
            )
        )
