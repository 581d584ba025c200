"""A connection to a worker: it parses answers and tells its taker what came.

What it never does: choose a leader or judge an answer (`Taker` does), or know of other connections (`pool` does).

Law: it carries one request at a time, and goes home only after a whole answer to a wholly sent request. An answer that
nobody asked for, or that can be read in two ways, ends it and reaches nobody.
"""

import asyncio
import logging
import re
import select
import socket
from typing import Final, Protocol, cast

import httptools

from shardlead.core.contract import Problem
from shardlead.errors import RequestError
from shardlead.router.heads import AnswerHead, Fields, Kinds, read_answer
from shardlead.router.known import AnswerLooks, Known
from shardlead.router.plans import AnswerPlan, Plans, is_whole_answer, without_keep_alive

log = logging.getLogger("shardlead.router")

_GONE_EVENTS: Final = select.POLLIN | select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
ANSWER_FIELDS_MAX: Final = 1_000
FINISH_S: Final = 2.0  # for the last bytes of a tunnel whose client has gone
BARE_BYTES_MAX: Final = 1_048_576  # of a head, or of a body's framing, until something of the answer has come
WRITE_HIGH_BYTES: Final = 262_144
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # the parser lets them pass in a reason phrase


class Taker(Protocol):
    """A request that has a connection, or waits for one."""

    def connected(self, connection: "Upstream") -> bool:
        """The connection is yours: send. False: it is not wanted any more, and is for the next one."""
        ...

    def not_connected(self) -> None:
        """No connection could be opened."""

    def informed(self, head: AnswerHead, phrase: bytes) -> None:
        """An interim answer (1xx other than 101) has come."""

    def answer_began(self, head: AnswerHead, phrase: bytes) -> None: ...

    def answer_continued(self, data: bytes) -> None: ...

    def trailers_came(self, fields: Fields, kinds: Kinds) -> None:
        """Trailers, right before `answer_ended`."""

    def answer_ended(self) -> None:
        """The answer is whole."""

    def switched(self, head: AnswerHead, phrase: bytes, rest: bytes) -> None:
        """101: from now on bytes pass as they are; `rest` has come already."""

    def tunnelled(self, data: bytes) -> None: ...

    def tunnel_half_closed(self) -> bool:
        """The worker's half of the tunnel has ended; True: the other goes on."""
        ...

    def lost(self) -> None:
        """The connection has ended or said what is no HTTP, and the answer is not whole."""

    def session_ended(self, sid: str) -> None:
        """That session of this worker has ended."""

    def upstream_full(self) -> None:
        """Stop writing."""

    def upstream_drained(self) -> None:
        """Go on writing."""


class Quick(Taker, Protocol):
    """An ordinary request, whose answer may come whole."""

    def answered(self, data: bytes) -> None:
        """This is the answer, as it goes to the client; the connection has gone home."""


class Home(Protocol):
    """Where connections of one worker are kept: `pool.Pool`."""

    @property
    def worker(self) -> str: ...

    @property
    def now_s(self) -> float: ...

    def give_back(self, connection: "Upstream") -> None:
        """An answer was received whole."""

    def forget(self, connection: "Upstream") -> None:
        """The connection has ended."""


class Upstream(asyncio.Protocol):
    """One connection to a worker. `pool` is where it goes home to."""

    __slots__ = (
        "_bare_bytes",
        "_eof_ends",
        "_fields",
        "_head",
        "_is_answering",
        "_is_done",
        "_is_lazy",
        "_is_paused",
        "_is_skipping",
        "_is_tunnel",
        "_kinds",
        "_known",
        "_last_end",
        "_lazy_body",
        "_parser",
        "_phrase",
        "_plans",
        "_poll",
        "_trailers",
        "expects_bodiless",
        "idle_since_s",
        "is_reusable",
        "is_sent",
        "pool",
        "quick",
        "taker",
        "transport",
    )

    def __init__(self, pool: Home, kinds: Kinds, plans: Plans[AnswerPlan], known: Known[AnswerLooks]) -> None:
        self.pool = pool
        self._kinds = kinds
        self._plans = plans
        self._known = known
        self._last_end = 0
        self.taker: Taker | None = None
        self.quick: Quick | None = None  # the taker, if its request is an ordinary one
        self.transport: asyncio.Transport | None = None
        self.is_reusable = True
        self.is_sent = True  # the request was written to its end
        self.idle_since_s = 0.0
        self.expects_bodiless = False  # the request was a HEAD
        self._is_answering = False
        self._is_skipping = False
        self._is_tunnel = False
        self._is_paused = False
        self._is_done = False
        self._is_lazy = False  # an ordinary request's answer has begun in this packet, and nobody was told so far
        self._lazy_body: list[bytes] = []
        self._eof_ends = False
        self._bare_bytes = 0
        self._fields: list[tuple[bytes, bytes]] = []
        self._trailers: list[tuple[bytes, bytes]] | None = None
        self._head: AnswerHead | None = None
        self._phrase = b""
        self._poll: select.poll | None = None
        self._parser = httptools.HttpResponseParser(self)

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        raw: socket.socket | None = transport.get_extra_info("socket")
        if raw is not None:
            if raw.family != socket.AF_UNIX:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._poll = select.poll()
            self._poll.register(raw.fileno(), _GONE_EVENTS)

    def data_received(self, data: bytes) -> None:
        quick = self.quick
        if quick is not None:
            if not self._bare_bytes and self._is_known(data, quick):
                return
        elif self._is_tunnel:
            if self.taker is not None:
                self.taker.tunnelled(data)
            return
        elif self.taker is None and not self._is_skipping:
            self.abort()  # a worker that speaks without being asked
            return
        self._bare_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._switch(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            if self._is_lazy:
                self._catch_up()
            # Nonsense, an answer nobody asked for, or data after `Connection: close`. An answer that was whole
            # before it is good; the connection is not.
            if isinstance(exc, httptools.HttpParserCallbackError) and not isinstance(exc.__context__, RequestError):
                log.exception("failed on a worker's answer", extra={"worker": self.pool.worker})
            self.is_reusable = False
            if not self._is_done:
                self.abort()
        if self._is_lazy:
            if self._is_done and self._answer_whole(data):
                return
            self._catch_up()
        if self._is_done:
            self._complete()
        elif self._bare_bytes > BARE_BYTES_MAX:
            self.abort()

    def eof_received(self) -> bool:
        if self._is_tunnel and self.taker is not None:
            return self.taker.tunnel_half_closed()
        if self._is_answering and self._eof_ends:
            self.is_reusable = False
            self._complete()
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self.transport = None
        taker = self._leave()
        if taker is not None:
            taker.lost()

    def pause_writing(self) -> None:
        if self.taker is not None:
            self.taker.upstream_full()

    def resume_writing(self) -> None:
        if self.taker is not None:
            self.taker.upstream_drained()

    # --- parser

    def on_message_begin(self) -> None:
        if self._is_done:
            raise RequestError(Problem.UPSTREAM_FAILED, "an answer that nobody asked for")
        self._fields = []
        self._phrase = b""
        self._head = None

    def on_status(self, phrase: bytes) -> None:
        self._phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        fields = self._fields
        if self._head is not None or self._is_lazy:
            if self._trailers is None:
                self._trailers = []
            fields = self._trailers
        fields.append((name, value))
        if len(fields) > ANSWER_FIELDS_MAX:
            raise RequestError(Problem.UPSTREAM_FAILED, "the worker's answer has too many fields")

    def on_headers_complete(self) -> None:
        self._bare_bytes = 0
        if self.quick is not None and self._parser.get_status_code() >= 200:
            self._is_lazy = True
            return
        self._begin_answer()

    def _begin_answer(self) -> None:
        head = self._head = read_answer(self._parser.get_status_code(), self._fields, self._kinds)
        status = head.status
        if status < 100 or (self._phrase != b"OK" and _CONTROL.search(self._phrase)):
            raise RequestError(Problem.UPSTREAM_FAILED, "the worker's status line is none")
        if status < 200:
            return
        self._is_answering = True
        is_bodiless = self.expects_bodiless or status == 204 or status == 304
        self._eof_ends = not is_bodiless and head.length < 0 and not head.is_chunked
        if head.is_last or self._eof_ends:
            self.is_reusable = False
        if self.taker is not None:
            self.taker.answer_began(head, self._phrase)
        if self.expects_bodiless:
            # The parser does not know of the HEAD and may wait for a body that will not come.
            self._is_done = True

    def on_body(self, data: bytes) -> None:
        if self._is_done:
            raise RequestError(Problem.UPSTREAM_FAILED, "a body where there is none")
        self._bare_bytes = 0
        if self._head is not None and self._head.status < 200:  # the parser knows 100 to 103 alone to have none
            raise RequestError(Problem.UPSTREAM_FAILED, "an interim answer with a body")
        if self._is_lazy:
            self._lazy_body.append(data)
        elif self.taker is not None:
            self.taker.answer_continued(data)

    def on_message_complete(self) -> None:
        if self._is_lazy:
            self._is_done = True
            return
        head = self._head
        if head is None:
            return
        if head.status >= 200:
            self._is_done = True
        elif head.status != 101 and self.taker is not None:
            self.taker.informed(head, self._phrase)

    def _is_known(self, data: bytes, quick: Quick) -> bool:
        """Whether this packet, the first of an ordinary request's answer, is one whose head has come before, byte by
        byte; then it is passed on as it is."""
        # A head that is known has no empty line in it, so that a wrong guess at where it ends finds nothing. Answers
        # of one worker are mostly as long as the last one.
        end = self._last_end
        if data[end : end + 4] != b"\r\n\r\n":
            end = self._last_end = data.find(b"\r\n\r\n")
            if end < 0:
                return False
        looks = self._known[data[:end]]
        if looks is None or end + 4 + looks.length != len(data):
            return False
        self.taker = self.quick = None
        self.pool.give_back(self)
        quick.answered(data if len(looks.head) == end else looks.head + data[end:])
        return True

    def _answer_whole(self, data: bytes) -> bool:
        """An ordinary request's answer has come in one packet: pass it on as it is, if it is an ordinary one, too."""
        quick = self.quick
        plan = self._plans.of(tuple([name for name, _ in self._fields]))
        fields = dict(self._fields)
        body = self._lazy_body
        body_bytes = 0 if not body else len(body[0]) if len(body) == 1 else sum(map(len, body))
        status = self._parser.get_status_code()
        if (
            plan is None
            or quick is None
            or status == 204
            or status == 304
            or not is_whole_answer(data, self._phrase, self._fields, fields[plan.length], body_bytes)
        ):
            return False
        end = data.find(b"\r\n\r\n")
        said = data[:end]
        head = said
        if plan.connection:
            head = without_keep_alive(said + b"\r\n", plan.connection, fields[plan.connection])[:-2]
            if not head:
                return False
            data = head + data[end:]
        self._known.keep(said, AnswerLooks(head, body_bytes))
        self._is_done = self._is_lazy = False
        self._bare_bytes = 0
        if body:
            body.clear()
        self.taker = self.quick = None
        self.pool.give_back(self)
        quick.answered(data)
        return True

    def _catch_up(self) -> None:
        """It is not an ordinary answer, or not whole yet: tell of it what has come."""
        self._is_lazy = False
        body, self._lazy_body = self._lazy_body, []
        is_done, self._is_done = self._is_done, False
        try:
            self._begin_answer()
        except RequestError:
            self._is_done = False
            self.abort()
            return
        for data in body:
            if self.taker is not None:
                self.taker.answer_continued(data)
        self._is_done = is_done

    def _complete(self) -> None:
        if self.expects_bodiless:
            self.expects_bodiless = False
            self._parser = httptools.HttpResponseParser(self)
        self._is_done = self._is_answering = self._is_skipping = self._eof_ends = False
        self._bare_bytes = 0
        self._head = None
        taker = self.taker
        self.taker = self.quick = None
        if self._trailers is not None:
            if taker is not None:
                taker.trailers_came(self._trailers, self._kinds)
            self._trailers = None
        self.resume()
        # Back into the pool first: the next request of the same client may want it at once.
        self.pool.give_back(self)
        if taker is not None:
            taker.answer_ended()

    def _switch(self, rest: bytes) -> None:
        head = self._head
        if head is None or head.status != 101 or self.taker is None:
            self.abort()
            return
        self._is_tunnel = True
        self.is_reusable = False
        self.taker.switched(head, self._phrase, rest)

    # --- for the taker

    def is_alive(self) -> bool:
        """Whether the worker's end is not yet known to be closed. One system call."""
        return self.transport is not None and (self._poll is None or not self._poll.poll(0))

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():  # uvloop's raises once it is closed
            self.transport.write(data)

    def write_eof(self) -> bool:
        """Tell the worker that nothing more comes; False if this connection knows no such state."""
        if self.transport is None or self.transport.is_closing() or not self.transport.can_write_eof():
            return False
        self.transport.write_eof()
        return True

    def pause(self) -> None:
        """Read no more for now: the client is slow."""
        if self.transport is not None and not self._is_paused and not self.transport.is_closing():
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._is_paused:
            self._is_paused = False
            if self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def detach(self) -> None:
        """The taker wants no more of this answer; the rest is skipped and the connection used again if it can be."""
        self.taker = self.quick = None
        if self.is_reusable and self.is_sent and self._is_answering:
            self._is_skipping = True
            self.idle_since_s = self.pool.now_s
            self.resume()
        else:
            self.close()

    def abort(self) -> None:
        """End the connection at once; the taker, if there is one still, is told that it is lost."""
        taker = self._leave()
        if self.transport is not None:
            self.transport.abort()
        if taker is not None:
            taker.lost()

    def close(self) -> None:
        """End the connection; nobody is told."""
        self._leave()
        if self.transport is not None:
            self.transport.close()

    def finish(self) -> None:
        """End the connection when all that was written has left, but soon; nobody is told."""
        transport = self.transport
        self.close()
        if transport is not None and transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(FINISH_S, transport.abort)

    def _leave(self) -> Taker | None:
        taker = self.taker
        self.taker = self.quick = None
        self._is_skipping = False
        self.is_reusable = False
        self.pool.forget(self)
        return taker
