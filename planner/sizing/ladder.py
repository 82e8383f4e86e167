"""Which numbers of nodes are tried: a ladder of doublings, then what lies between two of its rungs."""

from __future__ import annotations

import math

ODD = 8
"""Of a number of devices, the most that may not divide the batch: the pipeline must take it up."""


def ladder(most: int) -> tuple[int, ...]:
    """Numbers of nodes: 1, 2, 4 and so on, up to `most`."""
    return tuple(2**power for power in range(most.bit_length()))


def between(few: int, many: int, batch: int, devices_per_node: int) -> list[int]:
    """Numbers of nodes strictly between two, ascending: those whose devices share out a batch well.

    Of the devices at most ODD may be left to the pipeline: what does not divide the batch cannot be data
    ranks.
    """
    return [
        nodes
        for nodes in range(few + 1, many)
        if nodes * devices_per_node // math.gcd(nodes * devices_per_node, batch) <= ODD
    ]
