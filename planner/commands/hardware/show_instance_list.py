"""`plan list instances`: prices by instance, each with its date and whether it was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.commands.shared.text import table

DATE_LENGTH = 10


def instance_list(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people. Names stand last: some are long, and all must be whole to be used."""
    header = ["USD/h", "spot", "as of", "n", "device", "network", "region", "name"]
    body = [
        [
            _price(row["ondemand_usd_per_hour"], row["price_mark"]),
            _price(row["spot_usd_per_hour"], row["price_mark"]),
            _date(row["as_of"]),
            row["devices"],
            row["device"],
            row["network"] or "-",
            row["region"][:12] or "-",
            row["name"],
        ]
        for row in rows
    ]
    legend = (
        "USD an hour for the whole instance of n devices, without storage or tax; prices age: see the date.\n"
        "? from memory or derived, unverified; - unknown. Sources: plan show instance NAME, or --json."
    )
    return f"{table(header, body, numbers=(0, 1, 3))}\n\n{legend}"


def _price(usd: float | None, mark: str) -> str:
    if usd is None:
        return "- "
    return f"{usd:.2f}" + (" " if mark.startswith("READ") and "memory" not in mark else "?")


def _date(text: str) -> str:
    """A date in ten characters; what is no date is said as such."""
    return text if text[:4].isdigit() and len(text) <= DATE_LENGTH else "undated" if text else "-"
