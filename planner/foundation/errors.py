"""The errors a user can meet, and the exit code of each.

PlannerError
├── InputError        2  wrong use or bad input; carries every problem found
├── InfeasibleError   3  no feasible plan; carries what was rejected and why
└── CheckError        4  a validation or verification failed

`assert` is kept for our own invariants; anything that a user's file, flag or machine can cause is one
of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from planner.foundation.frozen import frozen


@frozen
class Problem:
    """One fault of an input: where it is, what is wrong, and what would be legal instead."""

    where: str
    fault: str
    legal: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.fault}"
        if self.legal:
            text += f" Legal here: {self.legal}."
        if self.fix:
            text += f" Fix: {self.fix}."
        return text


class PlannerError(Exception):
    """A fault that the user can act on. `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(PlannerError):
    """Bad input. Lists all problems at once."""

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise ValueError("an InputError names at least one problem")
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def at(cls, where: str | Path, fault: str, *, legal: str = "", fix: str = "") -> Self:
        """Return the error of a single problem."""
        return cls(Problem(where=str(where), fault=fault, legal=legal, fix=fix))


class InfeasibleError(PlannerError):
    """No plan satisfies the rules and limits."""

    exit_code = 3


class CheckError(PlannerError):
    """A check that was asked for did not hold."""

    exit_code = 4


def require_package(module: str, extra: str, use: str) -> None:
    """Raise InputError where `use`, such as a flag, needs a package that is not installed."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise InputError.at(
            use,
            f"needs the package {module}, which is not installed.",
            fix=f"pip install 'shardwise[{extra}]'",
        )
