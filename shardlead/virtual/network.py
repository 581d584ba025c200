"""A network in virtual time for `shardlead.virtual.loop`: connections that delay, stall, break, and never reorder.

Law: a connection is as TCP is: what arrives is a prefix of what was sent, in order. A cut link loses nothing at once;
its bytes wait, as retransmissions would, and after `PATIENCE_S` the sender's side gives up with a reset that the other
side does not hear of. A process that is killed resets its connections; a machine that is lost says nothing. A process
that is paused still has a kernel: it accepts and takes bytes until its buffers are full.

Faults are set for a direction between two addresses: `network.cut(a, b)`, `heal(a, b)`, `network.delays[a, b]`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from shardlead.virtual.loop import Machine, VirtualLoop

NS_PER_S: Final = 1_000_000_000
DELAY_S: Final = (0.0001, 0.001)  # one way, drawn for each write
PATIENCE_S: Final = 15.0
BUFFER_BYTES: Final = 262_144  # under way in one direction before the writer is told to pause
FIRST_PORT: Final = 20_000


class _ListeningSocket:
    """What `server.sockets` shows."""

    def __init__(self, name: tuple[str, int]) -> None:
        self._name = name

    def getsockname(self) -> tuple[str, int]:
        return self._name


class Server(asyncio.AbstractServer):
    """A listening port of one machine."""

    def __init__(self, network: "Network", machine: "Machine", factory: Callable[[], Any], port: int) -> None:
        self.machine = machine
        self.factory = factory
        self.is_serving_now = False
        self._network = network
        self._name = (machine.address, port)
        self._is_closed = False

    @property
    def sockets(self) -> tuple[_ListeningSocket, ...]:
        return () if self._is_closed else (_ListeningSocket(self._name),)

    def close(self) -> None:
        self._is_closed = True
        self.is_serving_now = False
        self._network.unlisten(self._name, self)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._network.loop

    def is_serving(self) -> bool:
        return self.is_serving_now

    async def start_serving(self) -> None:
        self.is_serving_now = True

    async def serve_forever(self) -> None:
        raise NotImplementedError

    async def wait_closed(self) -> None:
        pass

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


class _Reading(Protocol):
    def connection_made(self, transport: Any) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class Side(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, network: "Network", machine: "Machine", name: tuple[str, int], peername: tuple[str, int]):
        super().__init__({"peername": peername, "sockname": name, "socket": None, "sslcontext": None})
        self.machine = machine
        self.peer: Side  # set by the network
        self.protocol: _Reading
        self.is_lost = False  # nothing more comes or goes here
        self._is_begun = False
        self._lost_early: Exception | None = None
        self._network = network
        self._is_closing = False
        self._has_sent_eof = False
        self._has_eof = False  # the peer's end has been read
        self._is_reading = True
        self._is_writing_paused = False
        self._high = 65_536
        self.inbound: deque[bytes | None] = deque()  # in this machine's kernel; None is the end
        self.wire: deque[bytes | None] = deque()  # on its way to the peer
        self._wire_bytes = 0  # sent and not read by the peer's program
        self.arrives_ns = 0  # of the last thing sent: nothing overtakes
        self._stalled_since_ns = -1

    # --- asyncio: reading

    def is_reading(self) -> bool:
        return self._is_reading and not self._is_closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self.machine.call_soon(self.read_on)

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    # --- asyncio: writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_lost or self._is_closing or not data:
            return
        assert not self._has_sent_eof, "written after the end"
        self._send(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        if not self._has_sent_eof and not self.is_lost and not self._is_closing:
            self._has_sent_eof = True
            self._send(None)

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return self._wire_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._high // 4, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:  # noqa: ARG002
        self._high = 65_536 if high is None else high

    def is_closing(self) -> bool:
        return self._is_closing or self.is_lost

    def close(self) -> None:
        """What was written still goes; nothing is read any more."""
        if self._is_closing or self.is_lost:
            return
        if not self._has_sent_eof:
            self._has_sent_eof = True
            self._send(None)
        self._is_closing = True
        self.machine.call_soon(self.lose, None)

    def abort(self) -> None:
        """Reset: what has not arrived is lost."""
        if self.is_lost:
            return
        self._is_closing = True
        self.wire.clear()
        self._network.after(self, self.arrive_reset)
        self.machine.call_soon(self.lose, None)

    # --- the wire

    def _send(self, item: bytes | None) -> None:
        self.wire.append(item)
        self._wire_bytes += len(item or b"")
        if self._wire_bytes > self._high + BUFFER_BYTES and not self._is_writing_paused:
            self._is_writing_paused = True
            self.protocol.pause_writing()
        self._network.after(self, self._arrive)

    def _arrive(self) -> None:
        """Called on the network's time when the front of the wire has reached the peer, unless the link is cut."""
        network, peer = self._network, self.peer
        if not self.wire:
            return
        if network.is_cut(self.machine.address, peer.machine.address):
            network.stall(self)
            return
        item = self.wire.popleft()
        if peer.is_lost or peer.machine.is_crashed:
            if not network.is_gone(peer.machine.address):
                network.after(peer, peer.arrive_reset)  # its kernel knows no such connection
            return
        peer.inbound.append(item)
        peer.machine.call_soon(peer.read_on)

    def flush(self) -> None:
        """The link works again: what had stalled goes."""
        for _ in range(len(self.wire)):
            self._network.after(self, self._arrive)

    def arrive_reset(self) -> None:
        """A reset from this side reaches the peer."""
        peer = self.peer
        if self._network.is_cut(self.machine.address, peer.machine.address) or peer.is_lost:
            return
        if not peer.machine.is_crashed:
            peer.inbound.clear()
            peer.machine.call_soon(peer.lose, ConnectionResetError("reset by the peer"))

    def give_up(self) -> None:
        """Nothing has been acknowledged for too long."""
        if not self.is_lost and not self.machine.is_crashed:
            self.wire.clear()
            self.machine.call_soon(self.lose, TimeoutError("the connection timed out"))

    # --- on this machine

    def begin(self, protocol: Any) -> None:
        """What has come meanwhile is read after what `connection_made` has begun, as on every loop."""
        self.protocol = protocol
        protocol.connection_made(self)
        self.machine.call_soon(self._begun)

    def _begun(self) -> None:
        self._is_begun = True
        if self._lost_early is not None:
            self.lose(self._lost_early)
        self.read_on()

    def read_on(self) -> None:
        while self._is_begun and self.inbound and self._is_reading and not self._is_closing and not self.is_lost:
            item = self.inbound.popleft()
            if item is None:
                self._has_eof = True
                if not self.protocol.eof_received():
                    self.close()
                return
            self.peer.taken(len(item))
            self.protocol.data_received(item)

    def taken(self, count: int) -> None:
        self._wire_bytes -= count
        if self._is_writing_paused and self._wire_bytes <= self._high // 4 and not self.machine.is_crashed:
            self._is_writing_paused = False
            self.machine.call_soon(self._resume_writing)

    def _resume_writing(self) -> None:
        if not self.is_lost and not self._is_writing_paused:
            self.protocol.resume_writing()

    def lose(self, exc: Exception | None) -> None:
        if self.is_lost:
            return
        if not self._is_begun:
            self._lost_early = exc or ConnectionResetError("closed")
            return
        self.is_lost = self._is_closing = True
        self.inbound.clear()
        self._network.forget(self)
        self.protocol.connection_lost(exc)


class Network:
    """All connections between the machines of one loop."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self.loop = loop
        self.delays: dict[tuple[str, str], tuple[float, float]] = {}
        self._servers: dict[tuple[str, int], Server] = {}
        self._sides: dict[Side, None] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        self._stalled: dict[Side, None] = {}
        self._gone: dict[str, None] = {}
        self._ports: dict[str, int] = {}

    # --- faults

    def cut(self, source: str, target: str) -> None:
        """What `source` sends does not reach `target`, until healed. Cuts add up. Both are addresses."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1

    def heal(self, source: str, target: str) -> None:
        self._cuts[source, target] -= 1
        if self._cuts[source, target]:
            return
        del self._cuts[source, target]
        for side in tuple(self._stalled):
            if (side.machine.address, side.peer.machine.address) == (source, target):
                del self._stalled[side]
                side.flush()

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cuts or source in self._gone or target in self._gone

    def is_gone(self, address: str) -> bool:
        return address in self._gone

    def reset(self, source: str, target: str) -> int:
        """Break every connection between the two, as a restarted firewall does; how many."""
        broken = [side for side in self._sides if {side.machine.address, side.peer.machine.address} == {source, target}]
        for side in broken:
            if not side.machine.is_crashed:
                side.machine.call_soon(side.lose, ConnectionResetError("reset on the way"))
        return len(broken) // 2

    def crashed(self, machine: "Machine", *, with_machine: bool) -> None:
        """For machines."""
        if with_machine:
            self._gone[machine.address] = None
        for name, server in tuple(self._servers.items()):
            if server.machine is machine:
                del self._servers[name]
        for side in tuple(self._sides):
            if side.machine is machine:
                side.is_lost = True
                self.forget(side)
                if not with_machine:
                    side.wire.clear()
                    self.after(side, side.arrive_reset)

    # --- for the loop

    def listen(self, machine: "Machine", factory: Callable[[], Any], port: int, is_serving: bool) -> Server:
        if not port:
            port = self._ports[machine.address] = self._ports.get(machine.address, FIRST_PORT) + 1
        name = (machine.address, port)
        if name in self._servers:
            raise OSError(98, f"address already in use: {name}")
        server = self._servers[name] = Server(self, machine, factory, port)
        server.is_serving_now = is_serving
        return server

    def unlisten(self, name: tuple[str, int], server: Server) -> None:
        if self._servers.get(name) is server:
            del self._servers[name]

    async def connect(self, machine: "Machine", factory: Callable[[], Any], host: str, port: int) -> Any:
        """As `loop.create_connection`: (transport, protocol). Raises ConnectionRefusedError, TimeoutError, or waits
        as long as the caller lets it."""
        there = (host, port)
        answered: asyncio.Future[bool] = self.loop.create_future()
        is_lost = self.is_cut(machine.address, host) or self.is_cut(host, machine.address)

        def answer() -> None:
            if not answered.done():
                server = self._servers.get(there)
                answered.set_result(server is not None and server.is_serving_now)

        def lost() -> None:
            if not answered.done():
                answered.set_exception(TimeoutError("no answer to the request for a connection"))

        if not is_lost:
            machine.call_later(self._delay_s(machine.address, host) * 2, answer)
        else:
            machine.call_later(PATIENCE_S, lost)
        if not await answered:
            raise ConnectionRefusedError(111, f"nobody listens at {host}:{port}")
        server = self._servers.get(there)
        if server is None:
            raise ConnectionRefusedError(111, f"nobody listens at {host}:{port}")
        port_here = self._ports[machine.address] = self._ports.get(machine.address, FIRST_PORT) + 1
        name = (machine.address, port_here)
        mine = Side(self, machine, name, there)
        theirs = Side(self, server.machine, there, name)
        mine.peer, theirs.peer = theirs, mine
        self._sides[mine] = self._sides[theirs] = None
        protocol = factory()
        server.machine.call_soon(_accept, theirs, server.factory)
        mine.begin(protocol)
        return mine, protocol

    # --- for the sides

    def after(self, side: Side, act: Callable[[], None]) -> None:
        """Do it when what `side` sends now arrives."""
        loop = self.loop
        delay_ns = int(self._delay_s(side.machine.address, side.peer.machine.address) * NS_PER_S)
        when_ns = side.arrives_ns = max(side.arrives_ns, loop.true_ns() + delay_ns)
        loop.schedule(loop.observer, when_ns, act, (), loop.observer.context.copy())

    def stall(self, side: Side) -> None:
        """Its bytes cannot get through now."""
        if side in self._stalled:
            return
        self._stalled[side] = None
        loop = self.loop
        when_ns = loop.true_ns() + int(PATIENCE_S * NS_PER_S)
        loop.schedule(loop.observer, when_ns, self._despair, (side,), loop.observer.context.copy())

    def forget(self, side: Side) -> None:
        self._sides.pop(side, None)

    def _despair(self, side: Side) -> None:
        if side in self._stalled:
            del self._stalled[side]
            side.give_up()

    def _delay_s(self, source: str, target: str) -> float:
        low_s, high_s = self.delays.get((source, target), DELAY_S)
        return self.loop.rng.uniform(low_s, high_s)


def _accept(side: Side, factory: Callable[[], Any]) -> None:
    side.begin(factory())
