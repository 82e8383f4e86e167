"""YAML, which other tools read and write: safely, by PyYAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.foundation.decode import read_text
from planner.foundation.errors import InputError, Problem

MOST_ALIASES = 0
"""Aliases (`*name`) in a file that is read: a few can stand for very large values."""


def yaml_text(document: Any) -> str:
    """A document as YAML, keys in their order, texts of several lines as blocks."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Blocks for texts of several lines."""

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(document, Dumper=Dumper, sort_keys=False, width=110, allow_unicode=True))


def load_yaml_object(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError."""
    import yaml

    try:
        text = read_text(path).decode("utf-8-sig")
        aliases = sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
        if aliases > MOST_ALIASES:
            raise InputError(Problem(where=str(path), fault="uses YAML aliases.", fix="write the values out"))
        value = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        shown = " ".join(str(error).split())[:200]
        raise InputError(Problem(where=str(path), fault=f"is not YAML: {shown}.")) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(Problem(where=str(path), fault=f"holds a {kind}, not a mapping of keys."))
    return {str(key): item for key, item in value.items()}
