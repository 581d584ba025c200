"""One request's life: its body is collected or streamed, it is sent, and its answer goes to the client.

What it never does: decide whether to wait or to send again; it tells the desk what happened and carries out what the
desk says (`send`, `fail`, `pass_on`, `cut`).

Law: of a body up to 64 KiB all is kept, and the request leaves whole, in one write. A longer one, or one whose end is
not in sight, is announced with `Expect: 100-continue`, and not a byte of it leaves before the worker has admitted it;
until then the client is held back. Nothing of an answer reaches the client before it is sure that the request will not
be sent again.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from shardlead.core import contract
from shardlead.core.contract import Problem
from shardlead.core.routing import REFUSALS, Answer, Happened, encode_key, last_word
from shardlead.core.shardmap import Leader
from shardlead.errors import RequestError
from shardlead.router.body import NO_BODY, Body
from shardlead.router.heads import AnswerHead, Fields, Kinds, RequestHead, trailer_lines
from shardlead.router.pool import Pool
from shardlead.router.problems import problem_bytes
from shardlead.router.upstream import Upstream

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
JOIN_BYTES_MAX: Final = 16_384  # larger pieces are not copied to join them to a head

# Where an exchange stands.
COLLECTING: Final = 0  # its body is on its way, or other requests of its client come first
WAITING: Final = 1  # held, or waiting for a connection
SENT: Final = 2
ANSWERING: Final = 3
TUNNEL: Final = 4
DONE: Final = 5


class Client(Protocol):
    """The client's connection, as an exchange sees it."""

    @property
    def is_full(self) -> bool: ...

    @property
    def peer(self) -> str:
        """Its address."""
        ...

    def write(self, data: bytes) -> None: ...

    def write_two(self, head: bytes, data: bytes) -> None: ...

    def is_last(self, exchange: "Exchange") -> bool:
        """Whether the answer to this must say `Connection: close`."""
        ...

    def set_reading(self) -> None:
        """What holds the client back may have changed."""

    def touch(self) -> None:
        """There was progress."""

    def exchange_ended(self, exchange: "Exchange", *, is_last: bool) -> None: ...

    def open_tunnel(self, exchange: "Exchange") -> None: ...

    def half_close(self) -> bool:
        """Tell the client that nothing more comes; False if that ends the connection."""
        ...

    def cut(self) -> None:
        """Reset the connection."""


class Desk(Protocol):
    """Who decides."""

    @property
    def id_prefix(self) -> bytes:
        """What the ids of all requests begin with that came without one."""
        ...

    @property
    def date(self) -> Callable[[], bytes]:
        """The present time as a Date field says it."""
        ...

    def submit(self, exchange: "Exchange") -> None:
        """It is ready to be sent."""

    def happened(self, exchange: "Exchange", what: Happened) -> None:
        """That has happened to it; carry on."""

    def turned_down(self, exchange: "Exchange", what: Happened, epoch: int, leader: bytes) -> None:
        """Refused, or handled with an outcome unknown; the worker knows this epoch and leader."""

    def accepted(self, exchange: "Exchange") -> None:
        """Its worker has admitted it."""

    def is_current(self, exchange: "Exchange") -> bool:
        """Whether `exchange.leader` is still the one to send to."""
        ...

    def withdraw(self, exchange: "Exchange") -> None:
        """Its client has gone."""

    def keep(self, size: int) -> bool:
        """Count bytes kept (negative: given free); False if there is no room for more."""
        ...

    def ended(self, exchange: "Exchange", outcome: str) -> None:
        """It is over."""


class Exchange:
    """A request and its answer."""

    __slots__ = (
        "_is_chunking",
        "_is_last",
        "_pending",
        "_prefix",
        "_trailers",
        "answer_bytes",
        "body",
        "client",
        "connection",
        "desk",
        "error",
        "head",
        "held_ns",
        "hold_until_ns",
        "is_blocked",
        "is_half_closed",
        "is_held",
        "is_waiting_for_100",
        "key",
        "leader",
        "number",
        "pool",
        "repeats",
        "shard",
        "since_ns",
        "state",
        "status",
        "told_continue",
        "why",
    )

    def __init__(self, desk: Desk, client: Client, head: RequestHead, number: int, since_ns: int) -> None:
        self.desk = desk
        self.client = client
        self.head = head
        self.number = number
        self.since_ns = since_ns
        self.state = COLLECTING
        self.key: bytes | None = None
        self.shard = -1
        self.status = 0  # of the answer; 0: none has begun
        self.answer_bytes = 0  # of its content
        self.error: RequestError | None = None
        self.leader: Leader | None = None  # under whom it was sent last
        self.pool: Pool | None = None
        self.connection: Upstream | None = None
        self.repeats = 0
        self.why = Happened.ARRIVED
        self.is_held = False
        self.held_ns = 0  # when the present hold began
        self.hold_until_ns = 0  # 0: was never held
        self.body = Body(head.length) if head.has_body else NO_BODY
        self.is_blocked = False  # the client must not send more of the body for now
        self.is_half_closed = False  # a tunnel whose worker sends no more
        self.is_waiting_for_100 = False
        self.told_continue = not head.expects_continue
        self._prefix = b""
        self._pending = b""  # the answer's head, until there is something to send along with it
        self._trailers = b""  # of the answer
        self._is_chunking = False  # the answer goes to the client in chunks
        self._is_last = False

    def __repr__(self) -> str:
        method = self.head.method.decode("ascii", "replace")
        names = ("collecting", "waiting", "sent", "answering", "tunnel", "done")
        under = f" under epoch {self.leader.epoch} of {self.leader.worker}" if self.leader is not None else ""
        return f"<Exchange {self.number}: {method}, shard {self.shard}, {names[self.state]}{under}>"

    @property
    def request_id(self) -> bytes:
        """By which logs of all who had to do with it can be joined: the client's own, or one made here."""
        return self.head.request_id or b"%b%x" % (self.desk.id_prefix, self.number)

    # --- the client's side

    @property
    def can_start(self) -> bool:
        """Whether it can be sent: its body is here, or will be streamed."""
        return self.body.is_whole or self.body.is_large or (self.error is not None and not self.told_continue)

    def prompt(self) -> None:
        """Its turn has come. A client that waits to be told to send a short body is told so."""
        if not (self.told_continue or self.body.is_whole or self.body.is_large or self.body.length < 0 or self.error):
            self.told_continue = True
            self.client.write(CONTINUE)

    def start(self) -> None:
        """Its turn has come, and `can_start`."""
        self.state = WAITING
        if self.error is not None:
            self.fail(Answer(Problem(self.error.kind), self.error.status, self.error.detail))
        else:
            self.desk.submit(self)

    def body_came(self, data: bytes, body_bytes_max: int) -> bool:
        """A piece of the client's body; False: the body is longer than this and was not taken."""
        body = self.body
        body.total_bytes += len(data)
        if body.total_bytes > body_bytes_max:
            return False
        if self.state == DONE or self.error is not None:
            return True
        if self.state == ANSWERING and self.is_waiting_for_100:  # its worker answers without having asked for it
            body.is_torn = True
            return True
        if self._is_streaming:
            self._stream(data)
        elif not self.desk.keep(len(data)):
            self.refuse_body(RequestError(Problem.OVERLOADED, "too many bodies are being kept", status=503))
        elif body.keep(data):
            self.is_blocked = True
            self.client.set_reading()
        return True

    def body_ended(self) -> None:
        """The client's body is whole."""
        self.body.is_whole = True
        if self._is_streaming:
            self._finish_body()

    @property
    def _is_streaming(self) -> bool:
        return self.body.is_large and self.state >= SENT and not self.is_waiting_for_100

    def refuse_body(self, error: RequestError) -> None:
        """The body cannot be taken (any further)."""
        if self.state == COLLECTING:
            self.error = error
            self.body.is_large = True  # no use in waiting for the rest
            return
        if self.state == ANSWERING:
            self.cut()
            return
        answer = Answer(Problem(error.kind), error.status, error.detail)
        if self.state == SENT:  # its worker may have admitted it: the 100, if none has come, may be on its way
            answer = last_word(answer, self.head.method, self.repeats + 1)
        self._let_go()
        self.desk.withdraw(self)
        self.fail(answer)

    def client_left(self) -> None:
        """The client's connection has ended."""
        if self.state == DONE:
            return
        self.desk.withdraw(self)
        if self.state == TUNNEL and self.connection is not None:
            connection, self.connection = self.connection, None
            connection.finish()  # the last that the client said is still to arrive
        self._let_go()
        self._end("client-gone")

    def client_full(self) -> None:
        if self.connection is not None:
            self.connection.pause()

    def client_drained(self) -> None:
        if self.connection is not None:
            self.connection.resume()

    def client_tunnelled(self, data: bytes) -> None:
        if self.connection is not None:
            self.connection.write(data)

    def client_half_closed(self) -> bool:
        """The client's half of the tunnel has ended; False: so has the worker's, or it cannot be told."""
        return not self.is_half_closed and self.connection is not None and self.connection.write_eof()

    # --- what the desk says (`cluster.traffic.Request`)

    @property
    def method(self) -> bytes:
        return self.head.method

    @property
    def has_idempotency_key(self) -> bool:
        return self.head.has_idempotency_key

    @property
    def is_body_kept(self) -> bool:
        return self.body.is_kept

    @property
    def is_connecting(self) -> bool:
        return self.state == WAITING

    def touch(self) -> None:
        self.client.touch()

    def send(self, leader: Leader, pool: Pool, *, must_be_alive: bool) -> None:
        """Send it to this leader."""
        assert self.state != DONE, f"{self!r} is over"
        self.leader = leader
        self.pool = pool
        self.state = WAITING
        pool.take(self, must_be_alive=must_be_alive)

    def take_back(self) -> bool:
        """Whether it was still waiting for a connection; then it waits for none any more."""
        if self.state != WAITING or self.pool is None:
            return False
        return self.pool.withdraw(self)

    def detach(self) -> None:
        """What its worker still has to say does not matter any more."""
        connection = self.connection
        self.connection = None
        self.is_waiting_for_100 = False
        if self.state == SENT:
            self.state = WAITING
        if connection is not None:
            connection.detach()  # closes it if the request was not wholly sent: no 100, no body, no second request

    def fail(self, answer: Answer) -> None:
        """Answer the client with a problem."""
        answer = last_word(answer, self.head.method, self.repeats)
        is_last = self.client.is_last(self) or not self.body.is_whole
        self.status = answer.status
        self.client.write(
            problem_bytes(
                answer.problem,
                answer.status,
                answer.detail,
                shard=self.shard,
                retry_after_s=answer.retry_after_s,
                is_head=self.head.method == b"HEAD",
                is_last=is_last,
                date=self.desk.date(),
                request_id=self.request_id,
            )
        )
        self._end(_OUTCOMES.get(answer.problem, answer.problem.value))
        self.client.exchange_ended(self, is_last=is_last)

    def cut(self) -> None:
        """Its answer has begun and cannot be made whole."""
        self._let_go()
        self._end("upstream-failed")
        self.client.cut()

    # --- the worker's side (`upstream.Taker`)

    def connected(self, connection: Upstream) -> bool:
        leader = self.leader
        assert leader is not None
        if not self.desk.is_current(self):  # it changed while a connection was awaited
            connection.taker = None
            self.desk.happened(self, Happened.UNSENT)
            return False
        self.connection = connection
        self.state = SENT
        self.client.touch()
        head = self.head
        prefix = self._prefix or self._make_prefix()
        connection.expects_bodiless = head.method == b"HEAD"
        body = self.body
        if body.is_large:
            self.is_waiting_for_100 = True
            connection.is_sent = False
            connection.write(
                b"%b%bExpect: 100-continue\r\n%b: %d\r\n\r\n" % (prefix, body.framing, _EPOCH_NAME, leader.epoch)
            )
        elif body.trailers:
            connection.write(
                b"%bTransfer-Encoding: chunked\r\n%b: %d\r\n\r\n%b"
                % (prefix, _EPOCH_NAME, leader.epoch, body.all_chunked())
            )
        elif body.kept_bytes:
            data = body.all_kept()
            connection.write(
                b"%bContent-Length: %d\r\n%b: %d\r\n\r\n%b" % (prefix, len(data), _EPOCH_NAME, leader.epoch, data)
            )
        elif head.has_body or head.length == 0:
            connection.write(b"%bContent-Length: 0\r\n%b: %d\r\n\r\n" % (prefix, _EPOCH_NAME, leader.epoch))
        else:
            connection.write(b"%b%b: %d\r\n\r\n" % (prefix, _EPOCH_NAME, leader.epoch))
        return True

    def not_connected(self) -> None:
        self.desk.happened(self, Happened.NOT_OPENED)

    def informed(self, head: AnswerHead, phrase: bytes) -> None:
        if head.status == 100:
            if self.is_waiting_for_100:
                self.is_waiting_for_100 = False
                self.desk.accepted(self)
                self._release_body()
        elif self.head.is_http_11:
            self.client.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, phrase, b"".join(head.fields)))

    def answer_began(self, head: AnswerHead, phrase: bytes) -> None:
        what: Happened | None = None
        if head.refused:
            what = REFUSALS.get(head.refused)
        elif head.outcome == _OUTCOME_IS_UNKNOWN:
            what = Happened.UNCERTAIN
        if what is not None:
            connection = self.connection
            self.desk.turned_down(self, what, head.epoch, head.leader)
            if self.connection is not connection or connection is None:
                return
        self.desk.accepted(self)
        self.state = ANSWERING
        request = self.head
        is_last = self.client.is_last(self) or not self.body.is_whole
        status = self.status = head.status
        if status == 204:
            framing = b""
        elif head.length >= 0:
            framing = b""  # its own stands among the fields
        elif request.is_http_11 and (head.is_chunked or status != 304):
            self._is_chunking = request.method != b"HEAD" and status != 304
            framing = b"Transfer-Encoding: chunked\r\n" if self._is_chunking or head.is_chunked else b""
        else:
            is_last = is_last or status != 304
            framing = b""
        if is_last:
            option = b"Connection: close\r\n"
        elif not request.is_http_11:
            option = b"Connection: keep-alive\r\n"
        else:
            option = b""
        if not head.has_date:  # RFC 9110, 6.6.1: whoever passes on an answer without one adds it
            framing += b"Date: %b\r\n" % self.desk.date()
        self._is_last = is_last
        if self.is_waiting_for_100:  # answered without having asked for the body: what comes of it is thrown away
            self.is_blocked = False
            self.client.set_reading()
        self._pending = b"HTTP/1.1 %d %b\r\n%b%b%b\r\n" % (status, phrase, b"".join(head.fields), framing, option)

    def answer_continued(self, data: bytes) -> None:
        self.answer_bytes += len(data)
        if self._is_chunking:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        pending = self._pending
        client = self.client
        if pending:
            self._pending = b""
            if len(data) <= JOIN_BYTES_MAX:
                client.write(pending + data)
            else:
                client.write_two(pending, data)
        else:
            client.write(data)
        client.touch()
        if client.is_full and self.connection is not None:
            self.connection.pause()

    def trailers_came(self, fields: Fields, kinds: Kinds) -> None:
        if self._is_chunking:
            self._trailers = trailer_lines(fields, kinds)

    def answer_ended(self) -> None:
        self.connection = None
        rest = b"%b0\r\n%b\r\n" % (self._pending, self._trailers) if self._is_chunking else self._pending
        if rest:
            self._pending = b""
            self.client.write(rest)
        self._end("answered")
        self.client.exchange_ended(self, is_last=self._is_last or not self.body.is_whole)

    def switched(self, head: AnswerHead, phrase: bytes, rest: bytes) -> None:
        if not self.head.upgrade:  # nobody asked for it
            if self.connection is not None:
                self.connection.abort()
            return
        self.desk.accepted(self)
        self.state = TUNNEL
        self.status = 101
        self.client.write(
            b"HTTP/1.1 101 %b\r\n%bConnection: Upgrade\r\nUpgrade: %b\r\n\r\n%b"
            % (phrase, b"".join(head.fields), head.upgrade, rest)
        )
        self.client.open_tunnel(self)

    def tunnel_half_closed(self) -> bool:
        self.is_half_closed = self.client.half_close()
        return self.is_half_closed

    def tunnelled(self, data: bytes) -> None:
        self.client.touch()
        self.client.write(data)
        if self.client.is_full and self.connection is not None:
            self.connection.pause()

    def lost(self) -> None:
        self.connection = None
        if self.state == ANSWERING and self._pending:  # of the answer nothing has left for the client yet
            self._pending = b""
            self._is_chunking = False
            self.status = 0
            self.state = SENT
        if self.state == SENT:
            self.is_waiting_for_100 = False
            self.desk.happened(self, Happened.BROKEN)
        elif self.state == ANSWERING:
            self.desk.happened(self, Happened.TORN)
        elif self.state == TUNNEL:
            self._end("answered")
            self.client.exchange_ended(self, is_last=True)

    def session_ended(self, sid: str) -> None:
        """The session has ended. What its connections have already brought comes first; then this gives up."""
        if self.leader is None or self.leader.sid not in ("", sid):
            return
        if self.connection is not None:
            asyncio.get_running_loop().call_later(SESSION_GRACE_S, self._give_up_on, self.connection)
        elif self.state == WAITING and self.pool is not None:
            self.pool.withdraw(self)
            self.desk.happened(self, Happened.UNSENT)

    def silent(self) -> None:
        """No answer has begun in time."""
        self._let_go()
        self.desk.happened(self, Happened.SILENT)

    def stalled(self) -> None:
        """The client's body has stood still for too long."""
        self.refuse_body(RequestError(Problem.TIMED_OUT, "the request's body stopped arriving", status=408))
        if self.state == COLLECTING:
            self.start()

    def crowded_out(self) -> None:
        """It has waited for a connection for too long."""
        self.take_back()
        self.fail(CROWDED)

    def upstream_full(self) -> None:
        self.is_blocked = True
        self.client.set_reading()

    def upstream_drained(self) -> None:
        self.is_blocked = False
        self.client.set_reading()

    # --- inside

    def _make_prefix(self) -> bytes:
        head = self.head
        upgrade = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade if head.upgrade else b""
        route = b"%b: %d\r\n" % (_SHARD_NAME, self.shard)
        if self.key is not None:
            route += b"%b: %b\r\n" % (_KEY_NAME, encode_key(self.key))
        self._prefix = b"%b %b HTTP/1.1\r\nHost: %b\r\n%bX-Request-Id: %b\r\n%b%b" % (
            head.method, head.target, head.host, head.fields, self.request_id, upgrade, route,
        )  # fmt: skip
        return self._prefix

    def _give_up_on(self, connection: Upstream) -> None:
        if self.connection is not connection:
            return
        if self.state == SENT:
            self._let_go()
            self.is_waiting_for_100 = False
            self.desk.happened(self, Happened.FORCED)
        elif self.state == ANSWERING:
            self._let_go()
            self.desk.happened(self, Happened.TORN)
        elif self.state == TUNNEL:
            connection.abort()

    def close_tunnel(self) -> None:
        """The shard has moved."""
        if self.connection is not None:
            self.connection.abort()

    def _let_go(self) -> None:
        connection = self.connection
        self.connection = None
        if connection is not None:
            connection.taker = None
            connection.abort()

    def _release_body(self) -> None:
        """The worker has admitted it: what was kept leaves, and the client may go on."""
        if not self.told_continue:
            self.told_continue = True
            self.client.write(CONTINUE)
        self.is_blocked = False
        for piece in self._free():
            self._stream(piece)
        if self.body.is_whole:
            self._finish_body()
        self.client.set_reading()

    def _stream(self, data: bytes) -> None:
        self.client.touch()
        framed = self.body.framed(data)
        if self.connection is not None:
            self.connection.write(framed)

    def _finish_body(self) -> None:
        if self.connection is not None:
            if self.body.ending:
                self.connection.write(self.body.ending)
            self.connection.is_sent = self.body.is_as_long_as_said

    def _free(self) -> list[bytes]:
        """What was kept of the body, which is not kept any more."""
        if not self.body.kept_bytes:
            return []
        self.desk.keep(-self.body.kept_bytes)
        return self.body.let_go()

    def _end(self, outcome: str) -> None:
        if self.state != DONE:
            self.state = DONE
            self._free()
            self.is_blocked = False
            self.desk.ended(self, outcome)


CROWDED: Final = Answer(Problem.OVERLOADED, 503, "all connections to the shard's leader are in use", 1)

# A worker that ended in order has answered before its session ends, but the store's news may overtake its answer.
SESSION_GRACE_S: Final = 0.05

_EPOCH_NAME: Final = contract.EPOCH.encode()
_KEY_NAME: Final = contract.KEY.encode()
_SHARD_NAME: Final = contract.SHARD.encode()
_OUTCOME_IS_UNKNOWN: Final = contract.OUTCOME_IS_UNKNOWN.encode()
_OUTCOMES: Final = {
    Problem.KEY_MISSING: "bad-request",
    Problem.KEY_AMBIGUOUS: "bad-request",
    Problem.KEY_TOO_LONG: "bad-request",
    Problem.SUSPENDED: "not-led",
}
