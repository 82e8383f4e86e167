"""Saving and loading nested state of all ranks, by torch.distributed.checkpoint (DCP), no pickle on disk.

A leaf of the state is a DTensor (this rank's box of a whole), a tensor (the same on every rank that has it),
or a plain value. Its name is its path. DCP plans who writes which box (replicas once, spread evenly) and
what a rank of any other layout has to read. Its own storage pickles metadata and plain values into files;
ours (`checkpoint_writer`, `checkpoint_reader`) keeps

    tensors          shard-RANK.safetensors, each box under NAME@OFFSET
    plain values     index.json
    metadata         index.json: global shape and type of each tensor; offset, shape and file of its boxes

so that nothing that is read can run code. Between the ranks of a running job DCP passes its plans as pickles
over the process group; these never reach a file, and come from no one but the job itself. `committed` says
how a step is found again, `saver` how it is saved behind the steps.

Saves checkpoints behind the steps: training waits for a copy in host memory, a thread does the rest.

    the loop    wait for the save before ─ start the thread ─ wait for its copy ─ next step ─ next step ...
    the thread  plan with the other ranks ─ copy this rank's part ─ write, hash, read back ─ publish

The thread's collectives run on a gloo group of their own, so they never meet those of a step. A fault is kept
and raised by the next call of `wait`; the loop asks `failed` after every step.

Whose run a checkpoint is, in flat facts: what must not change when it goes on, and which plan made it.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from planner.foundation.errors import InputError, Problem
from runtime.checkpoint.dcp import JsonLoadPlanner, JsonSavePlanner, SafetensorsReader, SafetensorsWriter
from runtime.checkpoint.store import CheckpointIndex, Value
from runtime.launch.process_group import own_rank, run_collectively

State = Mapping[str, Any]


def save_checkpoint(
    folder: Path,
    state: State,
    *,
    step: int,
    run: dict[str, Value],
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
    staged: Callable[[], None] | None = None,
    remembered: str | None = None,
) -> Path:
    """Writes `state` of all ranks as the checkpoint of `step`, publishes it, and drops all but the newest.

    Every rank of `group` (None: the default one) calls it. `keep` (at least 2) checkpoints stay. `staged` is
    called when this rank's part is copied, so that training may go on before it is written. `remembered`:
    see JsonSavePlanner. Raises InputError on every rank if one of them cannot write; then the step does not
    exist and older ones are untouched.
    """
    planner = JsonSavePlanner(remembered)
    writer = SafetensorsWriter(folder, planner, step=step, run=run, keep=keep, staged=staged)
    try:
        quiet = contextlib.nullcontext() if dist.is_initialized() else _quiet_alone()
        with _reasons("written"), quiet:
            state_dict_saver.save(
                flattened(state),
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    except InputError:
        if own_rank() == 0:  # a full disk gets its room back
            shutil.rmtree(writer.temporary, ignore_errors=True)
        raise
    return writer.final


def load_checkpoint(path: Path, index: CheckpointIndex, state: State) -> dict[str, Any]:
    """`state` with every tensor filled from the checkpoint, in place, and every plain value replaced.

    The layout of `state` may be another one than that which was saved. Each rank reads what it holds, and
    plans that alone: DCP would send all ranks' plans to the first one and back, to change nothing in them.
    Every rank calls it. Raises InputError on every rank with every tensor that the checkpoint lacks or
    holds in another shape.
    """
    flat = flattened(state)
    wanted = {name: leaf for name, leaf in flat.items() if not isinstance(leaf, Tensor) or leaf.numel()}

    def load() -> None:
        _check_fit(path, index, flat)
        with _reasons("read"), _quiet_alone():
            state_dict_loader.load(
                wanted,
                storage_reader=SafetensorsReader(path, index),
                planner=JsonLoadPlanner(),
                no_dist=True,
            )

    run_collectively(load)
    result: dict[str, Any] = _rebuild(state, {**flat, **wanted})
    return result


def flattened(state: State) -> dict[str, Any]:
    """Nested state as values by name, tensors cut off from autograd; of such a state, itself.

    What is saved behind the steps goes through this first: a DTensor that is cut off works out its layout on
    fake tensors, which in a thread of its own ends a forked process of torch 2.11.
    """
    return dict(_leaves(state))


def _leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        elif isinstance(value, (list, tuple)):
            yield from _leaves({str(place): item for place, item in enumerate(value)}, name)
        elif isinstance(value, Tensor):
            yield name, value.detach() if value.requires_grad else value
        else:
            assert value is None or isinstance(value, (bool, int, float, str)), (name, type(value))
            yield name, value


def _rebuild(state: Any, leaves: Mapping[str, Any], prefix: str = "") -> Any:
    """Nested state as before, with these leaves by name."""

    def below(key: object, value: Any) -> Any:
        return _rebuild(value, leaves, f"{prefix}/{key}" if prefix else str(key))

    if isinstance(state, Mapping):
        return {key: below(key, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(below(place, item) for place, item in enumerate(state))
    return leaves[prefix]


def _check_fit(path: Path, index: CheckpointIndex, flat: Mapping[str, Any]) -> None:
    problems = [problem for name, leaf in flat.items() for problem in _misfits(path, index, name, leaf)]
    if problems:
        raise InputError(*problems)


def _misfits(path: Path, index: CheckpointIndex, name: str, leaf: Any) -> Iterator[Problem]:
    if not isinstance(leaf, Tensor):
        if name not in index.values:
            yield Problem(where=str(path), fault=f"lacks {name}.")
        return
    stored, shape = index.tensors.get(name), tuple(leaf.shape)
    if stored is None and leaf.numel():
        yield Problem(where=str(path), fault=f"lacks the tensor {name}.")
    elif stored is not None and stored.shape != shape:
        yield Problem(
            where=str(path),
            fault=f"holds {name} as {list(stored.shape)}, this model has {list(shape)}.",
        )


@contextlib.contextmanager
def _reasons(done: str) -> Iterator[None]:
    """Raises what went wrong on the ranks that failed, in place of DCP's account of it."""
    try:
        yield
    except CheckpointException as error:
        problems: list[Problem] = []
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                problems.append(
                    Problem(where=str(cause.filename), fault=f"cannot be {done}: {cause.strerror}.")
                )
            elif isinstance(cause, InputError):
                problems += cause.problems
            else:
                raise cause from error
        raise InputError(*problems) from error


@contextlib.contextmanager
def _quiet_alone() -> Iterator[None]:
    """Where ranks are not to meet, DCP warns that they do not, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


WRITE_TIMEOUT_S = 3600.0
"""How long the ranks wait for the slowest to write its part. One that died is noticed at once."""


class Saver:
    """The checkpoints of one rank's run, one at a time. Every rank makes one and calls it in step.

    `behind` false: `save` returns when the step is published. `waited_s` is what training has waited for
    checkpoints so far; `published` the newest step that this launch has published.
    """

    def __init__(self, folder: Path, *, keep: int, behind: bool, device: torch.device) -> None:
        self.folder, self.keep, self.behind, self.device = folder, keep, behind, device
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=WRITE_TIMEOUT_S))
        self._plans = uuid.uuid4().hex
        self.waited_s = 0.0
        self.published: Path | None = None
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a save behind the steps has come to nothing; `wait` raises why."""
        return self._fault is not None

    def save(self, state: Mapping[str, Any], *, step: int, run: dict[str, Value]) -> None:
        """Saves `state` as `step`, once the save before is published. Raises what that one failed of."""
        self.wait()
        begin_s = time.monotonic()
        try:
            if self.behind:
                self._start(flattened(state), step, run)
            else:
                self._save(state, step, run, None)
        finally:
            self.waited_s += time.monotonic() - begin_s

    def wait(self) -> None:
        """Until nothing is being written. Raises InputError where a rank could not write."""
        begin_s = time.monotonic()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.waited_s += time.monotonic() - begin_s
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _start(self, state: Mapping[str, Any], step: int, run: dict[str, Value]) -> None:
        copied = threading.Event()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the thread copies on a stream of its own

        def work() -> None:
            try:
                self._save(state, step, run, copied)
            except BaseException as fault:
                self._fault = fault
            finally:
                copied.set()

        # A daemon: a run that ends by a fault does not stay for a write that waits for a lost rank.
        self._thread = threading.Thread(target=work, name=f"save-{step}", daemon=True)
        self._thread.start()
        copied.wait()

    def _save(
        self, state: Mapping[str, Any], step: int, run: dict[str, Value], copied: threading.Event | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.published = save_checkpoint(
            self.folder,
            state,
            step=step,
            run=run,
            keep=self.keep,
            group=self.group,
            staged=None if copied is None else copied.set,
            remembered=self._plans,
        )
