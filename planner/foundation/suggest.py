"""Names as users write them: forgiving comparison, and errors that offer the nearest names.

Divisors, and which of some legal values a message names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from planner.foundation.errors import InputError, Problem


@functools.lru_cache(maxsize=4096)
def normalized(name: str) -> str:
    """A name without case and separators: `GPT3-175B` and `gpt-3-175b` are the same.

    A separator between two digits stays, as a dash: `llama-27b` is not `llama-2-7b`.
    """
    dashed = re.sub(r"[-_ ]+", "-", name.lower())
    return re.sub(r"(?<![0-9])-|-(?![0-9])", "", dashed)


def nearest_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names that look most like `name`, best first; empty where none does."""
    import difflib

    by_squashed = {normalized(known): known for known in names}
    near = difflib.get_close_matches(normalized(name), by_squashed, n=count, cutoff=0.5)
    return [by_squashed[key] for key in near]


def unknown_name(where: str, kind: str, name: str, names: Iterable[str], fix: str = "") -> InputError:
    """The error for a name that is not in the catalog, with the nearest that are."""
    known = list(names)
    near = nearest_names(name[:100], known)
    listing = f"plan list {kind}s"
    return InputError(
        Problem(
            where=where,
            fault=f"no {kind} '{name[:100]}'." + (f" Did you mean {' or '.join(near)}?" if near else ""),
            legal="" if near else f"{', '.join(known[:8])}, ... ({len(known)} in all)",
            fix=fix or f"see `{listing}`",
        )
    )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_values(values: Iterable[int], wanted: int, most: int = 8) -> str:
    """The legal values nearest to the wanted one, ascending."""
    nearest_names = sorted(sorted(values, key=lambda v: abs(v - wanted))[:most])
    return ", ".join(str(value) for value in nearest_names)
