"""Feed-forward sublayers: a dense MLP, or experts of which each token meets a few.

Routing: how tokens choose their experts, and what balances them; it does not change what a step costs.
"""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.model.sublayer import SavedActivations, Split, WeightMatrix


class Score(StrEnum):
    """What makes a router's logits into scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class TopkMethod(StrEnum):
    """DeepSeek's names for how experts are chosen: among all, or among those of the best groups.

    A group is as good as its best expert (`group_limited_greedy`, DeepSeek-V2, arXiv 2405.04434), or as its
    best two together, with the bias that corrects the choice (`noaux_tc`, DeepSeek-V3, arXiv 2412.19437).
    """

    GREEDY = "greedy"
    GROUP_LIMITED = "group_limited_greedy"
    CORRECTED = "noaux_tc"


@frozen
class Routing:
    """How a token's experts are chosen and weighed, and what keeps their loads even.

    score           softmax or sigmoid of the logits, in fp32
    normalised      the weights of a token's experts sum to 1 (with softmax the same as softmax of the chosen)
    scale           factor on the weights (DeepSeek's routed_scaling_factor)
    groups          equal parts of the experts, of which a token chooses among `chosen_groups`; a part's score
                    is the sum of its best `group_experts`
    corrected       a bias, not trained, is added to the scores for the choice alone
    bias_speed      u of the balancing without a loss: each step the bias of an expert with more tokens than
                    the mean sinks by u, of one with fewer rises by it (Wang et al. 2024, arXiv 2408.15664)
    aux_loss        alpha of the balance loss that each layer adds (0: none), alpha E / (K S) sum_i c_i P_i:
                    of a sequence of S tokens, each with K of E experts, c_i chose expert i, and P_i is its
                    mean score, scores of a token summing to 1 (DeepSeek-V3, eqs. 17 to 20). It is alpha at
                    balance; it is of sequences, so that it is the same in every layout.
    z_loss          coefficient of the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)
    capacity        an expert takes the first ceil(capacity S K / E) tokens of a sequence that chose it; the
                    others lose its part (GShard, arXiv 2006.16668). None: none is dropped.
    """

    score: Score = Score.SOFTMAX
    normalised: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_experts: int = 1
    corrected: bool = False
    bias_speed: float = 0.0
    aux_loss: float = 0.0
    z_loss: float = 0.0
    capacity: float | None = None


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

    def matrices(self, hidden: int, copies: int = 1, used: int = 1) -> tuple[WeightMatrix, ...]:
        """Up projections and the down projection, of every copy."""
        up = WeightMatrix(inputs=hidden, outputs=self.width, bias=self.bias, copies=copies, used=used)
        down = WeightMatrix(
            inputs=self.width, outputs=hidden, split=Split.INPUTS, bias=self.bias, copies=copies, used=used
        )
        return (up,) * self.up_projections + (down,)

    def saved_activations(self, hidden: int) -> SavedActivations:
        """Up projections, and the activation (and its product with the gate) that follows them."""
        width = self.up_projections * self.width
        return SavedActivations(products=width, elementwise=width)

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

    def matrices(self, hidden: int) -> tuple[WeightMatrix, ...]:
        """Router, projections to and from the latent, routed experts, shared experts and their gate."""
        whole = Split.NONE
        matrices = [WeightMatrix(inputs=hidden, outputs=self.count, split=whole, bias=self.router_bias)]
        if self.latent is not None:
            bias = self.latent_bias
            matrices.append(WeightMatrix(inputs=hidden, outputs=self.latent, split=whole, bias=bias))
            matrices.append(WeightMatrix(inputs=self.latent, outputs=hidden, split=whole, bias=bias))
        matrices += self.expert.matrices(self.latent or hidden, self.count, self.topk)
        if self.shared is not None:
            matrices += self.shared.matrices(hidden)
        if self.shared_gate:
            matrices.append(WeightMatrix(inputs=hidden, outputs=1, split=whole))
        return tuple(matrices)

    def saved_activations(self, hidden: int) -> SavedActivations:
        """Each chosen expert's input, projections and weighted result; the shared experts' own."""
        routed, width = self.expert.saved_activations(hidden), self.latent or hidden
        shared = self.shared.saved_activations(hidden) if self.shared else SavedActivations(products=0.0)
        return SavedActivations(
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
