"""Activations of a stage's first blocks in host memory between their forward and their backward pass.

What a block saves for its backward pass is caught by autograd's hooks on saved tensors; of a block that is
recomputed that is its input alone. When the block's forward pass ends, all of it goes down to pinned memory
on a stream beside, and is dropped on the device when the next block's ends. In the backward pass the first
use of anything that a block saved brings up what the block before it did. So two blocks at a time are on the
device: that of the pass that runs, and one on its way.

Weights are saved too, and stay: they belong to their units. So do the rotary tables, which all blocks share.
On a CPU the same path copies to buffers of their own.

Masters and optimizer state in host memory: the device keeps weights in the compute precision alone.

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

import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from planner.strategy.strategy import Stage
from runtime.model.held_weights import HostWeight, as_dtensor, local_part
from runtime.model.transformer import Transformer
from runtime.parallel.data import unit_groups
from runtime.parallel.recompute import WRAPPER_PREFIX

Key = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


class Link:
    """Copies between a device and host memory, each way on a stream of its own where there are streams."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._down = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]
        self._up = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]

    def down(self, tensors: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Starts copies to pinned memory; the copies, and the event of their end."""
        hosts = [torch.empty_like(t, device="cpu", pin_memory=self.cuda) for t in tensors]
        return hosts, self._copy(self._down, tensors, hosts, None)

    def up(self, hosts: list[Tensor], after: Any) -> tuple[list[Tensor], Any]:
        """Starts copies to the device, once the event `after` has come."""
        with torch.cuda.stream(self._up) if self._up is not None else nullcontext():
            tensors = [torch.empty_like(host, device=self.device) for host in hosts]
        return tensors, self._copy(self._up, hosts, tensors, after)

    def wait(self, event: Any, tensors: list[Tensor]) -> None:
        """What the device does from now on comes after `event`, and may use the tensors."""
        if self.cuda and event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(stream)

    def _copy(self, stream: Any, sources: list[Tensor], targets: list[Tensor], after: Any) -> Any:
        if stream is not None and after is None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        elif stream is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        return None if stream is None else stream.record_event()


class Saved:
    """What one block saved in one forward pass, on the device, in host memory, or on its way.

    Autograd alone keeps it alive: it goes, and its tensors with it, when the block's backward pass is done.
    """

    def __init__(self, link: Link, before: Saved | None) -> None:
        self.link, self.before = link, before
        self._on_device: list[Tensor] = []
        self._in_host: list[Tensor] = []
        self._places: dict[Key, int] = {}
        self._sent: Any = None
        self._fetched: Any = None
        self._waited = True

    def put(self, tensor: Tensor) -> int:
        """The place of a tensor; one that was put before has it already."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self._places:
            self._places[key] = len(self._on_device)
            self._on_device.append(tensor)
        return self._places[key]

    def send_down(self) -> int:
        """Starts the copies down; their bytes."""
        self._places.clear()
        self._in_host, self._sent = self.link.down(self._on_device)
        return sum(host.numel() * host.element_size() for host in self._in_host)

    def drop(self) -> None:
        """Frees what is on the device, once it has gone down."""
        if self._on_device:
            self.link.wait(self._sent, [])
            self._on_device = []

    def fetch(self) -> None:
        """Starts the copies up, unless they are there."""
        if not self._on_device and self._in_host:
            self._on_device, self._fetched = self.link.up(self._in_host, self._sent)
            self._waited = False

    def get(self, place: int) -> Tensor:
        """A tensor on the device again. The first call also brings up what the block before saved."""
        self.fetch()
        if not self._waited:
            self.link.wait(self._fetched, self._on_device)
            self._waited = True
        if self.before is not None:
            self.before.fetch()
        return self._on_device[place]


class ActivationOffload:
    """The first blocks of a stage, whose activations go to host memory; `sent_bytes` so far, by block."""

    def __init__(self, device: torch.device) -> None:
        self.link = Link(device)
        self.sent_bytes: dict[int, int] = {}
        self._last: weakref.ref[Saved] | None = None
        self._open: list[tuple[Saved, saved_tensors_hooks]] = []

    def watch(self, layer: int, block: nn.Module, *, first: bool) -> tuple[RemovableHandle, RemovableHandle]:
        """Offloads what `block` saves; `first` says that no block before it is offloaded."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            saved = Saved(self.link, None if first else self.last)
            stay = _stay(module, args)
            hooks = saved_tensors_hooks(lambda t: _pack(saved, stay, t), _unpack)
            hooks.__enter__()
            self._open.append((saved, hooks))

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            if not self._open:
                return
            saved, hooks = self._open.pop()
            hooks.__exit__()
            self.sent_bytes[layer] = self.sent_bytes.get(layer, 0) + saved.send_down()
            self.let_go()
            self._last = weakref.ref(saved)

        return block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)

    def watch_next(self, block: nn.Module) -> None:
        """The first block that is not offloaded: the last one that is leaves the device behind it, and
        comes back when the backward pass reaches it."""

        def leave(_module: nn.Module, _args: Any, out: Tensor) -> None:
            self.let_go()
            last = self._last
            if last is not None and out.requires_grad:
                out.register_hook(  # type: ignore[no-untyped-call]
                    lambda _gradient: saved.fetch() if (saved := last()) is not None else None
                )

        block.register_forward_hook(leave)

    def let_go(self) -> None:
        """Frees on the device what went down last."""
        if self.last is not None:
            self.last.drop()

    @property
    def last(self) -> Saved | None:
        """What was saved last, if a backward pass still needs it."""
        return None if self._last is None else self._last()


def apply_activation_offload(
    offload: ActivationOffload | None, stage: Stage, name: str, part: nn.Module
) -> None:
    """Watches a part of a stage if it is one of the first blocks, which are offloaded, or the next."""
    if offload is None or not name.startswith("layers."):
        return
    layer = int(name.split(".")[1])
    place = layer - stage.first
    if place < stage.offload.activations:
        offload.watch(layer, part, first=place == 0)
    elif place == stage.offload.activations:
        offload.watch_next(part)


def _stay(module: nn.Module, args: tuple[Any, ...]) -> set[int]:
    """Storages that are not the block's to send: its weights, and what it is given besides hidden states."""
    shared = [arg for arg in args[1:] if isinstance(arg, Tensor)]
    return {
        _plain(t).untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *shared)
    }


def _plain(tensor: Tensor) -> Tensor:
    tensor = local_part(tensor.detach())
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.trigger_wait()  # type: ignore[no-untyped-call]
    return tensor


def _pack(saved: Saved, stay: set[int], tensor: Tensor) -> Any:
    plain = _plain(tensor)
    if plain.device.type != saved.link.device.type or plain.untyped_storage().data_ptr() in stay:
        return tensor
    return saved, saved.put(plain), tensor._spec if isinstance(tensor, DTensor) else None


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    saved, place, spec = packed
    tensor = saved.get(place)
    return tensor if spec is None else as_dtensor(tensor, spec)


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
