"""The server of `plan web`: the page at /, and what it shows as files.

One search at a time, beside the server; the newest request wins, and answers are remembered.

The interactive page: the form, what is wrong with it, and the comparison below.

The socket and the server of `plan web`: this machine alone.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from planner.foundation.errors import InputError, PlannerError, Problem
from planner.foundation.frozen import frozen
from planner.report.charts import COLOURS, MARK_COLOURS
from planner.report.comparison_page import build_options_page
from planner.report.page import template
from planner.report.web.requests import FIELDS, POLICY, App, Asked, at_first, check_model, guarded, read_query
from planner.sizing.comparison import Comparison, Option

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

REMEMBERED = 24


class SupersededError(Exception):
    """A newer request came before this one was answered."""


class Latest(Generic[K, V]):
    """Computes values in a thread, one at a time. A request that a newer one has overtaken is given up.

    `compute(key, stopped)` asks `stopped()` now and then and raises SupersededError where it says so.
    """

    def __init__(self, compute: Callable[[K, Callable[[], bool]], V], remembered: int = REMEMBERED) -> None:
        self._compute = compute
        self._remembered = remembered
        self._known: OrderedDict[K, V] = OrderedDict()
        self._turn = asyncio.Lock()
        self._newest: K | None = None

    def known(self, key: K) -> V | None:
        """What is remembered."""
        return self._known.get(key)

    async def get(self, key: K) -> V:
        """The value, remembered or computed. Raises SupersededError, or what `compute` raises."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        self._newest = key
        async with self._turn:
            if key in self._known:
                return self._known[key]
            if self._newest != key:
                raise SupersededError
            value = await asyncio.to_thread(self._compute, key, lambda: self._newest != key)
            self._known[key] = value
            while len(self._known) > self._remembered:
                self._known.popitem(last=False)
            return value


@frozen
class WebPage:
    """The form around the comparison: what was typed, what is wrong, what there is to choose from."""

    values: Mapping[str, str]
    problems: tuple[Problem, ...]
    query: str
    nonce: str
    models: tuple[str, ...]
    choices: Mapping[str, Sequence[str]]


class _NoAnswer:
    """What the base of the page needs where there is no comparison."""

    model = "Which hardware?"
    colours = (*COLOURS, *MARK_COLOURS)


def render_web(web: WebPage, comparison: Comparison | None) -> str:
    """The page as HTML."""
    page = None if comparison is None else build_options_page(comparison)
    return template("web.html.j2").render(
        page=page or _NoAnswer, answered=page is not None, web=web, labels=FIELDS
    )


SUPERSEDED = 409
"""Status of a request that a newer one has overtaken; the page ignores it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the server can answer. Each raises PlannerError for what the user can mend.

    `compare(asked, stopped)` raises SupersededError where `stopped()` says so. `plan(asked, option)` is the
    text of plan.json of an option's whole plan; `csv` and `json` are a comparison as text.
    """

    compare: Callable[[Asked, Callable[[], bool]], Comparison]
    plan: Callable[[Asked, Option], str]
    csv: Callable[[Comparison], str]
    json: Callable[[Comparison], str]
    models: Sequence[str]
    choices: Callable[[], dict[str, Sequence[str]]]


def build_app(answers: Answers, port: int) -> App:
    """The app behind its guard; `port` is where it is served."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    server = _Server(answers)
    routes = [
        Route("/", server.page, methods=["GET"]),
        Route("/comparison.csv", server.csv, methods=["GET"]),
        Route("/comparison.json", server.json, methods=["GET"]),
        Route("/plan.json", server.plan, methods=["GET"]),
    ]
    return guarded(Starlette(routes=routes), port)


class _Server:
    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.comparisons: Latest[Asked, Comparison] = Latest(answers.compare)
        self.plans: Latest[tuple[Asked, str], str] = Latest(self._plan)

    def _plan(self, key: tuple[Asked, str], stopped: Callable[[], bool]) -> str:
        asked, cluster = key
        found = self.comparisons.known(asked)
        option = next((o for o in found.options if o.cluster == cluster), None) if found else None
        if option is None:
            raise SupersededError
        return self.answers.plan(asked, option)

    def _asked(self, request: Request, but: Sequence[str] = ()) -> Asked:
        pairs = [pair for pair in request.query_params.multi_items() if pair[0] not in but]
        asked = read_query(pairs)
        check_model(asked, self.answers.models)
        return asked

    async def page(self, request: Request) -> Response:
        """The page with its answer, or with what is wrong about what was asked."""
        from starlette.responses import HTMLResponse

        status, found = 200, None
        problems: tuple[Problem, ...] = ()
        asked = _as_typed(request)
        try:
            asked = self._asked(request)
            found = await self.comparisons.get(asked)
        except SupersededError:
            return _text("a newer request came first\n", SUPERSEDED)
        except InputError as error:
            status, problems = 400, error.problems
        except PlannerError as error:
            problems = (Problem(where="plan compare", fault=str(error)),)
        nonce = secrets.token_urlsafe(16)
        query = urllib.parse.urlencode(asked.values)
        page = WebPage(
            values=dict(asked.values), problems=problems, query=query, nonce=nonce,
            models=tuple(self.answers.models), choices=self.answers.choices(),
        )  # fmt: skip
        policy = f"{POLICY}; script-src 'nonce-{nonce}'"
        return HTMLResponse(
            render_web(page, found), status_code=status, headers={"content-security-policy": policy}
        )

    async def csv(self, request: Request) -> Response:
        return await self._file(request, self.answers.csv, "comparison.csv", "text/csv")

    async def json(self, request: Request) -> Response:
        return await self._file(request, self.answers.json, "comparison.json", "application/json")

    async def _file(
        self, request: Request, text: Callable[[Comparison], str], name: str, kind: str
    ) -> Response:
        try:
            found = await self.comparisons.get(self._asked(request))
        except SupersededError:
            return _text("a newer request came first\n", SUPERSEDED)
        except PlannerError as error:
            return _text(f"{error}\n", 400)
        return _download(text(found), name, kind)

    async def plan(self, request: Request) -> Response:
        """plan.json of the best plan on one option's nodes."""
        clusters = request.query_params.getlist("cluster")
        try:
            asked = self._asked(request, but=("cluster",))
            if len(clusters) != 1 or not 0 < len(clusters[0]) <= 200:
                raise InputError(Problem(where="cluster", fault="is missing, too long or given twice."))
            found = await self.comparisons.get(asked)
            if not any(option.cluster == clusters[0] for option in found.options):
                raise InputError(Problem(where="cluster", fault="is none of this comparison's options."))
            text = await self.plans.get((asked, clusters[0]))
        except SupersededError:
            return _text("a newer request came first\n", SUPERSEDED)
        except PlannerError as error:
            return _text(f"{error}\n", 400)
        return _download(text, "plan.json", "application/json")


def _as_typed(request: Request) -> Asked:
    """What was typed, as far as it can be shown again."""
    given = dict(request.query_params.items())
    return Asked(values=tuple((name, given.get(name, value)[:200]) for name, value in at_first().values))


def _download(text: str, name: str, kind: str) -> Response:
    from starlette.responses import Response

    return Response(text, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


def _text(text: str, status: int) -> Response:
    from starlette.responses import PlainTextResponse

    return PlainTextResponse(text, status_code=status)


ADDRESS = "127.0.0.1"
MOST_AT_ONCE = 64
"""Connections and requests that are held at once; more are answered 503."""


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1. Raises InputError for a port that cannot be had."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((ADDRESS, port))
        found.listen(128)
    except OSError as error:
        found.close()
        fault = f"{port} on 127.0.0.1 cannot be had: {error.strerror}."
        raise InputError(Problem(where="--port", fault=fault, fix="another port, or --port 0")) from None
    return found


def server(app: App) -> uvicorn.Server:
    """A server of the app, to be run on a socket of `listen`."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="error", access_log=False, lifespan="off", ws="none", server_header=False,
        date_header=False, limit_concurrency=MOST_AT_ONCE, h11_max_incomplete_event_size=16_384,
    )  # fmt: skip
    return uvicorn.Server(config)
