"""Load for the end-to-end tests: requests fall due by the clock, whatever became of the earlier ones.

A client of its own on asyncio streams, because a library's client hides what these tests look for: it sends again by
itself after a lost connection. Here every request is sent once, on a kept-alive connection; whatever is not a proper
answer stands in the ledger as a failure with its reason.

Law: open loop. A slow answer never delays the next request; a waiting request gets a connection of its own.
"""

import asyncio
import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Final, Self

import orjson

from shardlead.clock import NS_PER_S, Clock, SystemClock

MIB: Final = 1_048_576
_BIG_BODY: Final = bytes(MIB)
_HEAD_BYTES_MAX: Final = 65_536


@dataclass(slots=True)
class Entry:
    """One request and what became of it. Times are seconds since the load began."""

    number: int
    method: str
    key: str
    body_bytes: int
    idempotency_key: str
    due_s: float
    sent_s: float = -1.0  # when it was written to a connection
    done_s: float = -1.0
    status: int = 0  # 0: no answer
    error: str = ""  # why there is none, or the problem's type
    worker: str = ""
    shard: int = -1
    epoch: int = -1
    value: int = -1
    detail: str = ""

    @property
    def is_done(self) -> bool:
        return self.done_s >= 0

    @property
    def is_ok(self) -> bool:
        return self.status == 200

    @property
    def is_post(self) -> bool:
        return self.method == "POST"

    @property
    def latency_s(self) -> float:
        """From the moment it fell due, so that a stalled client counts against the server and not for it."""
        return self.done_s - self.due_s

    def __str__(self) -> str:
        what = f"{self.status or 'no answer'} {self.error} {self.detail}".strip()
        return (
            f"#{self.number} {self.method} {self.key} ({self.body_bytes} B) due {self.due_s:.3f} s, "
            f"sent {self.sent_s:.3f} s, done {self.done_s:.3f} s: {what}"
        )


@dataclass(frozen=True, slots=True)
class Mix:
    """What is asked: by default half POST, a few of them with 1 MiB, over 200 keys."""

    rate: float = 300.0
    """Requests per second."""
    keys: int = 200
    post_share: float = 0.5
    big_share: float = 0.02
    """Share of the POSTs that carry 1 MiB; the others carry nothing."""
    idempotent_share: float = 0.0
    """Share of the POSTs with an Idempotency-Key."""
    prefix: str = "key"
    seed: int = 1
    timeout_s: float = 25.0
    """After so long without an answer a request has failed."""
    connections_max: int = 2_000


@dataclass(slots=True)
class Ledger:
    """Every request of a load, in the order in which they fell due."""

    entries: list[Entry] = field(default_factory=list)

    def done(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_done]

    def failures(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_done and not entry.is_ok]

    def between(self, begin_s: float, end_s: float) -> "Ledger":
        """The requests that fell due in that time."""
        return Ledger([entry for entry in self.entries if begin_s <= entry.due_s < end_s])

    def acknowledged(self) -> dict[str, int]:
        """How many increments of each key were acknowledged; requests with one Idempotency-Key count once."""
        seen: set[str] = set()
        counts: dict[str, int] = defaultdict(int)
        for entry in self.entries:
            if not (entry.is_post and entry.is_ok):
                continue
            if entry.idempotency_key:
                if entry.idempotency_key in seen:
                    continue
                seen.add(entry.idempotency_key)
            counts[entry.key] += 1
        return dict(counts)

    def unknown(self) -> dict[str, int]:
        """How many increments of each key may or may not have happened."""
        return dict(Counter(entry.key for entry in self.entries if entry.is_post and not entry.is_ok))

    def lost(self, stored: dict[str, int]) -> list[str]:
        """What the store's counts contradict: an acknowledged increment that is missing, or one that nobody sent."""
        acknowledged, unknown = self.acknowledged(), self.unknown()
        wrong = []
        for key in sorted(acknowledged.keys() | unknown.keys() | stored.keys()):
            least = acknowledged.get(key, 0)
            most = least + unknown.get(key, 0)
            have = stored.get(key, 0)
            if not least <= have <= most:
                wrong.append(f"{key}: {have} stored, {least} acknowledged, {most - least} unknown")
        return wrong

    def split_leaderships(self) -> list[str]:
        """Shards that were answered by two workers under one epoch, and keys that changed their shard."""
        workers: dict[tuple[int, int], set[str]] = defaultdict(set)
        shards: dict[str, set[int]] = defaultdict(set)
        for entry in self.entries:
            if entry.is_ok:
                workers[entry.shard, entry.epoch].add(entry.worker)
                shards[entry.key].add(entry.shard)
        wrong = [f"shard {at[0]} epoch {at[1]}: {sorted(names)}" for at, names in workers.items() if len(names) > 1]
        return wrong + [f"key {key}: shards {sorted(found)}" for key, found in shards.items() if len(found) > 1]

    def values_answered_twice(self) -> list[str]:
        """Two acknowledged increments of one key that answered the same value: an update was lost."""
        seen: Counter[tuple[str, int]] = Counter()
        used: set[str] = set()
        for entry in self.entries:
            if entry.is_post and entry.is_ok and entry.idempotency_key not in used:
                seen[entry.key, entry.value] += 1
                if entry.idempotency_key:
                    used.add(entry.idempotency_key)
        return [f"{key} = {value}, {count} times" for (key, value), count in seen.items() if count > 1]

    def latencies_s(self) -> tuple[float, float, float]:
        """p50, p99 and the longest of the answered requests."""
        values = sorted(entry.latency_s for entry in self.entries if entry.is_ok)
        if not values:
            return (0.0, 0.0, 0.0)
        return values[len(values) // 2], values[int(len(values) * 0.99)], values[-1]

    def summary(self, examples: int = 8) -> str:
        """One line of figures, then the failures by reason with a few of them in full."""
        done, failed = self.done(), self.failures()
        p50, p99, longest = self.latencies_s()
        lines = [
            (
                f"{len(done)} of {len(self.entries)} done, {len(failed)} failed; "
                f"p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, max {longest * 1000:.0f} ms"
            )
        ]
        reasons = Counter(f"{entry.method} {entry.status or 'no answer'} {entry.error}" for entry in failed)
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
        lines += [f"    {entry}" for entry in failed[:examples]]
        return "\n".join(lines)


class Load:
    """Requests to `address` (host:port) at a steady rate, from entering the block until leaving it.

    Leaving waits for the requests under way (bounded by the mix's time-out) and closes every connection.
    """

    def __init__(self, address: str, mix: Mix | None = None, *, clock: Clock | None = None) -> None:
        host, _, port = address.rpartition(":")
        self.mix = mix or Mix()
        self.ledger = Ledger()
        self._host, self._port = host, int(port)
        self._clock: Clock = clock or SystemClock()
        self._random = random.Random(self.mix.seed)
        self._began_ns = 0
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._open = 0
        self._under_way: set[asyncio.Task[None]] = set()
        self._pacer: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._answered = 0

    def now_s(self) -> float:
        """Seconds since the load began: the ledger's time."""
        return (self._clock.now_ns() - self._began_ns) / NS_PER_S

    async def __aenter__(self) -> Self:
        self._began_ns = self._clock.now_ns()
        self._pacer = asyncio.create_task(self._pace())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> Ledger:
        """No new requests; those under way are awaited. May be called twice."""
        if self._pacer is not None:
            self._pacer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pacer
            self._pacer = None
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=self.mix.timeout_s + 5)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=5)
        for _, writer in self._idle:
            writer.close()
        for _, writer in self._idle:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()
        return self.ledger

    async def answered(self, count: int, *, timeout_s: float = 60.0) -> None:
        """Returns when `count` more requests have got a good answer."""
        want = self._answered + count
        async with asyncio.timeout(timeout_s):
            while self._answered < want:
                self._progress.clear()
                await self._progress.wait()

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            due_s = number / self.mix.rate
            ahead_s = due_s - self.now_s()
            if ahead_s > 0:
                await asyncio.sleep(ahead_s)
            entry = self._next(number, due_s)
            self.ledger.entries.append(entry)
            task = loop.create_task(self._ask(entry))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            number += 1
            if number % 50 == 0:
                await asyncio.sleep(0)  # a pacer that is behind must not keep the answers waiting

    def _next(self, number: int, due_s: float) -> Entry:
        mix, rng = self.mix, self._random
        is_post = rng.random() < mix.post_share
        return Entry(
            number=number,
            method="POST" if is_post else "GET",
            key=f"{mix.prefix}-{rng.randrange(mix.keys)}",
            body_bytes=MIB if is_post and rng.random() < mix.big_share else 0,
            idempotency_key=f"{mix.prefix}-{mix.seed}-{number}"
            if is_post and rng.random() < mix.idempotent_share
            else "",
            due_s=due_s,
        )

    async def _ask(self, entry: Entry) -> None:
        try:
            async with asyncio.timeout(self.mix.timeout_s):
                await self._exchange(entry)
        except TimeoutError:
            entry.error = f"no answer within {self.mix.timeout_s} s"
        except (OSError, EOFError, ValueError) as exc:
            entry.status, entry.error = 0, f"{type(exc).__name__}: {exc}"
        entry.done_s = self.now_s()
        self._answered += entry.is_ok
        self._progress.set()

    def _take_idle(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The connection used last; not one that is seen closed: the router closes what has been idle for a minute."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            self._open -= 1
            writer.close()
        return None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._open >= self.mix.connections_max:
            raise OSError("the load has no connection left")
        connection = await asyncio.open_connection(self._host, self._port, limit=_HEAD_BYTES_MAX)
        self._open += 1
        return connection

    async def _exchange(self, entry: Entry) -> None:
        reader, writer = self._take_idle() or await self._connect()
        is_reusable = False
        try:
            entry.sent_s = self.now_s()
            writer.write(_head(entry, f"{self._host}:{self._port}"))
            if entry.body_bytes:
                writer.write(_BIG_BODY[: entry.body_bytes])
            is_reusable = await _answer(reader, entry)
        finally:
            if is_reusable:
                self._idle.append((reader, writer))
            else:
                self._open -= 1
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


def _head(entry: Entry, host: str) -> bytes:
    lines = [f"{entry.method} /counters/{entry.key} HTTP/1.1", f"Host: {host}"]
    if entry.is_post:
        lines.append(f"Content-Length: {entry.body_bytes}")
    if entry.idempotency_key:
        lines.append(f"Idempotency-Key: {entry.idempotency_key}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _answer(reader: asyncio.StreamReader, entry: Entry) -> bool:
    """Reads one answer into `entry`; whether the connection can be used again."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    version, status, _ = (first + "  ").split(" ", 2)
    if version != "HTTP/1.1":
        raise ValueError(f"not an answer: {first!r}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    elif headers.get("transfer-encoding") == "chunked":
        body = await _chunks(reader)
    else:
        raise ValueError(f"an answer without a length: {head!r}")
    entry.status = int(status)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        content = {}
        entry.status, entry.error = 0, f"status {status} without JSON: {body[:80]!r}"
    if entry.status == 200:
        entry.worker, entry.value = str(content.get("worker", "")), int(content.get("value", -1))
        entry.shard, entry.epoch = int(content.get("shard", -1)), int(content.get("epoch", -1))
        if content.get("name") != entry.key:
            entry.status, entry.error = 0, f"the answer is about {content.get('name')!r}"
    else:
        entry.error = entry.error or str(content.get("type", "")).rpartition("/")[2]
        entry.detail = str(content.get("detail", content.get("error", "")))
    return headers.get("connection", "").lower() != "close"


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        body += await reader.readexactly(size)
        await reader.readexactly(2)
        if size == 0:
            return bytes(body)


async def settled(is_true: Callable[[], bool], *, timeout_s: float, every_s: float = 0.02) -> None:
    """Returns when `is_true`; for the few things that nobody announces. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not is_true():  # noqa: ASYNC110 - what is waited for sets no event; it is looked at from outside
            await asyncio.sleep(every_s)


def shares(entries: Iterable[Entry]) -> dict[str, int]:
    """How many good answers each worker gave."""
    return dict(Counter(entry.worker for entry in entries if entry.is_ok))


def gaps_s(entries: Sequence[Entry]) -> dict[int, float]:
    """For each shard, the longest time between two good answers: how long a client saw it without a leader."""
    times: dict[int, list[float]] = defaultdict(list)
    for entry in entries:
        if entry.is_ok:
            times[entry.shard].append(entry.done_s)
    return {
        shard: max((after - before for before, after in pairwise(done)), default=0.0)
        for shard, done in ((shard, sorted(done)) for shard, done in times.items())
    }
