"""What the page asks for: the fields of its form as typed, and the command line that means the same."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.catalog import catalog_model

LONGEST = 200
"""Characters of one field: the longest names have 60."""
MOST = 40
"""Values of one field, such as devices."""

FIELDS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "model": ("Model", "--model", "llama-3-8b"),
        "method": ("Method", "--method", "pretrain"),
        "seq": ("Tokens of a sequence", "--seq", "8192"),
        "batch": ("Batch", "--batch", "4Mtok"),
        "tokens": ("Tokens of the run", "--tokens", ""),
        "deadline": ("Deadline", "--deadline", "30d"),
        "budget": ("Budget", "--budget", ""),
        "objective": ("Best is", "--objective", "cost"),
        "device": ("Devices", "--device", "h100-sxm-80gb"),
        "instance": ("Instances or clusters", "--instance", ""),
        "provider": ("Providers", "--provider", "aws, azure, gcp, on-premises"),
        "pricing": ("Pricing", "--pricing", ""),
        "nodes": ("Numbers of nodes", "--nodes", ""),
    }
)
"""Name of a field: its label, the option of `plan compare` that it stands for, and what it holds at first."""

LISTS = frozenset({"device", "instance", "provider", "pricing", "nodes"})
"""Fields that hold several values, separated by commas."""


@frozen
class Asked:
    """The fields as typed, without spaces around; equal ones have equal answers."""

    values: tuple[tuple[str, str], ...]

    def __getitem__(self, name: str) -> str:
        return dict(self.values)[name]

    def list_of(self, name: str) -> tuple[str, ...]:
        """The values of a field that holds several; of clusters such as 64*p5.48xlarge, the instance."""
        return tuple(part for part in (each.strip() for each in self[name].split(",")) if part)


def at_first() -> Asked:
    """What the page asks before anybody has typed."""
    return Asked(values=tuple((name, default) for name, (_, _, default) in FIELDS.items()))


def read_query(pairs: Iterable[tuple[str, str]]) -> Asked:
    """The fields of a query; one that is not there is as at first. Raises InputError with every fault.

    A field that is given several times holds all its values.
    """
    given: dict[str, list[str]] = defaultdict(list)
    for name, value in pairs:
        given[name].append(value.strip())
    problems = [problem for name, values in given.items() for problem in _faults(name, values)]
    if problems:
        raise InputError(*problems)
    return Asked(
        values=tuple(
            (name, ", ".join(given[name]) if name in given else default)
            for name, (_, _, default) in FIELDS.items()
        )
    )


def _faults(name: str, values: Sequence[str]) -> list[Problem]:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        fix = f"did you mean '{near[0]}'" if near else ""
        return [Problem(where=f"the query: {name[:40]}", fault="is no field of this page.", fix=fix)]
    label = FIELDS[name][0]
    text = ", ".join(values)
    if name in LISTS and text.count(",") >= MOST:
        legal = f"at most {MOST}"
        return [Problem(where=label, fault=f"has {text.count(',') + 1} values.", legal=legal)]
    most = LONGEST * (MOST if name in LISTS else 1)
    if len(text) > most or (name not in LISTS and len(values) > 1):
        fault = "is given several times." if len(values) > 1 else f"has {len(text)} characters."
        return [Problem(where=label, fault=fault, legal=f"one value of at most {LONGEST} characters")]
    if any(not character.isprintable() for character in text):
        return [Problem(where=label, fault="has characters that cannot be printed.")]
    return []


def arguments(asked: Asked) -> list[str]:
    """The options of `plan compare` that ask the same. Raises InputError.

    `64*p5.48xlarge` among the instances is the instance, and 64 one of the numbers of nodes.
    """
    words: list[str] = []
    nodes = list(asked.list_of("nodes"))
    for name, (_, flag, _) in FIELDS.items():
        if name not in LISTS:
            words += [f"{flag}={asked[name]}"] if asked[name] else []
        elif name != "nodes":
            for value in asked.list_of(name):
                count, star, rest = value.partition("*")
                if name == "instance" and star:
                    nodes.append(count.strip())
                words.append(f"{flag}={rest.strip() if name == 'instance' and star else value}")
    return [*words, *(f"--nodes={count}" for count in dict.fromkeys(nodes))]


def check_model(asked: Asked, known: Sequence[str]) -> None:
    """Raises InputError for a model that is neither in the catalog nor one the server was started with.

    A page must not make the server read files by name.
    """
    if asked["model"] in known or catalog_model(asked["model"]) is not None:
        return
    near = difflib.get_close_matches(asked["model"], known, n=3)
    raise InputError(
        Problem(
            where="Model",
            fault=f"'{asked['model'][:60]}' is not in the catalog.",
            legal=", ".join(near),
            fix="a model of one's own is named when the server is started: plan web --model FILE",
        )
    )
