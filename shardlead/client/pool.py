"""A client's connections to one worker: an aiohttp session of its own, and who waits for a place in it.

What it never does: choose a leader. What aiohttp would do by itself and our law forbids is switched off here: no
redirect is followed, no cookie kept, and nothing is sent a second time (aiohttp repeats a PUT whose connection broke).

Law: as the router's pool. Never more than `connections_max`; who finds none waits its turn. Unused connections are
closed long before the worker would. Before a request that must not be sent twice goes out, its connection is looked
at: if the worker's end is already known to be closed, another one is taken, so that what was sent into the void is
never "maybe processed".
"""

import asyncio
import select
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection

from shardlead.client.call import Call, State
from shardlead.config import RouterSettings, split_address
from shardlead.core.contract import SAFE_METHODS
from shardlead.core.shardmap import ShardMap

CLOSE_TIMEOUT_S: Final = 1.0
_GONE_EVENTS: Final = select.POLLIN | select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)

_sending: ContextVar[tuple[Call, "Pool"]] = ContextVar("sending")  # from Pool.send to the request that aiohttp makes


class Stale(Exception):
    """Nothing was sent: the connection was dead already."""


class Overtaken(Exception):
    """Nothing was sent: the leader changed while the connection was awaited."""


class Unsendable(Exception):
    """Nothing was sent: aiohttp cannot write such a head."""


class NotOpened(Exception):
    """Nothing was sent: no connection could be opened."""


class Broken(Exception):
    """It was sent, and the connection ended before an answer began."""


class Pool:
    """The connections to one worker at one address. `is_current` tells whether a call's leader still leads;
    `ended` is called with each call whose answer has left its connection."""

    def __init__(
        self,
        worker: str,
        address: str,
        settings: RouterSettings,
        is_current: Callable[[Call], bool],
        ended: Callable[[Call], None],
    ) -> None:
        self.worker = worker
        self.address = address
        self.waiting: deque[Call] = deque()
        self.busy = 0
        self.is_current = is_current
        self.ended = ended
        self._base = f"http://{address}"
        self._is_address = split_address(address) is not None  # a worker's record may say anything
        self._connections_max = settings.upstream_connections_max
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=settings.upstream_idle_timeout_s, ttl_dns_cache=None
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            request_class=_Request,
            response_class=_Response,
        )

    def __repr__(self) -> str:
        return f"<Pool of {self.worker} at {self.address}: {self.busy} busy, {len(self.waiting)} waiting>"

    @property
    def is_empty(self) -> bool:
        return not (self.busy or self.waiting)

    async def close(self) -> None:
        """End all its connections."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):  # a worker that reads nothing would keep what is unsent
                await self._session.close()

    # --- places

    def enter(self, call: Call) -> bool:
        """Whether the call has a place now; else it waits its turn, `wake` tells, and `has_place`."""
        if self.busy < self._connections_max and not self.waiting:
            self.busy += 1
            call.has_place = True
            return True
        self.waiting.append(call)
        return False

    def withdraw(self, call: Call) -> None:
        call.queued_ns = 0
        self.waiting.remove(call)

    def give_back(self, call: Call) -> None:
        """It does not need its place, if it has one."""
        if call.has_place:
            call.has_place = False
            self._leave()

    def _leave(self) -> None:
        if self.waiting:
            call = self.waiting.popleft()
            call.queued_ns = 0
            call.has_place = True
            call.wake()
        else:
            self.busy -= 1

    # --- one sending

    async def send(self, call: Call, path: str, params: Any, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """Send it; the answer, whose head has come. The place that the call has is given free when its connection is,
        or with what this raises: NotOpened, Overtaken, Unsendable, Broken, CancelledError."""
        body = call.body
        while True:
            token = _sending.set((call, self))
            try:
                if not self._is_address:
                    raise NotOpened(f"not an address: {self.address}")
                return await self._session.request(
                    call.method,
                    self._base + path,
                    params=params,
                    data=body.stream,
                    headers=headers,
                    allow_redirects=False,
                    expect100=body.is_large,
                )
            except Stale:
                continue  # each time there is one less of these
            except Broken:
                if call.is_unsent:
                    call.is_unsent = False
                    raise Overtaken from None
                raise
            except (aiohttp.ClientError, OSError, ValueError) as exc:  # UnicodeError: a host that nobody could know
                if call.has_place:
                    self.give_back(call)
                    raise NotOpened(str(exc)) from exc
                raise Broken(str(exc)) from exc
            except BaseException:
                self.give_back(call)
                raise
            finally:
                _sending.reset(token)

    def released(self, call: Call, connection: Connection) -> None:
        """aiohttp has let the connection go."""
        self._leave()
        if call.connection is connection:
            call.connection = None
            if call.state == State.ANSWERING:
                self.ended(call)


class _Request(aiohttp.ClientRequest):
    """aiohttp's request, which looks at its connection before it uses it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, TypeError) as exc:
            raise Unsendable(str(exc)) from exc
        self._call, self._pool = _sending.get()

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Between the look at the connection and the write there is no await. aiohttp would write a body from a task
        of its own, a turn of the loop later; a short one is written here instead."""
        call, pool = self._call, self._pool
        if not pool.is_current(call):
            raise Overtaken
        transport, protocol = conn.transport, conn.protocol
        if transport is None or protocol is None or transport.is_closing() or protocol.writing_paused:
            raise Stale
        if _must_be_alive(call) and not _is_alive(transport):
            raise Stale
        call.state = State.SENT
        call.has_place = False  # from here on it is the connection's
        call.connection = conn
        call.protocol = protocol
        conn.add_callback(partial(pool.released, call, conn))
        try:
            response = await super().send(conn)
        except (ValueError, TypeError) as exc:
            raise Unsendable(str(exc)) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise Broken(str(exc)) from exc
        if call.body.kept:
            transport.write(call.body.kept)
        return response

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None
    ) -> None:
        """aiohttp's task for a large body: it begins with the head, and the wait for a 100."""
        transport, protocol = conn.transport, conn.protocol
        is_dead = (
            transport is None or transport.is_closing() or (_must_be_alive(self._call) and not _is_alive(transport))
        )
        if is_dead and protocol is not None:
            self._call.is_unsent = True
            protocol.set_exception(aiohttp.ClientConnectionError("dead before anything was written"))
            return
        await super().write_bytes(writer, conn, content_length)


class _Response(aiohttp.ClientResponse):
    """aiohttp's response; a broken one is told in a way that aiohttp does not answer by sending again."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        try:
            return await super().start(connection)
        except (aiohttp.ClientError, OSError) as exc:
            raise Broken(str(exc)) from exc


def _must_be_alive(call: Call) -> bool:
    """Whether nothing may be lost to a connection that is dead already."""
    return call.repeats > 0 or call.method not in SAFE_METHODS


def _is_alive(transport: asyncio.Transport) -> bool:
    """Whether the worker's end is not yet known to be closed. One system call."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), _GONE_EVENTS)
    return not poll.poll(0)


class Pools:
    """The pool of each worker's address; made when first asked for. `tasks` is the parent of all closing."""

    def __init__(
        self,
        settings: RouterSettings,
        is_current: Callable[[Call], bool],
        ended: Callable[[Call], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._settings = settings
        self._is_current = is_current
        self._ended = ended
        self._tasks = tasks
        self._pools: dict[tuple[str, str], Pool] = {}

    def to(self, worker: str, address: str) -> Pool:
        """The pool of this worker at this address."""
        pool = self._pools.get((worker, address))
        if pool is None:
            pool = self._pools[worker, address] = Pool(worker, address, self._settings, self._is_current, self._ended)
        return pool

    def values(self) -> tuple[Pool, ...]:
        return tuple(self._pools.values())

    def of(self, worker: str) -> list[Pool]:
        """The pools of this worker: one for each address it has had."""
        return [pool for pool in self._pools.values() if pool.worker == worker]

    def sweep(self, map_: ShardMap) -> None:
        """A worker that is leaving and leads nothing any more waits for its callers to go: close unused connections to
        it, and to those that are gone."""
        for pool in self.values():
            member = map_.workers.get(pool.worker)
            is_gone = member is None or member.record.address != pool.address
            is_left = is_gone or (
                member is not None and member.record.state == "draining" and pool.worker not in map_.led
            )
            if is_left and pool.is_empty:
                del self._pools[pool.worker, pool.address]
                self._tasks.create_task(pool.close(), name=f"close {pool.worker}")

    async def close(self) -> None:
        """End everything, at once and for good."""
        pools, self._pools = self.values(), {}
        for pool in pools:
            await pool.close()
