"""Feed-forward sublayers: a dense MLP, or experts of which each token meets a few."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.model.routing import Routing
from planner.model.saved_tensors import Kept
from planner.model.weight_matrix import Matrix, Split

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


class Activation(StrEnum):
    """The non-linearity of an MLP."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"


@frozen
class Mlp:
    """A feed-forward layer: up and down projections, and a gate beside the up when `gated`."""

    width: int
    gated: bool
    activation: Activation
    bias: bool = False

    @property
    def module_names(self) -> tuple[str, ...]:
        """What Hugging Face's llama calls the modules of `matrices`."""
        return MLP_MODULES if self.gated else MLP_MODULES[1:]

    @property
    def up_projections(self) -> int:
        return 2 if self.gated else 1

    @property
    def widths_split(self) -> tuple[tuple[int, str], ...]:
        return ((self.width, "the MLP's width"),)

    def matrices(self, hidden: int, copies: int = 1, used: int = 1) -> tuple[Matrix, ...]:
        """Up projections and the down projection, of every copy."""
        up = Matrix(inputs=hidden, outputs=self.width, bias=self.bias, copies=copies, used=used)
        down = Matrix(
            inputs=self.width, outputs=hidden, split=Split.INPUTS, bias=self.bias, copies=copies, used=used
        )
        return (up,) * self.up_projections + (down,)

    def kept(self, hidden: int) -> Kept:
        """Up projections, and the activation (and its product with the gate) that follows them."""
        width = self.up_projections * self.width
        return Kept(products=width, elementwise=width)

    @property
    def key(self) -> str:
        return f"{'g' if self.gated else 'u'}{self.width}-{self.activation}"

    @property
    def bias_key(self) -> str:
        return str(int(self.bias))


@frozen
class Experts:
    """A mixture of experts: a router, `count` equal MLPs of which each token meets `topk`, shared ones.

    `shared` is the sum of all shared experts as one MLP; `shared_gate` weighs its result by one value a
    token. `latent` is the width that tokens are projected to before the routed experts, and back after.
    Biases that only correct the router's choice are buffers, not parameters, and not counted. `routing` says
    what is computed, not what it costs.
    """

    count: int
    topk: int
    expert: Mlp
    router_bias: bool = False
    shared: Mlp | None = None
    shared_gate: bool = False
    latent: int | None = None
    latent_bias: bool = False
    routing: Routing = Routing()

    @property
    def widths_split(self) -> tuple[tuple[int, str], ...]:
        return ((self.shared.width, "the shared experts' width"),) if self.shared else ()

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Router, projections to and from the latent, routed experts, shared experts and their gate."""
        whole = Split.NONE
        matrices = [Matrix(inputs=hidden, outputs=self.count, split=whole, bias=self.router_bias)]
        if self.latent is not None:
            bias = self.latent_bias
            matrices.append(Matrix(inputs=hidden, outputs=self.latent, split=whole, bias=bias))
            matrices.append(Matrix(inputs=self.latent, outputs=hidden, split=whole, bias=bias))
        matrices += self.expert.matrices(self.latent or hidden, self.count, self.topk)
        if self.shared is not None:
            matrices += self.shared.matrices(hidden)
        if self.shared_gate:
            matrices.append(Matrix(inputs=hidden, outputs=1, split=whole))
        return tuple(matrices)

    def kept(self, hidden: int) -> Kept:
        """Each chosen expert's input, projections and weighted result; the shared experts' own."""
        routed, width = self.expert.kept(hidden), self.latent or hidden
        shared = self.shared.kept(hidden) if self.shared else Kept(products=0.0)
        return Kept(
            products=self.topk * routed.products + shared.products,
            elementwise=self.topk * routed.elementwise + shared.elementwise,
            statistics=float(self.count),
            routed=2.0 * self.topk * width,
        )

    @property
    def key(self) -> str:
        extras = [
            f"-shared{self.shared.key}" if self.shared else "",
            "-sharedgate" if self.shared_gate else "",
            f"-latent{self.latent}" if self.latent else "",
        ]
        return f"e{self.count}k{self.topk}-{self.expert.key}" + "".join(extras)

    @property
    def bias_key(self) -> str:
        shared = self.shared.bias_key if self.shared else ""
        latent = "1" if self.latent_bias else ""
        return self.expert.bias_key + str(int(self.router_bias)) + shared + latent


FeedForward = Mlp | Experts
