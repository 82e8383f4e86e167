"""A Hugging Face folder as the beginning of a run: its model must be the plan's, and its files are kept."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from planner.foundation.decode import encode
from planner.foundation.errors import InputError, Problem
from planner.model.huggingface import read_config_file
from planner.model.spec import ModelSpec
from runtime.model.huggingface.read import WeightFolder

KEPT = "huggingface"
"""Where a run keeps config.json and the tokenizer's files of the folder that it began with."""

CONFIG = "config.json"
KEPT_FILES = (CONFIG, "generation_config.json", "special_tokens_map.json", "added_tokens.json")
KEPT_PATTERNS = ("tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def check_folder(folder: Path, spec: ModelSpec) -> None:
    """Raises InputError where the folder's weights or its config.json are not of this model."""
    if (folder / CONFIG).exists():
        check_config(folder / CONFIG, spec)
    WeightFolder(folder, spec)


def check_config(file: Path, spec: ModelSpec) -> None:
    """Raises InputError with everything in which a config.json describes another model than the plan's."""
    own, theirs = _plain(spec), _plain(read_config_file(file))
    problems = [
        Problem(
            where=f"{file}: {name}",
            fault=f"is {theirs.get(name, 'absent')!r}, the plan's model has {own.get(name, 'absent')!r}.",
            fix="solve with --model and this folder",
        )
        for name in dict.fromkeys((*own, *theirs))
        if own.get(name, "absent") != theirs.get(name, "absent")
    ]
    if problems:
        raise InputError(*problems)


def _plain(spec: ModelSpec) -> dict[str, Any]:
    """Every fact of a model under its path. What training alone reads is left out: a plan may change it."""
    facts = encode(dataclasses.replace(spec, name="", sources=(), initializer_range=0.0, max_positions=1))
    found = dict(_flat(facts, ""))
    return {name: value for name, value in found.items() if ".routing." not in name}


def _flat(value: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}".strip("."))]
    if isinstance(value, (list, tuple)):
        return [pair for place, item in enumerate(value) for pair in _flat(item, f"{prefix}.{place}")]
    return [(prefix, value)]


def keep_files(folder: Path, run_dir: Path) -> None:
    """Copies config.json and the tokenizer's files into the run, for its weights to be exported with."""
    kept = run_dir / KEPT
    kept.mkdir(exist_ok=True)
    for path in side_files(folder):
        shutil.copyfile(path, kept / path.name)


def side_files(folder: Path) -> list[Path]:
    """The files of a folder beside its weights that belong to the model."""
    named = [folder / name for name in KEPT_FILES]
    found = [path for pattern in KEPT_PATTERNS for path in sorted(folder.glob(pattern))]
    return [path for path in (*named, *found) if path.is_file()]
