"""Balance without a loss: once a step the routers' corrections follow the tokens that each expert had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from planner.model.spec import ModelSpec
from runtime.model.experts import Router
from runtime.model.transformer import Transformer
from runtime.parallel.recompute import WRAPPER_PREFIX


class Balance:
    """The corrections of this rank's routers, by their names in the whole model; `frozen` ones never move."""

    def __init__(self, spec: ModelSpec, models: Sequence[Transformer], *, frozen: bool = False) -> None:
        found = ((name, module) for model in models for name, module in model.named_modules())
        routers = {name.replace(WRAPPER_PREFIX, ""): m for name, m in found if isinstance(m, Router)}
        self._routers = {int(name.split(".")[1]): router for name, router in routers.items()}
        self._layers = spec.layers
        self._experts = max((experts.count for experts in spec.experts), default=0)
        self.frozen = frozen
        self._moves = not frozen and any(experts.routing.bias_speed for experts in spec.experts)
        self.corrections: dict[str, Tensor] = {
            f"{name}.correction": router.correction
            for name, router in routers.items()
            if router.routing.corrected
        }

    def set_gradient_scale(self, scale: float) -> None:
        """What the gradients of the routers' own losses are multiplied by, as the head's are."""
        for router in self._routers.values():
            router.gradient_scale = scale

    def update(self) -> None:
        """Moves every correction by the tokens of the whole world, and counts from zero again. Collective.

        b_i += u sign(mean(c) - c_i) with c the tokens of the step (Wang et al. 2024, arXiv 2408.15664). Ranks
        that routed the same tokens all count them, which changes no sign.
        """
        if self._moves:
            device = next(iter(self._routers.values())).counts.device if self._routers else None
            counts = torch.zeros(self._layers, self._experts, device=device)
            for layer, router in self._routers.items():
                counts[layer, : router.experts] = router.counts
            dist.all_reduce(counts)
            for layer, router in self._routers.items():
                own = counts[layer, : router.experts]
                router.correction += router.routing.bias_speed * (own.mean() - own).sign()
        for router in self._routers.values():
            router.counts.zero_()
