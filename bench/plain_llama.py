"""A llama in plain PyTorch, as one would write it by hand for one job: the runtime is measured against it.

FSDP2 for each block and the root, DTensor's tensor-parallel styles, torch.compile for each block, fp32
masters with bf16 compute, torch's cross-entropy on fp32 logits, fused AdamW, clipping by torch. Nothing is
shared with the runtime. Shapes: B micro-batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """A llama's sizes; `vocab` 0 leaves embedding and head out, as in a middle stage of a pipeline."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    theta: float = 500_000.0


class PlainAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.head_dim = sizes.hidden, sizes.hidden // sizes.heads
        kv = sizes.kv_heads * self.head_dim
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, kv, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            t.view(*t.shape[:2], -1, self.head_dim).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x))
        )
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class PlainMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(sizes.hidden, sizes.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.ffn, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class PlainBlock(nn.Module):
    """One llama layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(sizes.hidden, eps=1e-5) for _ in range(2))
        self.attention, self.mlp = PlainAttention(sizes), PlainMlp(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).type_as(x)


class PlainLlama(nn.Module):
    """Blocks, and the ends where there is a vocabulary."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        ends = sizes.vocab > 0
        self.embedding = nn.Embedding(sizes.vocab, sizes.hidden) if ends else None
        self.blocks = nn.ModuleList(PlainBlock(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=1e-5) if ends else None
        self.output = nn.Linear(sizes.hidden, sizes.vocab, bias=False) if ends else None

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x, *tables)
        return x if self.norm is None or self.output is None else self.output(self.norm(x))


def rotary_tables(sizes: Sizes, seq: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [S, D/2]."""
    width = sizes.hidden // sizes.heads
    inverse = sizes.theta ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(seq, device=device), inverse)
    return angles.cos(), angles.sin()


def plain_step(
    sizes: Sizes, mesh: DeviceMesh, batch: int, seq: int, device: torch.device, *, compiled: bool
) -> Callable[[], object]:
    """A training step of this rank's micro-batch, on a mesh of the axes dp and tp."""
    with torch.device("meta"):
        model = PlainLlama(sizes)
    tp = mesh["tp"]
    if tp.size() > 1:
        for block in model.blocks:
            parallelize_module(block, tp, _plan())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            _local(parameter).normal_(0.0, 0.02) if parameter.dim() > 1 else _local(parameter).fill_(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tables = rotary_tables(sizes, seq, device)
    if sizes.vocab:
        tokens = torch.randint(sizes.vocab, (batch, seq + 1), device=device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    else:
        shape = (batch, seq // tp.size(), sizes.hidden)
        inputs = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    def step() -> None:
        out = model(inputs, tables)
        if sizes.vocab:
            functional.cross_entropy(out.flatten(0, 1).float(), targets).backward()
        else:
            torch.autograd.backward(out, torch.full_like(out, 1e-3))
        if tp.size() == 1:  # over tensor-parallel ranks torch's own mixes meshes
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _plan() -> dict[str, Any]:
    """Megatron's split with sequence parallelism, in torch's styles."""
    whole, part = Replicate(), Shard(1)
    rows = RowwiseParallel(output_layouts=part)
    return {
        "attention_norm": SequenceParallel(use_local_output=True),
        "mlp_norm": SequenceParallel(use_local_output=True),
        "attention": PrepareModuleInput(
            input_layouts=(part, None, None), desired_input_layouts=(whole, None, None)
        ),
        "mlp": PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(whole,)),
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}": ColwiseParallel() for name in ("gate", "up")},
        "attention.o": rows,
        "mlp.down": rows,
    }
