"""What the page asks for: the fields of its form as typed, and the command line that means the same.

The guard before the page: only GET, only for this machine's own address, and headers that forbid the rest.

A page elsewhere can make a browser call 127.0.0.1, and can have its own name resolve to it (DNS rebinding):
then the Host header is that name, and the Origin header is not ours. Both are refused, so is what the browser
itself marks as asked for by another site. Nothing is ever allowed to other origins (no CORS).
"""

from __future__ import annotations

import difflib
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

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


LONGEST_QUERY = 6000
"""Bytes of a query: all fields at their longest are refused with words, more than this without."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"cache-control", b"no-store"),
)
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Without a script-src, which a page adds with its nonce."""


def own_hosts(port: int) -> frozenset[str]:
    """What a Host header may be, in lower case."""
    names = ("127.0.0.1", "localhost")
    return frozenset([f"{name}:{port}" for name in names] + (list(names) if port == 80 else []))


def guarded(app: App, port: int) -> App:
    """The app behind the guard."""
    hosts = own_hosts(port)

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = refused(scope, hosts)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name for name, _ in given}
                own = [*HEADERS, (b"content-security-policy", POLICY.encode())]
                message["headers"] = given + [(name, value) for name, value in own if name not in names]
            await send(message)

        if refusal is None:
            try:
                await app(scope, receive, send_with_headers)
            except Exception as error:  # what we did not foresee: the framework has answered 500
                words = " ".join(str(error).split())[:300] or "no message"
                print(f"internal error: {type(error).__name__}: {words}", file=sys.stderr)
            return
        status, text = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        if status == 405:
            headers.append((b"allow", b"GET, HEAD"))
        await send_with_headers({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    return guard


def refused(scope: Scope, hosts: frozenset[str]) -> tuple[int, str] | None:
    """The status and the words of a refusal; None for what may pass."""
    headers: dict[bytes, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.lower(), []).append(value.decode("latin-1").lower())
    if scope["method"] not in ("GET", "HEAD"):
        return 405, "Only GET: this server changes nothing.\n"
    host = headers.get(b"host", [])
    if len(host) != 1 or host[0] not in hosts:
        return 403, "Refused: the Host header is not this server's address.\n"
    origins = headers.get(b"origin", [])
    if any(origin not in {f"http://{own}" for own in hosts} for origin in origins):
        return 403, "Refused: the Origin header is not this server's.\n"
    site = headers.get(b"sec-fetch-site", ["none"])
    opened = headers.get(b"sec-fetch-mode", [""]) == ["navigate"] and scope["path"] == "/"
    if site[0] not in ("same-origin", "none") and not opened:
        return 403, "Refused: another site asked for it.\n"
    if len(scope["query_string"]) > LONGEST_QUERY:
        return 414, f"Refused: the query is longer than {LONGEST_QUERY} bytes.\n"
    return None
