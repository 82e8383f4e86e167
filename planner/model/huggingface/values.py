"""Values of a config by key: looked up, checked for type and range, and shown in errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.foundation.errors import Problem
from planner.foundation.suggest import nearest
from planner.model.huggingface.keys import MAX_LAYERS, Key, Kind

_TYPES: Mapping[Kind, type] = {
    Kind.WHOLE: int,
    Kind.REAL: float,
    Kind.FLAG: bool,
    Kind.TEXT: str,
    Kind.WHOLES: list,
    Kind.TEXTS: list,
    Kind.TYPES: list,
}


def show(value: Any) -> str:
    """A value for an error message, short whatever it is."""
    if isinstance(value, (dict, list)):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "an enormous number"
    return text if len(text) <= 60 else text[:57] + "..."


def lookup(config: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, or None where it or an object on the way is absent or null."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def holds(config: Mapping[str, Any], name: str) -> bool:
    """Whether a dotted name is in a config, be it null."""
    *path, last = name.split(".")
    parent = lookup(config, ".".join(path)) if path else config
    return isinstance(parent, Mapping) and last in parent


@dataclass(frozen=True, slots=True)
class Values:
    """Reads keys of one config; collects what is wrong in `problems`, each at its path below `where`."""

    config: Mapping[str, Any]
    where: str
    problems: list[Problem] = field(default_factory=list)

    def at(self, name: str) -> str:
        return f"{self.where}{name}"

    def fault(self, name: str, fault: str, legal: str = "", fix: str = "") -> None:
        self.problems.append(Problem(where=self.at(name), fault=fault, legal=legal, fix=fix))

    def read(self, key: Key, names: tuple[str, ...], default: Any) -> Any:
        """The value under any of `names`, which must agree; the default where all are absent."""
        found = {name: value for name in names if (value := lookup(self.config, name)) is not None}
        if not found:
            if key.nullable and any(holds(self.config, name) for name in names):
                return None
            return key.choices[default] if key.choices and isinstance(default, str) else default
        (name, value), *others = found.items()
        for other, second in others:
            if second != value:
                self.fault(other, f"is {show(second)}, but {name} is {show(value)}, and both mean the same.")
        return self._checked(key, name, value)

    def _checked(self, key: Key, name: str, value: Any) -> Any:
        if key.kind is Kind.REAL and type(value) is int and abs(value) < 2**53:
            value = float(value)
        found: object = type(value)
        if found is not _TYPES[key.kind]:  # exactly: true is not 1, and 4096.0 is not 4096
            self.fault(name, f"is {show(value)}.", key.kind.value)
            return None
        if key.kind in (Kind.WHOLES, Kind.TEXTS):
            return self._list(key, name, value)
        if key.kind is Kind.TYPES:
            return self._repeated(name, value)
        return self._one(key, name, value)

    def _one(self, key: Key, name: str, value: Any) -> Any:
        """A number in its range, or a text among its choices."""
        if key.choices is not None:
            if value in key.choices:
                return key.choices[value]
            near = nearest(value[:60], key.choices)
            fix = f"did you mean '{near[0]}'" if near else ""
            self.fault(name, f"is {show(value)}.", ", ".join(key.choices), fix)
            return None
        if key.kind in (Kind.WHOLE, Kind.WHOLES, Kind.REAL) and not key.low <= value <= key.high:  # nor nan
            real = key.kind is Kind.REAL
            legal = f"{key.low:g} to {key.high:g}" if real else f"{key.low:.0f} to {key.high:.0f}"
            self.fault(name, f"is {show(value)}.", legal)
            return None
        return value

    def _list(self, key: Key, name: str, values: list[Any]) -> tuple[Any, ...] | None:
        """Every item checked as one value; the first that is wrong is reported."""
        if not self._short(name, values):
            return None
        wanted: object = int if key.kind is Kind.WHOLES else str
        checked = []
        for index, value in enumerate(values):
            found: object = type(value)
            if found is not wanted:
                kind = Kind.WHOLE if key.kind is Kind.WHOLES else Kind.TEXT
                self.fault(f"{name}[{index}]", f"is {show(value)}.", kind.value)
                return None
            before = len(self.problems)
            checked.append(self._one(key, f"{name}[{index}]", value))
            if len(self.problems) > before:
                return None
        return tuple(checked)

    def _short(self, name: str, values: list[Any]) -> bool:
        if len(values) > MAX_LAYERS:
            self.fault(name, f"is a list of {len(values)}.", f"at most {MAX_LAYERS} items")
        return len(values) <= MAX_LAYERS

    def _repeated(self, name: str, values: list[Any]) -> tuple[str, ...] | None:
        """[[types], repeats] one after the other, as gpt_neo writes them."""
        expanded: list[str] = []
        if not self._short(name, values):
            return None
        for index, item in enumerate(values):
            match item:
                case [[*kinds], int(times)] if (
                    set(map(str, kinds)) <= {"global", "local"} and 0 < times * len(kinds) <= MAX_LAYERS
                ):
                    expanded += kinds * times
                case _:
                    self.fault(f"{name}[{index}]", f"is {show(item)}.", '[["global", "local"], repeats]')
                    return None
            if len(expanded) > MAX_LAYERS:
                self.fault(name, f"describes {len(expanded)} layers.", f"at most {MAX_LAYERS}")
                return None
        return tuple(expanded)
