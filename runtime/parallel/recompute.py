"""Recomputation of a block: what it keeps from forward to backward."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from planner.model.saved_tensors import Recompute
from runtime.parallel.context_attention import ATTENTION_OPERATORS

WRAPPER_PREFIX = "_checkpoint_wrapped_module."
"""What the wrapper adds to the names of the parameters inside it."""


def _kept_operators() -> list[Any]:
    """The operators whose results `selective` keeps: matrix products and attention, on any device, and what
    was sent to experts and back."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._grouped_mm.default,
        torch.ops._c10d_functional.all_to_all_single.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        *ATTENTION_OPERATORS,
    ]


def wrap(block: nn.Module, option: Recompute) -> nn.Module:
    """The block with its recompute option; the block itself where nothing is recomputed."""
    match option:
        case Recompute.NONE:
            return block
        case Recompute.FULL:
            return checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT, preserve_rng_state=False)
        case Recompute.SELECTIVE:
            # torch's own contexts want every operator to come again, which those of FSDP's hooks do not.
            holds_unit = any(isinstance(module, FSDPModule) for module in block.modules())
            contexts = _keep_and_reuse if holds_unit else create_selective_checkpoint_contexts
            return checkpoint_wrapper(
                block,
                CheckpointImpl.NO_REENTRANT,
                context_fn=partial(contexts, _kept_operators()),
                preserve_rng_state=False,
            )


def _keep_and_reuse(operators: list[Any]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of a forward pass and of its repetition, which takes the results of `operators` from it."""
    results: dict[Any, deque[Any]] = {operator: deque() for operator in operators}
    return _Keeping(results), _Reusing(results)


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, results: dict[Any, deque[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.results:
            # Apart from what autograd hangs onto the result itself.
            self.results[func].append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
        return out


class _Reusing(_Keeping):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.results[func].popleft() if func in self.results else func(*args, **(kwargs or {}))


def read(module: nn.Module) -> Recompute:
    """The recompute option that a module of a running model has."""
    if not isinstance(module, CheckpointWrapper):
        return Recompute.NONE
    function = module.checkpoint_fn
    assert isinstance(function, partial)
    return Recompute.SELECTIVE if "context_fn" in function.keywords else Recompute.FULL
