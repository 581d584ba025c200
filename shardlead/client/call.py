"""One request of a client, from its asking to the end of its answer, as `cluster.traffic` sees it.

What it never does: decide, or touch HTTP. It remembers what was decided for it, and wakes who waits for that.
"""

import asyncio
from typing import Any, Final, Protocol

from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from shardlead.client.body import Body
from shardlead.core.routing import Answer, Happened, last_word
from shardlead.core.shardmap import Leader

NEVER_NS: Final = 1 << 62


class Queue(Protocol):
    """Where it waits for its turn to have a connection."""

    def withdraw(self, call: "Call") -> None: ...


# Where a call stands.
DECIDED: Final = 0  # what comes next is in `decision`, or is held back by a gate
WAITING: Final = 1  # for a connection
SENT: Final = 2
ANSWERING: Final = 3
DONE: Final = 4
_NAMES: Final = ("decided", "waiting", "sent", "answering", "done")


class Call:
    """`cluster.traffic.Request`. There is one for each request, so what is seldom set stands in the class."""

    leader: Leader | None = None
    why = Happened.ARRIVED
    repeats = 0
    is_held = False
    held_ns = 0
    hold_until_ns = 0
    state = DECIDED
    decision: Leader | Answer | None = None
    queued_ns = 0  # since when it waits for a place in its pool; 0: it does not
    has_place = False
    is_taken_back = False
    pool: Queue | None = None
    connection: Connection | None = None
    protocol: ResponseHandler | None = None
    stream: StreamReader | None = None  # its answer's body
    broken = ""  # why its answer cannot be made whole
    _waker: asyncio.Future[None] | None = None

    def __init__(
        self,
        number: int,
        method: str,
        shard: int,
        body: Body,
        *,
        has_idempotency_key: bool,
        task: asyncio.Task[Any] | None,
        timeout_ns: int,
        deadline_ns: int,
    ) -> None:
        self.number = number
        self.method = method
        self.shard = shard
        self.body = body
        self.has_idempotency_key = has_idempotency_key
        self.task = task
        self._cancelling = task.cancelling() if task is not None else 0  # before it is anybody's wish to end this
        self.timeout_ns = timeout_ns
        self.deadline_ns = deadline_ns

    def __repr__(self) -> str:
        under = f" under epoch {self.leader.epoch} of {self.leader.worker}" if self.leader is not None else ""
        held = ", held" if self.is_held else ""
        return f"<Call {self.number}: {self.method}, shard {self.shard}, {_NAMES[self.state]}{held}{under}>"

    # --- `cluster.traffic.Request`

    @property
    def is_body_kept(self) -> bool:
        return self.body.is_kept

    @property
    def is_connecting(self) -> bool:
        return self.state == WAITING

    def touch(self) -> None:
        """A hold counts into the time allowed."""

    def detach(self) -> None:
        """Who sent it sees to its connection."""

    def take_back(self) -> bool:
        if self.state != WAITING:
            return False
        self.state = DECIDED
        if self.queued_ns:
            assert self.pool is not None, "it waits there"
            self.pool.withdraw(self)
            self.wake()
        else:
            assert self.task is not None, "it has been sent by somebody"
            self.is_taken_back = True
            self.task.cancel()
        return True

    def send(self, leader: Leader) -> None:
        self.decision = leader
        self.wake()

    def fail(self, answer: Answer) -> None:
        self.decision = last_word(answer, self.method, self.repeats)
        self.wake()

    def cut(self) -> None:
        self.tear("the connection to the shard's leader ended before the answer was whole")

    # --- for whoever carries it

    def was_taken_back(self) -> bool:
        """Whether the present CancelledError was `take_back`'s, and nobody else has cancelled the task besides."""
        if not self.is_taken_back:
            return False
        self.is_taken_back = False
        assert self.task is not None, "as in take_back"
        return self.task.uncancel() <= self._cancelling

    async def woken(self) -> None:
        """Return at the next `wake`, and maybe before: look again."""
        self._waker = asyncio.get_running_loop().create_future()
        try:
            await self._waker
        finally:
            self._waker = None

    def wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def abort(self) -> None:
        """End its connection at once."""
        connection = self.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()

    def tear(self, why: str) -> None:
        """Its answer has begun and cannot be made whole; whoever reads it is told."""
        if not self.broken:
            self.broken = why
            self.abort()
            if self.stream is not None:
                self.stream.set_exception(ConnectionResetError(why))
