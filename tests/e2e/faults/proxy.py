"""A TCP link that can fail: between a worker and an etcd member, or between the routers and a worker.

    link = Link("w1-m0", ("127.0.0.1", 2379))
    await link.open()                     # link.port is where the one side connects instead
    link.cut(forward=True)                # a one-way cut: what the client sends waits, answers still come
    link.heal(resets=False)               # what waited is delivered now, as TCP would

Cut is silence, not loss: TCP sends again what was not acknowledged, so bytes that were sent into a cut arrive when it
is healed, even if the sender has closed its end meanwhile. That is how a request that was reported failed is applied
late. `heal(resets=True)` is the other end of it: a connection that has been given up.

Not played: a connection to a silent link opens (the proxy's kernel answers), where a lost network would not.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shardlead.processes import LOOPBACK

_PIECE_BYTES: Final = 65_536
_FROM: Final = b"x-server-from:"
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST


@dataclass
class Flow:
    """One direction of a link."""

    delay_s: float = 0.0
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.opened.set()


class Link:
    """Listens on a port of its own and passes on what comes, as long as it is let."""

    def __init__(self, name: str, target: tuple[str, int]) -> None:
        self.name = name
        self.target = target
        self.port = 0
        self.forward = Flow()
        """From who connects to the target."""
        self.backward = Flow()
        self.connections = 0
        """How many have been made."""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = [
            *(["refusing"] if self._server is None else []),
            *(f"{name} cut" for name, flow in self._flows() if not flow.opened.is_set()),
            *(f"{name} {flow.delay_s:g} s late" for name, flow in self._flows() if flow.delay_s),
        ]
        return f"<Link {self.name} {', '.join(state) or 'good'}>"

    def _flows(self) -> tuple[tuple[str, Flow], tuple[str, Flow]]:
        return ("forward", self.forward), ("backward", self.backward)

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    async def open(self) -> None:
        """Listen; on the same port as before, if it was open once."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port, backlog=256)
            self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End everything."""
        self._stop_listening()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=5)

    # --- faults

    def cut(self, *, forward: bool = False, backward: bool = False) -> None:
        """Hold what flows in these directions; connections stay."""
        if forward:
            self.forward.opened.clear()
        if backward:
            self.backward.opened.clear()

    def delay(self, forward_s: float, backward_s: float) -> None:
        """Pass everything on so much later."""
        self.forward.delay_s, self.backward.delay_s = forward_s, backward_s

    def refuse(self) -> None:
        """Nobody listens any more, and all connections are reset."""
        self._stop_listening()
        self.reset()

    def reset(self) -> None:
        """RST on both ends of every connection."""
        for writer in list(self._writers):
            peer = writer.get_extra_info("socket")
            if peer is not None:
                with contextlib.suppress(OSError):
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    async def heal(self, *, resets: bool) -> None:
        """Good again. What waited arrives now, unless `resets`: then every connection is gone."""
        if resets:
            self.reset()
        self.delay(0.0, 0.0)
        for _, flow in self._flows():
            flow.opened.set()
        await self.open()

    # --- inside

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        onward: asyncio.StreamWriter | None = None
        try:
            answers, onward = await asyncio.open_connection(*self.target)
            self._writers.add(onward)
            forward, backward = await self._flows_of(reader, onward)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(forward, reader, onward))
                pumps.create_task(self._pump(backward, answers, writer))
        except (OSError, EOFError, asyncio.LimitOverrunError):
            writer.transport.abort()  # nobody listens at the target
        except asyncio.CancelledError:
            pass  # only `close` cancels, and a cancelled handler would be logged as an error by asyncio's streams
        finally:
            for each in (writer, onward):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort() if task.cancelling() else each.close()
            self._tasks.discard(task)

    async def _flows_of(self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter) -> tuple[Flow, Flow]:
        """The two directions of a new connection."""
        return self.forward, self.backward

    async def _pump(self, flow: Flow, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while True:
                piece = await source.read(_PIECE_BYTES)
                if flow.delay_s:
                    await asyncio.sleep(flow.delay_s)
                await flow.opened.wait()  # for as long as the nemesis likes
                if not piece:
                    break
                target.write(piece)
                await target.drain()
            target.write_eof()
        except OSError:
            await flow.opened.wait()  # a reset does not pass a cut either
            target.transport.abort()


class PeerLink(Link):
    """Before the port at which an etcd member listens for the others: knows by whom a connection was made.

    Members say who they are in the head of each request, `X-Server-From`, and a connection is one member's for as long
    as it lasts. What a member sends flows both ways: in the requests that it makes, and in the answers to the others'.
    """

    def __init__(self, name: str, target: tuple[str, int]) -> None:
        super().__init__(name, target)
        self.by_source: dict[str, tuple[Flow, Flow]] = {}

    def flows(self, source: str) -> tuple[Flow, Flow]:
        """The two directions of all connections that this member (its id in hex) makes."""
        return self.by_source.setdefault(source, (Flow(), Flow()))

    async def _flows_of(self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter) -> tuple[Flow, Flow]:
        head = await reader.readuntil(b"\r\n\r\n")
        source = next(
            (line.partition(b":")[2].strip() for line in head.split(b"\r\n") if line.lower().startswith(_FROM)), b""
        )
        forward, backward = self.flows(source.decode())
        await forward.opened.wait()
        onward.write(head)
        return forward, backward


class PeerNetwork:
    """Between the members of an etcd: who hears whom."""

    def __init__(self, listening: Sequence[int], told: Sequence[int]) -> None:
        self.links = [PeerLink(f"peer-m{number}", (LOOPBACK, port)) for number, port in enumerate(listening)]
        for link, port in zip(self.links, told, strict=True):
            link.port = port

    async def open(self) -> None:
        for link in self.links:
            await link.open()

    async def close(self) -> None:
        for link in self.links:
            await link.close()

    def cut(self, number: int, ids: Sequence[str], *, hears: bool, speaks: bool) -> None:
        """Take from this member what it hears, what it says, or both; `ids` are all members' ids in hex."""
        for other, link in enumerate(self.links):
            if other == number:
                for source in ids:
                    self._hold(link.flows(source), forward=not hears, backward=not speaks)
            else:
                self._hold(link.flows(ids[number]), forward=not speaks, backward=not hears)

    def heal(self) -> None:
        """Everybody hears everybody."""
        for link in self.links:
            for flows in link.by_source.values():
                for flow in flows:
                    flow.opened.set()

    @staticmethod
    def _hold(flows: tuple[Flow, Flow], *, forward: bool, backward: bool) -> None:
        for flow, is_held in zip(flows, (forward, backward), strict=True):
            if is_held:
                flow.opened.clear()
