"""Imported: what an engine's configuration says, beside what was said for it by flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.export import accelerate, deepspeed, megatron, torchtitan
from planner.export.megatron import MODEL_SIZES
from planner.export.settings import Recipe, Settings
from planner.export.text_files import load_yaml_object, read_arguments
from planner.foundation.decode import load_json_object, load_toml_object
from planner.foundation.errors import Problem
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.model.spec import ModelSpec
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.strategy import Offload, Zero


@frozen
class Imported:
    """The settings of a file, its engine (None: Accelerate's own), and what of it is not read."""

    settings: Settings
    engine: Engine | None
    not_read: tuple[str, ...]


def read_config(path: Path, source: str, model: ModelSpec, devices: int, problems: list[Problem]) -> Imported:
    """What a file of an engine says; what no plan has a word for is added to `problems`.

    Raises InputError where it is not of the engine's form at all.
    """
    name = str(path)
    if source == "deepspeed":
        found = deepspeed.flattened(load_json_object(path))
        settings, lost = deepspeed.settings_from(found, name, problems)
        return Imported(settings=settings, engine=Engine.DEEPSPEED, not_read=lost)
    if source == "torchtitan":
        found = deepspeed.flattened(load_toml_object(path))
        settings, lost = torchtitan.settings_from(found, model.layers, devices, name, problems)
        return Imported(settings=settings, engine=Engine.TORCHTITAN, not_read=lost)
    if source == "accelerate":
        return _accelerate(path, problems)
    flags = read_arguments(path)
    _agree(flags, model, name, problems)
    settings, lost = megatron.settings_from(flags, model.layers, name, problems)
    return Imported(settings=settings, engine=Engine.MEGATRON, not_read=lost)


def _agree(flags: Mapping[str, Any], model: ModelSpec, source: str, problems: list[Problem]) -> None:
    """The file's model must be the one that is named."""
    for flag, field in MODEL_SIZES.items():
        own = getattr(model, field)
        if flag in flags and str(flags[flag]) != str(own):
            problems.append(
                Problem(
                    where=f"{source}: {flag}",
                    fault=f"is {flags[flag]}, and the model {model.name} has {own}.",
                    fix="name the file's model with --model",
                )
            )


def _accelerate(path: Path, problems: list[Problem]) -> Imported:
    """Accelerate's YAML, or where it names DeepSpeed, that configuration."""
    found = deepspeed.flattened(load_yaml_object(path))
    if found.get("distributed_type") != "DEEPSPEED":
        settings, lost = accelerate.settings_from(found, str(path), problems)
        return Imported(settings=settings, engine=None, not_read=lost)
    inline = {theirs: found[name] for name, theirs in accelerate.INLINE.items() if name in found}
    beside = found.get("deepspeed_config.deepspeed_config_file")
    if isinstance(beside, str):
        inline |= deepspeed.flattened(load_json_object(path.parent / beside))
    precision = found.get("mixed_precision")
    if isinstance(precision, str) and precision in ("bf16", "fp16"):
        inline.setdefault(f"{precision}.enabled", True)
    settings, lost = deepspeed.settings_from(inline, str(path), problems)
    known = (*accelerate.INERT, *accelerate.INLINE, "distributed_type", "mixed_precision")
    others = [name for name, value in found.items() if value not in (None, False, "none", "no")]
    outer = tuple(name for name in others if name not in known)
    return Imported(settings=settings, engine=Engine.DEEPSPEED, not_read=(*lost, *outer))


PINNED = {
    "tp": "tp",
    "pp": "pp",
    "chunks": "chunks",
    "schedule": "schedule",
    "cp": "cp",
    "cp_exchange": "cp_exchange",
    "ep": "ep",
    "etp": "etp",
    "zero": "zero",
    "micro_batch": "micro_batch",
    "sequence_parallel": "sequence_parallel",
    "recompute": "recompute",
}
"""Keys of --fix, and the field of Settings that each completes."""


def completed(settings: Settings, pins: FixedChoices, problems: list[Problem]) -> Settings:
    """Settings with what --fix says beside them; a key that the file says otherwise becomes a problem."""
    changes: dict[str, Any] = {}
    for pin, field in PINNED.items():
        asked = getattr(pins, pin)
        if asked is None:
            continue
        asked = Zero(asked) if pin == "zero" else Recipe(str(asked)) if pin == "recompute" else asked
        said, default = getattr(settings, field), Settings.__dataclass_fields__[field].default
        if said not in (default, asked):
            fault = f"is {asked}, and the file says {said}."
            problems.append(Problem(where=f"--fix {pin}", fault=fault, fix="leave one of them out"))
        changes[field] = asked
    if pins.offload is not None:
        changes["offload_optimizer"] = pins.offload is Offload.OPTIMIZER
        changes["offload_activations"] = -1 if pins.offload is Offload.ACTIVATIONS else 0
    return dataclasses.replace(settings, **changes)


def asked_twice(settings: Settings, given: Mapping[str, Any]) -> list[Problem]:
    """Flags that say otherwise than the file."""
    return [
        Problem(
            where=f"--{field}",
            fault=f"is {value}, and the file says {getattr(settings, field)}.",
            fix="leave it out",
        )
        for field, value in given.items()
        if value is not None
        and getattr(settings, field) is not None
        and str(value) != str(getattr(settings, field))
    ]


def missing(settings: Settings, given: Mapping[str, Any], source: str) -> list[Problem]:
    """What neither the file nor a flag says, of what every estimate needs."""
    needed = {"seq": "--seq", "batch": "--batch"}
    found = [
        Problem(where=flag, fault=f"is needed: {source} does not say it.", fix=f"add {flag} N")
        for field, flag in needed.items()
        if given.get(field) is None and getattr(settings, field) is None
    ]
    if settings.micro_batch is None and settings.num_micro_batches is None:
        fault = f"is needed: {source} says neither micro-batch nor accumulation."
        found.append(Problem(where="--fix micro_batch", fault=fault, fix="add --fix micro_batch=N"))
    return found
