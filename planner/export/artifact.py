"""Export: the files of an exported plan, and writing them whole or not at all."""

from __future__ import annotations

from pathlib import Path

from planner.foundation.decode import write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen

MARK = "README.txt"
"""A folder that holds this file and only names of an export is one of ours, and may be written again."""


@frozen
class ExportFile:
    """One file of an export: its name in the folder and its text. Scripts may be run."""

    name: str
    text: str

    @property
    def script(self) -> bool:
        return self.name.endswith((".sh", ".sbatch"))


@frozen
class Export:
    """What a plan is for another program: files, how they are started, and what they leave to it.

    `decides` is what of the plan the engine decides by itself, `yours` what the plan does not say and the
    user fills in.
    """

    target: str
    release: str
    files: tuple[ExportFile, ...]
    start: str
    decides: tuple[str, ...] = ()
    yours: tuple[str, ...] = ()


def write_export(export: Export, files: tuple[ExportFile, ...], folder: Path) -> None:
    """Writes the files into a new or empty folder, or over an earlier export. Raises InputError otherwise."""
    _check_folder(folder, {file.name for file in files})
    for file in sorted(
        files, key=lambda each: each.name == MARK
    ):  # the mark last: it says that all are there
        path = folder / file.name
        write_atomic(path, file.text)
        if file.script:
            path.chmod(0o755)


def _check_folder(folder: Path, names: set[str]) -> None:
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            fault = "is a file, and an export is a folder of several."
            raise InputError(Problem(where=f"-o {folder}", fault=fault, fix="name a new folder"))
        there = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(Problem(where=f"-o {folder}", fault=f"cannot be read: {error.strerror}.")) from None
    others = [name for name in there if name not in names]
    if there and (others or MARK not in there):
        shown = ", ".join((others or there)[:5])
        raise InputError(
            Problem(
                where=f"-o {folder}",
                fault=f"is a folder that holds other things ({shown}), which an export never writes over.",
                legal="a new or empty folder, or that of an earlier export of the same kind",
                fix="name another folder",
            )
        )
