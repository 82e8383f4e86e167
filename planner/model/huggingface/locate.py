"""Finds in a config the part that describes the language model, and the family that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import nearest
from planner.model.huggingface.family import Family
from planner.model.huggingface.inert import CODE_KEYS
from planner.model.huggingface.registry import FAMILIES, TEXT_PARTS, WRAPPERS
from planner.model.huggingface.values import show


@frozen
class TextPart:
    """The text model of a config: its table, its family, and the path that errors begin with.

    `nested` tables are read with the class's defaults where keys are absent, as wrappers are published;
    `wrapped` says that a wrapper holds it, nested or beside its own keys.
    """

    config: Mapping[str, Any]
    family: Family
    model_type: str
    where: str
    nested: bool = False
    wrapped: bool = False
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def locate(config: Mapping[str, Any], source: str, arch: str | None) -> TextPart:
    """The text model of `config`. Raises InputError where its architecture is not known."""
    own = config.get("model_type")
    inner = None if isinstance(own, str) and own in FAMILIES else _inner(config)
    wrapper = isinstance(own, str) and own in WRAPPERS
    notes: tuple[str, ...] = (
        () if arch is None else (f"read as {arch}, as --arch says; its own model_type is {show(own)}",)
    )
    if arch is not None and any(config.get(key) for key in CODE_KEYS):
        notes += ("code that the config names was not run",)
    if inner is None:
        model_type = _chosen(arch, WRAPPERS[str(own)] if wrapper else own, f"{source}: ")
        notes += _vision(own) if wrapper else ()
        return _part(config, model_type, f"{source}: ", notes=notes, wrapped=wrapper)
    name, table = inner
    where = f"{source}: {name}."
    text_type = table.get("model_type") or (WRAPPERS[str(own)] if wrapper else None)
    if isinstance(text_type, str):
        text_type = WRAPPERS.get(text_type, text_type)
    model_type = _chosen(arch, text_type, where)
    problems = () if arch else _code(config, source)
    return _part(
        _with_tie(config, table), model_type, where, nested=True, wrapped=True, problems=problems,
        notes=(*notes, *_vision(own), *_quantised(config)),
    )  # fmt: skip


def _part(config: Mapping[str, Any], model_type: str, where: str, **rest: Any) -> TextPart:
    return TextPart(config=config, family=FAMILIES[model_type], model_type=model_type, where=where, **rest)


def _vision(own: object) -> tuple[str, ...]:
    return (f"the text model of {show(own)}; what reads images, video or sound is not counted",)


def _quantised(config: Mapping[str, Any]) -> tuple[str, ...]:
    if not config.get("quantization_config"):
        return ()
    return ("published with quantised weights; training starts from dequantised ones",)


def _inner(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The nested text model of a wrapper, with its key."""
    for name in TEXT_PARTS:
        table = config.get(name)
        if isinstance(table, Mapping):
            return name, table
    return None


def _with_tie(config: Mapping[str, Any], table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The nested table; where it does not say whether embeddings are tied, the wrapper does."""
    tie = "tie_word_embeddings"
    return {**table, tie: config[tie]} if tie in config and tie not in table else table


def _code(config: Mapping[str, Any], source: str) -> tuple[Problem, ...]:
    return tuple(
        Problem(
            where=f"{source}: {key}",
            fault="says that code defines this model; code from a config is never run.",
            fix="if the text model's architecture is known, name it with --arch, or remove the key",
        )
        for key in CODE_KEYS
        if config.get(key)
    )


def _chosen(arch: str | None, model_type: object, where: str) -> str:
    """The family to read by: `arch` if given, else the config's own. Raises InputError if it is unknown."""
    if arch is not None:
        known = WRAPPERS.get(arch, arch)
        if known in FAMILIES:
            return known
        raise _unknown("--arch", arch, "")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    if model_type is None:
        raise InputError(Problem(where=f"{where}model_type", fault="is missing.", legal=_listed([])))
    raise _unknown(f"{where}model_type", model_type, "; or --arch NAME reads it as a known one")


def _unknown(where: str, model_type: object, more: str) -> InputError:
    near = nearest(str(model_type)[:60], [*FAMILIES, *WRAPPERS]) if isinstance(model_type, str) else []
    return InputError(
        Problem(
            where=where,
            fault=f"{show(model_type)} is no architecture that is known.",
            legal=_listed(near),
            fix=(f"did you mean '{near[0]}'" if near else "name the architecture") + more,
        )
    )


def _listed(near: list[str]) -> str:
    """The names that are near, or else the first, and how many there are."""
    return ", ".join(near or list(FAMILIES)[:12]) + f", ... ({len(FAMILIES)} in all)"
