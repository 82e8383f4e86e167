"""The catalog: models, devices, networks, instances and measured profiles by name.

Data lives in the package `profiles`. Names are compared without regard to case, dashes and underscores; an
unknown one is answered with the nearest. A model may also be a config.json, its folder, or a TOML file; a
device may also be a TOML file.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import profiles
from planner.foundation.decode import load_toml_object, read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import normalized, unknown_name
from planner.hardware.device_file import DeviceFile, load_device_file
from planner.hardware.instance import Instance, find_instance, load_instances
from planner.hardware.network import Network, NetworkFile, load_networks, parse_network

if TYPE_CHECKING:
    from planner.model.spec import ModelSpec


@frozen
class ModelEntry:
    """A model of the catalog: the config of the same name is beside the index.

    The figures are those of the model that the config describes, recorded so that a listing reads one file.
    """

    title: str
    model_type: str
    layers: int
    hidden: int
    vocab: int
    max_positions: int
    params_total: int
    params_active: int
    sources: tuple[str, ...]
    aliases: tuple[str, ...] = ()


def data_folder() -> Path:
    """The folder of the package `profiles`, which is plain files wherever it is installed."""
    return Path(str(profiles.__file__)).parent


@functools.cache
def model_index() -> dict[str, ModelEntry]:
    """Name and entry of every model. The file is ours and a test decodes it strictly: no need to here."""
    tables = load_toml_object(data_folder() / "models" / "index.toml")
    return {name: _entry(table) for name, table in tables.items()}


def _entry(table: Mapping[str, Any]) -> ModelEntry:
    lists = {key: tuple(table[key]) for key in ("sources", "aliases") if key in table}
    return ModelEntry(**{**table, **lists})


def catalog_model(text: str) -> str | None:
    """The name in the catalog of the model that `text` names, by that or another name of it."""
    return _find(text, {name: entry.aliases for name, entry in model_index().items()})


def model_sources(name: str) -> tuple[str, ...] | None:
    """The sources of a model by its very name in the catalog, read from its part of the index alone; None
    where that has no such name."""
    text, head = read_text(data_folder() / "models" / "index.toml").decode(), f'\n["{name}"]\n'
    start = text.find(head) + len(head)
    if start < len(head) or not name.isprintable() or '"' in name:
        return None
    end = text.find("\n[", start)
    return tuple(tomllib.loads(text[start:] if end < 0 else text[start:end])["sources"])


def load_model(text: str, where: str = "--model", arch: str | None = None) -> ModelSpec:
    """The model that `text` names: a catalog name, a config.json or its folder, a TOML file, or a file of
    `plan trace`.

    `arch` reads a file as the architecture of that name, whatever its model_type says.
    """
    from planner.model.huggingface import (  # `plan list devices` needs no models
        read_config_file,
        read_model_toml,
    )

    sources = model_sources(text)
    name = catalog_model(text) if sources is None else text
    if name is not None:
        file = data_folder() / "models" / f"{name}.json"
        return read_config_file(file, name=name, sources=sources or model_index()[name].sources, arch=arch)
    from planner.model.traced_model import read_traced_model

    path = Path(text)
    if path.suffix == ".toml":
        return read_model_toml(path, arch)
    if path.suffix == ".json" and path.name != "config.json" and (traced := read_traced_model(path)):
        return traced
    if path.suffix == ".json" or "/" in text or _exists(path, where):
        return read_config_file(path, arch=arch)
    raise unknown_name(
        where,
        "model",
        text,
        model_index(),
        fix="see `plan list models`, or give a path to a config.json or TOML file",
    )


def device_names() -> list[str]:
    """Names of all devices, sorted."""
    return list(_device_names())


@functools.cache
def _device_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (data_folder() / "devices").glob("*.toml")))


def load_device(text: str, where: str = "--cluster") -> DeviceFile:
    """The device that `text` names: a catalog name, one of its aliases, or a TOML file."""
    if text.endswith(".toml"):
        return load_device_file(Path(text))
    known = device_names()
    name = _find(text, dict.fromkeys(known, ()))
    if name is None:
        aliases = _device_aliases(known)
        name = _find(text, aliases)
        if name is None:
            raise unknown_name(
                where, "device", text, [*known, *(alias for own in aliases.values() for alias in own)]
            )
    return _shipped_device(name)


def architecture_of(device: str) -> str:
    """The architecture of a device by its catalog name; "" where the catalog has none of that name."""
    return _shipped_device(device).architecture if device in device_names() else ""


@functools.cache
def _shipped_device(name: str) -> DeviceFile:
    return load_device_file(data_folder() / "devices" / f"{name}.toml")


def device_reported_as(reported: str) -> DeviceFile | None:
    """The device whose driver calls it `reported`, or None where the catalog has none."""
    names = {
        name: tuple(table.get("reported_names", ())) for name, table in _device_tables(device_names()).items()
    }
    name = _find(reported, names)
    return None if name is None else load_device(name)


def _device_tables(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    folder = data_folder() / "devices"
    return {name: tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8")) for name in names}


def _device_aliases(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(table.get("aliases", ())) for name, table in _device_tables(names).items()}


@functools.cache
def networks() -> NetworkFile:
    """The kinds of network and their common names."""
    return load_networks(data_folder() / "clusters" / "networks.toml")


def load_network(text: str, where: str = "--cluster") -> Network:
    """The network that `text` names."""
    return parse_network(text, networks(), where)


def instances() -> tuple[Instance, ...]:
    """Every instance of the catalog."""
    return load_instances(data_folder() / "instances.csv")


def load_instance(text: str, where: str = "--cluster") -> Instance:
    """The instance that `text` names, with or without its provider."""
    return find_instance(text, instances(), where)


def profile_files() -> list[Path]:
    """The measured profiles that are shipped, sorted by name."""
    return sorted((data_folder() / "measured").glob("*.json"))


def _find(text: str, names: dict[str, tuple[str, ...]]) -> str | None:
    """The name that is `text`, or has it among its aliases."""
    wanted = normalized(text)
    for name, aliases in names.items():
        if wanted in (normalized(name), *map(normalized, aliases)):
            return name
    return None


def _exists(path: Path, where: str) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, a null character
        raise InputError(
            Problem(where=where, fault=f"'{str(path)[:60]}' is neither a name nor a path.")
        ) from None
