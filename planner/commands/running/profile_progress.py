"""How far a profile is: a bar on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

PLAIN_INTERVAL_S = 2.0
"""Off a terminal, a line of progress at most this often."""


class ProfileProgress:
    """Shows samples as they come. No thread: measuring forks this process."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._done, self._left, self._said_s = 0, 0, 0.0
        self._left_s: float | None = None

    def __enter__(self) -> ProfileProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.table import Column

            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what is narrowed where space is short
            self._bar = Progress(
                BarColumn(bar_width=16, table_column=Column(min_width=16)),
                TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True, min_width=7)),
                TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn("{task.fields[left]}{task.fields[text]}", markup=False, table_column=rest),
                console=Console(stderr=True),
                auto_refresh=False,
                expand=True,
            )
            self._task = self._bar.add_task("measuring", total=None, text="", left="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, text: str) -> None:
        """One more sample."""
        self._done += 1
        if self._bar is not None:
            total = self._done + self._left
            self._bar.update(self._task, completed=self._done, total=total, text=text, refresh=True)
        elif time.monotonic() - self._said_s >= PLAIN_INTERVAL_S:
            self._said_s = time.monotonic()
            total = self._done + self._left
            click.echo(f"measuring {self._done}/{total}: {self._left_text()}{text}", err=True)

    def ahead(self, cases: int, left_s: float | None) -> None:
        """So many cases are left at most, and about so many seconds."""
        self._left, self._left_s = cases, left_s
        if self._bar is not None:
            self._bar.update(self._task, left=self._left_text(), refresh=True)

    def say(self, text: str) -> None:
        """A remark."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _left_text(self) -> str:
        """A bound: families that are known well enough end before their cases do."""
        return "" if self._left_s is None else f"at most {self._left_s:.0f} s left, "
