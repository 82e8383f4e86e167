"""Weights of a LoRA run with its adapters in them: W + s B A where a projection has an adapter, W elsewhere.

W is taken as the run computed with it, in the compute precision; the sum is in fp32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from planner.foundation.errors import InputError, Problem
from planner.strategy.plan import Plan
from runtime.checkpoint.adapter_files import read_adapters
from runtime.checkpoint.checkpoint import load_checkpoint
from runtime.checkpoint.store import CheckpointIndex
from runtime.model.huggingface.read import WeightFolder
from runtime.model.lora import A, B, check_base, scale_of, sums_of
from runtime.model.precision import compute_dtype

CORRECTION = ".correction"
"""Ends the names of what corrects a router's choice, which is no weight, and fp32 in any precision."""


class MergedWeights:
    """Reads whole parameters by our names. `base` is the folder that the run began with."""

    def __init__(self, checkpoint: Path, index: CheckpointIndex, plan: Plan, base: Path) -> None:
        """Raises InputError where the run trained no adapters, or beside other weights than `base` has."""
        adapters = plan.workload.adapters
        if adapters is None:
            fault = f"is given, but the run trained all weights (method {plan.workload.method})."
            raise InputError(Problem(where="--merge-adapters", fault=fault, fix="leave it out"))
        self._dtype = compute_dtype(plan.workload.precision)
        alpha = index.run.get("lora_alpha")
        self._scale = scale_of(adapters, None if alpha is None else float(alpha))
        self._base, self._adapters = WeightFolder(base, plan.model), read_adapters(checkpoint)
        self._shapes = {mapped.name: mapped.shape for mapped in self._base.map.parameters}
        frozen = (self._frozen(name) for name in self._shapes if not name.endswith(CORRECTION))
        saved = torch.zeros(3, dtype=torch.float64)
        load_checkpoint(checkpoint, index, {"executor": {"base": saved}})
        check_base(saved, sum((sums_of(weight) for weight in frozen), torch.zeros(3, dtype=torch.float64)))

    def __call__(self, name: str) -> Tensor:
        """One parameter, as it is or with its adapter, in fp32."""
        if name.endswith(CORRECTION):
            return self._read(name)
        weight, path = self._frozen(name).float(), name.removesuffix(".weight")
        if f"{path}.{A}" in self._adapters:
            weight += self._scale * self._adapters[f"{path}.{B}"] @ self._adapters[f"{path}.{A}"]
        return weight

    def _frozen(self, name: str) -> Tensor:
        """A parameter of the base in the compute precision."""
        return self._read(name).to(self._dtype)

    def _read(self, name: str) -> Tensor:
        weight = torch.empty(self._shapes[name])
        self._base.fill(name, weight)
        return weight
