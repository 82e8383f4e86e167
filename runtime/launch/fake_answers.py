"""What a rank takes for received where nobody else is there: on torch's fake backend it runs alone.

Sizes that other ranks would say are those of balanced experts, and values are this rank's own: finite, of
the right shape, and worth nothing else.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.torch_version import TorchVersion

FILLS = TorchVersion(torch.__version__) >= "2.13"
"""Whether the fake backend itself copies what a rank sends into what it receives, of collectives; earlier
ones leave what is exchanged or reduced as it was allocated, which is filled here, but for DTensor's own. No
version does for messages of a pair."""


def alone(group: dist.ProcessGroup) -> bool:
    """Whether the other ranks of the group exist in name only."""
    return dist.get_backend(group) == "fake"


def balanced_counts(counts: Tensor) -> Tensor:
    """As many rows in all as `counts` [ranks, experts] says, as even as whole rows can be."""
    cells = counts.numel()
    begun = torch.arange(cells - 1, -1, -1, device=counts.device)
    return ((counts.sum() + begun) // cells).view_as(counts)


def row_counts(counts: Tensor, rows: int) -> list[list[int]]:
    """The numbers in `counts` [n, parts]; where tensors have shapes alone, `rows` over the parts of each."""
    if isinstance(counts, FakeTensor):
        parts = counts.shape[1]
        return [[(rows + parts - 1 - part) // parts for part in range(parts)]] * len(counts)
    found: list[list[int]] = counts.tolist()
    return found


def fill(received: Tensor, sent: Tensor) -> None:
    """Writes what was sent into what is received, row by row, again from the start where that is longer.

    Autograd and recomputation, which keep what was received, take it as part of receiving.
    """
    rows = max(len(sent), 1)
    target = received.data
    for first in range(0, len(received) if len(sent) else 0, rows):
        part = target[first : first + rows]
        part.copy_(sent.data[: len(part)])
