"""Attention by blocks of keys equals attention at once, forward and backward, by every kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from runtime.model import block_attention as attention_blocks
from runtime.model.block_attention import (
    FlashOnCpu,
    FlashOnCuda,
    Kernel,
    Merged,
    WrittenOut,
    attend,
    attend_backward,
    kernel_for,
)

BATCH, TOKENS, HEADS, KEY_HEADS, WIDTH = 2, 12, 4, 2, 8


def drawn(*, value_width: int = WIDTH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries, keys, values and the gradient of the result."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, value_width), (HEADS, value_width)]
    return tuple(
        torch.randn(BATCH, TOKENS, heads, width, generator=generator).to(dtype) for heads, width in shapes
    )


def at_once(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, causal: bool) -> tuple[Tensor, ...]:
    """Result and gradients by torch's own attention."""
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    first = [t.transpose(1, 2) for t in inputs]
    out = functional.scaled_dot_product_attention(*first, is_causal=causal, enable_gqa=True).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("kernel", [FlashOnCpu(), WrittenOut()], ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("causal", [True, False])
def test_one_block_is_torchs_attention(kernel: Kernel, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "QUERY_ROWS", 5)
    q, k, v, grad = drawn()
    out, lse = kernel.forward(q, k, v, causal, None)
    found = (out, *kernel.backward(grad, (q, k, v), out, lse, causal, None))
    for mine, right in zip(found, at_once(q, k, v, grad, causal=causal), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value_width", [WIDTH, 2 * WIDTH])
def test_blocks_of_keys_merge_to_the_whole(value_width: int) -> None:
    """Late queries meet an early block; keys are cut in three, the last causal; a scale of one's own."""
    q, k, v, grad = drawn(value_width=value_width)
    late = slice(8, None)
    blocks = [(slice(0, 4), False), (slice(4, 8), False), (late, True)]
    whole = Merged(*attend(q[:, late], k[:, late], v[:, late], causal=True, scale=0.3))
    for keys, causal in blocks[:2]:
        whole.add(*attend(q[:, late], k[:, keys], v[:, keys], causal=causal, scale=0.3))
    expected, _ = attend(q, k, v, causal=True, scale=0.3)
    torch.testing.assert_close(whole.out, expected[:, late], rtol=1e-5, atol=1e-6)

    zeroed = grad.clone()
    zeroed[:, :8] = 0
    out, lse = attend(q, k, v, causal=True, scale=0.3)
    right = attend_backward(zeroed, (q, k, v), out, lse, causal=True, scale=0.3)
    total_q = torch.zeros_like(q[:, late])
    for keys, causal in blocks:
        inputs = (q[:, late], k[:, keys], v[:, keys])
        part = attend_backward(grad[:, late], inputs, whole.out, whole.lse, causal=causal, scale=0.3)
        total_q += part[0]
        for mine, all_keys in zip(part[1:], right[1:], strict=True):
            torch.testing.assert_close(mine, all_keys[:, keys], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total_q, right[0][:, late], rtol=1e-5, atol=1e-6)


def test_bf16_blocks_merge_in_fp32() -> None:
    q, k, v, _ = drawn(dtype=torch.bfloat16)
    exact, _ = WrittenOut().forward(q.float(), k.float(), v.float(), False, None)
    merged = Merged(*attend(q, k[:, :6], v[:, :6], causal=False, scale=None))
    merged.add(*attend(q, k[:, 6:], v[:, 6:], causal=False, scale=None))
    assert merged.out.dtype == merged.lse.dtype == torch.float32
    torch.testing.assert_close(merged.out, exact, rtol=1e-2, atol=1e-2)


def test_the_kernel_is_the_one_that_the_device_has() -> None:
    q, _, v, _ = drawn()
    assert isinstance(kernel_for(q, v), FlashOnCpu)
    assert isinstance(kernel_for(q, drawn(value_width=4)[2]), WrittenOut)
    for dtype, width, kind in (
        (torch.bfloat16, 128, FlashOnCuda),
        (torch.float16, 64, FlashOnCuda),
        (torch.float32, 128, WrittenOut),
        (torch.bfloat16, 512, WrittenOut),
        (torch.bfloat16, 20, WrittenOut),
    ):
        on_device = torch.empty(1, 8, 2, width, dtype=dtype, device="meta")
        assert isinstance(kernel_for(on_device, on_device), kind)


def test_the_calls_of_the_kernel_for_cuda_fit_torchs_operators() -> None:
    """On meta tensors: names, arguments and shapes, as far as no device is needed."""
    q, k, v, grad = (t.to("meta") for t in drawn(dtype=torch.bfloat16))
    out, lse = FlashOnCuda().forward(q, k[:, :6], v[:, :6], False, 0.3)
    assert out.shape == q.shape and lse.shape == (BATCH, HEADS, TOKENS) and lse.dtype == torch.float32
    grads = FlashOnCuda().backward(grad, (q, k[:, :6], v[:, :6]), out, lse, False, 0.3)
    assert [t.shape for t in grads] == [q.shape, k[:, :6].shape, v[:, :6].shape]
