"""Mixers: the sublayers in which tokens meet each other, attention and what takes its place.

Each has the same members, so that a block adds them up without asking what they are:

    matrices(hidden)        its weights
    module_names            what their modules are called, for adapters beside them
    vector_params, vectors  parameters, and tensors, that are not matrices: norms, sinks, convolutions
    core_flops(seq)         FLOPs a token, forward, between the projections: scores and values, state
    kept(seq, kernel)       values a token kept for the backward pass
    heads_split             counts of heads that tensor parallelism shares out
    key                     a text that is equal where the costs are

Mixers with states instead of keys: a token costs the same however long the sequence is.
"""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.model.attention import Attention, LatentAttention
from planner.model.sublayer import AttentionKernel, HeadCount, SavedActivations, Split, WeightMatrix


@frozen
class StateSpace:
    """A Mamba-2 layer: projections, a short convolution, and a recurrence over states (2405.21060).

    The inner width is heads x head_dim; inputs to the state come in `groups`. `chunk` is the block of the
    chunked (SSD) algorithm.
    """

    state_heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    chunk: int
    bias: bool = False
    conv_bias: bool = True

    @property
    def inner(self) -> int:
        return self.state_heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: the inner width and both state projections."""
        return self.inner + 2 * self.groups * self.state

    @property
    def heads_split(self) -> tuple[HeadCount, ...]:
        return (
            HeadCount(count=self.state_heads, what="state-space heads"),
            HeadCount(count=self.groups, what="state-space groups"),
        )

    @property
    def module_names(self) -> tuple[str, ...]:
        """What Hugging Face's mamba2 calls the modules of `matrices`."""
        return ("in_proj", "out_proj")

    def matrices(self, hidden: int) -> tuple[WeightMatrix, ...]:
        """Input projection (gate, convolved channels, step sizes) and output projection."""
        outputs = self.inner + self.convolved + self.state_heads
        return (
            WeightMatrix(inputs=hidden, outputs=outputs, bias=self.bias),
            WeightMatrix(inputs=self.inner, outputs=hidden, split=Split.INPUTS, bias=self.bias),
        )

    @property
    def vector_params(self) -> int:
        """Convolution, step bias, decay and skip a head, and the gated norm."""
        return self.convolved * (self.kernel + self.conv_bias) + 3 * self.state_heads + self.inner

    @property
    def vectors(self) -> int:
        return 5 + self.conv_bias

    def core_flops(self, seq: int) -> float:
        """Convolution; inside a chunk scores and values of half its tokens; states written and read."""
        inside = (min(self.chunk, seq) + 1) / 2
        chunked = 2.0 * inside * (self.groups * self.state + self.inner)
        return 2.0 * self.kernel * self.convolved + chunked + 4.0 * self.inner * self.state

    def saved_activations(self, seq: int, kernel: AttentionKernel) -> SavedActivations:
        """Gate, channels before and after the convolution, step sizes, result, and states by chunk."""
        states = self.inner * self.state / min(self.chunk, seq)
        return SavedActivations(
            products=self.inner + self.convolved + self.state_heads + self.inner,
            elementwise=self.convolved + self.inner,
            statistics=states,
        )

    @property
    def key(self) -> str:
        size = f"{self.state_heads}x{self.head_dim}-n{self.state}-g{self.groups}"
        return f"ssm{size}-k{self.kernel}-c{self.chunk}"

    @property
    def bias_key(self) -> str:
        return f"{int(self.bias)}{int(self.conv_bias)}"


@frozen
class DeltaNet:
    """A gated delta-rule layer: linear attention with a decaying, correcting state (2412.06464).

    `chunk` is the block of the chunked algorithm.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_head_dim: int
    kernel: int
    chunk: int = 64

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_head_dim

    @property
    def convolved(self) -> int:
        return 2 * self.key_width + self.value_width

    @property
    def heads_split(self) -> tuple[HeadCount, ...]:
        return (
            HeadCount(count=self.key_heads, what="delta-rule key heads"),
            HeadCount(count=self.value_heads, what="delta-rule value heads"),
        )

    @property
    def module_names(self) -> tuple[str, ...]:
        """What Hugging Face's qwen3_next calls the modules of `matrices`."""
        return ("in_proj_qkvz", "in_proj_ba", "out_proj")

    def matrices(self, hidden: int) -> tuple[WeightMatrix, ...]:
        """Queries, keys, values and output gate; decay and write strength; output projection."""
        return (
            WeightMatrix(inputs=hidden, outputs=self.convolved + self.value_width),
            WeightMatrix(inputs=hidden, outputs=2 * self.value_heads),
            WeightMatrix(inputs=self.value_width, outputs=hidden, split=Split.INPUTS),
        )

    @property
    def vector_params(self) -> int:
        """Convolution, decay and step bias a head, and the gated norm over a head."""
        return self.convolved * self.kernel + 2 * self.value_heads + self.value_head_dim

    @property
    def vectors(self) -> int:
        return 4

    def core_flops(self, seq: int) -> float:
        """Convolution; in a chunk two kinds of scores, the solve, and values; state read twice, written."""
        inside = (min(self.chunk, seq) + 1) / 2
        chunked = 2.0 * inside * (3 * self.key_dim + 2 * self.value_head_dim)
        states = 6.0 * self.key_dim * self.value_head_dim
        return 2.0 * self.kernel * self.convolved + self.value_heads * (chunked + states)

    def saved_activations(self, seq: int, kernel: AttentionKernel) -> SavedActivations:
        """Channels before and after the convolution, gate, strengths, result, and states by chunk."""
        states = self.value_heads * self.key_dim * self.value_head_dim / min(self.chunk, seq)
        return SavedActivations(
            products=self.convolved + 2 * self.value_width + 2 * self.value_heads,
            elementwise=self.convolved + self.value_width,
            statistics=states,
        )

    @property
    def key(self) -> str:
        keys, values = f"{self.key_heads}x{self.key_dim}", f"{self.value_heads}x{self.value_head_dim}"
        return f"delta{keys}-v{values}-k{self.kernel}-c{self.chunk}"

    @property
    def bias_key(self) -> str:
        return "0"


@frozen
class LightningAttention:
    """Linear attention with a fixed decay a head, normed and gated at its output (MiniMax-01, 2501.08313).

    `chunk` is the block of the chunked algorithm.
    """

    lightning_heads: int
    head_dim: int
    chunk: int

    @property
    def width(self) -> int:
        return self.lightning_heads * self.head_dim

    @property
    def heads_split(self) -> tuple[HeadCount, ...]:
        return (HeadCount(count=self.lightning_heads, what="lightning-attention heads"),)

    @property
    def module_names(self) -> tuple[str, ...]:
        """What Hugging Face's minimax calls the modules of `matrices`."""
        return ("qkv_proj", "output_gate", "out_proj")

    def matrices(self, hidden: int) -> tuple[WeightMatrix, ...]:
        """Queries, keys and values; output gate; output projection."""
        return (
            WeightMatrix(inputs=hidden, outputs=3 * self.width),
            WeightMatrix(inputs=hidden, outputs=self.width),
            WeightMatrix(inputs=self.width, outputs=hidden, split=Split.INPUTS),
        )

    @property
    def vector_params(self) -> int:
        """The norm of the result."""
        return self.width

    @property
    def vectors(self) -> int:
        return 1

    def core_flops(self, seq: int) -> float:
        """Inside a chunk scores and values of half its tokens; the state written and read."""
        inside = (min(self.chunk, seq) + 1) / 2
        return self.width * (4.0 * inside + 4.0 * self.head_dim)

    def saved_activations(self, seq: int, kernel: AttentionKernel) -> SavedActivations:
        """q, k, v before and after their activation, the result before and after its norm, the gate."""
        states = self.width * self.head_dim / min(self.chunk, seq)
        return SavedActivations(products=5 * self.width, elementwise=5 * self.width, statistics=states)

    @property
    def key(self) -> str:
        return f"lightning{self.lightning_heads}x{self.head_dim}-c{self.chunk}"

    @property
    def bias_key(self) -> str:
        return "0"


Mixer = Attention | LatentAttention | StateSpace | DeltaNet | LightningAttention
