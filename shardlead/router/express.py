"""The short way of an ordinary request: one that came whole in one packet, goes to a known leader over an idle
connection, and is answered whole in one packet. Most requests are such.

What it never does: hold, send again, stream, or decide. Whatever is out of the ordinary, at any moment, is not its
business: `expand` makes the exchange that the request would have been, as it stands, and that one goes on.

Law: nothing is left out. The parser has read every byte, or the very same fields before (`known`); fields, framing,
host and key are judged by the rules of `heads`, `plans` and `core.routing`; what differs is the work. A message leaves
on this way only if its framing is one plain Content-Length that is true, or none and no body.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from shardlead.config import RouterSettings
from shardlead.core.contract import RESEND_BODY_BYTES_MAX
from shardlead.core.routing import KeyRules, encode_key
from shardlead.core.shardmap import Leader
from shardlead.errors import RequestError
from shardlead.router.exchange import SENT, Client, Desk, Exchange
from shardlead.router.forwarded import Forwarder
from shardlead.router.heads import AnswerHead, Fields, Kinds, is_host, is_request_id, read_request
from shardlead.router.known import BYTES_MAX, Known, RequestFields
from shardlead.router.plans import Plans, RequestPlan, plain_lines, split_fields, without_keep_alive
from shardlead.router.pool import Pool
from shardlead.router.upstream import Upstream

_TARGET: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=:@/?%"
"""What a target known by its looks may consist of, and the key's value beside it: RFC 3986's characters of paths and
queries, and no others."""
_VISIBLE: Final = bytes(range(0x21, 0x7F))
_FIRST_LINE: Final = b"%b %b HTTP/1.1"
_OURS: Final = b"\r\n%bShardlead-Shard: %d\r\nShardlead-Key: %b\r\nShardlead-Epoch: %d\r\n\r\n"
_OURS_WITH_ID: Final = _OURS.replace(b"\r\n%b", b"\r\n%b%x\r\n")  # behind the request id's constant part
DIFFERING_MAX: Final = 4  # fields of one client that differ from request to request; who has more goes the long way
_IS_SAFE: Final = {b"GET": True, b"POST": False, b"PUT": False, b"DELETE": False, b"PATCH": False}


class ExpressDesk(Desk, Protocol):
    """The desk, for requests that need no decision."""

    def take_at_once(self, key: bytes, *, is_safe: bool, size: int) -> tuple[Upstream, Pool, Leader, int] | None:
        """An idle connection to the leader of the key's shard, and its pool, that leader and shard; `size` bytes of
        body count as kept from now on. None: something about it is not ordinary."""
        ...

    def answered_at_once(self, since_ns: int, size: int) -> None:
        """A request of `take_at_once` has been answered."""


class ExpressFront(Protocol):
    """What the short way needs of the router."""

    @property
    def settings(self) -> RouterSettings: ...
    @property
    def rules(self) -> KeyRules: ...
    @property
    def kinds(self) -> Kinds: ...
    @property
    def plans(self) -> Plans[RequestPlan]: ...
    @property
    def desk(self) -> ExpressDesk: ...
    @property
    def known(self) -> Known[RequestFields]: ...
    def now_ns(self) -> int: ...

    def next_number(self) -> int: ...


class ExpressClient(Client, Protocol):
    """The client's connection, as the short way sees it."""

    @property
    def forwarder(self) -> Forwarder: ...

    def answer_at_once(self, data: bytes) -> None:
        """This is the answer to the request under way, whole."""

    def take_over(self, exchange: Exchange) -> None:
        """The request under way goes on as this one."""


class Express:
    """One client connection's short way. `connection` is that of the request under way, if one is."""

    __slots__ = (
        "_before",
        "_body_bytes",
        "_body_bytes_max",
        "_client",
        "_desk",
        "_differing",
        "_forwarded",
        "_forwarded_and_id",
        "_front",
        "_head_bytes_max",
        "_host",
        "_known",
        "_marks",
        "_marks_of_bodies",
        "_sent",
        "_since_ns",
        "connection",
    )

    def __init__(self, front: ExpressFront, client: ExpressClient) -> None:
        self.connection: Upstream | None = None
        self._front = front
        self._client = client
        self._desk = front.desk
        self._known = front.known
        self._host: bytes | None = None  # of the last one; a client's first may be empty
        self._forwarded = b""  # what is told of the client, for that host; and the begin of the request's id, too
        self._forwarded_and_id = b""
        self._head_bytes_max = front.settings.head_bytes_max
        self._body_bytes_max = min(RESEND_BODY_BYTES_MAX, front.settings.body_bytes_max)
        self._body_bytes = 0  # of the request under way, as the next two
        self._since_ns = 0
        # What stands before the values that differ in this client's requests, in those with a body, and their names:
        self._marks: tuple[bytes, ...] = ()
        self._marks_of_bodies: tuple[bytes, ...] = ()
        self._differing: frozenset[bytes] = frozenset()
        self._before: bytes | None = b""  # the lines of the last one that was not known; None: too much differs
        self._sent: tuple[bytes, bytes, RequestFields, Sequence[bytes], bytes, bytes, int, Leader, Pool, int]

    def __repr__(self) -> str:
        return f"<Express {'idle' if self.connection is None else f'waits for {self.connection!r}'}>"

    # --- the client's side

    def send(
        self, data: bytes, method: bytes, target: bytes, fields: Fields, plan: RequestPlan, body_bytes: int
    ) -> bool:
        """Send the request that is this packet; False: it must go the long way, and nothing has happened."""
        end = data.find(b"\r\n\r\n")
        line = len(method) + len(target) + 1  # where the request line's " HTTP/1.1" begins
        said = data[line + 9 : end]
        seen = dict(fields)
        if (
            end + 4 + body_bytes != len(data)
            or data[line : line + 9] != b" HTTP/1.1"
            or said != plain_lines(fields)
            or len(seen) != len(fields)
        ):
            return False
        if not is_host(seen[plan.host]) or b"#" in target:
            return False
        if plan.length:
            if seen[plan.length] != b"%d" % body_bytes:
                return False
        elif body_bytes:
            return False
        lines = said
        if plan.connection:
            lines = without_keep_alive(said + b"\r\n", plan.connection, seen[plan.connection])[:-2]
            if not lines:
                return False
        if plan.request_id and not is_request_id(seen[plan.request_id]):
            return False
        self._note_differing(said, seen, plan)
        cut = tuple([at for at, (name, _) in enumerate(fields) if name == plan.key or name in self._differing])
        names = [fields[at][0] for at in cut]
        values = [fields[at][1] for at in cut]
        marks = tuple([b"\r\n%b: " % name for name in names])
        known = RequestFields(
            fields,
            marks,
            cut,
            names.index(plan.key) if plan.key else -1,
            names.index(plan.request_id) if plan.request_id in names else -1,
            body_bytes,
            _template(_cut(lines, marks, values), has_request_id=bool(plan.request_id)),
            seen[plan.host],
            bool(plan.request_id),
        )
        if not self._go(data, method, target, known, values, end):
            return False
        if not b"".join(values).translate(None, _VISIBLE):
            if body_bytes:
                self._marks_of_bodies = marks
            else:
                self._marks = marks
            self._known.keep(b"".join(_cut(said, marks, values)), known)
        return True

    def _note_differing(self, said: bytes, seen: Mapping[bytes, bytes], plan: RequestPlan) -> None:
        """Compare a request with the last one that was not known: whose values differ, and mean nothing to us."""
        if self._before is None or len(said) > BYTES_MAX:
            return
        ours = (plan.host, plan.length, plan.connection, plan.key)
        differing = self._differing.union(
            name for name, value in split_fields(self._before) if seen.get(name, value) != value and name not in ours
        )
        if len(differing) > DIFFERING_MAX:
            self._differing, self._before = frozenset(), None
        else:
            self._differing, self._before = differing, said

    def send_known(self, data: bytes) -> bool:
        """Send the request that is this packet if its fields have come before, byte by byte but for the values that
        differ; False: nothing has happened. What is new is read here, and must be such that it can be read in one way
        only."""
        # Lines known begin with a line end and have no empty one among them, so that these need not be looked for
        # here: a wrong guess at where they begin and end finds nothing.
        line = data.find(b"\n") - 1
        if data.endswith(b"\r\n\r\n"):
            end = len(data) - 4
            marks = self._marks
        else:
            end = data.find(b"\r\n\r\n")
            marks = self._marks_of_bodies
        if end < line or line < 0:
            return False
        at = line
        said = b""
        values: list[bytes] = []
        for mark in marks:
            begin = data.find(mark, at, end)
            if begin < 0:  # it may be one of the requests in which nothing is cut out
                at, said, marks = line, b"", ()
                values.clear()
                break
            begin += len(mark)
            said += data[at:begin]
            at = data.find(b"\n", begin) - 1
            values.append(data[begin:at])
        known = self._known[said + data[at:end]]
        if known is None or end + 4 + known.length != len(data):
            return False
        if known.marks is not marks and known.marks != marks:
            return False
        method, _, target = data[:line].partition(b" ")
        if target[-9:] != b" HTTP/1.1":
            return False
        target = target[:-9]
        has_key = known.key_at >= 0
        if (
            (target + values[known.key_at] if has_key else target).translate(None, _TARGET)
            or (len(values) > has_key and b"".join(values).translate(None, _VISIBLE))
            or (known.id_at >= 0 and not is_request_id(values[known.id_at]))
        ):
            return False
        return self._go(data, method, target, known, values, end)

    def _go(
        self, data: bytes, method: bytes, target: bytes, known: RequestFields, values: Sequence[bytes], end: int
    ) -> bool:
        """Send it, if nothing about it or at this moment is out of the ordinary. `values`: of the fields cut out."""
        front = self._front
        is_safe = _IS_SAFE.get(method)
        body_bytes = known.length
        if is_safe is None or end > self._head_bytes_max or body_bytes > self._body_bytes_max or target[:1] != b"/":
            return False
        try:
            key = front.rules.find(target, (values[known.key_at],) if known.key_at >= 0 else ())
        except RequestError:
            return False
        if key is None:
            return False
        desk = self._desk
        taken = desk.take_at_once(key, is_safe=is_safe, size=body_bytes)
        if taken is None:
            return False
        connection, pool, leader, shard = taken
        if known.host != self._host:
            self._host = known.host
            self._forwarded = self._client.forwarder.write(known.host, None)
            self._forwarded_and_id = b"%bX-Request-Id: %b" % (self._forwarded, desk.id_prefix)
        self._since_ns = front.now_ns()
        self._body_bytes = body_bytes
        body = data[end + 4 :] if body_bytes else b""
        number = front.next_number()
        self._sent = method, target, known, values, body, key, shard, leader, pool, number
        self.connection = connection
        connection.taker = connection.quick = self
        sent_key, epoch = encode_key(key), leader.epoch
        if known.has_request_id:
            head = known.head % (method, target, *values, self._forwarded, shard, sent_key, epoch)
        else:
            head = known.head % (method, target, *values, self._forwarded_and_id, number, shard, sent_key, epoch)
        connection.write(head + body if body else head)
        return True

    # --- the worker's side

    def answered(self, data: bytes) -> None:
        """The answer, whole and as it goes to the client."""
        self.connection = None
        self._client.answer_at_once(data)
        self._desk.answered_at_once(self._since_ns, self._body_bytes)

    # --- the long way, from here on

    def expand(self) -> Exchange:
        """The exchange that this request is now: sent, and waiting for its answer."""
        connection = self.connection
        assert connection is not None, "no request is under way"
        front, client = self._front, self._client
        method, target, known, values, body, key, shard, leader, pool, number = self._sent
        fields = [*known.fields]
        for at, value in zip(known.cut, values, strict=True):
            fields[at] = (fields[at][0], value)
        head = read_request(method, target, "1.1", fields, front.kinds, client.forwarder)
        exchange = Exchange(self._desk, client, head, number, self._since_ns)
        exchange.key = key
        exchange.shard = shard
        exchange.leader = leader
        exchange.pool = pool
        exchange.connection = connection
        exchange.state = SENT
        if body:
            exchange.body.take_whole(body)
        if connection.quick is self:  # else it has ended, and this is about to hear of it
            connection.taker = exchange
            connection.quick = None
        self.connection = None
        client.take_over(exchange)
        return exchange

    # --- `upstream.Taker`: what an ordinary request never hears of

    def connected(self, connection: Upstream) -> bool:
        raise AssertionError(f"{self!r} takes {connection!r} itself")

    def not_connected(self) -> None:
        raise AssertionError(f"{self!r} waits for no connection")

    def informed(self, head: AnswerHead, phrase: bytes) -> None:
        self.expand().informed(head, phrase)

    def answer_began(self, head: AnswerHead, phrase: bytes) -> None:
        self.expand().answer_began(head, phrase)

    def answer_continued(self, data: bytes) -> None:
        self.expand().answer_continued(data)

    def answer_ended(self) -> None:
        self.expand().answer_ended()

    def trailers_came(self, fields: Fields, kinds: Kinds) -> None:
        self.expand().trailers_came(fields, kinds)

    def switched(self, head: AnswerHead, phrase: bytes, rest: bytes) -> None:
        self.expand().switched(head, phrase, rest)

    def tunnelled(self, data: bytes) -> None:
        self.expand().tunnelled(data)

    def tunnel_half_closed(self) -> bool:
        return self.expand().tunnel_half_closed()

    def lost(self) -> None:
        self.expand().lost()

    def session_ended(self, sid: str) -> None:
        self.expand().session_ended(sid)

    def upstream_full(self) -> None:
        self.expand().upstream_full()

    def upstream_drained(self) -> None:
        self.expand().upstream_drained()


def _cut(lines: bytes, marks: Sequence[bytes], values: Sequence[bytes]) -> list[bytes]:
    """What is left of the lines without these values, each behind its mark."""
    pieces = []
    at = 0
    for mark, value in zip(marks, values, strict=True):
        end = lines.index(mark, at) + len(mark)
        pieces.append(lines[at:end])
        at = end + len(value)
    return [*pieces, lines[at:]]


def _template(pieces: Sequence[bytes], *, has_request_id: bool) -> bytes:
    """How a request of these lines leaves, in the words of `RequestFields.head`."""
    lines = b"%b".join([piece.replace(b"%", b"%%") for piece in pieces])
    return _FIRST_LINE + lines + (_OURS if has_request_id else _OURS_WITH_ID)
