"""Peak memory of a piece of work, by the real allocator, on a CPU and on CUDA.

What is counted as `allocated`:

- the bytes that tensors' storages asked of torch's allocator, each storage once however many tensors and
  views share it (on CUDA: rounded up to the allocator's blocks of 512 bytes);
- in every thread that works for the caller: autograd's, and the backend's threads that run collectives
  with tensors of their own;
- what was alive before (weights, gradients, optimizer state, anything that Python can reach), so that the
  figure is the device's, not the increase.

What is not: tensors that wrap memory from elsewhere (NumPy arrays, mapped files), scratch that libraries
take for themselves (oneDNN, gloo's socket buffers; cuBLAS workspaces on CUDA are torch's and are counted),
and Python objects. `rss_bytes` has all of these on a CPU.

On a CPU the allocator keeps no statistics unless the profiler listens, so the work runs once under it and
the allocation events are added up in the order of time. It is therefore slower than usual: never time it.
A few releases are not seen: those by a thread of gloo that is the last to let go of a collective's copy.
Such a copy (one whose address is handed out again, or that nothing holds at the end) counts for the moment
of its allocation only; its like, released in sight, show how long they live.

A rank's program run on shapes alone: nothing is computed, and the bytes of every allocation are traced.

torch's own tracker of fake tensors (`torch.distributed._tools.MemTracker`) sees one pass of each module a
step: a pipeline's micro-batches are beyond it. This one follows storages, whoever makes them.

What an accelerator's fused kernels keep and allocate, for tensors of shapes alone on a CPU.

A CPU build of torch has other kernels: its RMSNorm is written in tensor operations, which keep the input in
fp32, and its attention repeats keys and values for the heads that share them. Inside `accelerator_kernels`
the two allocate what CUDA's do: results, fp32 sums for the backward pass, and gradients.
"""

from __future__ import annotations

import gc
import re
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.foundation.frozen import frozen

_MARK = "shardwise.phase."
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@frozen
class PeakMemory:
    """The most memory that a piece of work held at once.

    `allocated_bytes` is the peak of live tensor bytes on the device, `start_bytes` what was alive before.
    `reserved_bytes` (what the caching allocator took from the device, peak) and `device_used_bytes` (what
    the driver says is in use on the device, by anyone, after the work) are None on a CPU. `rss_bytes` is
    the peak resident size of this process in host memory.
    """

    allocated_bytes: int
    start_bytes: int
    reserved_bytes: int | None
    device_used_bytes: int | None
    rss_bytes: int


@frozen
class PhaseMemory:
    """Live bytes in one phase of a trace, relative to the start of its first phase.

    `peak_bytes` is the most during the phase (at least what was alive as it began), `end_bytes` what was
    alive when it ended.
    """

    peak_bytes: int
    end_bytes: int


def measure_peak(
    work: Callable[[], object], device: torch.device, *, timeline: list[tuple[float, int]] | None = None
) -> PeakMemory:
    """Runs `work` once and returns the peak memory of this process on `device` meanwhile.

    On a CPU, `timeline` is filled with (seconds since its start, live bytes) after every change.

    Before and after it, what is alive must be in reach of Python: call it for whole steps.
    """
    gc.collect()
    _reset_peak_rss()
    on_cuda = device.type == "cuda"
    if on_cuda:
        start_bytes = live_bytes(device)
        (phase,) = _trace_cuda([work], device)
    else:
        live = _live_storages()
        start_bytes = sum(storage.nbytes() for storage in live.values())
        changes, (phase,) = _trace_cpu([work], live, whole=True)
        if timeline is not None and changes:
            timeline += _live(changes, start_bytes)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device) if on_cuda else (0, 0)
    return PeakMemory(
        allocated_bytes=start_bytes + phase.peak_bytes,
        start_bytes=start_bytes,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_cuda else None,
        device_used_bytes=total_bytes - free_bytes if on_cuda else None,
        rss_bytes=peak_rss_bytes(),
    )


def _live(changes: Sequence[tuple[int, int]], start_bytes: int) -> Iterator[tuple[float, int]]:
    """(Seconds since the first change, live bytes after it) of each change."""
    live = start_bytes
    for time_ns, change in changes:
        live += change
        yield (time_ns - changes[0][0]) / 1e9, live


def live_bytes(device: torch.device) -> int:
    """Bytes of all live tensor storages on `device`.

    On CUDA from the allocator. On a CPU from the storages that Python's objects reach (tensors that only
    an autograd graph holds are not seen: call it between steps).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return sum(storage.nbytes() for storage in _live_storages().values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages under `tensors`, each once; a DTensor counts with its local shard."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages_under(tensors)}
    return sum(storages.values())


def trace_phases(phases: Sequence[Callable[[], object]], device: torch.device) -> list[PhaseMemory]:
    """Runs the phases one after another and returns the live bytes of each.

    Values that phases return are dropped; what shall stay alive must be held by the caller.
    """
    gc.collect()
    if device.type == "cuda":
        return _trace_cuda(phases, device)
    _, phase_memory = _trace_cpu(phases, _live_storages(), whole=False)
    return phase_memory


def _trace_cuda(phases: Sequence[Callable[[], object]], device: torch.device) -> list[PhaseMemory]:
    torch.cuda.synchronize(device)
    start = torch.cuda.memory_allocated(device)
    result = []
    for work in phases:
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        result.append(
            PhaseMemory(
                peak_bytes=torch.cuda.max_memory_allocated(device) - start,
                end_bytes=torch.cuda.memory_allocated(device) - start,
            )
        )
    return result


def _trace_cpu(
    phases: Sequence[Callable[[], object]], live: dict[int, torch.UntypedStorage], *, whole: bool
) -> tuple[list[tuple[int, int]], list[PhaseMemory]]:
    """(Nanoseconds, change of live bytes) in the order of time, and the phases. `live` is what is alive as
    they begin; it is emptied. `whole` says that after the last phase nothing is alive that Python cannot
    reach, such as a graph's saved tensors."""
    released: list[tuple[int, int]] = []
    watches = [_watch(storage, released) for storage in live.values()]
    sizes = {address: storage.nbytes() for address, storage in live.items()}
    live.clear()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with warnings.catch_warnings():
        # Without acc_events it says that only the last cycle counts; with it, it makes objects of all events.
        warnings.filterwarnings("ignore", "Profiler clears events", UserWarning)
        with profiler:
            for index, work in enumerate(phases):
                with record_function(f"{_MARK}{index}"):
                    work()
    del watches
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = list(_walk(profiler.profiler.kineto_results.experimental_event_tree()))
    bounds = sorted(
        (event.start_time_ns, event.end_time_ns) for event in events if event.name.startswith(_MARK)
    )
    left = set(_live_storages()) if whole else None
    changes = _changes(events, released, sizes, left)
    return changes, [_phase(changes, begin, end) for begin, end in bounds]


def _watch(storage: torch.UntypedStorage, released: list[tuple[int, int]]) -> weakref.ref[Any]:
    """Notes (time, address) when `storage` is freed; Python's object of a storage lives as long as it."""
    address = storage.data_ptr()
    return weakref.ref(storage, lambda _: released.append((time.time_ns(), address)))


def _walk(roots: Iterable[Any]) -> Iterator[Any]:
    settings = list(roots)
    while settings:
        event = settings.pop()
        yield event
        settings.extend(event.children)


def _changes(
    events: Iterable[Any], released: Iterable[tuple[int, int]], sizes: dict[int, int], left: set[int] | None
) -> list[tuple[int, int]]:
    """(time, change of live bytes) of every allocation and release, in the order of time.

    The profiler is silent about the release of a block that was allocated before it began; `released`
    has those, and `sizes` (address to bytes) what was alive at the start. `left` are the addresses that
    are alive at the end, where that is known.
    """
    moves = [(time_ns, address, 0) for time_ns, address in released]
    for event in events:
        if event.name == "[memory]" and event.extra_fields.device.type == "cpu":
            fields = event.extra_fields
            moves.append((event.start_time_ns, fields.ptr, max(fields.alloc_size, 0)))
    # Address to (since, bytes); 0 stands for before the trace.
    alive = {address: (0, size) for address, size in sizes.items()}
    changes: list[tuple[int, int]] = []
    for time_ns, address, new_bytes in sorted(moves, key=lambda move: move[0]):
        since, old_bytes = alive.pop(address, (time_ns, 0))
        if new_bytes:
            # An address in use is handed out again: what was there was freed unseen.
            changes += [(since or time_ns, -old_bytes), (time_ns, new_bytes)]
            alive[address] = (time_ns, new_bytes)
        else:
            changes.append((time_ns, -old_bytes))
    if left is not None:
        changes += [
            (since, -size) for address, (since, size) in alive.items() if since and address not in left
        ]
    return sorted(changes, key=lambda change: (change[0], change[1] < 0))


def _phase(changes: Sequence[tuple[int, int]], begin: int, end: int) -> PhaseMemory:
    current = sum(change for time_ns, change in changes if time_ns < begin)
    peak = current
    for time_ns, change in changes:
        if begin <= time_ns <= end:
            current += change
            peak = max(peak, current)
    return PhaseMemory(peak_bytes=peak, end_bytes=current)


def _live_storages() -> dict[int, torch.UntypedStorage]:
    """By address, every CPU storage of torch's allocator that Python can reach."""
    # type(), not isinstance(): the latter asks proxies for their __class__, which may warn or import.
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)}
    tensors = [value for value in objects if type(value) in kinds]
    del objects
    return {
        storage.data_ptr(): storage for storage in _storages_under(tensors) if storage.device.type == "cpu"
    }


def _storages_under(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        for part in _plain_parts(tensor):
            if is_lazy(part) or part.layout is not torch.strided or part.is_meta:
                continue
            storage = part.untyped_storage()
            # A storage over foreign memory (NumPy, a mapped file) cannot be resized.
            if storage.nbytes() and storage.resizable():
                yield storage


def _plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold the data: of a DTensor its shard; and of its gradient as well."""
    if tensor.is_leaf and tensor.grad is not None:
        yield from _plain_parts(tensor.grad)
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            part = getattr(tensor, name)
            if issubclass(type(part), torch.Tensor):  # a DTensor also names its mesh
                yield from _plain_parts(part)
    else:
        yield tensor


def peak_rss_bytes() -> int:
    """Peak resident bytes of this process since it began or since the last `measure_peak` began."""
    return _status_bytes("VmHWM")


def rss_bytes() -> int:
    """Resident bytes of this process now."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"{_STATUS} has no {field}"
    return int(match.group(1)) * 1024


def _reset_peak_rss() -> None:
    """Lets VmHWM begin anew (proc(5): writing 5). Where that is not allowed the peak is of the process."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


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
