"""What samples tell of a layer: themselves, the line between them, and as much more as the analytic cost.

The device is made up. It takes SLOWER times as long as the analytic model says, so every answer is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from planner.cost.constants import time_constants_of
from planner.cost.evaluate import CostModel
from planner.cost.layer import LayerCost, LayerShape
from planner.cost.stage.layer_cost import LayerModel, rates_of_run
from planner.cost.stage.layer_samples import Run, SampleTable, distance, form_of
from planner.job.engine_settings import NATIVE, EngineSettings
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import Constant, LayerKind, LayerSample, shape_key
from planner.strategy.strategy import Degrees, Strategy, even_stages
from tests.planner import instances
from tests.planner.cost.test_cliffs import FIGURES, assert_smooth, geometric

SLOWER = 1.7
ROUTED = Experts(count=8, topk=2, expert=Mlp(width=512, gated=True, activation=Activation.SILU))


def dense() -> ModelSpec:
    return instances.model(hidden=512, heads=16)


def routed() -> ModelSpec:
    block = dataclasses.replace(instances.dense_block(512, 16), mlp=ROUTED)
    return instances.model(hidden=512, blocks=[block] * 4)


CONSTANTS = (Constant(name="cp_step_s", value=1e-4, origin="test"),)


def problem(
    model: ModelSpec, samples: Sequence[LayerSample] = (), settings: EngineSettings = NATIVE
) -> PlanningProblem:
    profile = instances.profile(layers=tuple(samples), constants=CONSTANTS)
    asked = instances.problem(of=model, seq=2048, precision=Precision.FP32)
    return dataclasses.replace(asked, engine_settings=settings, profile=profile if samples else None)


def layers(
    model: ModelSpec, samples: Sequence[LayerSample] = (), settings: EngineSettings = NATIVE
) -> LayerModel:
    asked = problem(model, samples, settings)
    return LayerModel(asked, time_constants_of(asked.profile, asked.engine_settings))


def shaped(**changes: object) -> LayerShape:
    plain = LayerShape(
        kind=LayerKind.BLOCK, tp=1, sequence_parallel=False, micro_batch=8, seq=2048, precision=Precision.FP32
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def truth(model: ModelSpec, shape: LayerShape, run: Run) -> LayerCost:
    """What the made-up device takes."""
    analytic = layers(model).analytic(shape, run)
    return dataclasses.replace(
        analytic, forward_s=SLOWER * analytic.forward_s, backward_s=SLOWER * analytic.backward_s
    )


def taken(
    model: ModelSpec, shape: LayerShape, *, compiled: bool = False, host_s: float | None = None
) -> LayerSample:
    """The sample of a shape; with `host_s` the device's times are apart from the host's."""
    cost = truth(model, shape, Run(compiled=compiled, apart=host_s is not None, balanced=True))
    return LayerSample(
        kind=shape.kind,
        shape_key=shape_key(model, shape.kind),
        precision=shape.precision,
        recompute=shape.recompute,
        tp=shape.tp,
        sequence_parallel=shape.sequence_parallel,
        micro_batch=int(shape.micro_batch),
        seq=shape.seq,
        forward_s=cost.forward_s,
        backward_s=cost.backward_s,
        saved_bytes=round(cost.saved_bytes),
        forward_transient_bytes=round(cost.forward_transient_bytes),
        backward_transient_bytes=round(cost.backward_transient_bytes),
        spread=0.0,
        samples=5,
        cp=shape.cp,
        cp_exchange=shape.cp_exchange if shape.cp > 1 else None,
        ep=shape.ep,
        etp=shape.etp,
        compiled=compiled,
        host_forward_s=host_s,
        host_backward_s=None if host_s is None else 2 * host_s,
    )


FORMS = {
    "plain": shaped(),
    "tp": shaped(tp=4, sequence_parallel=True),
    "ring": shaped(cp=2),
    "gather": shaped(cp=4, cp_exchange=CpExchange.GATHER),
    "all-to-all": shaped(cp=2, cp_exchange=CpExchange.ALL_TO_ALL, tp=2),
    "full": shaped(recompute=Recompute.FULL),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_was_measured_is_the_answer(name: str) -> None:
    shape, others = FORMS[name], [shape for other, shape in FORMS.items() if other != name]
    samples = [taken(dense(), each) for each in (shape, *others)]
    cost = layers(dense(), samples).cost(shape)
    assert cost.origin == "measured"
    assert [getattr(cost, figure) for figure in FIGURES] == [
        getattr(samples[0], figure) for figure in FIGURES
    ]


@pytest.mark.parametrize("asked", FORMS)
@pytest.mark.parametrize("known", FORMS)
def test_any_form_tells_of_any_other_as_much_as_the_analytic_cost_differs(known: str, asked: str) -> None:
    """Also at other lengths and micro-batches."""
    samples = [taken(dense(), dataclasses.replace(FORMS[known], micro_batch=m)) for m in (1, 2, 4, 8, 16, 32)]
    model = layers(dense(), samples)
    for changes in ({}, {"micro_batch": 4}, {"seq": 4096}):
        shape = dataclasses.replace(FORMS[asked], **changes)
        expected = truth(dense(), shape, Run(compiled=False, apart=False, balanced=False))
        found = model.cost(shape)
        assert found.forward_s == pytest.approx(expected.forward_s, rel=0.02)
        assert found.backward_s == pytest.approx(expected.backward_s, rel=0.02)


def test_ranks_of_experts_that_were_measured_evenly_busy_are_not_in_a_plan() -> None:
    shape = shaped(ep=4)
    samples = [taken(routed(), shape)]
    expected = truth(routed(), shape, Run(compiled=False, apart=False, balanced=False))
    uneven = layers(routed(), samples).cost(shape)
    assert uneven.forward_s == pytest.approx(expected.forward_s) and uneven.origin == "fitted"
    assert uneven.forward_s > samples[0].forward_s
    even = layers(routed(), samples, dataclasses.replace(NATIVE, balanced=True)).cost(shape)
    assert even.forward_s == pytest.approx(samples[0].forward_s)


def test_ranks_of_experts_tell_of_more_of_them() -> None:
    samples = [taken(routed(), shaped(ep=2, tp=2, sequence_parallel=True, etp=1))]
    shape = shaped(ep=8, tp=2, sequence_parallel=True)
    expected = truth(routed(), shape, Run(compiled=False, apart=False, balanced=False))
    assert layers(routed(), samples).cost(shape).forward_s == pytest.approx(expected.forward_s)


def test_compiled_samples_are_for_compiled_stacks() -> None:
    shape = shaped()
    eager, compiled = (taken(dense(), shape, compiled=each) for each in (False, True))
    assert compiled.forward_s < eager.forward_s
    for samples in ([eager, compiled], [compiled, eager]):
        assert layers(dense(), samples).cost(shape).forward_s == eager.forward_s
        cost = layers(dense(), samples, EngineSettings(compiled=True)).cost(shape)
        assert (cost.forward_s, cost.origin) == (compiled.forward_s, "measured")
    for sample, settings in ((eager, EngineSettings(compiled=True)), (compiled, NATIVE)):
        cost = layers(dense(), [sample], settings).cost(shape)
        other = compiled if sample is eager else eager
        assert (cost.forward_s, cost.origin) == (pytest.approx(other.forward_s), "fitted")


def test_the_embedding_is_the_same_compiled() -> None:
    shape = shaped(kind=LayerKind.EMBEDDING)
    sample = taken(dense(), shape)
    cost = layers(dense(), [sample], EngineSettings(compiled=True)).cost(shape)
    assert (cost.forward_s, cost.origin) == (sample.forward_s, "measured")


def test_a_device_waits_for_its_host() -> None:
    """The host's time is a floor under few tokens and nothing under many, measured or not."""
    shape = shaped(micro_batch=1, seq=64)
    samples = [
        taken(dense(), dataclasses.replace(shape, micro_batch=m), host_s=0.1) for m in (1, 2, 4, 8, 4096)
    ]
    assert samples[0].forward_s < 0.1
    model = layers(dense(), samples)
    assert model.cost(shape).forward_s == 0.1 and model.cost(shape).backward_s == 0.2
    many = dataclasses.replace(shape, micro_batch=4096)
    run = Run(compiled=False, apart=True, balanced=False)
    assert model.cost(many).forward_s == pytest.approx(truth(dense(), many, run).forward_s, rel=1e-3)
    longer = dataclasses.replace(many, seq=128, micro_batch=2048)
    assert model.cost(longer).forward_s == pytest.approx(truth(dense(), longer, run).forward_s, rel=1e-3)
    assert model.cost(dataclasses.replace(shape, tp=2)).forward_s == 0.1
    figures = geometric(0.5, 10_000, 1.05)
    for tp in (1, 2):
        assert_smooth(
            lambda m, tp=tp: model.cost(dataclasses.replace(shape, tp=tp, micro_batch=m)).forward_s,  # type: ignore[misc]
            figures,
        )


@pytest.mark.parametrize("asked", FORMS)
def test_no_cliffs_at_samples_of_any_form(asked: str) -> None:
    """Over lengths, with samples of every form at two lengths and three micro-batches."""
    samples = [
        taken(dense(), dataclasses.replace(shape, seq=seq, micro_batch=m))
        for shape in FORMS.values()
        for seq in (128, 1024)
        for m in (1, 4, 16)
    ]
    model = layers(dense(), samples)
    inputs = sorted({*(int(x) for x in geometric(32, 8192, 1.07)), 127, 128, 129, 1023, 1024, 1025})
    for micro_batch in (1, 3, 4, 20):
        shape = dataclasses.replace(FORMS[asked], micro_batch=micro_batch)
        for figure in FIGURES:
            assert_smooth(
                lambda seq, s=shape, f=figure: float(  # type: ignore[misc]
                    getattr(model.cost(dataclasses.replace(s, seq=int(seq))), f)
                ),
                inputs,
                rises=False,  # under the host's floor two lengths that differ a little take turns
            )


def test_the_nearest_form_recomputes_alike_and_is_split_alike() -> None:
    asked = form_of(shaped(tp=8, cp=2, recompute=Recompute.FULL), compiled=False)
    order = [
        shaped(tp=8, cp=2, recompute=Recompute.FULL),
        shaped(tp=4, cp=2, recompute=Recompute.FULL),
        shaped(tp=4, recompute=Recompute.FULL),
        shaped(tp=8, cp=2, cp_exchange=CpExchange.GATHER, recompute=Recompute.FULL, micro_batch=9),
        shaped(tp=1, recompute=Recompute.FULL),
        shaped(tp=8, cp=2),
    ]
    away = [distance(form_of(shape, compiled=False), asked) for shape in order]
    assert away == sorted(away)
    assert max(away) < distance(form_of(order[0], compiled=True), asked)


def test_other_classes_and_precisions_say_nothing() -> None:
    sample = taken(dense(), shaped())
    table = SampleTable([sample], Precision.BF16, layers(dense()).analytic, curved=True)
    assert table.nearest(sample.shape_key, shaped(), compiled=False) is None
    cost = layers(routed(), [sample]).cost(shaped())
    assert cost.origin == "datasheet"


@pytest.mark.parametrize("exchange", list(CpExchange))
def test_what_a_rank_does_for_its_exchange_counts_once(exchange: CpExchange) -> None:
    """Measured of the block, it is no part of what the exchange shows besides."""
    degrees = Degrees(cp=2, cp_exchange=exchange, dp_replicate=2, micro_batch=2)
    strategy = Strategy(degrees=degrees, stages=even_stages(4, 1))
    shape = shaped(cp=2, cp_exchange=exchange)
    steps = {}
    for name, known in (("whole", shaped()), ("shared", shape)):
        asked = problem(dense(), [taken(dense(), known)])
        steps[name] = CostModel(asked).evaluate(strategy).estimate.breakdown
    model = layers(dense(), [taken(dense(), shape)])
    assert model.exchange_measured(shape)
    assert not layers(dense(), [taken(dense(), shaped())]).exchange_measured(shape)
    assert steps["shared"].cp_comm_s < steps["whole"].cp_comm_s


def test_rates_of_a_run_are_the_rates_where_it_is_alike() -> None:
    rates = layers(dense()).rates
    assert rates is not None
    alike = Run(compiled=rates.compiled, apart=False, balanced=False)
    assert rates_of_run(rates, alike) == rates
