"""`plan web` on a free port with answers from samples, for tests that talk to it."""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from planner.foundation.decode import to_json
from planner.foundation.errors import InputError, Problem
from planner.foundation.units import parse_duration
from planner.report.web.app import Answers, SupersededError, build_app, listen, server
from planner.report.web.requests import Asked
from planner.sizing.comparison import Comparison
from tests import comparison_samples as samples


@dataclasses.dataclass
class Sampled:
    """Answers from samples: the deadline moves the goal, and every search takes `slow_s`."""

    slow_s: float = 0.0
    compared: list[str] = dataclasses.field(default_factory=list)
    given_up: list[str] = dataclasses.field(default_factory=list)

    def compare(self, asked: Asked, stopped: Callable[[], bool]) -> Comparison:
        self.compared.append(asked["deadline"])
        if asked["budget"] == "broken":
            raise RuntimeError("secret of the server")
        if asked["deadline"] == "soon":
            raise InputError(
                Problem(where="--deadline", fault="'soon' is <b>no time</b>.", fix="such as 30d")
            )
        ends = time.monotonic() + self.slow_s
        while time.monotonic() < ends:
            if stopped():
                self.given_up.append(asked["deadline"])
                raise SupersededError
            time.sleep(0.01)
        goal = dataclasses.replace(
            samples.GOAL, deadline_s=parse_duration(asked["deadline"]), budget_usd=None
        )
        counts = (64, 128) if asked["device"] == "" else (16, 64, 128, 256)
        return dataclasses.replace(samples.comparison(counts=counts, goal=goal), model=asked["model"])

    def answers(self) -> Answers:
        return Answers(
            compare=self.compare,
            plan=lambda asked, option: json.dumps({"cluster": option.cluster, "model": asked["model"]}),
            csv=lambda found: "cluster\n" + "".join(f"{o.cluster}\n" for o in found.options),
            json=to_json,
            models=("llama-3-8b", "llama-3-70b"),
            choices=lambda: {"Devices": ["h100-sxm-80gb"]},
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str


@dataclasses.dataclass(frozen=True)
class Served:
    port: int
    sampled: Sampled

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """One request, with headers as given (`_` for `-`); `Host` is the server's unless it is given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in named)
        for name, value in named.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, text)


@contextmanager
def serving(sampled: Sampled | None = None) -> Iterator[Served]:
    """The server in a thread for as long as the block lasts."""
    sampled = sampled or Sampled()
    listening = listen(0)
    port = listening.getsockname()[1]
    running = server(build_app(sampled.answers(), port))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield Served(port, sampled)
    finally:
        running.should_exit = True
        thread.join()
        listening.close()
