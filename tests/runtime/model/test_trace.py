"""Traced modules: parameters, FLOPs and kept values against torch's own counts, and plans made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Size, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from planner.foundation.decode import load_json, to_json
from planner.foundation.errors import InputError
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.spec import ModelSpec
from planner.model.traced_graph import Chain, boundary_values
from planner.model.traced_layer import TracedLayer
from planner.model.traced_model import layer_pieces
from planner.model.workload import Precision, Workload
from planner.search.solve import SolveOptions, solve
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import decode_plan, encode_plan
from runtime.model.trace import trace_module, trace_operators
from runtime.model.transformer import build_transformer
from tests.plans import tiny_gpt2, tiny_llama
from tests.runtime.modules import (
    EncoderBlock,
    EncoderDecoder,
    LanguageModel,
    ResidualNetwork,
    VisionTransformer,
    mixture,
)

IDS = torch.zeros(2, 16, dtype=torch.long)
IMAGES = torch.zeros(2, 3, 32, 32)


def tied() -> LanguageModel:
    return LanguageModel([EncoderBlock(32, 4) for _ in range(3)], tied=True)


MODULES: list[tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = [
    (VisionTransformer, (IMAGES,)),
    (mixture, (IDS,)),
    (EncoderDecoder, (IDS, IDS.clone())),
    (ResidualNetwork, (IMAGES,)),
    (tied, (IDS,)),
]
KINDS = ["vision", "mixture", "encoder-decoder", "residual", "tied"]


def layers(spec: ModelSpec) -> list[TracedLayer]:
    found = [block for block in spec.blocks() if isinstance(block, TracedLayer)]
    assert len(found) == spec.layers
    return found


def forward_flops(spec: ModelSpec) -> float:
    """FLOPs of one sample."""
    return spec.flops_per_token_forward(spec.max_positions) * spec.max_positions


def counts(spec: ModelSpec) -> list[int]:
    return [segment.count for segment in spec.segments]


@pytest.mark.parametrize(("build", "inputs"), MODULES, ids=KINDS)
def test_parameters_are_all_there_and_counted_once(
    build: Callable[[], nn.Module], inputs: tuple[Tensor, ...]
) -> None:
    module = build()
    spec = trace_module(module, inputs, name="traced")
    assert spec.params_total == sum(p.numel() for p in module.parameters())
    assert sum(layer.tensors for layer in layers(spec)) == len(list(module.parameters()))


@pytest.mark.parametrize(("build", "inputs"), MODULES, ids=KINDS)
def test_flops_are_those_that_torch_counts(
    build: Callable[[], nn.Module], inputs: tuple[Tensor, ...]
) -> None:
    module = build()
    spec = trace_module(module, inputs, name="traced")

    # torch has no formula for the fused attention of a CPU; the one for CUDA's is the same.
    def attention(q: Size, k: Size, v: Size, *args: object, **kwargs: object) -> int:
        return int(sdpa_flop_count(q, k, v))

    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        module(*inputs)
    assert forward_flops(spec) == pytest.approx(counter.get_total_flops() / 2, rel=1e-12)


def measured_saved_values(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Values of a sample that autograd really keeps: storages, each once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(*inputs)
    assert result.requires_grad
    return sum(
        tensor.untyped_storage().nbytes() / (4 if tensor.is_floating_point() else 2)
        for pointer, tensor in kept.items()
        if pointer not in own
    ) / len(inputs[0])


@pytest.mark.parametrize(("build", "inputs"), MODULES, ids=KINDS)
def test_kept_values_are_those_that_autograd_keeps(
    build: Callable[[], nn.Module], inputs: tuple[Tensor, ...]
) -> None:
    module = build()
    spec = trace_module(module, inputs, name="traced")
    found = sum(layer.saved_values for layer in layers(spec))
    assert found == pytest.approx(measured_saved_values(module, inputs), rel=1e-9)


def test_equal_blocks_make_one_segment() -> None:
    images = trace_module(VisionTransformer(layers=12), (IMAGES,), name="vit")
    assert counts(images) == [1, 12, 1]
    assert images.segments[1].block.params == 4 * (64 * 64 + 64) + 2 * 128 + 8 * 64 * 64 + 5 * 64
    assert images.stream_width == 17 * 64  # a sample is one token of a workload of seq 1
    experts = trace_module(mixture(layers=6), (IDS,), name="moe")
    assert counts(experts) == [1, 6, 1]
    assert experts.stream_width == 32
    residual = trace_module(ResidualNetwork(depth=4), (IMAGES,), name="resnet")
    assert counts(residual) == [1, 4, 1, 3, 1, 3, 1]


def test_an_encoder_decoder_is_a_chain_that_carries_the_encoder_along() -> None:
    spec = trace_module(EncoderDecoder(layers=5), (IDS, IDS), name="seq2seq")
    assert counts(spec) == [1, 5, 1, 5, 1]
    encoder, decoder = spec.segments[1].block, spec.segments[3].block
    assert isinstance(encoder, TracedLayer) and isinstance(decoder, TracedLayer)
    assert encoder.message_values == 16 * 32
    assert decoder.input_values == decoder.message_values == 2 * 16 * 32
    assert boundary_values(spec)[0] == 32


def test_cuts_are_articulation_points() -> None:
    """Where one value crosses, its maker separates what comes before from what comes behind."""
    import networkx

    graph = trace_operators(VisionTransformer(layers=3), (IMAGES,))
    chain = Chain(graph)
    # What reads no sample, as a learned constant's operators, hangs beside the chain.
    points = set(networkx.articulation_points(chain.network.to_undirected()))
    for piece in layer_pieces(chain)[:-1]:
        (value,) = chain.crossing(piece.end)
        (maker,) = (i for i, op in enumerate(graph.operators) if value in op.writes)
        assert maker in points


def test_what_conditions_every_block_travels_along() -> None:
    """A diffusion transformer: the embedded time scales the stream before each block."""

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.enter, self.leave = nn.Linear(1, 32), nn.Linear(4, 32), nn.Linear(32, 4)
            self.blocks = nn.ModuleList(EncoderBlock(32, 4) for _ in range(6))
            self.scales = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            condition, x = self.time(time).tanh(), self.enter(x)
            for block, scale in zip(self.blocks, self.scales, strict=True):
                x = block(x * scale(condition)[:, None])
            out: Tensor = self.leave(x)
            return out

    spec = trace_module(Conditioned(), (torch.zeros(2, 16, 4), torch.zeros(2, 1)), name="conditioned")
    assert counts(spec)[-2:] == [6, 1]
    block = spec.segments[-2].block
    assert isinstance(block, TracedLayer)
    assert block.message_values == 16 * 32 + 32


def test_recurrent_layers_are_their_products() -> None:
    module = nn.LSTM(16, 16, num_layers=3, batch_first=True)
    spec = trace_module(module, (torch.zeros(2, 10, 16),), name="lstm")
    assert spec.params_total == sum(p.numel() for p in module.parameters())
    assert forward_flops(spec) == 3 * 10 * 2 * (2 * 16 * 4 * 16)


def test_tied_parameters_are_named_where_they_are_used_again() -> None:
    *_, last = layers(trace_module(tied(), (IDS,), name="tied"))
    assert last.shared_params == 128 * 32
    assert last.params == 2 * 32


def test_unused_parameters_belong_to_the_module_that_holds_them() -> None:
    module = LanguageModel([EncoderBlock(32, 4) for _ in range(4)])
    for block in module.layers:
        block.register_parameter("spare", nn.Parameter(torch.zeros(7)))
    spec = trace_module(module, (IDS,), name="spare")
    assert spec.params_total == sum(p.numel() for p in module.parameters())
    assert counts(spec) == [1, 4, 1]


@pytest.mark.parametrize("spec", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_our_own_transformer_traced_is_as_its_spec_says(spec: ModelSpec) -> None:
    seq = 16
    module = build_transformer(spec, 0, spec.layers, True, True, seq=seq)
    found = trace_module(module, (IDS,), name="own")
    assert found.params_total == spec.params_total
    assert found.max_positions == seq
    products = sum(layer.matmul_flops_forward(seq) for layer in layers(found))
    core = sum(layer.attention_flops_forward(seq, seq) for layer in layers(found))
    blocks = list(spec.blocks())
    assert products == sum(b.matmul_flops_forward(seq) for b in blocks) + spec.head_flops_forward(seq)
    assert core == pytest.approx(sum(b.attention_flops_forward(seq, seq) for b in blocks))
    assert counts(found) == [1, spec.layers, 1]


def test_figures_of_a_sample_do_not_depend_on_the_batch() -> None:
    one = trace_module(VisionTransformer(), (IMAGES[:1],), name="vit")
    four = trace_module(VisionTransformer(), (torch.zeros(4, 3, 32, 32),), name="vit")
    assert forward_flops(one) == forward_flops(four)
    for a, b in zip(layers(one)[1:], layers(four)[1:], strict=True):
        assert (a.products, a.core_flops, a.saved_values) == (b.products, b.core_flops, b.saved_values)


def test_a_large_module_on_meta_is_traced_without_memory() -> None:
    with torch.device("meta"):
        blocks = [EncoderBlock(4096, 32) for _ in range(32)]
        module = LanguageModel(blocks, width=4096, vocab=32_000)
        spec = trace_module(module, (torch.zeros(1, 2048, dtype=torch.long),), name="large")
    assert spec.params_total == sum(p.numel() for p in module.parameters()) > 6e9
    assert counts(spec) == [1, 32, 1]
    assert all(p.is_meta for p in module.parameters())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


# What cannot be traced


def test_shapes_that_depend_on_data_are_named() -> None:
    with pytest.raises(InputError) as caught:
        trace_module(mixture(data_dependent=True), (IDS,), name="moe")
    text = str(caught.value)
    assert "layers.0.mlp" in text and "aten.nonzero" in text and "one-hot" in text


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Failing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., :1])


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (Branching(4, 4), (torch.zeros(1, 4),), "depends on the data"),
        (Failing(4, 4), (torch.zeros(1, 4),), "RuntimeError"),
        (nn.Linear(4, 4), (), "batch"),
        (nn.Linear(4, 4), (torch.zeros(()),), "batch"),
        (nn.Identity(), (torch.zeros(1, 4),), "computes nothing"),
        (nn.LazyLinear(4), (torch.zeros(1, 4),), "no shape yet"),
    ],
    ids=["branch", "fails", "no input", "no batch", "nothing", "lazy"],
)
def test_what_cannot_be_traced_is_refused(module: nn.Module, inputs: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        trace_module(module, inputs, name="refused")
    assert not module._forward_hooks


def test_an_operator_that_nothing_is_known_of_is_refused() -> None:
    class Custom(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.ops.shardwise_test.twice(x))

    with torch.library._scoped_library("shardwise_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        library.impl("twice", lambda x: torch.empty_like(x), "Meta")
        with pytest.raises(InputError, match="FLOPs"):
            trace_module(Custom(4, 4), (torch.zeros(1, 4),), name="custom")


# Planned


def problem(spec: ModelSpec, batch: int) -> PlanningProblem:
    cluster = parse_cluster("2x8:a100-sxm-80gb")
    return PlanningProblem(
        model=spec,
        workload=Workload(seq=spec.max_positions, batch=batch),
        cluster=cluster,
        profile=None,
        memory_limit_bytes=cluster.groups[0].device.usable_memory_bytes,
    )


PLANNED: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "ViT-L/16": (
        lambda: VisionTransformer(layers=24, width=1024, heads=16, patch=16, size=224),
        (torch.zeros(1, 3, 224, 224),),
    ),
    "experts": (lambda: mixture(12, width=512), (torch.zeros(1, 512, dtype=torch.long),)),
    "encoder-decoder": (lambda: EncoderDecoder(layers=6, width=256), (IDS, IDS)),
}


@pytest.mark.parametrize("kind", list(PLANNED))
@pytest.mark.parametrize("pins", [(), ("pp=2",)], ids=["free", "pp=2"])
def test_a_traced_module_is_planned(kind: str, pins: tuple[str, ...]) -> None:
    build, inputs = PLANNED[kind]
    with torch.device("meta"):
        module = build()
    spec = trace_module(module, inputs, name=kind)
    plan = solve(problem(spec, batch=256), SolveOptions(pins=parse_fixed_choices(pins)))
    degrees = plan.strategy.degrees
    assert degrees.tp == 1 and degrees.world == 16
    assert [stage.end for stage in plan.strategy.stages][-1] == spec.layers
    peak = plan.cluster.groups[0].device.peak_flops(Precision.BF16)
    assert peak is not None
    assert plan.estimate.step_time_s > 3 * 256 * forward_flops(spec) / (16 * peak)
    weights = sum(stage.memory.weights_bytes for stage in plan.stage_estimates)
    assert weights * degrees.dp_shard >= 4 * spec.params_total
    assert decode_plan(encode_plan(plan), source="plan") == plan


def test_a_traced_model_is_read_back_from_its_file(tmp_path: Path) -> None:
    spec = trace_module(mixture(), (IDS,), name="moe")
    path = tmp_path / "moe.json"
    path.write_text(to_json(spec))
    assert load_json(path, ModelSpec) == spec
