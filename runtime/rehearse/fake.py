"""A rank's program run on shapes alone: nothing is computed, and the bytes of every allocation are traced.

torch's own tracker of fake tensors (`torch.distributed._tools.MemTracker`) sees one pass of each module a
step: a pipeline's micro-batches are beyond it. This one follows storages, whoever makes them.

What an accelerator's fused kernels keep and allocate, for tensors of shapes alone on a CPU.

A CPU build of torch has other kernels: its RMSNorm is written in tensor operations, which keep the input in
fp32, and its attention repeats keys and values for the heads that share them. Inside `accelerator_kernels`
the two allocate what CUDA's do: results, fp32 sums for the backward pass, and gradients.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_BLOCK_BYTES = 512
"""What torch's caching allocator on CUDA rounds allocations up to."""


@contextmanager
def fake_tensors(block_bytes: int = 1) -> Iterator[LiveBytes]:
    """Inside, tensors have shapes and no values; their bytes are counted in blocks of `block_bytes`."""
    with _Unread(allow_non_fake_inputs=True), LiveBytes(block_bytes) as live:
        yield live


class _Unread(FakeTensorMode):
    """Answers what a value is, such as a loss, with one. Whole numbers may be sizes: those stay unknown.

    What is real stays real: the ranks of a mesh, which FSDP looks itself up in as it wraps modules, and
    modules on meta, which are replaced in place when they get their (fake) memory.
    """

    def dispatch(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            if dtype is torch.bool or dtype.is_floating_point:
                return dtype is torch.bool or 1.0
        if _is_real(tree_leaves((args, kwargs)), (kwargs or {}).get("device")):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return super().dispatch(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _is_real(leaves: Sequence[Any], device: torch.device | None) -> bool:
    """Whether an operator with these arguments has nothing to do with memory that is traced."""
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in given):
        return False
    if not given:
        return device is not None and device.type == "meta"
    return device is None or all(tensor.device == device for tensor in given)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, the bytes of live storages: now, and the most since `begin`.

    A storage counts once, however many tensors share it, until the last of them is gone.
    """

    def __init__(self, block_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = self.peak_bytes = 0
        self._block_bytes = block_bytes
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._resize: Any = None

    def begin(self) -> int:
        """Lets the peak begin anew; what is live now."""
        gc.collect()
        self.peak_bytes = self.now_bytes
        return self.now_bytes

    def __enter__(self) -> LiveBytes:
        self._resize = original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            resized = original(storage, size)
            if storage._cdata in self._sizes:
                self._grow(storage, self._sizes[storage._cdata])
            return resized

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return made

    def _note(self, tensor: Tensor) -> None:
        if hasattr(type(tensor), "__tensor_flatten__"):  # a DTensor: the part that this rank holds
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            for part in (getattr(tensor, name) for name in names):
                if isinstance(part, Tensor):
                    self._note(part)
            return
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, lambda _: self._release(key))
            self._grow(storage, 0)

    def _grow(self, storage: torch.UntypedStorage, before_bytes: int) -> None:
        blocks = -(-storage.nbytes() // self._block_bytes)
        self._sizes[storage._cdata] = size = blocks * self._block_bytes
        self.now_bytes += size - before_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _release(self, key: int) -> None:
        del self._watched[key]
        self.now_bytes -= self._sizes.pop(key)


@contextmanager
def accelerator_kernels() -> Iterator[None]:
    """Inside, torch's functions are an accelerator's in what they allocate. Results have no values."""
    norm, attention = functional.rms_norm, functional.scaled_dot_product_attention

    def fused_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        if attn_mask is not None or query.dtype not in (torch.bfloat16, torch.float16):
            return attention(query, key, value, attn_mask, *rest, **more)
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        found: Tensor = flash(query, key, value, 0.0, more.get("is_causal", False), scale=more.get("scale"))[
            0
        ]
        return found

    functional.rms_norm = _fused_norm
    functional.scaled_dot_product_attention = fused_attention
    try:
        yield
    finally:
        functional.rms_norm, functional.scaled_dot_product_attention = norm, attention


def _fused_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    out: Tensor = _FusedNorm.apply(input, weight)  # type: ignore[no-untyped-call]
    return out


class _FusedNorm(torch.autograd.Function):
    """Keeps its input, its weight and one fp32 number for each row (torch.ops.aten._fused_rms_norm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
