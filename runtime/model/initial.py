"""Initial values of parameters: a function of the seed and the name, so the same in every layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from planner.model.spec import ModelSpec
from runtime.model.experts import Experts
from runtime.model.rotary import Rotary
from runtime.model.router import Router

RESIDUAL_OUTPUTS = (
    "attention.wo.weight",
    "mlp.down.weight",
    "mlp.shared.down.weight",
    "mlp.experts.down",
)
"""Projections that write into the residual stream; their initial scale shrinks with depth (GPT-2 paper)."""


def materialize(
    module: nn.Module, spec: ModelSpec, *, prefix: str, seed: int, device: torch.device | str
) -> None:
    """Gives the parameters of a module on meta their initial values and moves it to `device`.

    `prefix` is the module's name in the whole model, with its dot. Values are drawn on the CPU from
    (seed, name), so they are the same in every layout and on every device.
    """
    module.to_empty(device="cpu")
    with torch.no_grad():
        for path, part in module.named_modules(prefix=prefix.removesuffix(".")):
            for name, parameter in part.named_parameters(prefix=path, recurse=False):
                if isinstance(part, Experts):
                    fill_experts(parameter, part.first, name, spec, seed)
                else:
                    fill_parameter(parameter, name, spec, seed)
            if isinstance(part, Rotary | Router):
                part.fill()
    if torch.device(device).type != "cpu":
        module.to(device)


def fill_parameter(parameter: Tensor, name: str, spec: ModelSpec, seed: int) -> None:
    """Initial values by name: norms 1 (0 where they add 1), biases 0, the rest normal with the spec's
    initializer_range. Projections into the residual stream are scaled by 1 / sqrt(2 * layers) (Radford et
    al. 2019).
    """
    name = canonical_name(name, spec)
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm." in name:
        parameter.fill_(0.0 if spec.arithmetic.unit_offset else 1.0)
    else:
        _draw(parameter, name, name, spec, seed)


def fill_experts(parameter: Tensor, first: int, name: str, spec: ModelSpec, seed: int) -> None:
    """As `fill_parameter`, for stacked weights: each expert by its number, so that no rank draws others."""
    for index, expert in enumerate(parameter):
        if name.endswith("bias"):
            expert.zero_()
        else:
            _draw(expert, name, f"{name}:{first + index}", spec, seed)


def _draw(values: Tensor, name: str, stream: str, spec: ModelSpec, seed: int) -> None:
    generator = _generator(stream, seed)
    scale = 1 / math.sqrt(2 * spec.layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    values.normal_(0.0, spec.initializer_range * scale, generator=generator)


def canonical_name(name: str, spec: ModelSpec) -> str:
    """The name of a parameter in the whole model. A tied output projection is the token embedding."""
    if spec.tied_embeddings and name == "output.weight":
        return "tok_embeddings.weight"
    return name


def drawn(name: str, shape: tuple[int, ...], *, scale: float, seed: int) -> Tensor:
    """Normal values with standard deviation `scale`, by (seed, name), on the CPU."""
    return torch.empty(shape).normal_(0.0, scale, generator=_generator(name, seed))


def _generator(stream: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
