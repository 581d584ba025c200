"""The clients: they send each operation once, and write down what they know of its outcome.

`ok`: done, with the list as it was then. `fail`: surely not done. `unknown`: nobody told them; it may happen yet.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

import shardlead
from shardlead.errors import AnswerBroken, OutcomeUnknown, Unserved
from shardlead.virtual import Machine, VirtualLoop

ANSWER_TIMEOUT_S = 20.0
NOT_DONE = frozenset({400, 404, 421, 503})


@dataclass(slots=True)
class Operation:
    """One operation on one key, as its client lived it. Times are true ones."""

    number: int
    client: str
    key: str
    word: str  # what is appended; "" for a read
    began_ns: int
    ended_ns: int = -1  # -1: not yet, or its client never knew
    outcome: str = "unknown"
    status: int = 0
    seen: tuple[str, ...] | None = None
    is_cached: bool = False  # read from a leader's memory, which no fence protects
    is_background: bool = False  # a leader's own, which no client asked for

    def __str__(self) -> str:
        what = f"append {self.word}" if self.word else "read"
        return f"{self.client} {what} {self.key}: {self.outcome} {self.status}"


@dataclass
class Client:
    """One after the other, over one connection to one router at a time."""

    loop: VirtualLoop
    name: str
    rng: random.Random
    routers: Callable[[], list[tuple[str, int]]]
    keys: tuple[str, ...]
    history: list[Operation]
    tell: Callable[[str], object] = lambda _: None
    pause_s: float = 0.36
    has_idempotency_keys: bool = False
    is_over: bool = False
    machine: Machine | None = None  # where it runs; None: with all the others
    _reader: asyncio.StreamReader | None = None
    _writer: asyncio.StreamWriter | None = None
    done: list[Operation] = field(default_factory=list)

    async def run(self) -> None:
        while not self.is_over:
            await asyncio.sleep(self.rng.expovariate(1.0 / self.pause_s))
            await self.act(self.rng.choice(self.keys), is_read=self.rng.random() < 0.35)
        self._drop()

    async def act(self, key: str, *, is_read: bool) -> Operation:
        """One operation; never raises for what the world does."""
        number = len(self.history)
        operation = Operation(number, self.name, key, "" if is_read else f"w{number}", self.loop.true_ns())
        operation.is_cached = is_read and self.rng.random() < 0.5
        self.history.append(operation)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                status, body = await self._exchange(operation)
        except _NotSentError:
            operation.outcome = "fail"
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            self._drop()
        else:
            operation.status = status
            if status == 200:
                operation.outcome = "ok"
                operation.seen = tuple(orjson.loads(body)["list"])
            elif status in NOT_DONE:
                operation.outcome = "fail"
        if operation.outcome != "unknown":
            operation.ended_ns = self.loop.true_ns()
        self.done.append(operation)
        self.tell(str(operation))
        return operation

    async def _exchange(self, operation: Operation) -> tuple[int, bytes]:
        if self._writer is None or self._writer.is_closing() or self.rng.random() < 0.02:
            await self._connect()
        reader, writer = self._reader, self._writer
        assert reader is not None
        assert writer is not None
        query = "?cached" if operation.is_cached else ""
        method = "POST" if operation.word else "GET"
        head = f"{method} /lists/{operation.key}{query} HTTP/1.1\r\nHost: service\r\n"
        if operation.word:
            head += f"Content-Length: {len(operation.word)}\r\n"
            if self.has_idempotency_keys:
                head += f"Idempotency-Key: {operation.word}\r\n"
        writer.write(f"{head}\r\n{operation.word}".encode())
        status_line = await reader.readuntil(b"\r\n")
        status = int(status_line.split(b" ")[1])
        length, is_last = 0, False
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
            if name.lower() == b"connection" and b"close" in value:
                is_last = True
        body = await reader.readexactly(length)
        if is_last:
            self._drop()
        return status, body

    async def _connect(self) -> None:
        self._drop()
        routers = self.routers()
        if not routers:
            raise _NotSentError
        try:
            async with asyncio.timeout(2.0):
                self._reader, self._writer = await asyncio.open_connection(*self.rng.choice(routers))
        except (OSError, TimeoutError):
            raise _NotSentError from None

    def leave(self) -> None:
        """Close the connection, if there is one."""
        self._drop()

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@dataclass
class SmartClient(Client):
    """The same by the smart client, straight to the leaders. `ask` is None while it has no picture of the cluster."""

    ask: Callable[[], shardlead.Client | None] = lambda: None

    async def _exchange(self, operation: Operation) -> tuple[int, bytes]:
        client = self.ask()
        if client is None:
            raise _NotSentError
        word = operation.word
        try:
            async with client.request(
                "POST" if word else "GET",
                f"/lists/{operation.key}",
                key=operation.key,
                data=word.encode() if word else None,
                params={"cached": ""} if operation.is_cached else None,
                headers={"Idempotency-Key": word} if word and self.has_idempotency_keys else None,
            ) as answer:
                return answer.status, await answer.read()
        except Unserved:
            raise _NotSentError from None
        except (OutcomeUnknown, AnswerBroken) as exc:
            raise EOFError from exc


class _NotSentError(Exception):
    """Nothing has left this client."""
