"""fp8: scaled products near those of bf16, in every layout; refused where no kernel has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.foundation.errors import InputError
from planner.model.workload import AdapterModules, Adapters, Precision
from planner.strategy.strategy import Degrees, RecomputeCounts, Stage, Zero
from runtime.model.fp8 import BACKWARD, FORWARD, Fp8Linear, cast, check_fp8, scaled_product
from runtime.parallel.parallelize import check_supported
from tests.plans import make_plan, tiny_gpt2, tiny_llama
from tests.runtime.ranks import make_executor, on_ranks, single_process, train

LLAMA, GPT2 = tiny_llama(), tiny_gpt2()


def multiplies_here() -> bool:
    try:
        check_fp8(torch.device("cpu"))
    except InputError:
        return False
    return True


here = pytest.mark.skipif(not multiplies_here(), reason="this build of torch does not multiply fp8 on a CPU")


@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, 3), (BACKWARD, 2)])
def test_a_cast_keeps_its_bits_and_uses_the_whole_range(dtype: torch.dtype, bits: int) -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 1e-3
    low, scale = cast(values, dtype)
    assert low.float().abs().max() == torch.finfo(dtype).max
    kept = values.abs() > values.abs().max() * 2**-6
    error = ((low.float() * scale - values) / values).abs()[kept].max()
    assert 2.0 ** -(bits + 2) < error <= 2.0 ** -(bits + 1) * 1.001
    zero, one = cast(torch.zeros(4, 4), dtype)
    assert not zero.float().any() and torch.isfinite(one)


@here
def test_the_three_products_are_those_of_cast_operands() -> None:
    """Each operand cast and cast back, multiplied in fp32."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, 32, generator=generator).bfloat16().requires_grad_()
    w = torch.randn(48, 32, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(2, 16, 48, generator=generator).bfloat16() * 1e-4

    def again(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        low, scale = cast(t.detach().flatten(0, -2), dtype)
        return low.float() * scale

    y = scaled_product(x, w)
    y.backward(dy)
    x4, w4, dy5 = again(x, FORWARD), again(w, FORWARD), again(dy, BACKWARD)
    assert x.grad is not None and w.grad is not None
    for found, exact in ((y, x4 @ w4.T), (x.grad, dy5 @ w4), (w.grad, dy5.T @ x4)):
        found = found.detach().float().flatten(0, -2)
        assert ((found - exact).norm() / exact.norm()) < 4e-3


HALF = (Stage(first=0, end=4, recompute=RecomputeCounts(none=2, full=2)),)
LAYOUTS = {
    "one-full": (
        LLAMA,
        Degrees(micro_batch=4),
        (Stage(first=0, end=4, recompute=RecomputeCounts(none=2, full=2)),),
    ),
    "gpt2-tp2-sp": (GPT2, Degrees(tp=2, micro_batch=4, sequence_parallel=True), None),
    "pp2-zero3": (LLAMA, Degrees(pp=2, dp_shard=2, micro_batch=2, zero=Zero(3)), None),
}


@here
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [False, True])
def test_fp8_trains_like_fp32(layout: str, lora: bool) -> None:
    model, degrees, stages = LAYOUTS[layout]
    adapters = Adapters(rank=4, modules=AdapterModules.ALL) if lora else None
    plan = make_plan(model, degrees, stages, precision=Precision.FP8, adapters=adapters)

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        kinds = [type(m).__name__ for module in executor.modules for m in module.model.modules()]
        return train(executor, 0, 4), sum("Fp8Linear" in kind for kind in kinds)

    projections = len(model.block(0).matrices())
    for found, linears in on_ranks(body, degrees.world):
        assert linears == projections * model.layers // degrees.pp
        if not lora:
            for (loss, norm), (exact, exact_norm) in zip(found, single_process(plan, 4), strict=True):
                assert loss == pytest.approx(exact, rel=3e-2)
                assert norm == pytest.approx(exact_norm, rel=2e-1)
        assert found[-1][0] < found[0][0] + 0.5


@here
def test_a_projection_really_multiplies_in_fp8() -> None:
    linear = torch.nn.Linear(32, 32)
    x = torch.randn(16, 32)
    exact = linear(x)
    linear.__class__ = Fp8Linear
    error = ((linear.bfloat16()(x.bfloat16()).float() - exact).norm() / exact.norm()).item()
    assert 5e-3 < error < 0.1, "bf16 alone would be off by about 2e-3"


def test_sizes_that_no_kernel_has_are_refused() -> None:
    plan = make_plan(tiny_llama(hidden=40), Degrees(), seq=20, precision=Precision.FP8)
    with pytest.raises(InputError, match=r"inputs of 40 are no multiple of 16"):
        check_supported(plan)
