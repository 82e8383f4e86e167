"""Divisors, and which of some legal values a message names."""

from __future__ import annotations

from collections.abc import Iterable


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def legal_values(values: Iterable[int], wanted: int, most: int = 8) -> str:
    """The legal values nearest to the wanted one, ascending."""
    nearest = sorted(sorted(values, key=lambda v: abs(v - wanted))[:most])
    return ", ".join(str(value) for value in nearest)
