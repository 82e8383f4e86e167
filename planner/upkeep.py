"""Upkeep: what a job does between its steps and suffers from outside. What nobody said is not counted."""

from __future__ import annotations

from planner.codec import noun

FAILURES_PER_1000_NODE_DAYS = 3.8
"""Unexpected interruptions of a job: 419 in 54 days on 2,048 nodes of 8 H100 (Llama 3, arXiv 2407.21783). Two
A100 clusters of Meta had 2.3 and 6.5 (arXiv 2410.21680)."""

RESTART_S = 1000.0
"""What an interruption costs besides lost steps. Llama 3 lost under 10 % of 54 days in 466 of them: at most
1,000 s each, lost steps included (arXiv 2407.21783)."""


@noun
class Upkeep:
    """Rates are of the whole job. `checkpoint_every` counts steps; `checkpoint_async` writes behind the
    steps, which wait only for the copy to host memory. `device_spread` is a device's standard deviation of
    compute time, from device to device and step to step, over its mean: equal V100s of one cluster were
    found to differ by 8 % on average (arXiv 2208.11035).
    """

    data_tokens_per_s: float | None = None
    storage_bytes_per_s: float | None = None
    checkpoint_every: int | None = None
    checkpoint_async: bool = False
    device_spread: float | None = None
    failures_per_1000_node_days: float = FAILURES_PER_1000_NODE_DAYS
    restart_s: float = RESTART_S

    @property
    def silent(self) -> bool:
        """Whether nothing was said that counts."""
        said = (self.data_tokens_per_s, self.checkpoint_every, self.device_spread)
        return all(value is None for value in said)


NOTHING_SAID = Upkeep()
