"""Layers of every class and shard, measured as they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch.distributed.tensor import DTensor

from planner.foundation.decode import decode, decode_json, to_json
from planner.model.attention import Attention, AttentionSpan, CpExchange, Reach
from planner.model.spec import Block, ModelSpec, Segment
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, LayerSample
from runtime.model.experts import MixtureOfExperts
from runtime.parallel.collectives import FAKE_BACKEND_COPIES
from runtime.parallel.meshes import fake_world
from runtime.profiler.layers import LayerBench, LayerCase, build_layer, layer_cases, measure_layers
from runtime.profiler.timing import Effort
from tests.plans import tiny_deepseek_experts, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_mla
from tests.runtime.ranks import in_a_process

SEQ = 32
ONCE = Effort(warmup=1, least=2, most=2, budget_s=0.0)


def hybrid() -> ModelSpec:
    """A dense layer first, then two with experts, then one whose attention has a window."""
    dense, routed = tiny_llama(layers=1), tiny_mixtral(layers=2)
    block = dense.block(0)
    assert isinstance(block, Block) and isinstance(block.mixer, Attention)
    mixer = dataclasses.replace(block.mixer, span=AttentionSpan(reach=Reach.WINDOW, size=8))
    windowed = Segment(block=dataclasses.replace(block, mixer=mixer), count=1)
    segments = (*dense.segments, *routed.segments, windowed)
    return dataclasses.replace(routed, name="hybrid", segments=segments)


def a_case(**changes: object) -> LayerCase:
    plain = LayerCase(
        kind=LayerKind.BLOCK,
        recompute=Recompute.NONE,
        tp=1,
        sequence_parallel=False,
        micro_batch=2,
        seq=SEQ,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def taken(cases: Sequence[LayerCase], model: ModelSpec) -> list[LayerSample]:
    messages = list(measure_layers(cases, model, Precision.FP32, "cpu", ONCE))
    return [decode(LayerSample, message, source="test") for message in messages]


def routed_key(model: ModelSpec) -> str:
    return model.segments[1].block.shape_key


def test_every_class_of_a_model_is_measured_as_itself() -> None:
    model = hybrid()
    keys = list(model.classes())
    cases = [case for case in layer_cases(model, [SEQ], [1], [1]) if case.kind is LayerKind.BLOCK]
    assert [case.block for case in cases[::3]] == ["", *keys[1:]]
    samples = taken(cases[::3], model)
    assert [sample.shape_key for sample in samples] == keys
    with fake_world(cases[0].degrees(), "cpu") as meshes:
        built = [build_layer(case, model, Precision.FP32, meshes) for case in cases[::3]]
    assert [next(iter(layer.layers)) for layer in built] == ["0", "1", "3"]
    mixtures = [any(isinstance(m, MixtureOfExperts) for m in layer.modules()) for layer in built]
    assert mixtures == [False, True, False]


@pytest.mark.parametrize(
    "model", [tiny_llama(), tiny_gpt2(), tiny_mla(), tiny_deepseek_experts(), hybrid()], ids=lambda m: m.name
)
def test_labels_of_all_cases_differ(model: ModelSpec) -> None:
    cases = layer_cases(model, [16, 32], [1, 2, 4], [1, 2, 4, 8], [1, 2], [1, 2, 4], [False, True])
    assert len({case.label() for case in cases}) == len(cases) == len(set(cases))


def test_what_takes_longest_to_begin_is_measured_last() -> None:
    cases = layer_cases(tiny_mixtral(), [16, 32], [1, 2], [1, 2], [1, 2], [1, 2], [False, True])
    last = [(case.compiled, case.cp > 1 or case.ep > 1) for case in cases]
    assert last == sorted(last) and {case.seq for case in cases[: len(cases) // 4]} == {16, 32}


def test_the_grid_of_a_dense_model_is_what_it_was() -> None:
    """Three kinds, by width and micro-batch; recomputing blocks at two micro-batches."""
    cases = layer_cases(tiny_llama(), [SEQ], [1, 2, 3], [1, 2, 4, 8])
    assert len(cases) == 3 * (3 * 4 + 2 * 2)
    assert all(c.cp == c.ep == 1 and not c.compiled for c in cases)


def test_illegal_shards_are_left_out() -> None:
    model = tiny_mixtral()  # 8 heads, 4 of keys, 8 experts
    cases = layer_cases(model, [SEQ], [1, 2], [1], cps=[1, 2, 3, 8], eps=[1, 2, 3, 8])
    found = {(c.tp, c.sequence_parallel, c.cp, str(c.cp_exchange)) for c in cases if c.cp > 1}
    assert {cp for _, _, cp, _ in found} == {2, 8}
    assert (1, False, 8, "all_to_all") in found and (2, False, 8, "all_to_all") not in found
    spread = {(c.tp, c.sequence_parallel, c.ep, c.etp) for c in cases if c.ep > 1}
    assert spread == {
        (1, False, 2, None), (1, False, 8, None), (2, False, 2, None), (2, False, 8, None),
        (2, True, 2, None), (2, True, 8, None), (2, True, 2, 1), (2, True, 8, 1),
    }  # fmt: skip


def test_windows_go_no_ring() -> None:
    cases = layer_cases(hybrid(), [SEQ], [1], [1], cps=[2])
    assert {case.cp_exchange for case in cases if case.cp > 1} == {CpExchange.ALL_TO_ALL}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("exchange", list(CpExchange))
def test_a_rank_that_shares_a_sequence_holds_its_part(exchange: CpExchange, tp: int) -> None:
    """Half of what the whole sequence takes, besides what the exchange keeps."""
    part, whole = taken(
        [
            a_case(cp=2, cp_exchange=exchange, tp=tp, recompute=Recompute.FULL),
            a_case(tp=tp, recompute=Recompute.FULL),
        ],
        tiny_llama(),
    )
    assert (part.cp, part.cp_exchange, part.seq) == (2, exchange, SEQ)
    assert part.saved_bytes == whole.saved_bytes / 2
    assert part.forward_s > 0 and part.backward_s > 0


@pytest.mark.parametrize(
    "shards",
    [
        {"ep": 2},
        {"ep": 4, "tp": 2},
        {"ep": 4, "tp": 2, "sequence_parallel": True},
        {"ep": 4, "tp": 2, "sequence_parallel": True, "etp": 1},
        {"ep": 2, "cp": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", list(Recompute))
@in_a_process
def test_a_rank_of_experts_meets_as_many_rows_as_its_tokens_have(
    shards: dict[str, int | bool], recompute: Recompute
) -> None:
    """Each of ep x etp ranks has 1 / ep of the experts, which meet the rows of etp ranks, evenly."""
    case = a_case(recompute=recompute, **shards)
    model = tiny_mixtral()
    met: list[list[int]] = []
    with fake_world(case.degrees(), "cpu") as meshes:
        layer = build_layer(case, model, Precision.FP32, meshes)
        bench = LayerBench(case, layer, model, Precision.FP32)
        for module in layer.modules():
            if isinstance(module, MixtureOfExperts):
                module.experts.register_forward_pre_hook(lambda _, args: met.append(args[1].tolist()))
        bench.prepare()
        bench.forward()
        bench.backward()
        gradients = [p.grad for p in layer.parameters()]
        own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    routed = case.micro_batch * case.seq // case.cp * 2
    routed //= case.tp if case.sequence_parallel else 1
    gathered = case.degrees().expert_tp if case.sequence_parallel else 1
    assert len(met[0]) == 8 // case.ep
    assert set(met[0]) == {routed * gathered * case.ep // 8}
    assert all(grad is not None for grad in own)
    if FAKE_BACKEND_COPIES:  # else what DTensor's own messages bring is whatever memory held
        assert all(grad.isfinite().all() for grad in own if grad is not None)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_layers_are_measured_beside_eager_ones() -> None:
    model = tiny_llama()
    cases = layer_cases(model, [SEQ], [1], [1], compiled=[False, True])
    block = next(case for case in cases if case.compiled and case.kind is LayerKind.BLOCK)
    assert {case.kind for case in cases if case.compiled} == {LayerKind.BLOCK, LayerKind.HEAD}
    with fake_world(block.degrees(), "cpu") as meshes:
        layer = build_layer(block, model, Precision.FP32, meshes)
    assert hasattr(layer.layers["0"].forward, "_torchdynamo_orig_callable")
    assert {case.compiled for case in layer_cases(model, [SEQ], [1], [1], compiled=[True])} == {True}


def test_samples_of_earlier_profiles_read_as_plain_ones() -> None:
    (sample,) = taken([a_case()], tiny_llama())
    text = to_json(sample)
    assert decode_json(LayerSample, text, source="test") == sample
    later = ("cp", "cp_exchange", "ep", "etp", "compiled", "host_forward_s", "host_backward_s")
    lines = [
        line for line in text.splitlines() if not line.strip().startswith(tuple(f'"{n}"' for n in later))
    ]
    earlier = "\n".join(lines).replace(",\n}", "\n}")
    assert decode_json(LayerSample, earlier, source="test") == sample
    assert (sample.cp, sample.ep, sample.etp, sample.compiled, sample.host_forward_s) == (
        1,
        1,
        None,
        False,
        None,
    )


def test_precisions_of_16_bits_are_measured_in_them() -> None:
    case = a_case()
    with fake_world(case.degrees(), "cpu") as meshes:
        layer = build_layer(case, tiny_llama(), Precision.BF16, meshes)
        bench = LayerBench(case, layer, tiny_llama(), Precision.BF16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} == {bench.source.dtype}


@pytest.mark.parametrize("tp", [1, 2])
def test_products_in_fp8_are_measured_in_it(tp: int) -> None:
    model = tiny_llama(hidden=64)
    messages = [
        next(iter(measure_layers([a_case(tp=tp)], model, each, "cpu", ONCE)))
        for each in (Precision.FP8, Precision.BF16)
    ]
    eight, sixteen = (decode(LayerSample, message, source="test") for message in messages)
    assert eight.precision is Precision.FP8 and eight.saved_bytes == sixteen.saved_bytes
