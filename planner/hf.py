"""Reads a Hugging Face config.json into a ModelSpec, by the tables of `planner.hf_keys`.

A config is data from strangers: it is parsed as plain JSON, never imports transformers and never runs code.
Every fault is reported at its key, all at once. Keys that would change what a step costs and are not
modelled are refused; keys that are not part of the description are named in the model's sources.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.codec import load_json_object, load_toml_object
from planner.errors import InputError, Problem
from planner.hf_keys import CHANGES_COST, COMMON_INERT, FAMILIES, REQUIRED, Family, Key
from planner.model import ModelSpec
from planner.naming import nearest

MAX_CONFIG_BYTES = 4 * 1024 * 1024
"""Published configs are a few KiB; larger files are refused before they are read."""

TYPO_LIKENESS = 0.85
"""An unread key that is this like an absent one is taken for its misspelling."""

MAX_COMPARED_KEYS = 200
"""Misspellings are looked for among this many keys: comparing takes time, and configs have some fifty."""

_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_config_file(path: Path, name: str | None = None, sources: tuple[str, ...] = ()) -> ModelSpec:
    """The model in a config.json, or in the folder that holds one. Raises InputError with every fault."""
    file = path / "config.json" if path.is_dir() else path
    config = load_json_object(file, MAX_CONFIG_BYTES)
    own_name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return read_config(config, source=str(file), name=name or own_name, sources=sources or (file.name,))


def read_model_toml(path: Path) -> ModelSpec:
    """The model in a TOML file: the keys of config.json, `name` and `sources`, and no others."""
    table = load_toml_object(path, MAX_CONFIG_BYTES)
    problems = []
    name, sources = table.pop("name", path.stem), table.pop("sources", [path.name])
    if not isinstance(name, str):
        problems.append(Problem(where=f"{path}: name", fault="is not a text."))
    if not isinstance(sources, list) or not all(isinstance(item, str) for item in sources):
        problems.append(Problem(where=f"{path}: sources", fault="is not a list of texts."))
    family = _family(table, str(path))
    known = [key for entry in family.keys.values() for key in entry.names] + list(family.noted)
    tops = {key.split(".")[0] for key in known} | COMMON_INERT
    for key in table:
        if key not in tops:
            near = difflib.get_close_matches(key, tops, n=1)
            fix = f"did you mean '{near[0]}'" if near else ""
            problems.append(Problem(where=f"{path}: {key[:60]}", fault="unknown key.", fix=fix))
    if problems:
        raise InputError(*problems)
    return read_config(table, source=str(path), name=name, sources=tuple(sources))


def read_config(
    config: Mapping[str, Any], *, source: str, name: str, sources: tuple[str, ...] = ()
) -> ModelSpec:
    """The model that a parsed config describes. Raises InputError with every fault and its path."""
    family = _family(config, source)
    problems = _refusals(config, source) + _shapes(config, family, source)
    values: dict[str, Any] = {}
    for field, key in family.keys.items():
        values[field] = _read(config, key, source, problems)
    problems += _misspelt(config, family, source)
    if not problems:
        problems = [
            Problem(where=f"{source}: {where}", fault=fault, legal=legal)
            for where, fault, legal in family.faults(values)
        ]
    if problems:
        raise InputError(*problems)
    notes = (*sources, *_notes(config, family))
    return family.build(values, name[:100], str(config["model_type"]), notes)


def _family(config: Mapping[str, Any], source: str) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    legal = ", ".join(FAMILIES)
    if model_type is None:
        raise InputError(Problem(where=f"{source}: model_type", fault="is missing.", legal=legal))
    near = nearest(str(model_type)[:60], FAMILIES)
    raise InputError(
        Problem(
            where=f"{source}: model_type",
            fault=f"{_show(model_type)} is no architecture that is known.",
            legal=legal,
            fix=f"did you mean '{near[0]}'" if near else "",
        )
    )


def _refusals(config: Mapping[str, Any], source: str) -> list[Problem]:
    """Problems of keys that point at code, or that change the cost in a way that is not modelled."""
    problems = []
    for key in ("auto_map", "trust_remote_code"):
        if config.get(key):
            problems.append(
                Problem(
                    where=f"{source}: {key}",
                    fault="says that code defines this model; code from a config is never run.",
                    fix="remove the key if the architecture is exactly that of its model_type",
                )
            )
    for key, reason in CHANGES_COST.items():
        if config.get(key):
            problems.append(Problem(where=f"{source}: {key}", fault=f"is set: {reason}."))
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        problems.append(Problem(where=f"{source}: layer_types", fault="names other than full attention."))
    return problems


def _shapes(config: Mapping[str, Any], family: Family, source: str) -> list[Problem]:
    """Problems of keys that should hold a table of others, such as rope_parameters."""
    names = [name for key in family.keys.values() for name in key.names]
    parents = dict.fromkeys(name.split(".")[0] for name in (*names, *family.noted) if "." in name)
    return [
        Problem(where=f"{source}: {parent}", fault=f"is {_show(config[parent])}.", legal="a table")
        for parent in parents
        if not isinstance(config.get(parent, {}), (dict, type(None)))
    ]


def _lookup(config: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, or None where it or an object on the way is absent or null."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _read(config: Mapping[str, Any], key: Key, source: str, problems: list[Problem]) -> Any:
    """The value of `key`, its default where absent. Adds to `problems` what is wrong."""
    found = {name: value for name in key.names if (value := _lookup(config, name)) is not None}
    if not found:
        if key.default is REQUIRED:
            problems.append(_missing(config, key, source))
            return None
        return key.choices[str(key.default)] if key.choices else key.default
    (name, value), *others = found.items()
    for other, second in others:
        if second != value:
            fault = f"is {_show(second)}, but {name} is {_show(value)}, and both mean the same."
            problems.append(Problem(where=f"{source}: {other}", fault=fault))
    return _checked(key, name, value, source, problems)


def _checked(key: Key, name: str, value: Any, source: str, problems: list[Problem]) -> Any:
    where = f"{source}: {name}"
    if key.kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    found: object = type(value)
    if found is not key.kind:  # exactly: true is not 1, and 4096.0 is not 4096
        problems.append(Problem(where=where, fault=f"is {_show(value)}.", legal=_KIND_NAMES[key.kind]))
        return None
    if key.choices is not None:
        if value not in key.choices:
            near = nearest(value[:60], key.choices)
            legal = ", ".join(key.choices)
            fix = f"did you mean '{near[0]}'" if near else ""
            problems.append(Problem(where=where, fault=f"is {_show(value)}.", legal=legal, fix=fix))
            return None
        return key.choices[value]
    if key.kind in (int, float) and not key.low <= value <= key.high:  # nan is in no range
        legal = f"{key.low:g} to {key.high:g}" if key.kind is float else f"{key.low:.0f} to {key.high:.0f}"
        problems.append(Problem(where=where, fault=f"is {_show(value)}.", legal=legal))
        return None
    return value


def _missing(config: Mapping[str, Any], key: Key, source: str) -> Problem:
    names = [name[:100] for name in list(config)[:MAX_COMPARED_KEYS]]
    near = difflib.get_close_matches(key.names[0], names, n=1)
    fix = f"is '{near[0][:60]}' a misspelling" if near else ""
    return Problem(where=f"{source}: {key.names[0]}", fault="is missing.", fix=fix)


def _misspelt(config: Mapping[str, Any], family: Family, source: str) -> list[Problem]:
    """Problems of keys that are not read but look like an optional key that is absent."""
    names = [name for key in family.keys.values() for name in key.names]
    absent = [
        key.names[0]
        for key in family.keys.values()
        if key.default is not REQUIRED and all(_lookup(config, name) is None for name in key.names)
    ]
    problems = []
    for unread in _unread(config, names, family)[:MAX_COMPARED_KEYS]:
        near = difflib.get_close_matches(unread[:100], absent, n=1, cutoff=TYPO_LIKENESS)
        if near:
            where = f"{source}: {unread[:60]}"
            problems.append(Problem(where=where, fault="unknown key.", fix=f"did you mean '{near[0]}'"))
    return problems


def _unread(config: Mapping[str, Any], names: list[str], family: Family) -> list[str]:
    tops = {name.split(".")[0] for name in (*names, *family.noted)}
    known = tops | COMMON_INERT | CHANGES_COST.keys() | {"auto_map", "trust_remote_code", "layer_types"}
    return [str(key) for key in config if key not in known]


def _notes(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """What the config says that the ModelSpec does not: it does not change the cost, and is not hidden."""
    notes = []
    for key, harmless in family.noted.items():
        value = _lookup(config, key)
        if value is not None and value != harmless:
            notes.append(f"not described: {key} = {_show(value)}")
    names = [name for key in family.keys.values() for name in key.names]
    unread = _unread(config, names, family)
    if unread:
        listed = ", ".join(name[:40] for name in unread[:10])
        notes.append(
            f"keys not read: {listed}" + (f" and {len(unread) - 10} more" if len(unread) > 10 else "")
        )
    return tuple(notes)


def _show(value: Any) -> str:
    """A value for an error message, short whatever it is."""
    if isinstance(value, (dict, list)):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "an enormous number"
    return text if len(text) <= 60 else text[:57] + "..."
