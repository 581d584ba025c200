"""A client's connection: gives each request its turn, holds the client back when it must, and ends in order.

What it never does: know shards or workers, or parse (`intake` does).

Law: one request of a connection is in work at a time; others that were sent along wait parsed, and nothing more is
read until their turn comes. Answers leave in the order of the requests. What cannot be read is answered last, and the
connection closed behind it. A client that sends no more still gets the answers to what it has sent whole; whether it
is still there cannot be seen, so not for longer than `half_closed_timeout_s`. Bodies must move both ways, at
`body_rate_min` at least, unless we hold them back ourselves.
"""

import asyncio
import socket
from typing import Final, Protocol, cast

from shardlead.core.contract import Problem
from shardlead.errors import RequestError
from shardlead.router.access import AccessLog
from shardlead.router.counts import Counts
from shardlead.router.exchange import ANSWERING, COLLECTING, DONE, SENT, WAITING, Exchange
from shardlead.router.express import Express, ExpressDesk
from shardlead.router.forwarded import Forwarder
from shardlead.router.intake import Intake, Readings
from shardlead.router.known import Known, RequestFields
from shardlead.router.pace import Pace, unsent_bytes
from shardlead.router.problems import problem_bytes

WRITE_HIGH_BYTES: Final = 262_144
MARK_S: Final = 1.0  # the router's time moves once a second, so a mark may be that much too old: end nothing early
SLOW_AFTER_S: Final = 1.0  # an answer that moved within this time is not looked at more closely
LINGER_S: Final = 2.0  # an answered client that still sends is read for so long, so that it can read the answer
STOPPING_IDLE_S: Final = 0.5  # how long an idle client has to send a request that crosses with our stopping


class Front(Readings, Protocol):
    """What a client's connection needs of the router."""

    @property
    def counts(self) -> Counts: ...
    @property
    def desk(self) -> ExpressDesk: ...
    @property
    def known(self) -> Known[RequestFields]: ...
    @property
    def is_stopping(self) -> bool: ...
    @property
    def access(self) -> AccessLog | None:
        """None: there is no access log."""
        ...

    def admit(self, connection: "Downstream", peer: str) -> str:
        """Count a new connection; the reason why it cannot stay, or ""."""
        ...

    def forget(self, connection: "Downstream", peer: str) -> None: ...

    def tunnelled(self, exchange: Exchange) -> bool:
        """It has become a tunnel; False: its shard has moved meanwhile."""
        ...


class Downstream(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "_current",
        "_express",
        "_front",
        "_half_closed_s",
        "_intake",
        "_is_advancing",
        "_is_reading",
        "_lingers_s",
        "_mark_s",
        "_pace",
        "_transport",
        "_tunnel",
        "forwarder",
        "is_full",
        "peer",
    )

    def __init__(self, front: Front) -> None:
        self._front = front
        self._transport: asyncio.Transport | None = None
        self.peer = ""
        self._intake: Intake  # from connection_made on
        self._current: Exchange | None = None
        self._tunnel: Exchange | None = None
        self._express = Express(front, self)
        self._is_advancing = False
        self._lingers_s = 0.0  # nothing but the client's leaving is awaited any more, and for no longer than this
        self._half_closed_s: float | None = None  # since when the client sends no more
        self._is_reading = True
        self._pace: Pace | None = None  # of a client that takes its answer slowly
        self._mark_s = front.now_s  # of the last progress
        self.is_full = False

    def __repr__(self) -> str:
        return f"<Downstream from {self.peer}: {self._current!r}, {len(self._intake.came)} behind it>"

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) and name else ""
        raw: socket.socket | None = transport.get_extra_info("socket")
        if raw is not None and raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        front = self._front
        self.forwarder = Forwarder(front.settings.forwarded, self.peer, is_tls=bool(front.settings.tls_cert_file))
        self._intake = Intake(front, self, self.forwarder)
        refusal = front.admit(self, self.peer)
        if refusal:
            self._refuse(RequestError(Problem.OVERLOADED, refusal, status=503))

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._mark_s = self._front.now_s
            self._tunnel.client_tunnelled(data)
            return
        express = self._express
        if express.connection is not None:
            express.expand()
        if (
            self._current is None
            and not self.is_full
            and not self._lingers_s
            and not self._intake.came
            and self._front.access is None  # which asks more about a request than the short way keeps
            and not self._front.is_stopping  # which the answer has to tell
        ):
            self._intake.feed(data, express)
            if express.connection is not None:
                return
        else:
            self._intake.feed(data)
        self._advance()

    def eof_received(self) -> bool:
        """The client sends no more; True: the connection stays, for what is still to be answered."""
        if self._express.connection is not None:
            self._express.expand()
        transport = self._transport
        if transport is None or self._lingers_s or not transport.can_write_eof():  # the last: TLS has no such state
            return False
        if not self._front.settings.half_closed_timeout_s:
            return False
        if self._half_closed_s is None:
            self._half_closed_s = self._front.now_s
        if self._tunnel is not None:
            self._mark_s = self._front.now_s
            return self._tunnel.client_half_closed()
        self._intake.ended()
        exchange = self._current
        return exchange is not None and exchange.body.is_whole

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._transport = None
        self._front.forget(self, self.peer)
        if self._express.connection is not None:
            self._express.expand()
        current, self._current = self._current, None
        tunnel, self._tunnel = self._tunnel, None
        for exchange in (current, tunnel):
            if exchange is not None:
                exchange.client_left()
        self._intake.stop()

    def pause_writing(self) -> None:
        self.is_full = True
        if self._express.connection is not None:
            self._express.expand()
        exchange = self._tunnel or self._current
        if exchange is not None:
            exchange.client_full()

    def resume_writing(self) -> None:
        self.is_full = False
        self._mark_s = self._front.now_s
        self._pace = None
        exchange = self._tunnel or self._current
        if exchange is not None:
            exchange.client_drained()
        else:
            self._intake.head_since_s = self._front.now_s  # nothing more of a head was read meanwhile
            self._advance()

    # --- turns

    def answer_at_once(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(data)
        self._mark_s = self._intake.head_since_s = self._front.now_s

    def take_over(self, exchange: Exchange) -> None:
        self._current = exchange
        self._mark_s = self._front.now_s

    def _advance(self) -> None:
        """Give the next request its turn, for as long as they can be answered at once."""
        if self._is_advancing:
            return
        self._is_advancing = True
        intake = self._intake
        try:
            while True:
                exchange = self._current
                if exchange is not None and exchange.state == DONE:  # its body could not be read to its end
                    exchange = self._current = None
                if exchange is None:
                    if self._transport is None:
                        break
                    if not intake.came:
                        if intake.error is not None:
                            self._refuse(intake.error)
                        elif self._half_closed_s is not None and not self._lingers_s:
                            self._close()
                        break
                    if self.is_full:  # the client must take the answers that it has, first
                        break
                    exchange = self._current = intake.came.popleft()
                    exchange.body.settle()
                    exchange.prompt()
                elif exchange.state == COLLECTING:
                    exchange.body.settle()
                if exchange.state != COLLECTING or not exchange.can_start:
                    break
                exchange.start()
                if self._current is exchange:
                    break
        finally:
            self._is_advancing = False
        self.set_reading()

    def exchange_ended(self, exchange: Exchange, *, is_last: bool) -> None:
        if self._tunnel is exchange:
            self._tunnel = None
            self._close()
            return
        self._pace = None
        if self._current is not exchange:
            return
        self._current = None
        self._mark_s = self._intake.head_since_s = self._front.now_s
        if is_last or self._transport is None:
            self._linger()
            return
        if self._intake.rest is not None and not self._intake.came:  # else it was not this one that asked for it
            self._intake.stay_http()
        self._advance()

    def set_reading(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing() or self._half_closed_s is not None:
            return
        current = self._tunnel or self._current
        should_read = bool(self._lingers_s) or not (
            self._intake.came
            or self._intake.rest is not None
            or (current.is_blocked if current is not None else self.is_full)
        )
        if should_read != self._is_reading:
            self._is_reading = should_read
            if should_read:
                transport.resume_reading()
            else:
                transport.pause_reading()

    # --- `exchange.Client`

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():  # uvloop's raises once it is closed
            self._transport.write(data)

    def write_two(self, head: bytes, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines((head, data))

    def is_last(self, exchange: Exchange) -> bool:
        if not exchange.head.is_keep_alive or self._front.is_stopping:
            return True
        return self._half_closed_s is not None and not self._intake.came and self._intake.error is None

    def touch(self) -> None:
        self._mark_s = self._front.now_s

    def open_tunnel(self, exchange: Exchange) -> None:
        rest = self._intake.switch()
        self._tunnel = exchange
        self._current = None
        is_led = self._front.tunnelled(exchange)
        self.set_reading()
        if rest:
            exchange.client_tunnelled(rest)
        if not is_led or (self._half_closed_s is not None and not exchange.client_half_closed()):
            exchange.close_tunnel()
        elif self._front.is_stopping:
            self._close()

    def half_close(self) -> bool:
        transport = self._transport
        if (
            transport is None
            or transport.is_closing()
            or self._half_closed_s is not None
            or not transport.can_write_eof()
        ):
            return False
        self._mark_s = self._front.now_s
        transport.write_eof()
        return True

    def cut(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- ends

    def _refuse(self, error: RequestError) -> None:
        self._front.counts.others[_OUTCOMES.get(error.kind, "bad-request")] += 1
        access = self._front.access
        if access is not None:
            access.add_refused(self.peer, error.status, error.detail)
        self.write(problem_bytes(error.kind, error.status, error.detail, is_last=True, date=self._front.desk.date()))
        self._linger()

    def _linger(self) -> None:
        """The last answer is written. A connection closed while bytes are unread, or on their way, is reset, and the
        answer with it (RFC 9112, 9.6): only our half is closed, and what still comes is thrown away for a while."""
        transport = self._transport
        if (
            self._half_closed_s is not None
            or transport is None
            or transport.is_closing()
            or not transport.can_write_eof()
        ):
            self._close()
            return
        self._intake.stop()
        self._lingers_s = LINGER_S
        self._mark_s = self._front.now_s
        transport.write_eof()
        self.set_reading()

    def _is_taking(self, still_s: float, allowed_s: float) -> bool:
        """Whether what was written goes out to the client fast enough; nothing written: whether it is not yet still
        for too long."""
        if self._transport is None or not self._transport.get_write_buffer_size():
            self._pace = None
            return still_s <= allowed_s
        if still_s <= SLOW_AFTER_S:
            self._pace = None
            return True
        if self._pace is None:
            self._pace = Pace(self._front.now_s)
        settings = self._front.settings
        return self._pace.falls(
            unsent_bytes(self._transport), self._front.now_s, settings.body_progress_timeout_s, settings.body_rate_min
        )

    def _close(self) -> None:
        """Close, once what was written has left; `check` ends it if the client does not take it."""
        self._intake.stop()
        self._lingers_s = self._front.settings.body_progress_timeout_s
        self._mark_s = self._front.now_s
        if self._transport is not None:
            self._transport.close()

    def stop(self) -> None:
        """The router is stopping; a connection without a request goes soon (`check`), and an answer to come says so."""
        if self._express.connection is not None:
            self._express.expand()
        if self._tunnel is not None:
            self._close()

    def check(self, now_s: float) -> None:
        """Called about once a second: end what has taken too long."""
        if self._express.connection is not None:  # it takes its time: no ordinary request any more
            self._express.expand()
        settings = self._front.settings
        still_s = now_s - self._mark_s - MARK_S
        if self._lingers_s:
            if not self._is_taking(still_s, self._lingers_s):
                self.cut()
            return
        exchange = self._current
        if self._tunnel is not None:
            is_half = self._half_closed_s is not None or self._tunnel.is_half_closed
            if still_s > (settings.half_closed_timeout_s if is_half else settings.tunnel_idle_timeout_s):
                self._tunnel.close_tunnel()
        elif exchange is None and self.is_full:
            if not self._is_taking(still_s, settings.body_progress_timeout_s):
                self.cut()
        elif exchange is None and self._intake.is_in_head:
            if now_s - self._intake.head_since_s > settings.head_timeout_s:
                self._refuse(RequestError(Problem.TIMED_OUT, "the request's head did not arrive in time", status=408))
        elif exchange is None:
            if still_s > settings.idle_timeout_s or (
                self._front.is_stopping and now_s - self._mark_s > STOPPING_IDLE_S
            ):
                self._close()
        elif exchange.state == ANSWERING:
            if not self._is_taking(still_s, settings.body_progress_timeout_s):
                exchange.cut()
        elif self._half_closed_s is not None and now_s - self._half_closed_s > settings.half_closed_timeout_s:
            self.cut()
        elif exchange.state == WAITING:
            if not exchange.is_held and still_s > settings.hold_timeout_s:
                exchange.crowded_out()
        elif exchange.state == COLLECTING or (exchange.state == SENT and not exchange.body.is_whole):
            self._check_body(exchange, still_s)
        elif exchange.state == SENT and still_s > settings.answer_timeout_s:
            exchange.silent()

    def _check_body(self, exchange: Exchange, still_s: float) -> None:
        """Its body is still to come, or to be taken by the worker."""
        settings = self._front.settings
        if exchange.state == SENT and exchange.is_waiting_for_100:
            if still_s > settings.answer_timeout_s:
                exchange.silent()
            return
        window_s = settings.body_progress_timeout_s
        is_moving = exchange.body.is_moving(
            self._front.now_s, window_s, settings.body_rate_min, is_held_back=exchange.is_blocked
        )
        if still_s <= window_s and is_moving:
            return
        if exchange.is_blocked and exchange.state == SENT:
            exchange.silent()  # it is the worker that does not take it
        else:
            exchange.stalled()

    def abort(self) -> None:
        """The router's time for stopping is over."""
        self.cut()


_OUTCOMES: Final[dict[str, str]] = {
    Problem.TOO_LARGE: "too-large",
    Problem.OVERLOADED: "overloaded",
    Problem.TIMED_OUT: "timed-out",
}
