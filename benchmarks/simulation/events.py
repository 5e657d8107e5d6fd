"""A clock of events, and the links and servers that transfers and requests wait for."""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

Call = Callable[..., None]


class Clock:
    """Calls functions at their times, in order; calls with equal times run in the order in which they were
    requested."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._number = itertools.count()

    def after(self, seconds: float, call: Call, *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._number), call, args))

    def run(self, done: Callable[[], bool] = lambda: False) -> None:
        """Run until no call is left, or until `done` returns True."""
        while self._queue and not done():
            self.now, _, call, args = heapq.heappop(self._queue)
            self.events += 1
            call(*args)


class Link:
    """A link of `rate` bytes per second, shared equally by all transfers; each has at most `limit` bytes per second.

    At any time all transfers have the same speed, so one number, `_moved`, tracks all of them: the bytes that each has
    moved. A transfer ends when `_moved` has grown by its size since its start.
    """

    def __init__(self, clock: Clock, rate: float, limit: float = math.inf) -> None:
        self.clock, self.rate, self.limit = clock, rate, limit
        self.bytes = 0.0  # of the transfers that have ended
        self._moved = self._since = 0.0
        self._active: list[tuple[float, int, float, Call, tuple[Any, ...]]] = []
        self._number = itertools.count()
        self._version = 0  # counts changes of the transfers: a planned end of an older version is void

    def send(self, size: float, call: Call, *args: Any) -> None:
        """Start a transfer; `call` is called at its end."""
        self._advance()
        heapq.heappush(self._active, (self._moved + size, next(self._number), size, call, args))
        self._plan_end()

    def drop_all(self) -> None:
        """End every transfer without calling its function, because the node is gone."""
        self._active.clear()
        self._version += 1

    @property
    def speed(self) -> float:
        """Bytes per second of each transfer now."""
        return min(self.limit, self.rate / len(self._active)) if self._active else 0.0

    def _advance(self) -> None:
        self._moved += self.speed * (self.clock.now - self._since) if self._active else 0.0
        self._since = self.clock.now

    def _plan_end(self) -> None:
        self._version += 1
        if self._active:
            left = max(0.0, self._active[0][0] - self._moved)
            self.clock.after(left / self.speed, self._end, self._version)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        self._moved, _, size, call, args = heapq.heappop(self._active)
        self.bytes += size
        self._plan_end()
        call(*args)


class Server:
    """Serves requests in the order of their arrival, `rate` per second."""

    def __init__(self, clock: Clock, rate: float) -> None:
        self.clock, self.rate = clock, rate
        self.served = 0.0
        self._free = 0.0

    def serve(self, requests: float) -> float:
        """Accept requests; returns the seconds until the last of them is served."""
        self._free = max(self.clock.now, self._free) + requests / self.rate
        self.served += requests
        return self._free - self.clock.now
