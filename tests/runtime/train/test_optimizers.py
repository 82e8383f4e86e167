"""Adafactor and Muon on shards are those of one process, in every layout, and go on in another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from planner.cost.memory.parameter_state import states_of
from planner.job.problem import PlanningProblem
from planner.model.workload import Optimizer
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Zero
from runtime.train.optimizer import orthogonalize
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.runtime.ranks import interrupted, make_executor, on_ranks, single_process, train

STEPS = 5
LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
MODELS = {"zero1": GPT2, "copied-heads": tiny_llama(kv_heads=1)}
LAYOUTS = {
    "one": Degrees(micro_batch=2, num_micro_batches=2),
    "tp2-sp": Degrees(tp=2, micro_batch=4, sequence_parallel=True),
    "zero1": Degrees(dp_shard=2, micro_batch=2, zero=Zero(1)),
    "tp2-zero3": Degrees(tp=2, dp_shard=2, micro_batch=1, num_micro_batches=2, zero=Zero(3)),
    "copied-heads": Degrees(tp=2, dp_shard=2, micro_batch=2, zero=Zero(1)),
    "pp2-hsdp": Degrees(pp=2, dp_replicate=2, dp_shard=2, micro_batch=1, zero=Zero(2)),
}


def by_adafactor(model: nn.Module) -> list[torch.optim.Optimizer]:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.Adafactor(groups, eps=(1e-3, 1e-3), foreach=False)]


class PlainMuon(torch.optim.Optimizer):
    """Muon of whole matrices as its paper writes it, in fp32."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__([{"params": params}], {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            state, grad = self.state[p], p.grad
            momentum = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * grad
            x = 0.1 * grad + 0.9 * momentum
            x = x.T if x.shape[0] > x.shape[1] else x
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
            x = x.T if p.shape[0] > p.shape[1] else x
            p.sub_(lr * 0.1 * p + lr * 0.2 * max(p.shape) ** 0.5 * x)


def by_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and name.startswith("layers.")]
    ends = [p for name, p in named.items() if p.dim() == 2 and not name.startswith("layers.")]
    vectors = [p for p in named.values() if p.dim() == 1]
    groups = [{"params": ends, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [PlainMuon(matrices), torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-3)]


KINDS = {Optimizer.ADAFACTOR: by_adafactor, Optimizer.MUON: by_muon}


def plan_of(kind: Optimizer, layout: str) -> Plan:
    return make_plan(MODELS.get(layout, LLAMA), LAYOUTS[layout], optimizer=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(kind: Optimizer, layout: str) -> None:
    plan = plan_of(kind, layout)
    expected = [value for pair in single_process(plan, STEPS, KINDS[kind]) for value in pair]
    world = plan.strategy.degrees.world
    for trajectory in on_ranks(lambda rank: train(make_executor(plan), 0, STEPS), world):
        assert [value for pair in trajectory for value in pair] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_in_another_layout(kind: Optimizer) -> None:
    before = make_plan(LLAMA, LAYOUTS["tp2-zero3"], optimizer=kind)
    after = make_plan(LLAMA, Degrees(pp=2, dp_shard=2, micro_batch=2, zero=Zero(1)), optimizer=kind)
    (early, *_), (late, *_) = interrupted(before, after)
    expected = [value for pair in single_process(before, 5, KINDS[kind]) for value in pair]
    assert [v for pair in early + late for v in pair] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", list(Optimizer))
def test_state_takes_the_bytes_that_the_planner_charges(kind: Optimizer) -> None:
    plan = make_plan(GPT2, Degrees(micro_batch=4), optimizer=kind)

    def body(rank: int) -> tuple[int, float]:
        executor = make_executor(plan)
        states = [executor.optimizer.state_of(weight.shard) for weight in executor.weights]
        tensors = [value for state in states for key, value in state.items() if key != "step"]
        return sum(4 * value.numel() for value in tensors)

    problem = PlanningProblem(
        model=GPT2, workload=plan.workload, cluster=plan.cluster, profile=None, memory_limit_bytes=2**40
    )
    charged = states_of(problem, plan.strategy.degrees)
    ends = GPT2.params_total - GPT2.params_blocks
    blocks = charged.block.optimizer * GPT2.params_blocks
    # Positions and the last norm are charged like the token table, of which they are a few percent.
    assert on_ranks(body, 1)[0] == pytest.approx(blocks + charged.end.optimizer * ends, rel=0.02)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 32)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_muon_and_adafactor_are_those_of_torch() -> None:
    """One process, one matrix: torch's own optimizers, whose Muon multiplies in bf16."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    from runtime.model.held_weights import Weight
    from runtime.train.optimizer import Adafactor, Muon

    def weight(values: Tensor) -> Weight:
        shard = nn.Parameter(values.clone())
        name = "layers.0.mlp.up.weight"
        return Weight(name=name, path=name, parameter=shard, shard=shard, share=1.0)

    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    mine, theirs = [weight(start) for _ in range(2)], [nn.Parameter(start.clone()) for _ in range(2)]
    groups = [[{"params": [w.shard], "weight_decay": 0.1}] for w in mine]
    pairs = [
        (
            Muon([mine[0]], lr=0.01, momentum=0.95, product_dtype=torch.bfloat16, groups=groups[0]),
            torch.optim.Muon([theirs[0]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            2e-3,
        ),
        (
            Adafactor([mine[1]], lr=0.01, eps=1e-8, groups=groups[1]),
            torch.optim.Adafactor([theirs[1]], lr=0.01, weight_decay=0.1, eps=(1e-8, 1e-3)),
            1e-6,
        ),
    ]
    for step in range(4):
        grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(10 + step))
        for place, (own, reference, tolerance) in enumerate(pairs):
            mine[place].shard.grad, theirs[place].grad = grad.clone(), grad.clone()
            own.step()
            reference.step()
            torch.testing.assert_close(mine[place].shard, theirs[place], rtol=0.0, atol=tolerance)


def test_the_default_momentum_and_rate_fit_the_optimizer() -> None:
    from runtime.train.options import TrainOptions, default_lr, resolve

    options = TrainOptions(steps=10, run_dir="unused")
    plan = make_plan(LLAMA, Degrees(micro_batch=4), optimizer=Optimizer.MUON)
    assert (resolve(options, plan, None).momentum, resolve(options, plan, None).learning_rate) == (
        0.95,
        default_lr(LLAMA),
    )
    factored = replace(plan, workload=replace(plan.workload, optimizer=Optimizer.ADAFACTOR))
    assert resolve(options, factored, None).learning_rate == 0.01
