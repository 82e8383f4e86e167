"""Scaling laws: compute-optimal parameters and tokens for a budget, and the loss of any choice.

Every law is data (`profiles/scaling_laws.toml`) with its source and the range of budgets that it was fitted
on. Training takes C = 6 N D FLOPs for N parameters and D tokens (Kaplan et al., arXiv 2001.08361).

A training budget in FLOPs, device-hours or dollars, and what FLOPs take of a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

from planner.foundation.decode import load_toml
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.catalog import data_folder
from planner.sizing.device_rate import DeviceRate

FLOPS_PER_PARAM_TOKEN = 6
"""Forward 2 and backward 4 FLOPs for each parameter and token (Kaplan et al., arXiv 2001.08361)."""

LEAST_BUDGET_FLOPS = 1e15
MOST_BUDGET_FLOPS = 1e30
"""Budgets outside are refused: at 1e15 the laws speak of models of a few million parameters, far below what
they were fitted on; 1e30 is ten thousand times the largest training of today."""


class Quantity(StrEnum):
    """What a law's power of the budget stands for."""

    PARAMS = "params"
    TOKENS = "tokens"
    FLOPS_PER_TOKEN = "flops_per_token"

    def params(self, value: float, flops: float) -> float:
        """N of the budget `flops` where this quantity is `value`, with C = 6 N D."""
        match self:
            case Quantity.PARAMS:
                return value
            case Quantity.TOKENS:
                return flops / FLOPS_PER_PARAM_TOKEN / value
            case Quantity.FLOPS_PER_TOKEN:
                return value / FLOPS_PER_PARAM_TOKEN


@frozen
class PowerFit:
    """The optimum as a power of the budget: value * (C / at_flops) ^ exponent."""

    quantity: Quantity
    at_flops: float
    value: float
    exponent: float

    def optimal_params(self, flops: float) -> float:
        return self.quantity.params(self.value * (flops / self.at_flops) ** self.exponent, flops)


@frozen
class ParametricLoss:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv 2203.15556, equation 2)."""

    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    @property
    def g(self) -> float:
        """G = (alpha A / (beta B)) ^ (1 / (alpha + beta)), the optimum's coefficient (equation 4)."""
        return float((self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta)))

    def loss(self, params: float, tokens: float) -> float:
        return float(self.irreducible + self.a / params**self.alpha + self.b / tokens**self.beta)

    def optimal_params(self, flops: float) -> float:
        """N* = G (C / 6) ^ (beta / (alpha + beta)): the minimum of the loss along C = 6 N D."""
        return float(self.g * (flops / FLOPS_PER_PARAM_TOKEN) ** (self.beta / (self.alpha + self.beta)))

    def flops_of_params(self, params: float) -> float:
        """The budget for which `params` is the optimum: the inverse of `optimal_params`."""
        return float(FLOPS_PER_PARAM_TOKEN * (params / self.g) ** ((self.alpha + self.beta) / self.beta))

    def flops_of_loss(self, loss: float) -> float:
        """The least budget that reaches `loss` > E.

        At the optimum L - E = (A G^-alpha + B G^beta) (C / 6) ^ (-alpha beta / (alpha + beta)).
        """
        scale = self.a * self.g**-self.alpha + self.b * self.g**self.beta
        power = (self.alpha + self.beta) / (self.alpha * self.beta)
        return float(FLOPS_PER_PARAM_TOKEN * (scale / (loss - self.irreducible)) ** power)


@frozen
class JointLoss:
    """L(N, D) = [(Nc / N)^(alpha_n / alpha_d) + Dc / D]^alpha_d (Kaplan et al., equation 1.5)."""

    params: float
    tokens: float
    alpha_n: float
    alpha_d: float

    def loss(self, params: float, tokens: float) -> float:
        of_params = (self.params / params) ** (self.alpha_n / self.alpha_d)
        return float((of_params + self.tokens / tokens) ** self.alpha_d)


@frozen
class BudgetPower:
    """coefficient * C ^ exponent."""

    coefficient: float
    exponent: float

    def at(self, flops: float) -> float:
        return float(self.coefficient * flops**self.exponent)


@frozen
class HyperFit:
    """Near-optimal peak learning rate, and batch in tokens, as powers of the budget."""

    learning_rate: BudgetPower
    batch_tokens: BudgetPower
    fitted_min_flops: float
    fitted_max_flops: float


@frozen
class Law:
    """One published law. Exactly one of `fit` and `loss` gives its optimum."""

    key: str
    title: str
    about: str
    counts: str
    fitted_min_flops: float
    fitted_max_flops: float
    fitted_on: str
    note: str
    sources: tuple[str, ...]
    recommended: bool = False
    fit: PowerFit | None = None
    loss: ParametricLoss | None = None
    joint_loss: JointLoss | None = None
    hyper: HyperFit | None = None

    def optimal_params(self, flops: float) -> float:
        """N* of a budget."""
        optimum = self.fit or self.loss
        assert optimum is not None, f"{self.key} has neither fit nor loss"
        return optimum.optimal_params(flops)

    def loss_of(self, params: float, tokens: float) -> float | None:
        """The predicted loss in nats a token, or None where the law gives none."""
        form = self.loss or self.joint_loss
        return None if form is None else form.loss(params, tokens)


@frozen
class Hyperparameters:
    """Batch and learning rate that a law gives for a budget."""

    learning_rate: float
    batch_tokens: float
    beyond_fit: float
    fitted_min_flops: float
    fitted_max_flops: float


@frozen
class Optimum:
    """What a law makes of a budget. `beyond_fit` is how far outside its range the budget lies; 1: inside."""

    law: Law
    flops: float
    params: float
    tokens: float
    loss: float | None
    beyond_fit: float
    hyper: Hyperparameters | None

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.params


@frozen
class TrainingPoint:
    """A model of `params` trained on `tokens`, its loss, and the compute-optimal model of equal loss.

    `overhead` is the FLOPs over those of the optimal model; `size_ratio` the optimal model's parameters
    over this one's, which is what a smaller model saves whenever it is used.
    """

    params: float
    tokens: float
    flops: float
    loss: float
    equal_flops: float
    equal_params: float
    equal_tokens: float

    @property
    def overhead(self) -> float:
        return self.flops / self.equal_flops

    @property
    def size_ratio(self) -> float:
        return self.equal_params / self.params


@frozen
class _LawFile:
    laws: tuple[Law, ...]


def load_laws() -> tuple[Law, ...]:
    """The published laws, in the order in which they are shown."""
    return load_toml(data_folder() / "scaling_laws.toml", _LawFile).laws


def recommended(laws: Sequence[Law]) -> Law:
    """The law to use where one must be chosen; it has a loss."""
    return next(law for law in laws if law.recommended)


def beyond(flops: float, least: float, most: float) -> float:
    """How many times `flops` lies above or below a range; 1 inside it."""
    return max(1.0, flops / most, least / flops)


def optimum(law: Law, flops: float) -> Optimum:
    """The compute-optimal model of a budget by one law."""
    params = law.optimal_params(flops)
    tokens = flops / FLOPS_PER_PARAM_TOKEN / params
    return Optimum(
        law=law,
        flops=flops,
        params=params,
        tokens=tokens,
        loss=law.loss_of(params, tokens),
        beyond_fit=beyond(flops, law.fitted_min_flops, law.fitted_max_flops),
        hyper=None if law.hyper is None else hyperparameters(law.hyper, flops),
    )


def optimal_tokens(law: Law, params: float) -> float:
    """Tokens of the budget for which a model of `params` parameters is the optimum, found by halving."""
    low, high = LEAST_BUDGET_FLOPS, MOST_BUDGET_FLOPS
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if law.optimal_params(middle) < params else (low, middle)
    return low / FLOPS_PER_PARAM_TOKEN / params


def hyperparameters(fit: HyperFit, flops: float) -> Hyperparameters:
    """Batch and learning rate of a budget, with how far outside their fit it lies."""
    return Hyperparameters(
        learning_rate=fit.learning_rate.at(flops),
        batch_tokens=fit.batch_tokens.at(flops),
        beyond_fit=beyond(flops, fit.fitted_min_flops, fit.fitted_max_flops),
        fitted_min_flops=fit.fitted_min_flops,
        fitted_max_flops=fit.fitted_max_flops,
    )


def training_point(form: ParametricLoss, params: float, tokens: float) -> TrainingPoint:
    """One choice of size and tokens, beside the compute-optimal model that reaches the same loss."""
    loss = form.loss(params, tokens)
    equal_flops = form.flops_of_loss(loss)
    equal_params = form.optimal_params(equal_flops)
    return TrainingPoint(
        params=params,
        tokens=tokens,
        flops=FLOPS_PER_PARAM_TOKEN * params * tokens,
        loss=loss,
        equal_flops=equal_flops,
        equal_params=equal_params,
        equal_tokens=equal_flops / FLOPS_PER_PARAM_TOKEN / equal_params,
    )


def over_training(form: ParametricLoss, params: float, multiples: Sequence[float]) -> list[TrainingPoint]:
    """A fixed size trained on multiples of the tokens for which it is the compute-optimal size."""
    optimal = form.flops_of_params(params) / FLOPS_PER_PARAM_TOKEN / params
    return [training_point(form, params, optimal * multiple) for multiple in multiples]


def iso_flop(form: ParametricLoss, flops: float, points: int, decades: float) -> list[TrainingPoint]:
    """Models of one budget, evenly spaced in log N over `decades` around the optimum."""
    best = math.log10(form.optimal_params(flops))
    step = decades / (points - 1)
    sizes = [10 ** (best - decades / 2 + step * index) for index in range(points)]
    return [training_point(form, size, flops / FLOPS_PER_PARAM_TOKEN / size) for size in sizes]


def nonembedding_params(flops_per_token: float, seq: int, aspect: float) -> float:
    """Parameters of blocks whose FLOPs a token, attention included, are M: 72 L d^2 + 12 L d s = M.

    With d = aspect * L and 12 L d^2 parameters; solved for L by bisection on a monotone cubic. Source of
    M: DeepSeek LLM, arXiv 2401.02954, section 3.
    """

    def needed(layers: float) -> float:
        width = aspect * layers
        return 72 * layers * width**2 + 12 * layers * width * seq

    low, high = 0.0, 1.0
    while needed(high) < flops_per_token:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) < flops_per_token else (low, middle)
    return 12 * low * (aspect * low) ** 2


@frozen
class Budget:
    """FLOPs to spend, how they were derived, and the device that spends them where one is named."""

    flops: float
    formula: str
    rate: DeviceRate | None

    def device_hours(self, flops: float) -> float | None:
        """Device-hours of `flops` at the assumed utilisation; None without a device or its peak."""
        speed = None if self.rate is None else self.rate.flops_per_s
        return None if speed is None else flops / speed / 3600

    def usd(self, flops: float) -> float | None:
        """Dollars of `flops`; None where the hours or the price are unknown."""
        hours = self.device_hours(flops)
        price = None if self.rate is None else self.rate.price
        return None if hours is None or price is None else hours * price.usd_per_device_hour


def budget_of_flops(flops: float, rate: DeviceRate | None) -> Budget:
    """A budget given in FLOPs. Raises InputError outside the range in which the laws mean anything."""
    return _checked("--budget-flops", float(flops), "C as given", rate)


def budget_of_hours(hours: float, rate: DeviceRate) -> Budget:
    """C = device-hours x 3600 x peak x MFU. Raises InputError where the peak is unknown."""
    flops = hours * 3600 * _speed("--budget-gpu-hours", rate)
    formula = f"{hours:,.0f} h x 3600 x {rate.peak_flops:.4g} x MFU {rate.mfu:g}"
    return _checked("--budget-gpu-hours", flops, formula, rate)


def budget_of_usd(usd: float, rate: DeviceRate) -> Budget:
    """C = dollars / price x 3600 x peak x MFU. Raises InputError where peak or price are unknown."""
    if rate.price is None:
        raise InputError(
            Problem(
                where="--budget-usd",
                fault=f"no on-demand price of {rate.title} is known.",
                fix="say it with --usd-per-gpu-hour",
            )
        )
    each = rate.price.usd_per_device_hour
    flops = usd / each * 3600 * _speed("--budget-usd", rate)
    formula = f"${usd:,.0f} / ${each:.4g} an hour x 3600 x {rate.peak_flops:.4g} x MFU {rate.mfu:g}"
    return _checked("--budget-usd", flops, formula, rate)


def _speed(flag: str, rate: DeviceRate) -> float:
    if rate.flops_per_s is None:
        raise InputError(
            Problem(where=flag, fault=f"{rate.unknown_peak}.", fix="choose a known format with --precision")
        )
    return rate.flops_per_s


def _checked(flag: str, flops: float, formula: str, rate: DeviceRate | None) -> Budget:
    if not LEAST_BUDGET_FLOPS <= flops <= MOST_BUDGET_FLOPS:
        raise InputError(
            Problem(
                where=flag,
                fault=f"is {flops:.3g} FLOPs, where the laws say nothing.",
                legal=f"{LEAST_BUDGET_FLOPS:g} to {MOST_BUDGET_FLOPS:g} FLOPs",
            )
        )
    return Budget(flops=flops, formula=formula, rate=rate)
