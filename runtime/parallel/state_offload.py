"""Masters and optimizer state in host memory: the device keeps weights in the compute precision alone.

Of a parameter whose state is offloaded (ZeRO-Offload, arXiv 2101.06840):

    device   its shard in the compute precision; no master, no state
    down     its reduced gradient, in the compute precision, each time that data parallelism reduces it
    host     the master in fp32 (pinned), the gradients' sum in fp32, the state; the update runs here
    up       the updated weight, in the compute precision, once a step

A gradient goes down on the stream that reduced it, behind the backward pass, and is added to the sum when
the next one comes or the step ends. The update goes block by block: while the processor updates one, the
weights of the one before go up. On a CPU the same copies go to buffers of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.strategy.strategy import Stage
from runtime.model.held_weights import HostWeight, local_part
from runtime.model.transformer import Transformer
from runtime.parallel.data import unit_groups
from runtime.parallel.recompute import WRAPPER_PREFIX


def apply_state_offload(
    model: Transformer, stage: Stage, dtype: torch.dtype
) -> dict[nn.Parameter, HostWeight]:
    """Moves masters of the stage's first `offload.optimizer` blocks to host memory, and of embedding and head
    where they are all its blocks. The model has its units of data parallelism, and has not run yet.
    """
    chosen = [name for name, _ in model.named_parameters() if _offloaded(name, stage)]
    if not chosen:
        return {}
    masters = {name: _to_host(model.get_parameter(name)) for name in chosen}
    ids = {id(model.get_parameter(name)) for name in chosen}
    # Buffers keep their precision: only parameters of these blocks change theirs.
    model._apply(lambda t: t.to(dtype) if id(t) in ids else t)  # type: ignore[no-untyped-call]
    managed = {id(p.sharded_param) for group in unit_groups(model) for p in group.fsdp_params}
    hosted = {}
    for name, master in masters.items():
        parameter = model.get_parameter(name)
        hosted[parameter] = HostWeight(parameter, master)
        if id(parameter) in managed:
            receive = hosted[parameter].receive_and_free
            parameter.register_post_accumulate_grad_hook(receive)  # type: ignore[no-untyped-call]
    return hosted


def _offloaded(name: str, stage: Stage) -> bool:
    parts = name.replace(WRAPPER_PREFIX, "").split(".")
    if parts[0] == "layers":
        return int(parts[1]) < stage.first + stage.offload.optimizer
    return stage.offload.optimizer == stage.layers


def _to_host(parameter: nn.Parameter) -> Tensor:
    local = local_part(parameter.detach())
    host = torch.empty(local.shape, dtype=torch.float32, pin_memory=local.is_cuda)
    return host.copy_(local)


def send_up(hosts: Iterable[HostWeight]) -> None:
    """Copies masters into their parameters."""
    for host in hosts:
        host.send_up()


def block_of(name: str) -> str:
    """What of a stage is updated together: a block, or the ends."""
    parts = name.split(".")
    return parts[1] if parts[0] == "layers" else "ends"


def hosted_blocks(paths: Sequence[str], hosted: Sequence[bool]) -> set[int]:
    """The blocks all of whose weights have their masters elsewhere than the parameter."""
    found: dict[int, bool] = {}
    for path, away in zip(paths, hosted, strict=True):
        if path.startswith("layers."):
            block = int(path.split(".")[1])
            found[block] = found.get(block, True) and away
    return {block for block, away in found.items() if away}


def apart(parameter: nn.Parameter, shard: Tensor) -> bool:
    """Whether what the optimizer updates is host memory of its own, not the parameter's."""
    local = local_part(parameter.detach()) if isinstance(parameter, DTensor) else parameter.detach()
    same = local.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
    return shard.device.type == "cpu" and not (same and local.numel())
