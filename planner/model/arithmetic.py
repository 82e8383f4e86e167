"""Arithmetic: what a model computes beside what its sizes say. It changes results, not costs."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen


class RopeKind(StrEnum):
    """How rotary frequencies are stretched for longer sequences than the first training had.

    LINEAR divides all by the factor; LLAMA3 only the low ones (Llama 3.1); YARN blends by turns over the
    original length (arXiv 2309.00071); LONGROPE has a divisor for every frequency (arXiv 2402.13753).
    """

    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@frozen
class RopeScaling:
    """The stretching of rotary frequencies and its numbers, each used by the kinds that have it.

    `amplitude` multiplies cosines and sines. `short` and `long` are LONGROPE's divisors for sequences up to
    and beyond `original_positions`.
    """

    kind: RopeKind
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


@frozen
class Arithmetic:
    """Scales, rotations and the places of norms. The defaults are Llama's.

    `rope_dims` of a head are turned (None: all), as pairs (i, i + half) or, `rope_interleaved`, (2i, 2i + 1);
    layers with a window turn by the base `window_rope_theta` unscaled, where that is set, and
    `unrotated_layers` do not turn. Learned positions are looked up `position_offset` rows further on.
    `attention_scale` multiplies scores (None: 1 / sqrt(head_dim)); a cap c makes a value c tanh(value / c).
    `post_norm`: a block of two norms has them behind its sublayers (OLMo 2, arXiv 2501.00656), not before.
    `unit_offset`: norms multiply by 1 + weight (Gemma, arXiv 2403.08295). `unexpressed` is what the model
    computes besides, in words: it can be planned and not executed.
    """

    rope_dims: int | None = None
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    window_rope_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    position_offset: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    post_norm: bool = False
    unit_offset: bool = False
    unexpressed: tuple[str, ...] = ()


PLAIN = Arithmetic()
