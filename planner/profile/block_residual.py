"""How much longer than their price the blocks of measured runs took, by their shape: a part of a profile."""

from __future__ import annotations

from collections.abc import Iterator

from planner.foundation.frozen import frozen
from planner.model.saved_tensors import AttentionKernel, Recompute
from planner.model.workload import Precision


@frozen
class BlockShape:
    """What the time of a block follows on one device, whatever the number of blocks.

    `tokens` are those of a micro-batch on that device, `width` the hidden size of a GPT block with as many
    parameters for a token: sqrt(parameters / 12).
    """

    device: str
    precision: Precision
    recompute: Recompute
    kernel: AttentionKernel
    compiled: bool
    routed: bool
    tp: int
    cp: int
    tokens: float
    seq: int
    width: float

    @property
    def splits_sequences(self) -> bool:
        """Whether ranks share out the tokens of a sequence."""
        return self.cp > 1


@frozen
class BlockResidual:
    """Runs whose blocks have one shape: ln(time that their steps tell of a block / its price), and how many
    runs' worth speak for it: each by the share of its step that blocks are, and by how far it is off."""

    shape: BlockShape
    log_ratio: float
    weight: float


@frozen
class BlockResiduals:
    """Those of a fit's runs, and the Gaussian process between them: the `spread` of blocks around their price
    and the `noise` of one run, both as shares.

    They hold for what `device`, `network`, `engine` and `framework` say, as a `Constant` does. Where none is
    told, nothing that a wider scope tells holds either.
    """

    spread: float
    noise: float
    told: tuple[BlockResidual, ...]
    device: str = ""
    framework: str = ""
    engine: str = ""
    network: str = ""

    def sizes(self) -> Iterator[tuple[str, float]]:
        """All that has to be above 0, by name."""
        yield from (("spread", self.spread), ("noise", self.noise))
        for each in self.told:
            yield "weight", each.weight
            yield from ((name, getattr(each.shape, name)) for name in ("tp", "cp", "tokens", "seq", "width"))
