"""Numbers of the command line that have a range: a clear refusal of zero, negative, NaN and endless ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    from planner.foundation.errors import Problem
    from planner.sizing.device_rate import DeviceRate

T = TypeVar("T")

RATE_OPTIONS = ("device", "precision", "mfu", "usd_per_gpu_hour", "prices", "on_premises")
"""Options of `napkin` and `scaling` that say what a device-hour computes and costs."""


def read_number(text: str, flag: str, least: float, most: float, example: str) -> float:
    """A plain number from `least` (not reached) to `most`. Raises InputError."""
    from planner.foundation.errors import InputError, Problem

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least < value <= most:
        legal = f"numbers above {least:g} up to {most:g}, such as {example}"
        raise InputError(
            Problem(where=flag, fault=f"'{text[:40]}' is out of range or no number.", legal=legal)
        )
    return value


def read_count(text: str, flag: str, least: float, most: float) -> int:
    """A count with a unit, such as 2T or 1.5e9, from `least` to `most`. Raises InputError."""
    from planner.foundation.errors import InputError, Problem
    from planner.foundation.units import parse_count

    try:
        value = parse_count(text, flag)
    except InputError:
        value = -1
    if not least <= value <= most:
        fault = "is out of range." if value >= 0 else "is no count in known units."
        legal = f"{_plain(least)} to {_plain(most)}, in units K, M, B, T, P or as in 1.5e12"
        raise InputError(Problem(where=flag, fault=f"'{text[:40]}' {fault}", legal=legal))
    return value


def _plain(value: float) -> str:
    from planner.foundation.units import format_count

    return format_count(value) if value < 1e15 else f"{value:g}".replace("e+", "e")


class Reading:
    """Reads several options and keeps every problem, so that all are told at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def read(self, function: Callable[[], T]) -> T | None:
        """The value, or None where reading it failed; the problems are kept."""
        from planner.foundation.errors import InputError

        try:
            return function()
        except InputError as error:
            self.problems.extend(error.problems)
            return None

    def add(self, where: str, fault: str, legal: str = "", fix: str = "") -> None:
        """Keeps a problem that shows only when options are seen together."""
        from planner.foundation.errors import Problem

        self.problems.append(Problem(where=where, fault=fault, legal=legal, fix=fix))

    def finish(self) -> None:
        """Raises InputError if there was a problem."""
        from planner.foundation.errors import InputError

        if self.problems:
            raise InputError(*self.problems)


def read_rate(
    reading: Reading,
    *,
    device: str,
    precision: str | None,
    mfu: str | None,
    usd_per_gpu_hour: str | None,
    prices: Path | None,
    on_premises: bool,
) -> DeviceRate | None:
    """What an hour of a device computes and costs; None where a fault was kept in `reading`."""
    from planner.commands.shared.options import open_market
    from planner.hardware.catalog import load_device
    from planner.sizing.device_rate import Price, device_rate, price_of

    facts = reading.read(lambda: load_device(device, "--device"))
    share = optional_number(reading, mfu, "--mfu", 1.0, "0.4")
    usd = optional_number(reading, usd_per_gpu_hour, "--usd-per-gpu-hour", 1e6, "2.5")
    market = reading.read(lambda: open_market(prices, on_premises))
    if facts is None or market is None:
        return None
    given = None if usd is None else Price(usd_per_device_hour=usd, source="as given")
    return device_rate(facts, precision, share, given or price_of(facts, market))


def optional_number(reading: Reading, text: str | None, flag: str, most: float, example: str) -> float | None:
    """A number above 0 up to `most`, or None where the option was left out or its fault was kept."""
    return None if text is None else reading.read(lambda: read_number(text, flag, 0.0, most, example))
