"""`plan show profile`: what a profile holds, for people, as JSON, and as a page."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.commands.shared.text import WIDTH, pairs, table, wrapped_table

if TYPE_CHECKING:
    from planner.model.spec import ModelSpec
    from planner.profile.coverage import ClassKey, SampledClass
    from planner.profile.profile import CommSample, LayerSample, Profile

    Classes = Mapping[ClassKey, SampledClass]

FIX = "see `plan list profiles`, or give a path to a file"
ALIKE = 4
"""Characters that a name must begin with to be offered for one that is like none."""

MOST_ROWS = 150
"""Layer samples that are printed; of more, the rest is in --json and --html."""


def find_profile(text: str, where: str = "NAME") -> Profile:
    """The shipped profile of a name, else the one in a file. Raises InputError with the nearest names."""
    from planner.foundation.errors import InputError, Problem
    from planner.foundation.suggest import nearest_names, normalized, unknown_name
    from planner.hardware.catalog import profile_files
    from planner.profile.profile import load_profile

    shipped = {path.stem: path for path in profile_files()}
    for name, path in shipped.items():
        if normalized(name) == normalized(text):
            return load_profile(path)
    if text.endswith(".json") or "/" in text:
        return load_profile(Path(text))
    alike = [
        name
        for name in shipped
        if normalized(text)[:ALIKE] and normalized(name).startswith(normalized(text)[:ALIKE])
    ]
    if alike and not nearest_names(
        text[:100], shipped
    ):  # names are long: a beginning says more than a likeness
        fault = f"no profile '{text[:100]}'. Did you mean {' or '.join(alike)}?"
        raise InputError(Problem(where=where, fault=fault, fix=FIX))
    raise unknown_name(where, "profile", text, shipped, fix=FIX)


def show_profile(
    text: str, models: Sequence[ModelSpec], html: Path | None, today: datetime.date
) -> tuple[dict[str, Any], str]:
    """The document and the text of a profile; with `html` its page is written there."""
    from planner.foundation.decode import write_atomic
    from planner.profile.coverage import sampled_classes
    from planner.report.profile_page import render_profile

    profile = find_profile(text)
    classes = sampled_classes(profile, models)
    if html is not None:
        write_atomic(html, render_profile(profile, models, today))
    return profile_document(profile, classes, today), profile_text(profile, classes, today)


def profile_document(profile: Profile, classes: Classes, today: datetime.date) -> dict[str, Any]:
    """The profile as its file has it, with what its classes are and what is to be said of it."""
    from planner.cost.constants import spec_of
    from planner.foundation.decode import encode
    from planner.profile.coverage import bus_bytes_per_s, covered_models, noisy
    from planner.report.profile_words import warnings

    document: dict[str, Any] = encode(profile)
    for constant in document["constants"]:
        constant["meaning"] = spec_of(constant["name"]).description
    for sample, own in zip(profile.layers, document["layers"], strict=True):
        found = classes[sample.kind, sample.shape_key]
        own |= {"class": found.title, "flops_per_s": found.flops_per_s(sample)}
    for comm, own in zip(profile.comms, document["comms"], strict=True):
        own["bus_bytes_per_s"] = bus_bytes_per_s(comm)
    return document | {
        "models": list(covered_models(classes)),
        "measured": profile.measured,
        "noisy_samples": len(noisy(profile)),
        "warnings": list(warnings(profile, today)),
    }


def profile_text(profile: Profile, classes: Classes, today: datetime.date) -> str:
    """All of it: facts, layers, collectives, constants, what is doubtful."""
    from planner.report.profile_words import facts, warnings

    heading = pairs(((fact.name, fact.value) for fact in facts(profile, classes, today)), WIDTH)
    parts = [heading, *_layer_texts(profile, classes), *_rate_texts(profile), *_comm_texts(profile)]
    parts.append(_constants_text(profile))
    parts.append(pairs((("mind", text) for text in warnings(profile, today)), WIDTH))
    return "\n\n".join(part for part in parts if part)


def _layer_texts(profile: Profile, classes: Classes) -> list[str]:
    """A table for each class and format; at most MOST_ROWS rows in all."""
    from planner.profile.coverage import variant_text

    grouped: dict[tuple[ClassKey, str], list[LayerSample]] = {}
    for sample in profile.layers:
        grouped.setdefault(((sample.kind, sample.shape_key), variant_text(sample)), []).append(sample)
    texts, left = [], MOST_ROWS
    for (key, variant), samples in grouped.items():
        if left > 0:
            texts.append(_class_text(classes[key], variant, samples, left))
        left -= len(samples)
    if left < 0:
        texts.append(f"and {-left:,} more layer samples: --json and --html have all")
    return texts


def _class_text(found: SampledClass, variant: str, samples: Sequence[LayerSample], most: int) -> str:
    from planner.report.profile_tables import layer_table

    shown = layer_table(found, samples)
    left, right = shown.numbers
    body = table(shown.header, shown.rows[:most], numbers=range(left, right))
    return f"{found.title}, {variant}\n{found.shape_key}\n{body}"


def _rate_texts(profile: Profile) -> list[str]:
    """A row for each kind of operator: how many sizes, and its best rate."""
    from planner.report.profile_tables import best_rates

    if not profile.rates:
        return []
    shown = best_rates(profile.rates)
    return [table(shown.header, shown.rows, numbers=range(*shown.numbers))]


def _comm_texts(profile: Profile) -> list[str]:
    """Bus bandwidth by operation, group and size."""
    from planner.foundation.units import format_bytes
    from planner.profile.coverage import group_title
    from planner.profile.profile import NOISY_SPREAD
    from planner.report.profile_tables import NOISY_MARK
    from planner.report.profile_words import op_title

    if not profile.comms:
        return []
    sizes = sorted({sample.bytes for sample in profile.comms})
    found = {(group_title(s), op_title(s.op), s.bytes): s for s in profile.comms}
    rows = dict.fromkeys((group, op) for group, op, _ in found)
    cells = [(*row, *(_bandwidth(found.get((*row, size))) for size in sizes)) for row in rows]
    header = ("collectives", "operation", *(format_bytes(size) for size in sizes))
    note = (
        "bytes a second over a rank's link, by the best algorithm on a ring, by the size of all that is sent;"
        f" {NOISY_MARK} spread beyond {NOISY_SPREAD:.0%}"
    )
    return [f"{table(header, cells, numbers=range(2, len(header)))}\n{textwrap.fill(note, WIDTH)}"]


def _bandwidth(sample: CommSample | None) -> str:
    from planner.foundation.units import format_si
    from planner.profile.coverage import bus_bytes_per_s, is_noisy
    from planner.report.profile_tables import NOISY_MARK

    if sample is None:
        return "-"
    return format_si(bus_bytes_per_s(sample), "B/s") + (NOISY_MARK if is_noisy(sample) else "")


def _constants_text(profile: Profile) -> str:
    """Each constant with its values, what they hold for, and what it means."""
    from planner.report.profile_tables import constant_rows

    rows = []
    for row in constant_rows(profile):
        usual = f"usually {row.usual}: " if row.usual else ""
        one = len(row.values) == 1
        if not one:
            rows.append((row.name, "", f"{usual}{row.meaning}"))
        for value, scope, origin in row.values:
            held = origin if scope == "everything" else f"{scope}; {origin}"
            rows.append((row.name, value, f"{usual}{row.meaning} ({held})") if one else ("", value, held))
    return wrapped_table(("constant", "value", "meaning, and how it came to be"), rows) if rows else ""
