"""YAML, which other tools read and write: safely, by PyYAML.

Arguments in a shell script or in YAML, as a mapping of flags: nothing of a script is run.

Pieces of shell scripts that exports share: who this node is, and quoting.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.foundation.decode import read_text
from planner.foundation.errors import InputError, Problem
from planner.strategy.plan import Plan

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


_ASSIGNED = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)\+?=(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?[-=]([^{}]*))?\}|(\w+))")
YAML_SUFFIXES = (".yaml", ".yml")
SEPARATORS = ("(", ")", "&&", "||", ";", "|", "&")
"""Words that end an argument's values; a line's end is one of them."""
MOST_ROUNDS = 8
"""Variables within variables that are put in; scripts have one or two."""


def read_arguments(path: Path) -> dict[str, Any]:
    """Flags by name, with the value behind each (True where there is none). Raises InputError."""
    if path.suffix.lower() in YAML_SUFFIXES:
        return _from_yaml(load_yaml_object(path))
    try:
        text = read_text(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(Problem(where=str(path), fault=f"is not text: {error}.")) from None
    found = _from_script(text)
    if not found:
        raise InputError(
            Problem(
                where=str(path),
                fault="has no argument that begins with --.",
                legal="a shell script with the arguments of pretrain_gpt.py, or YAML of them",
            )
        )
    return found


def _from_yaml(document: dict[str, Any]) -> dict[str, Any]:
    """Arguments at any depth, by their flag or by its name with underscores."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        if name in ("ENV_VARS", "BEFORE_SCRIPT", "AFTER_SCRIPT"):
            continue
        if isinstance(value, dict):
            found |= _from_yaml({str(key): item for key, item in value.items()})
        elif value is not None and value is not False:
            flag = name if name.startswith("--") else "--" + name.replace("_", "-")
            found[flag] = " ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _from_script(text: str) -> dict[str, Any]:
    words = _words(re.sub(r"\\\r?\n", " ", text))
    values = _assignments(words)
    flags: dict[str, Any] = {}
    current = None
    for word in [piece for each in words for piece in _substituted(each, values)]:
        name, equals, value = word.partition("=")
        if word.startswith("--") and len(word) > 2:
            current = name
            flags[current] = value if equals else True
        elif word in SEPARATORS or word.startswith("$"):  # the end of a line, or an array put in here
            current = None
        elif current is not None:
            flags[current] = word if flags[current] is True else f"{flags[current]} {word}"
    return flags


def _words(text: str) -> list[str]:
    """Words of a script, lines apart; a line that shlex cannot read is left out."""
    words: list[str] = []
    for line in text.splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="();&|")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            words += [*lexer, ";"]
        except ValueError:
            continue
    return words


def _assignments(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        match = _ASSIGNED.match(word)
        if match is not None and not word.startswith("-"):
            found[match[1]] = match[2]
    return found


def _substituted(word: str, values: dict[str, str]) -> list[str]:
    """A word with the script's own variables put in, as the words that this makes."""
    if _ASSIGNED.match(word) and not word.startswith("-"):
        inner = _ASSIGNED.match(word)
        assert inner is not None
        word = inner[2] if "--" in inner[2] else ";"
    before = word
    for _ in range(MOST_ROUNDS):
        after = _VARIABLE.sub(lambda match: _value(match, values), word)
        if after == word or len(after) > 100_000:
            break
        word = after
    if word == before and not word.startswith("--"):
        return [word]
    try:
        return shlex.split(word) if word != before or " --" in word else [word]
    except ValueError:
        return [word]


def _value(match: re.Match[str], values: dict[str, str]) -> str:
    """What a variable stands for: what the script gives it, else the default; `A=${A:-2}` is its default."""
    name, default = match[1] or match[3], match[2] or ""
    own = values.get(name, default)
    again = _VARIABLE.fullmatch(own)
    return again[2] or "" if again is not None and name in (again[1], again[3]) else own


PORT = 29500
"""torchrun's own default of --master-port."""


def head(title: str) -> str:
    return f"#!/bin/bash\n{title}set -euo pipefail\n"


def node_variables(plan: Plan) -> str:
    """Nodes, this node's place among them, and where all meet, as the launcher or the user sets them.

    PET_* are what Kubeflow's trainer sets, NODE_RANK and MASTER_* what the other exports do.
    """
    nodes = sum(group.nodes for group in plan.cluster.groups)
    lines = [
        f"NNODES={nodes}",
        f"GPUS_PER_NODE={plan.cluster.devices_per_node}",
        'NODE_RANK="${NODE_RANK:-${PET_NODE_RANK:-0}}"',
        'MASTER_ADDR="${MASTER_ADDR:-${PET_MASTER_ADDR:-127.0.0.1}}"',
        f'MASTER_PORT="${{MASTER_PORT:-${{PET_MASTER_PORT:-{PORT}}}}}"',
    ]
    if nodes > 1:
        lines.insert(
            0, "# On several nodes: run this on each, with NODE_RANK=0..N-1 and MASTER_ADDR of node 0."
        )
    return "\n".join(lines) + "\n"


def torchrun() -> str:
    """torchrun with this node's variables; its arguments follow."""
    return (
        'torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "$NODE_RANK" \\\n'
        '  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"'
    )


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Each flag with its value as shell words; True is the flag alone."""
    return [name if value is True else f"{name} {shlex.quote(str(value))}" for name, value in flags.items()]


def array(name: str, flags: Mapping[str, Any]) -> str:
    """Flags as a bash array, a line each."""
    lines = "".join(f"  {words}\n" for words in flag_words(flags))
    return f"{name}=(\n{lines})\n"
