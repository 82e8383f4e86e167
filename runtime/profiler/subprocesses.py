"""Measuring processes: forked from this one, each reporting JSON lines through a pipe as it goes.

Every measurement runs in a child, so that a sample that runs out of memory or is killed costs that child
and not the profile, and this process never touches a device itself (which would forbid forking on CUDA).
torch is imported before the fork: a child starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

Emit = Callable[[dict[str, Any]], None]
Body = Callable[[int, Emit], None]

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a child gets when its parent dies."""


class ChildFailed(Exception):  # noqa: N818  # an event to report, caught and turned into a skipped sample
    """A measuring process ended before its work did. The text says how."""


class TimeUp(Exception):  # noqa: N818  # the end of the time that was given, not a fault
    """The time that `ended_at` gave is over: the measuring processes were ended."""


_ENDS_S: ContextVar[float] = ContextVar("ends_s", default=math.inf)


@contextlib.contextmanager
def ended_at(ends_s: float) -> Iterator[None]:
    """Within it, `run_children` waits for nobody beyond this time of `time.monotonic`."""
    before = _ENDS_S.set(ends_s)
    try:
        yield
    finally:
        _ENDS_S.reset(before)


def run_children(body: Body, count: int = 1, *, silence_s: float = 120.0) -> Iterator[dict[str, Any]]:
    """Runs `body(rank, emit)` in `count` forked processes and yields what they emit, as it comes.

    Raises ChildFailed when a child raises, is killed, or when none has emitted anything for `silence_s`
    seconds, and TimeUp where the time is limited. However the iteration ends, no child is left running.
    """
    children: dict[int, int] = {}  # read end of its pipe -> process id
    try:
        for rank in range(count):
            reader, process = _fork(body, rank, list(children))
            children[reader] = process
        yield from _read(children, silence_s)
        for process in children.values():
            _expect_success(process)
    finally:
        for reader, process in children.items():
            os.close(reader)
            _end(process)


def _fork(body: Body, rank: int, inherited: list[int]) -> tuple[int, int]:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns when other threads exist; torch's own idle threads are no danger to a child
        # that computes with one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        for descriptor in (reader, *inherited):
            os.close(descriptor)
        _child(body, rank, writer)
    os.close(writer)
    return reader, process


def _child(body: Body, rank: int, writer: int) -> None:
    """Runs the body and ends this process; nothing of the parent's clean-up may run here."""
    code = 1
    try:
        _die_with_parent()
        _die_first()
        gc.freeze()  # nothing that was imported is garbage: collections and walks skip it from here
        for ending in (signal.SIGINT, signal.SIGTERM):  # the parent, which gets them too, ends us
            signal.signal(ending, signal.SIG_IGN)
        with os.fdopen(writer, "w", encoding="utf-8", buffering=1) as pipe:
            try:
                body(rank, lambda message: print(json.dumps(message), file=pipe, flush=True))
                code = 0
            except BaseException as error:
                text = " ".join(str(error).split())[:500]
                print(json.dumps({"failed": f"{type(error).__name__}: {text}"}), file=pipe, flush=True)
    finally:
        os._exit(code)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_first() -> None:
    """Where memory runs out, the system is to kill the measuring process and not the one that gathers."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _read(children: dict[int, int], silence_s: float) -> Iterator[dict[str, Any]]:
    buffers = dict.fromkeys(children, b"")
    with selectors.DefaultSelector() as selector:
        for reader in children:
            selector.register(reader, selectors.EVENT_READ)
        while selector.get_map():
            left_s = _ENDS_S.get() - time.monotonic()
            ready = selector.select(timeout=max(0.0, min(silence_s, left_s)))
            if not ready and left_s <= silence_s:
                raise TimeUp
            if not ready:
                raise ChildFailed(f"no sign of life for {silence_s:.0f} s")
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                *lines, buffers[key.fd] = (buffers[key.fd] + chunk).split(b"\n")
                for line in lines:
                    message: dict[str, Any] = json.loads(line)
                    if "failed" in message:
                        raise ChildFailed(message["failed"])
                    yield message
                if not chunk:
                    _raise_if_killed(children[key.fd])


def _raise_if_killed(process: int) -> None:
    """A child that was killed closes its pipe without a word: the others would wait for it in vain."""
    state = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if state is not None and state.si_code != os.CLD_EXITED:
        raise ChildFailed(f"was killed by {signal.Signals(state.si_status).name}")


def _expect_success(process: int) -> None:
    state = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if state is not None and state.si_status != 0:
        raise ChildFailed(f"ended with code {state.si_status}")


def _end(process: int) -> None:
    """Reaps a child; one that still runs is killed first."""
    finished, _ = os.waitpid(process, os.WNOHANG)
    if finished == 0:
        os.kill(process, signal.SIGKILL)
        while True:
            try:
                os.waitpid(process, 0)
                return
            except InterruptedError:
                time.sleep(0.01)
