"""Maxima and minima of seconds that hold under one set of constants, or under many sets at once.

Physics' fields may be arrays, an entry for each set of constants. Costs are sums, products and maxima of
them, so one evaluation gives the cost under every set: a fit gets its derivatives that way. Nothing on the
way branches on a figure that depends on a constant; where a larger or smaller one counts, it is one of these.
"""

from __future__ import annotations


def larger(first: float, *others: float) -> float:
    """The largest of some seconds, for each set of constants."""
    for other in others:
        first = _pick(first, other, largest=True)
    return first


def smaller(first: float, *others: float) -> float:
    """The smallest of some seconds, for each set of constants."""
    for other in others:
        first = _pick(first, other, largest=False)
    return first


def _pick(a: float, b: float, *, largest: bool) -> float:
    if isinstance(a, (float, int)) and isinstance(b, (float, int)):
        return a if bool(a >= b) is largest else b
    import numpy as np

    picked: float = np.maximum(a, b) if largest else np.minimum(a, b)  # an array stands for a float
    return picked
