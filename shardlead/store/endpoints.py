"""Which endpoint a call uses next, and for how long it goes on trying.

Law: an endpoint is left when it fails and for no other reason; calls that fail on it together leave it once. A failure
is logged once per trouble, not per try.
"""

import asyncio
import logging
import random
from typing import Final

from shardlead.clock import NS_PER_S, Clock

_log = logging.getLogger("shardlead.store.endpoints")

PAUSE_MIN_S: Final = 0.05  # after each round over all endpoints, doubled each time, jittered
PAUSE_MAX_S: Final = 1.0


def loop_time() -> float:
    """For waking and bounding only; a lease's deadline is the session's business, on another clock."""
    return asyncio.get_running_loop().time()


class Cursor:
    """Which endpoint one channel uses now, by its index."""

    __slots__ = ("_count", "at")

    def __init__(self, count: int, at: int) -> None:
        self._count = count
        self.at = at

    def leave(self, index: int) -> None:
        """Turn to the next endpoint, unless somebody has left this one already."""
        if index == self.at:
            self.at = (index + 1) % self._count


class Budget:
    """The time and the pauses of one call over all its tries."""

    __slots__ = ("_deadline", "_endpoints", "_failures", "_rng")

    def __init__(self, timeout_s: float, endpoints: int, rng: random.Random) -> None:
        self._deadline = loop_time() + timeout_s
        self._endpoints = endpoints
        self._rng = rng
        self._failures = 0

    @property
    def left_s(self) -> float:
        return self._deadline - loop_time()

    async def has_another_try(self) -> bool:
        """Whether time is left after a failure; pauses first where every endpoint has just failed once more."""
        self._failures += 1
        rounds, rest = divmod(self._failures, self._endpoints)
        if rest == 0:
            pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** min(rounds - 1, 10)) * self._rng.uniform(0.5, 1.0)
            if pause_s >= self.left_s:
                return False
            await asyncio.sleep(pause_s)
        return self.left_s > 0


class Health:
    """Remembers which endpoints are in trouble, so that the log tells its beginning and its end."""

    __slots__ = ("_clock", "_since_ns")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_ns: dict[str, int] = {}

    def failed(self, endpoint: str, reason: str) -> None:
        if endpoint not in self._since_ns:
            self._since_ns[endpoint] = self._clock.now_ns()
            _log.warning("endpoint failed", extra={"endpoint": endpoint, "reason": reason})

    def answered(self, endpoint: str) -> None:
        if not self._since_ns:
            return
        since_ns = self._since_ns.pop(endpoint, None)
        if since_ns is not None:
            after_s = round((self._clock.now_ns() - since_ns) / NS_PER_S, 3)
            _log.info("endpoint answers again", extra={"endpoint": endpoint, "after_s": after_s})
