"""Saves checkpoints behind the steps: training waits for a copy in host memory, a thread does the rest.

    the loop    wait for the save before ─ start the thread ─ wait for its copy ─ next step ─ next step ...
    the thread  plan with the other ranks ─ copy this rank's part ─ write, hash, read back ─ publish

The thread's collectives run on a gloo group of their own, so they never meet those of a step. A fault is kept
and raised by the next call of `wait`; the loop asks `failed` after every step.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runtime.checkpoint.checkpoint import flattened, save_checkpoint
from runtime.checkpoint.store import Value

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
