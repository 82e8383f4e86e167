"""Units: SI inside (bytes, seconds, FLOPs), words like `72GiB`, `2T` and `30d` at the edge."""

from __future__ import annotations

import re

from planner.foundation.errors import InputError, Problem

KIB = 1024
MIB = 1024**2
GIB = 1024**3
DAY_S = 86_400.0
LARGEST = 1e30
"""Larger numbers in a quantity are taken for a typing error; they would overflow further on."""

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
    """Bytes of a text such as `72GiB` or `80GB`."""
    return round(_parse(text, _BYTE_UNITS, flag, "72GiB"))


def parse_bytes_per_s(text: str, flag: str) -> float:
    """Bytes a second of a text such as `40GB/s`; the `/s` may be left out."""
    return _parse(text.strip().removesuffix("/s"), _BYTE_UNITS, flag, "40GB/s")


def parse_count(text: str, flag: str = "--tokens") -> int:
    """A whole number of a text such as `2T`, `1.5B` or `300000`."""
    return round(_parse(text, _COUNT_UNITS, flag, "2T"))


def parse_duration(text: str, flag: str = "--deadline") -> float:
    """Seconds of a text such as `30d` or `12h`."""
    return _parse(text, _TIME_UNITS, flag, "30d")


def format_bytes(value_bytes: float) -> str:
    """Bytes for people, in binary units: `52.2 GiB`."""
    for unit, size in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(value_bytes) >= size:
            return f"{value_bytes / size:.4g} {unit}"
    return f"{value_bytes:.0f} B"


def format_seconds(value_s: float) -> str:
    """Seconds for people: `1.23 s`, `4.5 ms`, `3.2 h`, `218 days`."""
    if value_s >= 2 * DAY_S:
        return f"{value_s / DAY_S:.4g} days"
    if value_s >= 7200:
        return f"{value_s / 3600:.3g} h"
    if value_s >= 1:
        return f"{value_s:.4g} s"
    if value_s >= 1e-3:
        return f"{value_s * 1e3:.3g} ms"
    return f"{value_s * 1e6:.3g} us"


def format_si(value: float, unit: str) -> str:
    """A rate for people, in decimal units: `312 TFLOP/s`, `1.2 GB/s`."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def format_count(value: float) -> str:
    """A count for people: `8.03B`, `124M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
