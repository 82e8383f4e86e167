"""A vocabulary that tensor parallelism does not divide: the last rank has fewer rows, each a token's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from planner.foundation.errors import InputError
from planner.strategy.engines import native as chunked_loss
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.checkpoint.store import committed_folders, load_index
from runtime.model.huggingface.files import WeightFolder, write_weights
from runtime.model.transformer import build_transformer, materialize
from runtime.parallel.parallelize import check_supported
from tests.plans import batch8, make_plan, tiny_gpt2, tiny_llama
from tests.runtime.matrix import TOLERANCE, execute
from tests.runtime.ranks import batch_of, make_executor, on_ranks, slice_of
from tests.runtime.resharding import reshard

LLAMA, TIED = tiny_llama(vocab=67), tiny_gpt2(vocab=67)
BIASED = replace(LLAMA, head_bias=True)


PLANS: dict[str, Plan] = {
    "tp4-sp": make_plan(LLAMA, batch8(tp=4, micro_batch=4, sequence_parallel=True)),
    "tp2-zero3": make_plan(LLAMA, batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(3))),
    "tied-tp4": make_plan(TIED, batch8(tp=4, micro_batch=4)),
    "tied-tp2-pp2": make_plan(TIED, batch8(tp=2, pp=2, micro_batch=2)),
    "tied-tp2-hsdp": make_plan(
        TIED, batch8(tp=2, dp_replicate=2, dp_shard=2, micro_batch=1, zero=Zero(1), sequence_parallel=True)
    ),
    "biased-tp2": make_plan(BIASED, batch8(tp=2, dp_replicate=2, micro_batch=2)),
    "biased-tp2-zero3": make_plan(BIASED, batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(3))),
    "biased-tp2-zb": make_plan(BIASED, batch8(tp=2, pp=2, micro_batch=2, schedule=Schedule.ZB_H1)),
}


@pytest.mark.parametrize("name", PLANS)
def test_losses_and_gradient_norms_are_those_of_one_process(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Over chunks of 7 tokens, which all ranks cut alike whatever columns they have."""
    plan = PLANS[name]
    tp = plan.strategy.degrees.tp
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 7 * 4 * plan.model.vocab_shard(tp))
    outcome = execute(plan)
    assert outcome.difference < TOLERANCE
    assert outcome.not_as_planned == ()


def test_ranks_hold_rows_of_tokens_alone() -> None:
    """67 rows over 4 ranks are 17, 17, 17 and 16; no more than are charged for."""
    plan = PLANS["tied-tp4"]

    def body(rank: int) -> list[int]:
        weight = next(w for w in make_executor(plan).weights if w.name == "tok_embeddings.weight")
        return list(weight.shard.shape)

    assert on_ranks(body, 4) == [[17, 32], [17, 32], [17, 32], [16, 32]]
    assert plan.model.vocab_shard(4) >= 17


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_the_vocabulary_alone_and_goes_on_under_any_tp(tied: bool, tmp_path: Path) -> None:
    spec = replace(tiny_llama(layers=1, vocab=67, tied=tied), head_bias=not tied)
    shards = Degrees(tp=2, dp_shard=2, micro_batch=2, zero=Zero(2))
    plans = {
        "tp4": make_plan(spec, Degrees(tp=4, micro_batch=4)),
        "other": make_plan(spec, Degrees(micro_batch=4) if tied else shards),
    }
    pairs = reshard(plans, tmp_path)
    assert len(pairs) == len(plans) ** 2
    assert [pair for pair in pairs if not pair.good] == []
    stored = load_index(committed_folders(tmp_path / "tp4")[0]).tensors
    assert {name: tensor.shape for name, tensor in stored.items() if "tok_embeddings" in name} == {
        f"{part}tok_embeddings.weight{state}": shape
        for part, state, shape in (
            ("model.", "", (67, 32)),
            ("optimizer.", ".step", ()),
            ("optimizer.", ".exp_avg", (67, 32)),
            ("optimizer.", ".exp_avg_sq", (67, 32)),
        )
    }


@pytest.mark.parametrize("degrees", [Degrees(tp=4, micro_batch=4), PLANS["tp2-zero3"].strategy.degrees])
def test_weights_of_a_folder_are_read_by_their_rows(degrees: Degrees, tmp_path: Path) -> None:
    plan = make_plan(LLAMA, degrees)
    whole = build_transformer(LLAMA, 0, LLAMA.layers, True, True, seq=plan.workload.seq)
    materialize(whole, LLAMA, prefix="", seed=3, device="cpu")
    own = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    write_weights(own.__getitem__, LLAMA, tmp_path / "hf", config={}, dtype=torch.float32)
    tokens = batch_of(plan, 0)
    expected = functional.cross_entropy(whole(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()

    def body(rank: int) -> float:
        executor = make_executor(plan)
        source = WeightFolder(tmp_path / "hf", LLAMA)
        for name, tensor in executor.weight_tensors():
            source.fill(name, tensor)
        executor.weights_filled()
        return executor.step(slice_of(executor, tokens)).loss

    for loss in on_ranks(body, degrees.world):
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "degrees", "words"),
    [
        (tiny_llama(vocab=5), Degrees(tp=4, micro_batch=4), "the last of 4 parts of 2 rows has none"),
        (LLAMA, Degrees(tp=2, dp_shard=3, zero=Zero(3)), "3 ranks cannot share out 32 columns"),
    ],
)
def test_parts_that_ranks_cannot_hold_are_refused(model: Any, degrees: Degrees, words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_supported(make_plan(model, degrees))
    assert f"cannot split the vocabulary of {model.vocab}: " in str(caught.value)
    assert words in str(caught.value)
