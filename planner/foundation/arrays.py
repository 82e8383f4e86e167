"""Types of numpy arrays, and maxima and minima that take floats and arrays alike.

The cost model computes one figure, or an array of figures for many sets of constants or many recompute mixes
at once, with the same code. Nothing on the way branches on such a figure: where the larger or the smaller of
two counts, it is taken by `larger` or `smaller`, element by element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Bools = np.ndarray[Any, np.dtype[np.bool_]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Ints = np.ndarray[Any, np.dtype[np.int64]]


def larger(first: float, *others: float) -> float:
    """Return the largest of some figures, element by element where some are arrays."""
    for other in others:
        first = _pick(first, other, largest=True)
    return first


def smaller(first: float, *others: float) -> float:
    """Return the smallest of some figures, element by element where some are arrays."""
    for other in others:
        first = _pick(first, other, largest=False)
    return first


def _pick(a: float, b: float, *, largest: bool) -> float:
    if isinstance(a, (float, int)) and isinstance(b, (float, int)):
        return a if bool(a >= b) is largest else b
    import numpy as np

    picked: float = np.maximum(a, b) if largest else np.minimum(a, b)  # an array stands for a float
    return picked
