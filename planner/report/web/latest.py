"""One search at a time, beside the server; the newest request wins, and answers are remembered."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

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
