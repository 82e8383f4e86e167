"""Parameters of every model of the catalog, read and recorded: `python -m bench.model_counts --out FILE.csv`.

The recorded counts are those of the model that transformers builds from the same config.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import click

from planner.foundation.decode import write_atomic
from planner.hardware.catalog import load_model, model_index

COLUMNS = (
    "model", "model_type", "layers", "layer_classes", "params_total", "params_active", "recorded_total",
    "recorded_active", "equal", "flops_per_token_forward_4k",
)  # fmt: skip


def rows() -> list[dict[str, object]]:
    """One row a model."""
    found = []
    for name, entry in model_index().items():
        model = load_model(name)
        counts = (model.params_total, model.params_active)
        recorded = (entry.params_total, entry.params_active)
        values = (
            name, model.model_type, model.layers, len(model.classes()), *counts, *recorded,
            counts == recorded, round(model.flops_per_token_forward(4096)),
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="CSV file to write.")
def main(out: Path) -> None:
    """Write the table of counts."""
    table = rows()
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(out, text.getvalue())
    equal = sum(bool(row["equal"]) for row in table)
    families = len({row["model_type"] for row in table})
    click.echo(f"{equal} of {len(table)} models of {families} families have the recorded counts; see {out}")


if __name__ == "__main__":
    main()
