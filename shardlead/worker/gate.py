"""The gate before one request's connection: what an application sends passes only while its leadership is valid.

Law: protocol.md A.4. The guard is asked at the point of use, synchronously, with no await between the answer "valid"
and the bytes handed to the transport. If it fails before the first byte of the answer has left, nothing leaves and
the runtime answers in the application's stead; if it fails later, the connection is reset, so that nobody can take
what came for a whole answer.

Why nothing slips by: aiohttp's `web.Server(request_factory=…)` asks for the request and hands over the connection's
protocol. The request made here has a protocol whose transport is guarded, and a writer upon that protocol; all that
aiohttp and an application can send (heads, bodies, compressed or not, files, WebSocket frames, bytes written by hand)
ends in that transport's write. No private attribute of aiohttp is named. What a newer aiohttp or Python may ask of a
transport besides is not implemented here: it fails, it does not pass.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http import RawRequestMessage, StreamWriter
from aiohttp.streams import StreamReader
from multidict import CIMultiDict

from shardlead.core.contract import RESERVED_PREFIX
from shardlead.worker.audit import Trail
from shardlead.worker.leadership import Leadership
from shardlead.worker.tenure import Tenure

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_RESERVED: Final = len(RESERVED_PREFIX)
_STATUS_AT: Final = len("HTTP/1.1 ")
_GOING_AWAY: Final = b"\x88\x02\x03\xe9"  # an unmasked WebSocket close frame, code 1001
CLOSING_S: Final = 1.0  # for a peer to take the last bytes of a tunnel; then it is reset
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST

Bytes = bytes | bytearray | memoryview


class AnswerCut(ConnectionResetError):
    """The leadership is not valid any more: nothing more of this answer leaves.

    A ConnectionResetError, because that is what an application that streams is ready for.
    """


class Gate:
    """One request's way out: open for the runtime's own answers, guarded while the application answers, then cut.

    The guarded objects know their gate, and it does not know them: without a cycle a request's memory is free at once.
    Not promised: that bytes which passed were received; the kernel or the peer may still drop them.
    """

    __slots__ = (
        "_admitted_ns",
        "_closing",
        "_is_over",
        "_is_websocket",
        "_lead",
        "_loop",
        "_message",
        "_need_s",
        "_on_tunnel",
        "_payload",
        "_protocol",
        "_trail",
        "has_begun",
        "is_cut",
        "is_tunnel",
    )

    def __init__(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._message = message
        self._payload = payload
        self._protocol = protocol
        self._loop = loop
        self._lead: Leadership | None = None
        self._need_s = 0.0
        self._on_tunnel: Callable[[Gate], object] | None = None
        self._trail: Trail | None = None
        self._admitted_ns = 0
        self.has_begun = False  # a byte of the application's answer may have left
        self.is_cut = False
        self.is_tunnel = False
        self._is_over = False
        self._is_websocket = False
        self._closing: asyncio.Transport | None = None  # of a tunnel that is closed and has not left yet

    def __repr__(self) -> str:
        state = "cut" if self.is_cut else "open" if self._lead is None else "guarded"
        return f"<Gate {state}{' begun' if self.has_begun else ''}{' tunnel' if self.is_tunnel else ''}>"

    @property
    def is_connected(self) -> bool:
        """Whether there is still somebody to answer."""
        transport = self._protocol.transport
        return transport is not None and not transport.is_closing()

    def request(self, task: "asyncio.Task[None]", *, body_bytes_max: int) -> web.Request:
        """The request as the application sees it, with this gate before everything it can send by."""
        protocol = cast(web.RequestHandler, _GuardedProtocol(self, self._protocol))
        writer = GuardedWriter(self, protocol, self._loop)
        return web.Request(
            self._message, self._payload, protocol, writer, task, self._loop, client_max_size=body_bytes_max
        )

    def own_request(self, task: "asyncio.Task[None]") -> web.Request:
        """The same request for the runtime's own answer, past the guard and free of what the application prepared."""
        assert not self.has_begun, "an answer that has begun can only be reset"
        writer = StreamWriter(self._protocol, self._loop)
        return web.Request(self._message, self._payload, self._protocol, writer, task, self._loop)

    async def write_continue(self) -> None:
        """Tell the peer to send the body it has announced."""
        await StreamWriter(self._protocol, self._loop).write(_CONTINUE)

    def guard(self, tenure: Tenure, need_s: float, admitted_ns: int) -> None:
        """From here on the application answers, for a request that was admitted then; if it upgrades the connection,
        this gate becomes a tunnel of the tenure."""
        self._lead, self._need_s, self._on_tunnel = tenure.lead, need_s, tenure.tunnels.add
        self._trail, self._admitted_ns = tenure.trail, admitted_ns

    def check(self) -> None:
        """Raise AnswerCut unless the application may send now. No await may stand between this and the sending."""
        if self._lead is None:
            return
        if self.is_cut or self._is_over:
            raise AnswerCut("this answer is over")
        if not self._lead.is_valid(self._need_s):
            self.cut()
            raise AnswerCut("the leadership ended before the answer did")

    def pass_bytes(self) -> None:
        """As `check`, for bytes that leave right after. The first ones of an answer are written down before."""
        if self._trail is not None and not self.has_begun:
            asked_ns = self._trail.now_ns()
            self.check()
            self.note_accepted(asked_ns)
        else:
            self.check()
        self.has_begun = self._lead is not None

    def note_accepted(self, asked_ns: int) -> None:
        """For the audit log: the guard, asked right after that time, lets the request's answer pass. Counts once."""
        if self._trail is not None and not self.has_begun:
            self._trail.accept(self._admitted_ns, asked_ns)

    def note_refused(self, why: str) -> None:
        """For the audit log: nothing of the application's answer leaves."""
        if self._trail is not None and not self.has_begun:
            self._trail.reject(why)

    def cut(self) -> None:
        """Nothing of the application passes any more; an answer that has begun ends in a reset."""
        self.is_cut = True
        if self.has_begun:
            self.reset()

    def finish(self) -> None:
        """The application's time to answer is over: what it left running writes no more."""
        self._is_over = True

    def begin_answer(self, status_line: str, headers: CIMultiDict[str]) -> None:
        """The application hands over the head of its answer; its `Shardlead-*` headers stay here."""
        if self._lead is None:
            return
        if self.has_begun:
            raise RuntimeError("a second answer to one request")
        for name in [name for name in headers if name[:_RESERVED].lower() == RESERVED_PREFIX]:
            headers.popall(name, None)
        if status_line.startswith("101", _STATUS_AT):
            if self._lead.draining.is_set():  # tunnels were closed when it began: the next leader may open this one
                raise AnswerCut("the shard is being passed on")
            self.is_tunnel = True
            self._is_websocket = headers.get("Upgrade", "").lower() == "websocket"
            if self._on_tunnel is not None:
                self._on_tunnel(self)

    def close(self) -> None:
        """Send what has passed, then close the connection, whatever the peer still sends.

        For a tunnel this is its end: a WebSocket is told so, if the leadership is still valid; else it is reset.
        """
        if self.is_tunnel and not self.is_cut and not self._is_over:
            if self._lead is not None and not self._lead.is_valid(self._need_s):
                self.cut()
                return
            self._is_over = True
            transport = self._protocol.transport
            if self._is_websocket and transport is not None and not transport.is_closing():
                transport.write(_GOING_AWAY)  # between two frames: each is written whole
            if transport is not None and transport.get_write_buffer_size():  # the peer may never take it
                self._closing = transport
                self._loop.call_later(CLOSING_S, self.reset)
        self._protocol.force_close()

    def reset(self) -> None:
        """Drop what has not left yet and reset the connection, so that the peer sees an error, never an end."""
        transport = self._protocol.transport or self._closing
        if transport is not None:
            sock = transport.get_extra_info("socket")
            if sock is not None:
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()
        self._protocol.force_close()


class GuardedWriter(StreamWriter):
    """aiohttp's writer of one answer, upon the guarded protocol."""

    def __init__(self, gate: Gate, protocol: web.RequestHandler, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(protocol, loop)
        self.gate = gate
        self.has_head = False

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        self.has_head = True
        self.gate.begin_answer(status_line, headers)
        await super().write_headers(status_line, headers)

    async def write(self, chunk: Any, **options: Any) -> None:
        if not self.has_head and chunk == _CONTINUE:
            return  # an aiohttp application answers an Expect by itself, which the runtime has done already
        await super().write(chunk, **options)


class _GuardedProtocol:
    """aiohttp's connection as a request sees it: all of it, but its transport behind the gate."""

    __slots__ = ("_gate", "_protocol", "_transport")

    def __init__(self, gate: Gate, protocol: web.RequestHandler) -> None:
        self._gate = gate
        self._protocol = protocol
        self._transport: _GuardedTransport | None = None

    @property
    def transport(self) -> asyncio.Transport | None:
        inner = self._protocol.transport
        if inner is None:  # the connection is lost
            return None
        if self._transport is None:
            self._transport = _GuardedTransport(self._gate, inner)
        return self._transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)


class _GuardedTransport(asyncio.Transport):
    """A transport whose writes pass the gate. Whatever else it is asked for is not implemented, on purpose:

    `loop.sendfile` then gives up, and aiohttp sends a file piece by piece through the writer, each piece guarded.
    """

    __slots__ = ("_gate", "_inner")

    def __init__(self, gate: Gate, inner: asyncio.Transport) -> None:
        super().__init__()
        self._gate = gate
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"a guarded transport has no {name!r}")

    def write(self, data: Bytes) -> None:
        self._gate.pass_bytes()
        self._inner.write(data)

    def writelines(self, list_of_data: Iterable[Bytes]) -> None:
        self._gate.pass_bytes()
        self._inner.writelines(list_of_data)

    def write_eof(self) -> None:
        self._gate.pass_bytes()
        self._inner.write_eof()

    def can_write_eof(self) -> bool:
        return self._inner.can_write_eof()

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def is_reading(self) -> bool:
        return self._inner.is_reading()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._inner.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._inner.set_write_buffer_limits(high, low)
