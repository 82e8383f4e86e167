"""The borders of documents in packed sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Borders:
    """Of each token of packed sequences the place in its sequence at which its document begins.

    `begins` [B, S] stays in host memory, where attention reads it without waiting for the device. It is
    handed to a stage in this object, since FSDP moves the tensors that a root is called with.
    """

    begins: Tensor

    def chunk(self, parts: int) -> list[Borders]:
        """Those of each micro-batch."""
        return [Borders(part) for part in self.begins.chunk(parts)]
