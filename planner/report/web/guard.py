"""The guard before the page: only GET, only for this machine's own address, and headers that forbid the rest.

A page elsewhere can make a browser call 127.0.0.1, and can have its own name resolve to it (DNS rebinding):
then the Host header is that name, and the Origin header is not ours. Both are refused, so is what the browser
itself marks as asked for by another site. Nothing is ever allowed to other origins (no CORS).
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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
