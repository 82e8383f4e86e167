"""Processes that tests start, watch and end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from planner.foundation.errors import PlannerError

PATIENCE_S = 60.0


def forked(work: Callable[[], None], fault: Path) -> int:
    """Runs `work` in a forked process that ends as `plan train` does; what it raises goes to `fault`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except PlannerError as error:
        fault.write_text(str(error))
        code = error.exit_code
    finally:
        os._exit(code)


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; fails after PATIENCE_S."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The children of a process, in the order in which it made them."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def exit_code(pid: int) -> int:
    """How a child ended, once it has; the negative signal where one ended it."""
    wait_for(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
