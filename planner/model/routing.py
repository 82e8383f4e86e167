"""Routing: how tokens choose their experts, and what balances them; it does not change what a step costs."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen


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
