"""How long a step takes whose stages all take as long, in passes of the whole model: no bound, but near.

With F, I and W of a stage a second each, v stages on each of p ranks and m micro-batches, a step takes
3 m v seconds of work and a bubble:

    GPipe, 1F1B, interleaved    3 (p - 1)
    ZB-H1                       max(p - 1, 2 p - 1 - m)          arXiv 2401.10241, table 1, where m >= p
    ZB-V                        max(p - 1, 4 p - 2 - 2 m)        no bubble but the way down to the last rank
    DualPipeV                   2 (p - 1)                        github.com/deepseek-ai/DualPipe

and the whole model 3 v p. Of few micro-batches the two zero-bubble schedules wait for the first to come back.
"""

from __future__ import annotations

from planner.strategy.strategy import Degrees, Schedule


def even_factor(degrees: Degrees) -> float:
    """A step of even stages, in passes of the whole model for one micro-batch."""
    p, m, v = degrees.pp, degrees.num_micro_batches, degrees.chunks
    if p == 1:
        return float(m)
    match degrees.schedule:
        case Schedule.GPIPE | Schedule.ONE_F_ONE_B | Schedule.INTERLEAVED:
            bubble = 3 * (p - 1)
        case Schedule.ZB_H1:
            bubble = max(p - 1, 2 * p - 1 - m)
        case Schedule.ZBV:
            bubble = max(p - 1, 4 * p - 2 - 2 * m)
        case Schedule.DUALPIPEV:
            bubble = 2 * (p - 1)
    return (3 * m * v + bubble) / (3 * v * p)
