"""A vocabulary that tensor parallelism does not divide: padded in costs, whatever the engine."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from planner.cost.evaluate import CostModel
from planner.hardware.catalog import load_model
from planner.job.engine_settings import Engine, EngineSettings
from planner.job.problem import Limits, PlanningProblem
from planner.model.spec import VOCAB_UNIT, ModelSpec
from planner.search.bounds.layout_bounds import memory_bound_bytes
from planner.search.space import shapes
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances

GPT2_VOCAB = 50257


def test_a_shard_is_whole_or_padded_as_megatron_pads() -> None:
    """50,257 over 2 and 8 ranks: 50,432 and 51,200 rows, as Megatron-LM prints "with 175 dummy tokens"."""
    model = instances.model(vocab=GPT2_VOCAB)
    assert [tp * model.vocab_shard(tp) for tp in (1, 2, 4, 8)] == [50257, 50432, 50688, 51200]
    assert model.padded(1) is model and model.padded(2).vocab == 50432
    assert instances.model(vocab=256).padded(8).vocab == 256
    for vocab, tp in itertools.product((1, 127, 1001, 32003), (2, 6, 8)):
        padded = instances.model(vocab=vocab).padded(tp).vocab
        assert padded % (VOCAB_UNIT * tp) == 0 and 0 < padded - vocab < VOCAB_UNIT * tp


def problem(model: ModelSpec, settings: EngineSettings) -> PlanningProblem:
    on = instances.cluster(per_node=4, of=instances.device(flops=1e14, bandwidth=1e12))
    return dataclasses.replace(
        instances.problem(of=model, on=on, limit_bytes=1 << 40), engine_settings=settings
    )


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
def test_it_costs_what_the_padded_one_does(engine: Engine, tied: bool, liger: bool, pp: int) -> None:
    """Of a step only the rate of the optimizer's state, a mean over parameters, may tell them apart."""
    model = dataclasses.replace(instances.model(vocab=1001), tied_embeddings=tied)
    degrees = Degrees(tp=2, pp=pp, dp_shard=2 // pp, zero=Zero(2 // pp - 1), num_micro_batches=4 * pp)
    strategy = Strategy(degrees=degrees, stages=even_stages(4, pp))
    settings = EngineSettings(engine=engine, liger=liger)
    own, padded = (CostModel(problem(each, settings)) for each in (model, model.padded(2)))
    mine, theirs = (each.evaluate(strategy).estimate for each in (own, padded))
    assert mine.step_time_s == pytest.approx(theirs.step_time_s, rel=1e-12)
    assert mine.peak_memory_bytes == theirs.peak_memory_bytes
    assert memory_bound_bytes(own.layout(degrees)) <= mine.peak_memory_bytes


def test_no_engine_refuses() -> None:
    model = load_model("gpt2")
    assert model.vocab == GPT2_VOCAB
    degrees = Degrees(tp=4, num_micro_batches=8)
    strategy = Strategy(degrees=degrees, stages=even_stages(model.layers, 1))
    for engine in (None, *Engine):
        base = problem(model, EngineSettings(engine=engine or Engine.NATIVE))
        held = dataclasses.replace(base, limits=Limits(engine=engine))
        broken = {rejected.rule for rejected in broken_rules(held, strategy)}
        assert not broken & {"native_vocabulary", "tp_divides_widths"}


def test_gpt3_is_searched_with_tensor_parallelism() -> None:
    on = instances.cluster(per_node=8)
    of = instances.problem(of=load_model("gpt3-175b"), on=on, seq=2048, batch=8, limit_bytes=1 << 50)
    legal = [each for each in shapes(of, FixedChoices(pp=1, zero=0)) if isinstance(each, Degrees)]
    assert {degrees.tp for degrees in legal} == {1, 2, 4, 8}
