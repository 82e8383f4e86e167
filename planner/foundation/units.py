"""Quantities as text: `72GiB`, `2T` and `30d` are parsed into SI units, and values are formatted for people.

Inside the program every quantity is a plain number in bytes, seconds, FLOPs or dollars, and its name says
which. The `parse_*` functions read what a person typed and raise InputError; the `format_*` functions are the
only spelling of percentages, dollars, times, sizes and counts in printed text and on pages.
"""

from __future__ import annotations

import math
import re

from planner.foundation.errors import InputError, Problem

KIB = 1024
MIB = 1024**2
GIB = 1024**3
DAY_S = 86_400.0
LARGEST = 1e30
"""Largest number accepted in a quantity; a larger one is a typing error and would overflow later."""
MOST_USD = 1e15
"""Largest amount of dollars accepted."""
UNKNOWN = "unknown"
"""Text of a value that is not known, where a dash would be too short."""

_BYTE_UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024**4,
}  # fmt: skip
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12, "P": 10**15}
_TIME_UNITS = {"S": 1.0, "MIN": 60.0, "H": 3600.0, "D": DAY_S, "W": 7 * DAY_S}
_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*$")


def _parse(text: str, units: dict[str, int] | dict[str, float], flag: str, example: str) -> float:
    sizes = {unit.upper(): size for unit, size in units.items()}
    match = _NUMBER.match(text)
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in sizes or float(match.group(1)) > LARGEST:
        raise InputError(
            Problem(
                where=flag,
                fault=f"'{text[:40]}' is not a quantity in known units, such as {example}.",
                legal=", ".join(u or "(none)" for u in units),
            )
        )
    return float(match.group(1)) * sizes[unit]


def parse_bytes(text: str, flag: str = "--memory-limit") -> int:
    """Return the bytes of a text such as `72GiB` or `80GB`. Raises InputError."""
    return round(_parse(text, _BYTE_UNITS, flag, "72GiB"))


def parse_bytes_per_s(text: str, flag: str) -> float:
    """Return the bytes per second of a text such as `40GB/s`; the `/s` is optional. Raises InputError."""
    return _parse(text.strip().removesuffix("/s"), _BYTE_UNITS, flag, "40GB/s")


def parse_count(text: str, flag: str = "--tokens") -> int:
    """Return the whole number of a text such as `2T`, `1.5B` or `300000`. Raises InputError."""
    return round(_parse(text, _COUNT_UNITS, flag, "2T"))


def parse_count_between(text: str, flag: str, least: float, most: float) -> int:
    """Return a count from `least` to `most`, typed as for `parse_count`. Raises InputError with the range."""
    try:
        value = parse_count(text, flag)
    except InputError:
        value = -1
    if not least <= value <= most:
        fault = "is out of range." if value >= 0 else "is not a count in known units."
        low, high = (
            format_count(end) if end < 1e15 else f"{end:g}".replace("e+", "e") for end in (least, most)
        )
        legal = f"{low} to {high}, in units K, M, B, T, P or as in 1.5e12"
        raise InputError(Problem(where=flag, fault=f"'{text[:40]}' {fault}", legal=legal))
    return value


def parse_number(text: str, flag: str, most: float, example: str) -> float:
    """Return a plain number above 0 and up to `most`. Raises InputError, for NaN and infinity too."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        legal = f"numbers above 0 up to {most:g}, such as {example}"
        fault = f"'{text[:40]}' is out of range or not a number."
        raise InputError(Problem(where=flag, fault=fault, legal=legal))
    return value


def parse_duration(text: str, flag: str = "--deadline") -> float:
    """Return the seconds of a text such as `30d` or `12h`. Raises InputError."""
    return _parse(text, _TIME_UNITS, flag, "30d")


def parse_deadline(text: str, flag: str = "--deadline") -> float:
    """Return the seconds of a text such as `30` (days), `30d` or `12h`. Raises InputError."""
    is_plain = text.strip().replace(".", "", 1).isdigit()
    seconds = parse_duration(f"{text.strip()}d" if is_plain else text, flag)
    if seconds <= 0:
        raise InputError(Problem(where=flag, fault=f"'{text[:40]}' is zero time.", legal="above 0"))
    return seconds


def parse_usd(text: str, flag: str = "--budget") -> float:
    """Return the dollars of a text such as `50000`, `$50,000` or `1.5M`. Raises InputError."""
    plain = text.strip().removeprefix("$").replace(",", "")
    for parse in (float, parse_count):
        try:
            value = float(parse(plain))
        except (ValueError, InputError):
            continue
        if 0 < value <= MOST_USD:
            return value
    legal = "dollars above 0, such as 50000, $50,000 or 1.5M"
    raise InputError(Problem(where=flag, fault=f"'{text[:40]}' is not an amount of dollars.", legal=legal))


def format_bytes(value_bytes: float) -> str:
    """Return a size in binary units: `52.2 GiB`."""
    for unit, size in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(value_bytes) >= size:
            return f"{value_bytes / size:.4g} {unit}"
    return f"{value_bytes:.0f} B"


def format_seconds(value_s: float) -> str:
    """Return a duration: `1.23 s`, `4.5 ms`, `3.2 h`, `218 days`."""
    if value_s >= 2 * DAY_S:
        return f"{value_s / DAY_S:.4g} days"
    if value_s >= 7200:
        return f"{value_s / 3600:.3g} h"
    if value_s >= 1:
        return f"{value_s:.4g} s"
    if value_s >= 1e-3:
        return f"{value_s * 1e3:.3g} ms"
    return f"{value_s * 1e6:.3g} us"


def format_days(days: float) -> str:
    """Return days with about three significant digits, without the unit: `0.042`, `4.2`, `1,240`."""
    return f"{days:,.0f}" if days >= 100 else f"{days:.1f}" if days >= 1 else f"{days:.3f}"


def format_si(value: float, unit: str) -> str:
    """Return a rate in decimal units: `312 TFLOP/s`, `1.2 GB/s`."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def format_count(value: float) -> str:
    """Return a count in decimal units: `8.03B`, `124M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def format_percent(share: float | None, digits: int = 1, unknown: str = "-") -> str:
    """Return a share of 1 as a percentage: `3.2%`; `unknown` for None."""
    return unknown if share is None else f"{share:.{digits}%}"


def format_signed_percent(share: float | None, digits: int = 1, unknown: str = "-") -> str:
    """Return a relative difference as a percentage with its sign: `+3.2%`, `-3.2%`; `unknown` for None."""
    return unknown if share is None else f"{share:+.{digits}%}"


def format_usd(usd: float | None, unknown: str = UNKNOWN) -> str:
    """Return dollars, with cents below $1,000: `$12.34`, `$123,456`; `unknown` for None, never `$0`."""
    if usd is None:
        return unknown
    sign, amount = "-" if usd < 0 else "", abs(usd)
    return f"{sign}${amount:,.2f}" if amount < 1000 else f"{sign}${amount:,.0f}"


def format_short_usd(usd: float | None, unknown: str = UNKNOWN) -> str:
    """Return dollars with three significant digits from $10,000 on: `$192K`, `$1.74M`."""
    if usd is None or abs(usd) < 9_995:
        return format_usd(usd, unknown)
    sign, amount = "-" if usd < 0 else "", abs(usd)
    for unit, size in (("K", 1e3), ("M", 1e6), ("B", 1e9)):
        if amount < 999.5 * size:
            return f"{sign}${amount / size:#.3g}".rstrip(".") + unit
    return format_usd(usd, unknown)
