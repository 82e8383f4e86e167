"""The socket and the server of `plan web`: this machine alone."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from planner.foundation.errors import InputError, Problem
from planner.report.web.guard import App

if TYPE_CHECKING:
    import uvicorn

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
