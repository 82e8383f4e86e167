"""Recomputation of a block: what it keeps from forward to backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from planner.strategy import Recompute
from runtime.parallel.context_attention import CONTEXT_OPERATORS

WRAPPER_PREFIX = "_checkpoint_wrapped_module."
"""What the wrapper adds to the names of the parameters inside it."""


def _kept_operators() -> list[Any]:
    """The operators whose results `selective` keeps: matrix products and attention, on any device."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        *CONTEXT_OPERATORS,
    ]


def wrap(block: nn.Module, option: Recompute) -> nn.Module:
    """The block with its recompute option; the block itself where nothing is recomputed."""
    match option:
        case Recompute.NONE:
            return block
        case Recompute.FULL:
            return checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT, preserve_rng_state=False)
        case Recompute.SELECTIVE:
            return checkpoint_wrapper(
                block,
                CheckpointImpl.NO_REENTRANT,
                context_fn=partial(create_selective_checkpoint_contexts, _kept_operators()),
                preserve_rng_state=False,
            )


def read(module: nn.Module) -> Recompute:
    """The recompute option that a module of a running model has."""
    if not isinstance(module, CheckpointWrapper):
        return Recompute.NONE
    function = module.checkpoint_fn
    assert isinstance(function, partial)
    return Recompute.SELECTIVE if "context_fn" in function.keywords else Recompute.FULL
