"""`plan list profiles`: what each shipped profile speaks for, and how old it is."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from planner.commands.shared.text import pairs, wrapped_table

if TYPE_CHECKING:
    from planner.profile.profile import Profile

MOST_MODELS = 4


def profile_rows(today: datetime.date) -> list[dict[str, Any]]:
    """Every shipped profile: devices, formats, models, samples, constants, age."""
    from planner.hardware.catalog import profile_files
    from planner.profile.profile import load_profile

    return [{"name": path.stem, **_row(load_profile(path), today)} for path in profile_files()]


def _row(profile: Profile, today: datetime.date) -> dict[str, Any]:
    from planner.profile.choose import told_age
    from planner.profile.coverage import covered_models, sampled_classes
    from planner.report.profile_words import fitted_runs, precisions

    classes = sampled_classes(profile)
    return {
        "device": ", ".join(profile.devices),
        "device_title": profile.device_title,
        "measured": profile.measured,
        "fitted_runs": fitted_runs(profile),
        "precisions": list(precisions(profile)),
        "models": list(covered_models(classes)),
        "classes": [found.title for found in classes.values()],
        "layer_samples": len(profile.layers),
        "comm_samples": len(profile.comms),
        "constants": len(profile.constants),
        "backend": profile.backend,
        "torch": profile.versions.get("torch", ""),
        "created": profile.created,
        "age": told_age(profile.created, today),
    }


def profile_list(rows: list[dict[str, Any]]) -> str:
    """The table that people read."""
    header = ("name", "taken", "formats", "what it speaks for")
    cells = [
        (row["name"], row["age"], ", ".join(row["precisions"]) or "any", _speaks_for(row)) for row in rows
    ]
    legend = pairs(
        [
            ("measured", "layers and collectives of the device: counts where its samples are"),
            ("fitted", "constants of the cost model, for any model and cluster of the devices"),
            ("more", "plan show profile NAME [--html FILE]; plan profile makes one of this machine"),
        ]
    )
    return f"{wrapped_table(header, cells)}\n\n{legend}"


def _speaks_for(row: dict[str, Any]) -> str:
    constants = f"{row['constants']} constants"
    if not row["measured"]:
        return f"{row['device']}: {constants} fitted to {row['fitted_runs']} runs"
    names = row["models"] or row["classes"]
    more = f" and {len(names) - MOST_MODELS} more" if len(names) > MOST_MODELS else ""
    models = f" of {', '.join(names[:MOST_MODELS])}{more}" if names else ""
    torch = f", torch {row['torch']}" if row["torch"] else ""
    return (
        f"{row['device']} ({row['device_title']}, {row['backend']}{torch}): {row['layer_samples']} layers"
        f"{models}, {row['comm_samples']} collectives, {constants}"
    )
