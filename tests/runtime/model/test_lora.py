"""LoRA: adapters train as in one process in every layout; the rest is frozen, and not saved."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from planner.foundation.errors import InputError
from planner.model.lora import adapter_params, module_names
from planner.model.spec import ModelSpec
from planner.model.workload import AdapterModules, Adapters, Precision
from planner.strategy.plan import Plan
from planner.strategy.plan_check import check_sound
from planner.strategy.strategy import Degrees, RecomputeCounts, Stage, Zero
from runtime.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from runtime.checkpoint.store import committed_folders, load_index
from runtime.model.lora import adapted_modules
from runtime.model.transformer import build_transformer, drawn
from runtime.train.data.prepare import DataOptions
from runtime.train.executor import Executor
from runtime.train.options import TrainOptions
from runtime.train.train import run_training
from tests.plans import (
    changed_mixer,
    make_plan,
    tiny_deepseek_experts,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_mla,
)
from tests.runtime.ranks import OPTIONS, SEED, make_executor, on_ranks, single_process, train

STEPS = 4
LLAMA, GPT2, MLA, MIXTRAL = tiny_llama(), tiny_gpt2(), tiny_mla(), tiny_mixtral()
UNCOMPRESSED = changed_mixer(MLA, query_rank=None)
ALL, QV = Adapters(rank=4, modules=AdapterModules.ALL), Adapters(rank=2, modules=AdapterModules.QV)
MIXED = (Stage(first=0, end=4, recompute=RecomputeCounts(none=1, selective=1, full=2)),)

PLANS: dict[str, Plan] = {
    "one": make_plan(LLAMA, Degrees(micro_batch=2, num_micro_batches=2), adapters=QV),
    "tp2-sp-recompute": make_plan(
        LLAMA, Degrees(tp=2, micro_batch=4, sequence_parallel=True), MIXED, adapters=ALL
    ),
    "gpt2-tp2-zero1": make_plan(
        GPT2, Degrees(tp=2, dp_shard=2, num_micro_batches=2, zero=Zero(1)), adapters=ALL
    ),
    "copied-heads": make_plan(
        tiny_llama(kv_heads=1), Degrees(tp=2, micro_batch=4, sequence_parallel=True), MIXED, adapters=ALL
    ),
    "pp2-zero3": make_plan(LLAMA, Degrees(pp=2, dp_shard=2, num_micro_batches=2, zero=Zero(3)), adapters=ALL),
    "hsdp-zero2": make_plan(
        LLAMA, Degrees(dp_replicate=2, dp_shard=2, micro_batch=1, zero=Zero(2)), adapters=QV
    ),
    "dp2": make_plan(GPT2, Degrees(dp_replicate=2, micro_batch=2), adapters=QV),
    "latent-one": make_plan(UNCOMPRESSED, Degrees(micro_batch=2), adapters=QV),
    "latent-tp2-zero3": make_plan(
        MLA, Degrees(tp=2, dp_shard=2, num_micro_batches=2, zero=Zero(3)), adapters=ALL
    ),
    "latent-tp2-sp-recompute": make_plan(
        MLA, Degrees(tp=2, micro_batch=4, sequence_parallel=True), MIXED, adapters=QV
    ),
    "latent-named-tp2-sp": make_plan(
        MLA,
        Degrees(tp=2, micro_batch=2, num_micro_batches=2, sequence_parallel=True),
        adapters=Adapters(rank=2, modules="q_a_proj,kv_b_proj,down_proj"),
    ),
    "named-tp2-zero3": make_plan(
        tiny_llama(kv_heads=1),
        Degrees(tp=2, dp_shard=2, micro_batch=2, zero=Zero(3)),
        adapters=Adapters(rank=2, modules="q_proj,o_proj"),
    ),
    "latent-pp2-tp2": make_plan(UNCOMPRESSED, Degrees(pp=2, tp=2, num_micro_batches=2), adapters=ALL),
}


MODULES = {
    "qv": "wq wq_down wq_up wv wkv_down wkv_up",
    "all": "wq wq_down wq_up wk wv wkv_down wkv_up wo gate up down",
    "q_a_proj,kv_b_proj,down_proj": "wq_down wkv_up down",
    "q_proj,o_proj": "wq wo",
}
"""What the modules asked for are in our transformer, where it has them."""


class Beside(nn.Module):
    """A frozen projection with an adapter, written out."""

    def __init__(self, frozen: nn.Linear, name: str, rank: int) -> None:
        super().__init__()
        outputs, inputs = frozen.weight.shape
        self.frozen = frozen
        self.a = nn.Parameter(drawn(f"{name}.lora_a", (rank, inputs), scale=inputs**-0.5, seed=SEED))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.frozen.weight, self.frozen.bias) + 2 * (x @ self.a.T) @ self.b.T


def adapted(adapters: Adapters) -> Any:
    """Freezes a whole model, puts adapters in it, and makes AdamW for them."""
    adapted = MODULES[adapters.modules].split()

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        model.requires_grad_(False)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path.split(".")[-1] in adapted:
                model.set_submodule(path, Beside(module, path, adapters.rank))
        trained = [p for p in model.parameters() if p.requires_grad]
        return [torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)]

    return make


@pytest.mark.parametrize("name", PLANS)
def test_adapters_train_as_in_one_process(name: str) -> None:
    plan = PLANS[name]
    assert plan.workload.adapters is not None
    expected = single_process(plan, STEPS, adapted(plan.workload.adapters))
    exact = [value for pair in expected for value in pair]

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        found = train(executor, 0, STEPS)
        differences = executor.executed().differences(plan)
        return found, differences, sum(w.share * w.shard.numel() for w in executor.weights)

    results = on_ranks(body, plan.strategy.degrees.world)
    for found, differences, _ in results:
        assert [value for pair in found for value in pair] == pytest.approx(exact, rel=1e-5)
        assert differences == []
    assert sum(trained for _, _, trained in results) == adapter_params(plan.workload.adapters, plan.model)


@pytest.mark.parametrize(
    "model", [LLAMA, MLA, UNCOMPRESSED, MIXTRAL], ids=["llama", "mla", "direct", "experts"]
)
def test_the_planner_and_the_runtime_count_the_same_for_every_choice_of_modules(model: ModelSpec) -> None:
    """Every subset of a model's modules, and every group; by rank 3."""
    names = module_names(model)
    subsets = [",".join(some) for size in range(1, len(names) + 1) for some in combinations(names, size)]
    block = build_transformer(model, 0, 1, False, False, seq=1).layers["0"]
    counts = set()
    for modules in (*subsets, *AdapterModules):
        weights = [block.get_submodule(path).weight for path in adapted_modules(block, modules)]
        trained = 3 * model.layers * sum(sum(weight.shape) for weight in weights)
        assert trained == adapter_params(Adapters(rank=3, modules=modules), model) > 0
        counts.add(trained)
    assert len(counts) > len(names), "different modules are different parameters"


def test_what_corrects_the_choice_of_experts_is_frozen_beside_adapters() -> None:
    """Adapters are given away without it; routers are frozen too."""
    plan = make_plan(tiny_deepseek_experts(layers=2), Degrees(micro_batch=4), adapters=QV)

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        train(executor, 0, 2)
        moved = [float(bias.abs().max()) for bias in executor.balance.corrections.values()]
        return moved, [name for name in executor.state_dict() if "correction" in name]

    assert on_ranks(body, 1) == [[[0.0, 0.0], []]]


def test_modules_that_a_model_does_not_have_are_no_sound_plan() -> None:
    plan = make_plan(LLAMA, Degrees(micro_batch=2), adapters=Adapters(rank=2, modules="q_proj,kv_b_proj"))
    with pytest.raises(InputError, match="tiny-llama has no module 'kv_b_proj'"):
        check_sound(plan)
    check_sound(dataclasses.replace(plan, model=UNCOMPRESSED))


@pytest.mark.parametrize("zero", [Zero(0), Zero(1), Zero(3)])
def test_frozen_weights_are_in_the_compute_precision_and_have_no_state(zero: Zero) -> None:
    """As planner.cost.memory.parameter_state charges them: c bytes a weight, shared out under ZeRO 3
    alone."""
    degrees = Degrees(dp_shard=2 if zero else 1, micro_batch=2, num_micro_batches=2, zero=zero)
    plan = make_plan(LLAMA, degrees, adapters=ALL, precision=Precision.BF16)

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        before = [weight.shard.detach().clone() for weight in executor.frozen]
        losses = train(executor, 0, STEPS)
        assert all(torch.equal(b, w.shard) for b, w in zip(before, executor.frozen, strict=True))
        assert all(weight.parameter.grad is None for weight in executor.frozen)
        assert {str(weight.parameter.dtype) for weight in executor.frozen} == {"torch.bfloat16"}
        assert {str(weight.shard.dtype) for weight in executor.weights} == {"torch.float32"}
        return losses, sum(weight.shard.numel() for weight in executor.frozen)

    results = on_ranks(body, degrees.world)
    shards = 2 if zero is Zero.PARAMETERS else 1
    assert sum(held for _, held in results) == LLAMA.params_total * degrees.world // shards
    for (loss, _), (exact, _) in zip(results[0][0], single_process(plan, STEPS, adapted(ALL)), strict=True):
        assert loss == pytest.approx(exact, rel=1e-2)


def test_a_checkpoint_holds_adapters_alone_and_knows_what_they_stand_beside() -> None:
    before = make_plan(LLAMA, Degrees(tp=2, dp_shard=2, zero=Zero(3), micro_batch=2), adapters=ALL)
    after = make_plan(LLAMA, Degrees(pp=2, micro_batch=1, num_micro_batches=4), adapters=ALL)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)

        def start(rank: int) -> Any:
            executor = make_executor(before)
            found = train(executor, 0, 2)
            save_checkpoint(folder, executor.state_dict(), step=2, run={})
            return found

        def go_on(rank: int, seed: int) -> Any:
            executor = Executor(after, device="cpu", seed=seed, optimizer_options=OPTIONS)
            path = committed_folders(folder)[0]
            executor.load_state_dict(load_checkpoint(path, load_index(path), executor.state_dict()))
            return train(executor, 2, 2)

        early = on_ranks(start, 4)[0]
        index = load_index(committed_folders(folder)[0])
        late = on_ranks(lambda rank: go_on(rank, SEED), 2)[0]
        with pytest.raises(InputError, match="trained beside weights with a sum of squares"):
            on_ranks(lambda rank: go_on(rank, SEED + 1), 2)
    saved = [name for name in index.tensors if name.startswith("model.")]
    assert len(saved) == 2 * 7 * LLAMA.layers and all("lora_" in name for name in saved)
    expected = [v for pair in single_process(before, 4, adapted(ALL)) for v in pair]
    assert [v for pair in early + late for v in pair] == pytest.approx(expected, rel=1e-5)


def test_merging_gives_what_projection_and_adapter_give_together() -> None:
    generator = torch.Generator().manual_seed(2)
    linear = nn.Linear(24, 16)
    beside = Beside(linear, "layers.0.mlp.up", 4)
    with torch.no_grad():
        beside.b.normal_(generator=generator)
    x = torch.randn(3, 24, generator=generator)
    together = linear.weight + 2.0 * (beside.b @ beside.a)
    whole = functional.linear(x, together, linear.bias)
    torch.testing.assert_close(whole, beside(x), rtol=1e-5, atol=1e-5)


def test_a_run_leaves_its_adapters_where_peft_finds_them(tmp_path: Path) -> None:
    model = tiny_llama(vocab=258)
    plan = make_plan(model, Degrees(tp=2, dp_shard=2, zero=Zero(1)), adapters=ALL)
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 200)
    options = TrainOptions(
        steps=2,
        run_dir=str(tmp_path / "run"),
        data=DataOptions(data=(str(text),), tokenizer="byte"),
        lr=1e-2,
        lora_alpha=12,
    )
    run_training(plan, options, shown=False)
    folder = tmp_path / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    assert config["target_modules"] == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    assert len(tensors) == 2 * 7 * model.layers
    assert tensors[key.format(3, "mlp.down_proj", "A")].shape == (4, 64)
    assert tensors[key.format(0, "self_attn.k_proj", "B")].shape == (16, 4)
    assert all(bool(value.any()) for value in tensors.values()), "every adapter was trained"


def test_alpha_without_adapters_is_refused(tmp_path: Path) -> None:
    plan = make_plan(LLAMA, Degrees(micro_batch=2))
    options = TrainOptions(steps=1, run_dir=str(tmp_path / "run"), lora_alpha=8.0)
    with pytest.raises(InputError, match="--lora-alpha: is given, but the plan trains all weights"):
        run_training(plan, options, shown=False)
