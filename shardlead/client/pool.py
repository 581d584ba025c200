"""A client's connections to one worker, and who waits for a place among them.

What it never does: choose a leader, follow a redirect, keep a cookie, or send anything a second time. That is why
aiohttp's connector, request and response are used here without its session, which does all of that (it repeats a PUT
whose connection broke) and costs more than what is left.

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
from functools import partial
from typing import Final

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from shardlead.client.call import ANSWERING, SENT, Call
from shardlead.config import RouterSettings, split_address
from shardlead.core.contract import SAFE_METHODS
from shardlead.core.shardmap import ShardMap

CLOSE_TIMEOUT_S: Final = 1.0
_GONE_EVENTS: Final = select.POLLIN | select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


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
        self._connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=settings.upstream_idle_timeout_s, ttl_dns_cache=None
        )
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s)
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<Pool of {self.worker} at {self.address}: {self.busy} busy, {len(self.waiting)} waiting>"

    @property
    def is_empty(self) -> bool:
        return not (self.busy or self.waiting)

    async def close(self) -> None:
        """End all its connections."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):  # a worker that reads nothing would keep what is unsent
                await self._connector.close()

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

    async def send(
        self, call: Call, path: str, params: Mapping[str, str] | None, fields: CIMultiDict[str]
    ) -> aiohttp.ClientResponse:
        """Send it; the answer, whose head has come. The place that the call has is given free when its connection is,
        or with what this raises: NotOpened, Overtaken, Unsendable, Broken, CancelledError."""
        body = call.body
        try:
            if not self._is_address:
                raise NotOpened(f"not an address: {self.address}")
            try:
                request = _Request(
                    call.method,
                    URL(self._base + path),
                    params=params,
                    headers=fields,
                    data=body.stream,
                    expect100=body.is_large,
                    loop=self._loop,
                    response_class=aiohttp.ClientResponse,
                )
            except (ValueError, TypeError) as exc:
                raise Unsendable(str(exc)) from exc
            while True:
                try:
                    connection = await self._connector.connect(request, [], self._timeout)
                except (aiohttp.ClientError, OSError, ValueError) as exc:  # UnicodeError: a host nobody could know
                    raise NotOpened(str(exc)) from exc
                try:
                    self._check(call, connection)
                    return await self._exchange(call, request, connection)
                except Stale:
                    connection.close()  # each time there is one less of these
                except BaseException:  # cancelled, too: part of the request may be on it
                    connection.close()
                    raise
        except BaseException:  # cancelled, too: a place that nobody gives back is lost to the pool
            self.give_back(call)
            raise

    def _check(self, call: Call, connection: Connection) -> None:
        """Raises Overtaken or Stale. Between this and the write there is no await."""
        if not self.is_current(call):
            raise Overtaken
        transport, protocol = connection.transport, connection.protocol
        if transport is None or protocol is None or transport.is_closing() or protocol.writing_paused:
            raise Stale
        if _must_be_alive(call) and not _is_alive(transport):
            raise Stale

    async def _exchange(self, call: Call, request: "_Request", connection: Connection) -> aiohttp.ClientResponse:
        """From here on the place is the connection's."""
        transport, protocol = connection.transport, connection.protocol
        assert transport is not None, "as checked"
        assert protocol is not None, "as checked"
        call.state = SENT
        call.has_place = False
        call.connection = connection
        call.protocol = protocol
        connection.add_callback(partial(self._released, call, connection))
        protocol.set_response_params(skip_payload=call.method == "HEAD", read_until_eof=True)
        request.call = call
        try:
            response = await request.send(connection)
            # aiohttp would write a body from a task of its own, a turn of the loop later.
            if call.body.kept:
                transport.write(call.body.kept)
            try:
                return await response.start(connection)
            except BaseException:  # cancelled, too: its answer may still come on this connection
                response.close()
                raise
        except (ValueError, TypeError) as exc:
            raise Unsendable(str(exc)) from exc
        except (aiohttp.ClientError, OSError) as exc:
            if request.is_unsent:
                raise Overtaken from exc
            raise Broken(str(exc)) from exc

    def _released(self, call: Call, connection: Connection) -> None:
        """aiohttp has let the connection go."""
        self._leave()
        if call.connection is connection:
            call.connection = None
            if call.state == ANSWERING:
                self.ended(call)


class _Request(aiohttp.ClientRequest):
    """aiohttp's request, whose task for a large body looks at the connection once more before it begins."""

    call: Call | None = None
    is_unsent = False

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None
    ) -> None:
        """It begins with the head, and waits for a 100."""
        transport, protocol, call = conn.transport, conn.protocol, self.call
        if transport is None or transport.is_closing() or (call and _must_be_alive(call) and not _is_alive(transport)):
            self.is_unsent = True
            if protocol is not None:
                protocol.set_exception(aiohttp.ClientConnectionError("dead before anything was written"))
            return
        await super().write_bytes(writer, conn, content_length)


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
        await asyncio.gather(*(pool.close() for pool in pools))
