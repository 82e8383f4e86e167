"""Targets that are not trained on: the loss is the mean over the others of the whole batch, in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from planner.strategy.strategy import Degrees, Zero
from runtime.model.transformer import build_transformer, materialize
from tests.plans import make_plan, tiny_llama
from tests.runtime.ranks import SEED, batch_of, make_executor, on_ranks, slice_of

MODEL = tiny_llama()
LAYOUTS = {
    "micro-batches": Degrees(micro_batch=1, num_micro_batches=8),
    "dp2": Degrees(dp_shard=2, zero=Zero.PARAMETERS, micro_batch=2, num_micro_batches=2),
    "pp2": Degrees(pp=2, micro_batch=2, num_micro_batches=4),
    "tp2": Degrees(tp=2, sequence_parallel=True, micro_batch=4, num_micro_batches=2),
    "cp2": Degrees(cp=2, micro_batch=4, num_micro_batches=2),
}


def mask_of(tokens: torch.Tensor) -> torch.Tensor:
    """Uneven on purpose: the first rows count wholly, the last hardly at all."""
    rows = torch.arange(tokens.shape[0])[:, None]
    return (tokens + rows * 3) % 8 >= rows


def reference() -> tuple[float, float]:
    """Loss and gradient norm of the first step in one process, by torch's own cross-entropy."""
    plan = make_plan(MODEL, LAYOUTS["micro-batches"])
    model = build_transformer(MODEL, 0, MODEL.layers, True, True, seq=plan.workload.seq)
    materialize(model, MODEL, prefix="", seed=SEED, device="cpu")
    tokens = batch_of(plan, 0)
    targets = tokens[:, 1:].masked_fill(~mask_of(tokens)[:, 1:], -100)
    loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return loss.item(), norm.item()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loss_is_the_mean_over_trained_targets_of_the_batch(name: str) -> None:
    plan = make_plan(MODEL, LAYOUTS[name])

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        tokens = slice_of(executor, batch_of(plan, 0))
        trained = slice_of(executor, mask_of(batch_of(plan, 0)))
        result = executor.step(tokens, trained)
        return result.loss, result.grad_norm

    for found in on_ranks(body, plan.strategy.degrees.world):
        assert found == pytest.approx(reference(), rel=1e-5)
