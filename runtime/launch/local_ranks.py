"""Forks the ranks of a run on this machine, watches them, and ends them together.

torch is imported once, before the fork, so that four ranks start in well under a second. Every rank writes
its output to its own log file and sends JSON lines to the parent through a pipe. The ranks die with the
parent (PR_SET_PDEATHSIG). When one of them fails, the others are ended within seconds, and the error names
the rank that failed first or, if ranks timed out, the one that hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

import planner.foundation.errors as errors
from planner.foundation.decode import encode
from planner.foundation.errors import InputError, PlannerError, Problem
from runtime.launch.process_group import describe_hang, is_lost_peer, is_timeout, process_state

RankMessage = dict[str, Any]
"""A JSON object that a rank sends to the parent."""
Send = Callable[[RankMessage], None]
RankBody = Callable[[int, Send], None]
"""The work of one rank, given its number and a function that sends messages to the parent."""

GRACE_S = 2.0
"""Time that the other ranks get after a failure to report their own error."""
LOG_TAIL_LINES = 12
PORT_DIGITS = 6
_PR_SET_PDEATHSIG = 1
"""prctl(2): sets the signal that a process gets when its parent dies."""


class RunFailedError(PlannerError):
    """A run on real ranks ended before its work was done."""

    exit_code = 4


@dataclass(slots=True)
class _Rank:
    """A forked rank as the parent sees it."""

    rank: int
    pid: int
    pipe: int
    log: Path
    partial_line: bytes = b""
    status: int | None = None
    """Exit code, or the negative signal that ended the rank; None while it runs."""
    error: RankMessage | None = None
    """The exception that the rank reported."""
    ended_s: float = 0.0

    @property
    def failed(self) -> bool:
        return self.status is not None and self.status != 0

    @property
    def error_text(self) -> str:
        return str(self.error["text"]) if self.error else ""

    @property
    def killed_by(self) -> str | None:
        if self.status is None or self.status >= 0:
            return None
        return signal.Signals(-self.status).name


def run_local(
    body: RankBody, world: int, *, log_dir: Path, on_message: Callable[[int, RankMessage], None]
) -> None:
    """Run `body(rank, send)` in `world` forked processes until all have ended.

    Each rank sees torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, ...). The parent holds
    the store, so no port has to be guessed. SIGTERM and the first Ctrl-C are forwarded to the ranks as
    SIGTERM; a second one kills them.

    If a rank raised a PlannerError, that error is raised here. Any other failure raises RunFailedError with
    the rank that failed first, the cause, and the end of its log. No process is left running in any case.
    """
    import torch._dynamo  # noqa: F401  # imported before the fork, else every rank imports its 300 modules

    log_dir.mkdir(parents=True, exist_ok=True)
    port_reader, port_writer = os.pipe()
    ranks: list[_Rank] = []
    store = None
    try:
        with _forward_signals(ranks) as signals:
            for rank in range(world):
                ranks.append(_fork_rank(body, rank, world, (port_reader, port_writer), log_dir, ranks))
            # After the forks: the store runs a thread, and a fork could copy a lock that the thread holds.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(port_writer, f"{store.port:<{PORT_DIGITS}}".encode() * world)
            _watch(ranks, on_message)
        _raise_failure(ranks, signals)
    finally:
        os.close(port_reader)
        os.close(port_writer)
        _end_all(ranks)
        del store


def fork_child(run: Callable[[Send], int], inherited: Iterable[int] = ()) -> tuple[int, int]:
    """Fork a process that ends with the exit code `run(send)`; return its process id and its pipe's read end.

    `send` writes a message as one JSON line into the pipe. The child closes the `inherited` file descriptors,
    dies with this process, and runs none of this process's clean-up.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python 3.12 warns when other threads exist: here idle ones of libraries, which hold no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid != 0:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        for descriptor in (reader, *inherited):
            os.close(descriptor)
        _die_with_parent(parent)
        gc.freeze()  # objects from before the fork stay: a collection would copy their memory pages
        with os.fdopen(writer, "w", encoding="utf-8", buffering=1) as pipe:
            code = run(lambda message: print(json.dumps(message), file=pipe, flush=True))
    finally:
        with contextlib.suppress(OSError):  # the disk is full
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _fork_rank(
    body: RankBody, rank: int, world: int, port_pipe: tuple[int, int], log_dir: Path, others: list[_Rank]
) -> _Rank:
    port_reader, port_writer = port_pipe
    log = log_dir / f"rank-{rank}.log"
    process_group = others[0].pid if others else 0

    def run(send: Send) -> int:
        with contextlib.suppress(OSError):  # the group's first process has ended: it failed
            os.setpgid(0, process_group)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _redirect_output(log)
        port = int(os.read(port_reader, PORT_DIGITS) or os._exit(1))  # nothing to read: the parent gave up
        os.environ.update(_environment(rank, world, port))
        return _run_and_report(body, rank, send)

    pid, reader = fork_child(run, (port_writer, *(other.pipe for other in others)))
    with contextlib.suppress(OSError):  # the child did it already, or has ended
        os.setpgid(pid, process_group or pid)
    return _Rank(rank=rank, pid=pid, pipe=reader, log=log)


def _run_and_report(body: RankBody, rank: int, send: Send) -> int:
    """Run the body; send any exception to the parent and print its traceback to the log."""
    import traceback

    try:
        body(rank, send)
        return 0
    except PlannerError as error:
        problems = [encode(p) for p in getattr(error, "problems", ())]
        send({"fault": "planner", "type": type(error).__name__, "text": str(error), "problems": problems})
        return error.exit_code
    except BaseException as error:
        text = " ".join(str(error).split())[:500]
        send({"fault": "error", "type": type(error).__name__, "text": text})
        traceback.print_exc()  # last: the disk may be full
        return 1


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Every rank is a client of the parent's store, as under torchrun's agent.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _redirect_output(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


@contextlib.contextmanager
def _forward_signals(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Forward the first SIGTERM or SIGINT to the ranks as SIGTERM and later ones as SIGKILL.

    Yield the list of the signals received so far.
    """
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for rank in ranks:
            if rank.status is None:
                os.kill(rank.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    try:
        before = {name: signal.signal(name, forward) for name in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, where signals cannot be handled
        yield received
        return
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _watch(ranks: list[_Rank], on_message: Callable[[int, RankMessage], None]) -> None:
    """Read messages until every rank has ended, or for at most GRACE_S after the first failure."""
    deadline_s: float | None = None
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.pipe, selectors.EVENT_READ, rank)
        while any(rank.status is None for rank in ranks):
            for key, _ in selector.select(timeout=0.05):
                if not _read(key.data, on_message):
                    selector.unregister(key.fd)
            _reap(ranks)
            if deadline_s is None and any(rank.failed for rank in ranks):
                deadline_s = time.monotonic() + GRACE_S
            if deadline_s is not None and time.monotonic() > deadline_s:
                return
    for rank in ranks:
        while _read(rank, on_message):
            pass


def _read(rank: _Rank, on_message: Callable[[int, RankMessage], None]) -> bool:
    """Handle the messages that a rank has sent; False at the end of its pipe."""
    chunk = os.read(rank.pipe, 1 << 16)
    *lines, rank.partial_line = (rank.partial_line + chunk).split(b"\n")
    for line in lines:
        message: RankMessage = json.loads(line)
        if "fault" in message:
            rank.error = message
        else:
            on_message(rank.rank, message)
    return bool(chunk)


def _reap(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.status is None:
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid:
                rank.status = os.waitstatus_to_exitcode(status)
                rank.ended_s = time.monotonic()


def _end_all(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.status is None:
            os.kill(rank.pid, signal.SIGKILL)
            os.waitpid(rank.pid, 0)
            rank.status = -signal.SIGKILL
        os.close(rank.pipe)


def _raise_failure(ranks: list[_Rank], signals: list[int]) -> None:
    """Raise the error of the rank that caused the failure; the others only lost their connection to it."""
    failed = [rank for rank in ranks if rank.failed]
    if not failed:
        return
    for rank in failed:
        if rank.error is not None and rank.error["fault"] == "planner":
            raise _decode_error(rank.error)
    first = min(
        failed, key=lambda rank: (rank.killed_by is None, is_lost_peer(rank.error_text), rank.ended_s)
    )
    if signals and first.killed_by in ("SIGTERM", "SIGKILL"):
        name = signal.Signals(signals[0]).name
        raise RunFailedError(f"{name} ended the run before its ranks could save a checkpoint.")
    timed_out = [rank.rank for rank in failed if is_timeout(rank.error_text) or rank.killed_by == "SIGABRT"]
    silent = {rank.rank: process_state(rank.pid) for rank in ranks if rank.status is None}
    if timed_out and silent:
        logs = ", ".join(str(rank.log) for rank in ranks if rank.status is None)
        raise RunFailedError(f"{describe_hang(silent, timed_out)} All ranks were ended. See {logs}")
    raise RunFailedError(_describe(first))


def _decode_error(message: RankMessage) -> PlannerError:
    """Rebuild the PlannerError that a rank raised."""
    kind = getattr(errors, message["type"], RunFailedError)
    if kind is InputError:
        return InputError(*(Problem(**problem) for problem in message["problems"]))
    return kind(message["text"])


def _describe(rank: _Rank) -> str:
    if rank.killed_by is not None:
        cause = f"was killed by {rank.killed_by}"
        if rank.killed_by == "SIGKILL":
            cause += " (by a user, or by the kernel because the machine ran out of memory)"
    elif rank.error is not None:
        cause = f"raised {rank.error['type']}: {rank.error['text']}"
    else:
        cause = f"ended with exit code {rank.status}"
    text = f"rank {rank.rank} {cause}. All other ranks were ended. Its log is {rank.log}"
    try:
        tail = rank.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except OSError:
        tail = []
    return text + (":\n" + "\n".join(f"  {line}" for line in tail) if tail else " and is empty.")
