"""A checkpoint of any plan goes on under any other: a fast part of `bench.reshard`."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Zero
from tests.plans import make_plan, split, tiny_gpt2, tiny_llama
from tests.runtime.resharding import reshard

LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
PLANS: dict[str, dict[str, Plan]] = {
    "llama": {
        "tp2-sp": make_plan(LLAMA, Degrees(tp=2, micro_batch=4, sequence_parallel=True)),
        "interleaved": make_plan(
            LLAMA,
            Degrees(pp=2, chunks=2, schedule=Schedule.INTERLEAVED, micro_batch=2, num_micro_batches=2),
        ),
        "zero3": make_plan(LLAMA, Degrees(dp_shard=4, zero=Zero(3), micro_batch=1), split(4)),
    },
    "gpt2-tied": {
        "pp2-uneven": make_plan(GPT2, Degrees(pp=2, micro_batch=2, num_micro_batches=2), split(3, 1)),
        "hsdp": make_plan(GPT2, Degrees(dp_replicate=2, dp_shard=2, zero=Zero(2), micro_batch=1)),
    },
}


@pytest.mark.parametrize("model", PLANS)
def test_any_plan_goes_on_from_any_other(model: str, tmp_path: Path) -> None:
    pairs = reshard(PLANS[model], tmp_path)
    assert len(pairs) == len(PLANS[model]) ** 2
    assert [pair for pair in pairs if not pair.good] == []
