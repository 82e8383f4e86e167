"""Saves and loads the nested state of all ranks, also in the background while training goes on.

A leaf of the state is a DTensor (this rank's box of a whole tensor), a tensor (equal on every rank that has
it), or a plain value; its name is its path. DCP (torch.distributed.checkpoint) plans who writes which box:
replicas once, spread evenly. `dcp` reads and writes the files, `store` publishes them. Between the ranks of a
running job DCP passes its plans as pickles over the process group; these never reach a file and come from no
one but the job itself.

In the background, training only waits for a copy in host memory:

    training    wait for the previous save ─ start the thread ─ wait for its copy ─ next steps ...
    thread      plan with the other ranks ─ copy this rank's part ─ write, hash, read back ─ publish

The thread's collectives run on their own gloo group, so they never mix with those of a step.
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
from runtime.checkpoint.store import CheckpointIndex, Value, step_folder
from runtime.launch.process_group import own_rank, run_collectively

State = Mapping[str, Any]

WRITE_TIMEOUT_S = 3600.0
"""Time that ranks wait for the slowest one to write its part. A rank that died is noticed at once."""


def save_checkpoint(
    folder: Path,
    state: State,
    *,
    step: int,
    run: dict[str, Value],
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
    staged: Callable[[], None] | None = None,
    plan_cache_key: str | None = None,
) -> Path:
    """Write `state` of all ranks as the checkpoint of `step`, publish it, and return its folder.

    Every rank of `group` (None: the default group) calls it. The newest `keep` (at least 2) checkpoints
    stay, older ones are removed. `staged` is called once this rank's part is copied, so that training may go
    on before it is written; `plan_cache_key` is that of JsonSavePlanner. Raises InputError on every rank if
    one of them cannot write; then the step does not exist and older steps are untouched.
    """
    planner = JsonSavePlanner(plan_cache_key)
    writer = SafetensorsWriter(folder, planner, step=step, run=run, keep=keep, staged=staged)
    try:
        quiet = contextlib.nullcontext() if dist.is_initialized() else _without_process_group_warning()
        with _original_errors("written"), quiet:
            state_dict_saver.save(
                flatten_state(state),
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    except InputError:
        if own_rank() == 0:  # gives a full disk its space back
            shutil.rmtree(writer.temporary, ignore_errors=True)
        raise
    return step_folder(folder, step)


def load_checkpoint(path: Path, index: CheckpointIndex, state: State) -> dict[str, Any]:
    """Load a checkpoint of any layout: fill every tensor of `state` in place and replace every plain value.

    Every rank calls it and reads only what it holds. Each rank plans its own reads: DCP would send the plans
    of all ranks to the first one and back without changing them. Raises InputError on every rank with every
    tensor that the checkpoint lacks or holds in another shape.
    """
    flat = flatten_state(state)
    wanted = {name: leaf for name, leaf in flat.items() if not isinstance(leaf, Tensor) or leaf.numel()}

    def load() -> None:
        problems = [problem for name, leaf in flat.items() for problem in _misfits(path, index, name, leaf)]
        if problems:
            raise InputError(*problems)
        with _original_errors("read"), _without_process_group_warning():
            state_dict_loader.load(
                wanted,
                storage_reader=SafetensorsReader(path, index),
                planner=JsonLoadPlanner(),
                no_dist=True,
            )

    run_collectively(load)
    result: dict[str, Any] = _rebuild(state, {**flat, **wanted})
    return result


def flatten_state(state: State) -> dict[str, Any]:
    """Nested state as leaves by path, tensors detached from autograd.

    State that is saved in the background must be flattened first: detaching a DTensor computes its layout on
    fake tensors, which in a second thread ends a forked process of torch 2.11.
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
    """Nested state of the same structure with these leaves."""

    def below(key: object, value: Any) -> Any:
        return _rebuild(value, leaves, f"{prefix}/{key}" if prefix else str(key))

    if isinstance(state, Mapping):
        return {key: below(key, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(below(place, item) for place, item in enumerate(state))
    return leaves[prefix]


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
def _original_errors(verb: str) -> Iterator[None]:
    """Raise the errors of the ranks that failed instead of DCP's CheckpointException."""
    try:
        yield
    except CheckpointException as error:
        problems: list[Problem] = []
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                problems.append(
                    Problem(where=str(cause.filename), fault=f"cannot be {verb}: {cause.strerror}.")
                )
            elif isinstance(cause, InputError):
                problems += cause.problems
            else:
                raise cause from error
        raise InputError(*problems) from error


@contextlib.contextmanager
def _without_process_group_warning() -> Iterator[None]:
    """Silence DCP's warning that ranks do not meet, where this is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class CheckpointSaver:
    """Saves the checkpoints of a run one at a time. Every rank makes one and calls it in the same order.

    With `background`, `save` returns once the state is copied; else once the step is published. `waited_s` is
    the time that training has waited for checkpoints so far, `published` the newest step of this launch.
    """

    def __init__(self, folder: Path, *, keep: int, background: bool, device: torch.device) -> None:
        self.folder, self.keep, self.background, self.device = folder, keep, background, device
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=WRITE_TIMEOUT_S))
        self._plan_cache_key = uuid.uuid4().hex
        self.waited_s = 0.0
        self.published: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """True if a save in the background has failed; `wait` raises its error."""
        return self._error is not None

    def save(self, state: State, *, step: int, run: dict[str, Value]) -> None:
        """Save `state` as `step` once the previous save is published. Raises that save's error."""
        self.wait()
        begin_s = time.monotonic()
        try:
            if self.background:
                self._start(flatten_state(state), step, run)
            else:
                self._save(state, step, run, None)
        finally:
            self.waited_s += time.monotonic() - begin_s

    def wait(self) -> None:
        """Wait until nothing is being written. Raises InputError if a rank could not write."""
        begin_s = time.monotonic()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.waited_s += time.monotonic() - begin_s
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _start(self, state: State, step: int, run: dict[str, Value]) -> None:
        copied = threading.Event()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the thread copies on its own stream

        def work() -> None:
            try:
                self._save(state, step, run, copied)
            except BaseException as error:
                self._error = error
            finally:
                copied.set()

        # A daemon: a run that fails does not stay for a write that waits for a lost rank.
        self._thread = threading.Thread(target=work, name=f"save-{step}", daemon=True)
        self._thread.start()
        copied.wait()

    def _save(self, state: State, step: int, run: dict[str, Value], copied: threading.Event | None) -> None:
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
            plan_cache_key=self._plan_cache_key,
        )
