"""Recomputation of a block: what it keeps from forward to backward.

torch.compile, one block at a time: blocks are alike, so one compilation serves them all.

Compiled is what a block computes, with its tensor-parallel messages and its recomputation inside, since the
compiler must know what is kept; FSDP's hooks stay outside. Names of parameters do not change.
"""

from __future__ import annotations

import shutil
import warnings
from collections import deque
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from planner.foundation.errors import CheckError, InputError, Problem
from planner.model.attention import Attention
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees
from runtime.model.experts import MixtureOfExperts
from runtime.model.loss import Head, compiled_passes
from runtime.model.transformer import build_transformer, materialize
from runtime.parallel.context import ATTENTION_OPERATORS, ContextCore
from runtime.parallel.meshes import Meshes
from runtime.parallel.tensor import apply_tensor_parallel

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


EAGER = (MixtureOfExperts, ContextCore)
"""Parts of a block that are not compiled: how many tokens an expert gets differs every time, and messages
between neighbours are nothing that a graph can hold."""

TOLERANCE = 1e-4
"""Relative difference of gradients, compiled against eager, that rounding in fp32 explains in one block."""


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Whether a run compiles its blocks: as asked, else on an accelerator that can.

    Raises InputError where it is asked and the machine has no compiler for generated code.
    """
    missing = _missing_compiler(device)
    if asked and missing:
        fix = f"install {missing}, or train with --no-compile"
        raise InputError(
            Problem(where="--compile", fault=f"needs {missing}, which is not installed.", fix=fix)
        )
    return device.type == "cuda" and not missing if asked is None else asked


def run_eagerly(plan: Plan, *, compiled: bool) -> str | None:
    """What is to be said of a plan that was priced as compiled and does not run so; None of others."""
    if compiled or not plan.problem.engine_settings.compiled:
        return None
    return "blocks run eagerly; the plan's times are those of compiled ones"


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs to build kernels for a device and this machine lacks."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton"
    return None if shutil.which("g++") or shutil.which("clang++") else "a C++ compiler (g++)"


def apply_compile(part: nn.Module, *, block: bool, backend: str = "inductor") -> None:
    """Compiles a block, with its recomputation, or the passes of the head's loss over its logits."""
    if isinstance(part, Head):
        part.passes = compiled_passes(backend)
    elif block:
        for module in part.modules():
            if isinstance(module, EAGER):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]
        # Shapes never change in a run; symbolic ones make torch 2.13 recurse without end in DTensor's views.
        part.forward = torch.compile(part.forward, backend=backend, dynamic=False)


def check_compiled_gradients(degrees: Degrees, meshes: Meshes, device: torch.device) -> None:
    """Raises CheckError if a compiled tensor-parallel block has other gradients than an eager one.

    In torch 2.13 one that is fed the unfinished result of a collective loses the gradient of the embedding
    before it, without any error (pytorch#179849 is alike). So a tiny model is run both ways at the start.
    Collective over the tensor-parallel ranks. The fault lies before code is generated: that is left out.
    """
    if degrees.tp == 1:
        return
    eager = _tiny_gradients(degrees, meshes, device, compiled=False)
    try:
        compiled = _tiny_gradients(degrees, meshes, device, compiled=True)
    except (AttributeError, RuntimeError) as error:  # all of the compiler's own errors are of the latter
        raise CheckError(
            f"torch {torch.__version__} cannot run a block compiled over tp={degrees.tp} ranks "
            f"({str(error).splitlines()[0][:200]}). Train with --no-compile, or use another torch build."
        ) from error
    torch._dynamo.reset()  # the real blocks' first compilation is not this one's second
    for name, expected in eager.items():
        difference = (compiled[name] - expected).abs().max() / expected.abs().max()
        dist.all_reduce(difference, op=dist.ReduceOp.MAX, group=meshes.tp.get_group())
        if not difference <= TOLERANCE:
            raise CheckError(
                f"torch {torch.__version__}: compiled over tp={degrees.tp} ranks, the gradient of {name} "
                f"differs from the eager one by {difference.item():.1%}. Train with --no-compile, or use "
                "another torch build."
            )


def _tiny_gradients(
    degrees: Degrees, meshes: Meshes, device: torch.device, *, compiled: bool
) -> dict[str, Tensor]:
    """Gradients of this rank's shards of a model with one block."""
    tp, tokens = degrees.tp, torch.arange(2 * degrees.tp, device=device)[None] % (4 * degrees.tp)
    spec = _tiny_spec(tp)
    model = build_transformer(spec, 0, 1, True, True, seq=tokens.shape[1])
    for name, part in model.parts():
        materialize(part, spec, prefix=f"{name}.", seed=0, device=device)
        apply_tensor_parallel(name, part, degrees, meshes)
        if compiled:
            apply_compile(part, block=name.startswith("layers."), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        model(tokens, tokens.roll(1)).backward()
    return {name: _local(parameter.grad) for name, parameter in model.named_parameters()}


def _tiny_spec(tp: int) -> ModelSpec:
    block = Block(
        hidden=8 * tp,
        norm=Norm.RMSNORM,
        mixer=Attention(heads=tp, kv_heads=tp, head_dim=8),
        mlp=Mlp(width=8 * tp, gated=True, activation=Activation.SILU),
    )
    return ModelSpec(
        name="tiny",
        model_type="llama",
        hidden=8 * tp,
        vocab=4 * tp,
        max_positions=2 * tp,
        learned_positions=0,
        rope_theta=10_000.0,
        norm=Norm.RMSNORM,
        norm_eps=1e-5,
        initializer_range=0.1,
        tied_embeddings=False,
        segments=(Segment(block=block, count=1),),
    )


def _local(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad
