"""The server of `plan web`: the page at /, and what it shows as files."""

from __future__ import annotations

import secrets
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.foundation.errors import InputError, PlannerError, Problem
from planner.report.web.asked import Asked, at_first, check_model, read_query
from planner.report.web.guard import POLICY, App, guarded
from planner.report.web.latest import Latest, SupersededError
from planner.report.web.page import WebPage, render_web
from planner.sizing.comparison import Comparison
from planner.sizing.option import Option

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

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
