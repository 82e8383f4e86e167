"""What a profile is added to, and what is kept when it is interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from planner.foundation.errors import InputError, Problem

if TYPE_CHECKING:
    from planner.profile.merge import Platform
    from planner.profile.profile import Profile
    from runtime.profiler.scheduler import Header, Record

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of a process that a signal ended, as a shell gives them."""


class Terminated(BaseException):
    """SIGTERM came. Not an Exception: nothing but the command may catch it."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within it, SIGTERM raises Terminated, so that files are closed and children ended."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class ProfileSession:
    """The profile that is there already and the record of what is measured now.

    Within `with`, whatever ends it keeps the record; `write` needs it no more.
    """

    def __init__(self, output: Path, earlier: Profile | None, record: Record) -> None:
        self.output, self.earlier, self.record = output, earlier, record

    def __enter__(self) -> ProfileSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.record.close()

    def write(self, taken: Profile) -> Profile:
        """Writes the profile, with what was there before; returns what it wrote.

        The record of one that had no time for the rest is kept: the same command goes on with that.
        """
        from planner.foundation.decode import to_json, write_atomic
        from planner.profile.merge import merge

        if not self.record.kept:
            fault = "was over before anything was measured, and a profile of nothing is not written."
            raise InputError(Problem(where="--time-limit", fault=fault, fix="allow more time"))
        merged = taken if self.earlier is None else merge(self.earlier, taken, self.record.measured())
        write_atomic(self.output, to_json(merged))
        if self.record.whole:
            self.record.remove()
        else:
            click.echo(f"time was up: {self._kept_text()}", err=True)
        return merged

    def interrupted(self, ending: BaseException) -> int:
        """Says what is kept; the exit code."""
        click.echo(f"interrupted: {self._kept_text()}", err=True)
        return TERMINATED if isinstance(ending, Terminated) else INTERRUPTED

    def _kept_text(self) -> str:
        kept, path = self.record.kept, self.record.path
        if not kept:
            return "nothing was measured yet"
        return f"{kept} cases are kept in {path}: the same command goes on from there"


def begin_session(output: Path, header: Header, *, replace: bool) -> ProfileSession:
    """Opens what a profile is added to. Raises InputError where that is of another device or software."""
    from runtime.profiler.scheduler import open_record

    earlier = None if replace else _earlier_profile(output, header.stack)
    partial = output.with_name(f"{output.name}.partial")
    return ProfileSession(output, earlier, open_record(partial, header, replace=replace))


def _earlier_profile(output: Path, platform: Platform) -> Profile | None:
    """The profile that is at `output` already, to which the new samples are added; None where there is none.

    Raises InputError for one of another platform: its times would be taken for those of this one.
    """
    from planner.profile.merge import platform_of
    from planner.profile.profile import load_profile

    if not output.exists():
        return None
    try:
        earlier = load_profile(output)
    except InputError as error:
        first = error.problems[0]
        inside = first.where.removeprefix(f"{output}").lstrip(": ")
        fault = f"exists, and is no profile to add to: {f'{inside} ' * bool(inside)}{first.fault}"
        raise InputError(Problem(where=f"-o {output}", fault=fault, fix=_FIX)) from None
    differences = platform_of(earlier).differences(platform)
    if differences:
        fault = f"is of another device or software: {'; '.join(differences)}."
        raise InputError(Problem(where=f"-o {output}", fault=fault, fix=_FIX))
    return earlier


_FIX = "name another file by -o, or overwrite it by --replace"
