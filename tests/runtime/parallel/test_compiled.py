"""A compiled block is the eager one: losses and gradient norms, over tp and with recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.foundation.errors import CheckError, InputError
from planner.model.attention import CpExchange
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, RecomputeCounts, Stage, Zero
from runtime.parallel import recompute as compiled
from runtime.train.executor import Executor
from tests.plans import make_plan, parallel, tiny_gpt2, tiny_llama, tiny_mixtral
from tests.runtime.ranks import OPTIONS, SEED, on_ranks, single_process, train

LLAMA = tiny_llama(layers=3)
MIXED = (Stage(first=0, end=3, recompute=RecomputeCounts(none=1, selective=1, full=1)),)
PLANS = {
    "tp2-sp": make_plan(LLAMA, Degrees(tp=2, micro_batch=4, sequence_parallel=True)),
    "copied-heads": make_plan(tiny_llama(layers=2, kv_heads=1), Degrees(tp=2, micro_batch=4)),
    "parallel-tp2-sp": make_plan(
        parallel(tiny_gpt2(layers=2), 1), Degrees(tp=2, micro_batch=4, sequence_parallel=True)
    ),
    "cp2": make_plan(LLAMA, Degrees(cp=2, micro_batch=4, cp_exchange=CpExchange.RING)),
    "experts": make_plan(tiny_mixtral(layers=2), Degrees(micro_batch=4)),
    "zero3-recompute": make_plan(LLAMA, Degrees(dp_shard=2, micro_batch=2, zero=Zero(3)), MIXED),
}


def made(plan: Plan) -> Executor:
    return Executor(plan, device="cpu", seed=SEED, optimizer_options=OPTIONS, compiled=True)


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, differentiated and partitioned as always, and then run operator by operator.

    What goes wrong between compiled blocks goes wrong before code is generated, and C++ takes minutes.
    """
    usual = torch.compile

    def fast(*args: Any, **kwargs: Any) -> Any:
        return usual(*args, **(kwargs | {"backend": "aot_eager"}))

    monkeypatch.setattr(torch, "compile", fast)


# What torch's compiler does itself with an autograd.Function, the one of copied heads.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", PLANS)
def test_compiled_steps_are_those_of_one_process(name: str) -> None:
    plan = PLANS[name]
    expected = [value for pair in single_process(plan, 3) for value in pair]

    def body(rank: int) -> Any:
        executor = made(plan)
        found = train(executor, 0, 3)
        assert executor.executed().differences(plan) == ()
        return found, _compiled_frames()

    for trajectory, frames in on_ranks(body, plan.strategy.degrees.world):
        assert [v for pair in trajectory for v in pair] == pytest.approx(expected, rel=1e-5)
        assert frames > 0, "nothing was compiled"


def _compiled_frames() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def test_a_gradient_garbled_between_blocks_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.13 garbles that of an embedding whose collective is not waited for."""
    real = compiled.apply_compile

    def garbles(part: torch.nn.Module, *, block: bool, **more: Any) -> None:
        real(part, block=block, **more)
        if block:
            part.register_forward_pre_hook(
                lambda _, args: args[0].register_hook(lambda grad: 2 * grad) and None
            )

    monkeypatch.setattr(compiled, "apply_compile", garbles)

    def body(rank: int) -> str:
        try:
            made(PLANS["tp2-sp"])
        except (CheckError, AttributeError) as error:
            return str(error)
        return ""

    faults = on_ranks(body, 2)
    assert all("--no-compile" in fault for fault in faults), faults


def test_what_a_run_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not compiled.compiles(None, cpu)
    assert not compiled.compiles(False, cpu)
    monkeypatch.setattr(compiled, "_missing_compiler", lambda device: None)
    assert compiled.compiles(True, cpu)
    assert compiled.compiles(None, torch.device("cuda"))
    monkeypatch.setattr(compiled, "_missing_compiler", lambda device: "Triton")
    assert not compiled.compiles(None, torch.device("cuda"))
    with pytest.raises(InputError, match="Triton"):
        compiled.compiles(True, torch.device("cuda"))
