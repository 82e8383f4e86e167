"""The ranks of a run on this machine: forked from one parent, watched, and ended together.

torch is imported once, before the fork, so that a run of four ranks starts in well under a second. Every
rank writes its output to a log file of its own and speaks to the parent in JSON lines through a pipe. The
ranks form one process group, die with the parent (PR_SET_PDEATHSIG), and if one of them ends badly the
others are ended within seconds.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from planner.foundation.decode import encode
from planner.foundation.errors import PlannerError, Problem
from runtime.launch.process_group import describe_hang, lost_peer, process_state, timed_out

Message = dict[str, Any]
Send = Callable[[Message], None]
Body = Callable[[int, Send], None]

GRACE_S = 2.0
"""How long ranks may go on after one has failed, to say why themselves."""
TAIL_LINES = 12
PORT_DIGITS = 6
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent dies."""


class RunFailedError(PlannerError):
    """A run on real ranks ended before its work did."""

    exit_code = 4


@dataclass(slots=True)
class _Rank:
    """One forked rank as the parent sees it."""

    rank: int
    pid: int
    pipe: int
    log: Path
    rest: bytes = b""
    status: int | None = None
    fault: Message | None = None
    ended_s: float = field(default=0.0)

    @property
    def failed(self) -> bool:
        return self.status is not None and self.status != 0

    @property
    def said(self) -> str:
        """The error that it raised, in words."""
        return str(self.fault["text"]) if self.fault else ""

    @property
    def killed_by(self) -> str | None:
        if self.status is None or self.status >= 0:
            return None
        return signal.Signals(-self.status).name


def run_local(body: Body, world: int, *, log_dir: Path, on_message: Callable[[int, Message], None]) -> None:
    """Runs `body(rank, send)` in `world` forked processes until all have ended.

    In a rank the environment is that of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, ...) with a
    store that the parent holds, so no port is ever guessed. SIGTERM and the first Ctrl-C of the parent
    are passed on to the ranks, which end in their own way; a second one kills them.

    Raises what a rank raised if that was a PlannerError; else RunFailedError with the rank that failed
    first, how, and the end of its log. No process is left in any case.
    """
    import torch._dynamo  # noqa: F401  # every rank would import its 300 modules, each for itself

    log_dir.mkdir(parents=True, exist_ok=True)
    gate, opener = os.pipe()
    ranks: list[_Rank] = []
    store = None
    try:
        with _forward_signals(ranks) as signals:
            for rank in range(world):
                ranks.append(_fork(body, rank, world, (gate, opener), log_dir / f"rank-{rank}.log", ranks))
            # Only now: the store has a thread, and a fork while it works could copy a lock that it holds.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(opener, f"{store.port:<{PORT_DIGITS}}".encode() * world)
            _watch(ranks, on_message)
        _raise_fault(ranks, signals)
    finally:
        os.close(gate)
        os.close(opener)
        _end_all(ranks)
        del store


def _fork(body: Body, rank: int, world: int, gate: tuple[int, int], log: Path, others: list[_Rank]) -> _Rank:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python 3.12 warns when other threads exist: here idle ones of libraries, which hold no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        for descriptor in (reader, gate[1], *(other.pipe for other in others)):
            os.close(descriptor)
        _child(body, rank, world, gate[0], log, writer, parent, others[0].pid if others else 0)
    os.close(writer)
    group = others[0].pid if others else pid
    with contextlib.suppress(OSError):  # the child did it itself already, or has ended
        os.setpgid(pid, group)
    return _Rank(rank=rank, pid=pid, pipe=reader, log=log)


def _child(
    body: Body, rank: int, world: int, gate: int, log: Path, writer: int, parent: int, group: int
) -> NoReturn:
    """Runs the body and ends this process; nothing of the parent's clean-up may run here."""
    code = 1
    try:
        with contextlib.suppress(OSError):  # the group's first process has ended: it failed
            os.setpgid(0, group)
        _die_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _redirect(log)
        gc.freeze()  # what was there before the fork is nobody's here: collecting it would copy its pages
        port = int(os.read(gate, PORT_DIGITS) or os._exit(1))  # nothing to read: the parent gave up
        os.environ.update(_environment(rank, world, port))
        with os.fdopen(writer, "w", encoding="utf-8", buffering=1) as pipe:
            code = _guard(body, rank, lambda message: print(json.dumps(message), file=pipe, flush=True))
    finally:
        with contextlib.suppress(OSError):  # the disk is full
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _guard(body: Body, rank: int, send: Send) -> int:
    """Runs the body; what it raises is told to the parent, and its traceback goes to the log."""
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


def _redirect(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


@contextlib.contextmanager
def _forward_signals(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Passes SIGTERM, and SIGINT as SIGTERM, on to the ranks; the second time as SIGKILL.

    Gives the list of the signals that came.
    """
    seen: list[int] = []

    def forward(number: int, frame: object) -> None:
        seen.append(number)
        for rank in ranks:
            if rank.status is None:
                os.kill(rank.pid, signal.SIGTERM if len(seen) == 1 else signal.SIGKILL)

    names = (signal.SIGTERM, signal.SIGINT)
    try:
        before = {name: signal.signal(name, forward) for name in names}
    except ValueError:  # not the main thread: signals are the caller's affair
        yield seen
        return
    try:
        yield seen
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _watch(ranks: list[_Rank], on_message: Callable[[int, Message], None]) -> None:
    """Reads messages until every rank has ended; after the first failure at most GRACE_S longer."""
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


def _read(rank: _Rank, on_message: Callable[[int, Message], None]) -> bool:
    """Takes what a rank has said; False at the end of its pipe."""
    chunk = os.read(rank.pipe, 1 << 16)
    *lines, rank.rest = (rank.rest + chunk).split(b"\n")
    for line in lines:
        message: Message = json.loads(line)
        if "fault" in message:
            rank.fault = message
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


def _raise_fault(ranks: list[_Rank], signals: list[int]) -> None:
    """Raises for the rank that failed on its own account; its peers only lost their connection to it."""
    failed = [rank for rank in ranks if rank.failed]
    if not failed:
        return
    for rank in failed:
        if rank.fault is not None and rank.fault["fault"] == "planner":
            raise decode_fault(rank.fault)
    first = min(failed, key=lambda rank: (rank.killed_by is None, lost_peer(rank.said), rank.ended_s))
    if signals and first.killed_by in ("SIGTERM", "SIGKILL"):
        name = signal.Signals(signals[0]).name
        raise RunFailedError(f"the run was ended by {name} before its ranks could save.")
    waited = [rank.rank for rank in failed if timed_out(rank.said) or rank.killed_by == "SIGABRT"]
    silent = {rank.rank: process_state(rank.pid) for rank in ranks if rank.status is None}
    if waited and silent:
        logs = ", ".join(str(rank.log) for rank in ranks if rank.status is None)
        raise RunFailedError(f"{describe_hang(silent, waited)} All ranks were ended. See {logs}")
    raise RunFailedError(_describe(first))


def decode_fault(fault: Message) -> PlannerError:
    """The error that a rank raised, in the parent."""
    import planner.foundation.errors as errors

    kind = getattr(errors, fault["type"], RunFailedError)
    if kind is errors.InputError:
        return errors.InputError(*(Problem(**problem) for problem in fault["problems"]))
    return kind(fault["text"])


def _describe(rank: _Rank) -> str:
    if rank.killed_by is not None:
        how = f"was killed by {rank.killed_by}"
        if rank.killed_by == "SIGKILL":
            how += " (by someone, or by the kernel because the machine ran out of memory)"
    elif rank.fault is not None:
        how = f"raised {rank.fault['type']}: {rank.fault['text']}"
    else:
        how = f"ended with code {rank.status}"
    text = f"rank {rank.rank} {how}. All other ranks were ended. Its log is {rank.log}"
    tail = _tail(rank.log)
    return text + (":\n" + "\n".join(f"  {line}" for line in tail) if tail else " and is empty.")


def _tail(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return []
