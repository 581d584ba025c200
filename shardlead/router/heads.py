"""Heads of messages: what the router takes from a request's and an answer's header fields, and what it sends on.

What it never does: touch a socket. It is the request path, so it is written for speed: one dict lookup a field tells
what to do with it, and fields that pass are joined as the bytes they came in.

Law: hop-by-hop fields go; so does everything that begins with `Shardlead-`, both ways, so that nobody but the
runtimes can speak the contract. Framing is our own on both sides: a message leaves with exactly one Content-Length or
one `Transfer-Encoding: chunked`, never with what it came in. What could be read in two ways is refused. Trailers pass
where the next hop is chunked, less all that frames, routes, authenticates or controls a message (`trailer_lines`). A
name that becomes one of ours once its underscores are read as hyphens, as gateways to CGI and WSGI read them, goes too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from shardlead.core import contract
from shardlead.core.contract import Problem
from shardlead.errors import RequestError

Fields = Sequence[tuple[bytes, bytes]]

# What to do with a field. Those from CONNECTION on are looked at one by one.
PASS: Final = 0
DROP: Final = 1
CONNECTION: Final = 2
CONTENT_LENGTH: Final = 3
TRANSFER_ENCODING: Final = 4
HOST: Final = 5
EXPECT: Final = 6
UPGRADE: Final = 7
FORWARDED_FOR: Final = 8
FORWARDED_PROTO: Final = 9
FORWARDED_HOST: Final = 10
FORWARDED: Final = 11
IDEMPOTENCY_KEY: Final = 12
REFUSED: Final = 13
EPOCH: Final = 14
LEADER: Final = 15
OUTCOME: Final = 16
REQUEST_ID: Final = 17
TE: Final = 18
DATE: Final = 19
KEY_BIT: Final = 32  # added where a key rule names the field

_HOP_BY_HOP: Final = {
    b"connection": CONNECTION,
    b"keep-alive": DROP,
    b"proxy-connection": DROP,
    b"proxy-authenticate": DROP,
    b"proxy-authorization": DROP,
    b"trailer": DROP,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"upgrade": UPGRADE,
    b"content-length": CONTENT_LENGTH,
}
_OF_REQUESTS: Final = {
    **_HOP_BY_HOP,
    b"http2-settings": DROP,
    b"host": HOST,
    b"expect": EXPECT,
    b"te": TE,
    b"x-request-id": REQUEST_ID,
    b"x-forwarded-for": FORWARDED_FOR,
    b"x-forwarded-proto": FORWARDED_PROTO,
    b"x-forwarded-host": FORWARDED_HOST,
    b"forwarded": FORWARDED,
    contract.IDEMPOTENCY_KEY.lower().encode(): IDEMPOTENCY_KEY,
}
_OF_ANSWERS: Final = {
    **_HOP_BY_HOP,
    b"te": DROP,
    b"date": DATE,
    contract.REFUSED.lower().encode(): REFUSED,
    contract.EPOCH.lower().encode(): EPOCH,
    contract.LEADER.lower().encode(): LEADER,
    contract.OUTCOME.lower().encode(): OUTCOME,
}
_RESERVED: Final = contract.RESERVED_PREFIX.encode()
_HOST_BYTES: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+;=:[]%"  # RFC 3986
_KINDS_KEPT_MAX: Final = 4_096  # spellings of field names remembered; a client that invents more just pays the look-up
_NAME_KEPT_BYTES_MAX: Final = 64
_REQUEST_ID_BYTES_MAX: Final = 128
_REQUEST_ID_BYTES: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~:+/=@"
_NEVER_TRAILERS: Final = frozenset(  # RFC 9110, 6.5.1: routing, controls, conditions, authentication, content format
    b"accept-ranges age authorization cache-control content-disposition content-encoding content-language "
    b"content-location content-range content-type cookie date expires if-match if-modified-since if-none-match "
    b"if-range if-unmodified-since location max-forwards pragma range retry-after set-cookie traceparent tracestate "
    b"vary warning www-authenticate".split()
)
_LENGTH_DIGITS_MAX: Final = 20  # of 64 bits; leading zeros count, for Python converts no more than 4,300 digits


class Kinds:
    """What to do with a field, by its name as spelled; remembers spellings."""

    __slots__ = ("_by_name", "_by_spelling")

    def __init__(self, by_name: dict[bytes, int], key_headers: frozenset[bytes] = frozenset()) -> None:
        self._by_name = by_name | {name: by_name.get(name, PASS) | KEY_BIT for name in key_headers}
        self._by_spelling: dict[bytes, int] = {}

    def of(self, name: bytes) -> int:
        """The kind of a field."""
        kind = self._by_spelling.get(name)
        return self.learn(name) if kind is None else kind

    def learn(self, name: bytes) -> int:
        """The kind of a field whose spelling is not known yet."""
        lower = name.lower()
        kind = self._by_name.get(lower)
        if kind is None:
            kind = PASS
            if lower.startswith(_RESERVED):
                kind = DROP
            elif b"_" in lower:
                meant = lower.replace(b"_", b"-")
                if meant in self._by_name or meant.startswith(_RESERVED):
                    kind = DROP
        if len(self._by_spelling) < _KINDS_KEPT_MAX and len(name) <= _NAME_KEPT_BYTES_MAX:
            self._by_spelling[name] = kind
        return kind


def request_kinds(key_headers: frozenset[bytes]) -> Kinds:
    """Kinds of a request's fields; `key_headers` are the names (lower case) that key rules look at."""
    return Kinds(_OF_REQUESTS, key_headers)


def answer_kinds() -> Kinds:
    """Kinds of an answer's fields."""
    return Kinds(_OF_ANSWERS)


class ForwardedWriter(Protocol):
    """Writes the fields that tell whom a request came from."""

    def write(self, host: bytes, came: dict[int, list[bytes]] | None) -> bytes:
        """Lines, ready to be sent. `came`: what the client sent of them, by kind."""
        ...


@dataclass(slots=True)
class RequestHead:
    """A request's head, understood. `length` -1: no Content-Length. `fields` pass on as they are."""

    method: bytes
    target: bytes
    fields: bytes
    host: bytes
    key_values: Sequence[bytes]
    length: int
    is_chunked: bool
    is_keep_alive: bool
    is_http_11: bool
    expects_continue: bool
    upgrade: bytes  # what to change to, if Connection asks for it
    has_upgrade: bool  # an Upgrade field came
    has_idempotency_key: bool
    request_id: bytes  # b"": none came, or none that can be passed on

    @property
    def has_body(self) -> bool:
        return self.is_chunked or self.length > 0


def is_host(host: bytes) -> bool:
    """Whether a Host field's value can be one, as far as a router must know."""
    return not host.translate(None, _HOST_BYTES)


def read_request(
    method: bytes, target: bytes, version: str, came: Fields, kinds: Kinds, forwarder: ForwardedWriter
) -> RequestHead:
    """Understand a request's head. Raises RequestError (with its status) for whatever is not allowed."""
    if version != "1.1" and version != "1.0":
        raise RequestError(Problem.BAD_REQUEST, f"HTTP/{version} is not spoken here", status=505)
    is_http_11 = version == "1.1"
    spellings = kinds._by_spelling  # noqa: SLF001  # the same module; one attribute instead of a call a field
    parts: list[bytes] = []
    key_values: list[bytes] = []
    forwarded: dict[int, list[bytes]] | None = None
    options: list[bytes] = []
    host: bytes | None = None
    length = -1
    is_chunked = has_idempotency_key = expects_continue = wants_trailers = False
    upgrade = b""
    request_id: bytes | None = None
    for name, value in came:
        kind = spellings.get(name)
        if kind is None:
            kind = kinds.learn(name)
        if kind >= KEY_BIT:
            key_values.append(value)
            kind -= KEY_BIT
        if kind == PASS:
            parts += (name, b": ", value, b"\r\n")
        elif kind == DROP:
            pass
        elif kind == HOST:
            if host is not None:
                raise RequestError(Problem.BAD_REQUEST, "two Host fields")
            host = value
        elif kind == CONNECTION:
            options += [option.strip().lower() for option in value.split(b",")]
        elif kind == CONTENT_LENGTH:
            value = value.strip(b" \t")  # what surrounds it is no part of it
            if length >= 0 or not value.isdigit() or len(value) > _LENGTH_DIGITS_MAX:
                raise RequestError(Problem.BAD_REQUEST, "Content-Length is not one number")
            length = int(value)
        elif kind == TRANSFER_ENCODING:
            if is_chunked or value.strip().lower() != b"chunked":
                raise RequestError(Problem.BAD_REQUEST, "the only Transfer-Encoding understood is chunked", status=501)
            is_chunked = True
        elif kind == EXPECT:
            if value.strip().lower() != b"100-continue":
                raise RequestError(Problem.BAD_REQUEST, "the only expectation understood is 100-continue", status=417)
            expects_continue = True
        elif kind == UPGRADE:
            if upgrade or not value:
                raise RequestError(Problem.BAD_REQUEST, "Upgrade twice or empty")
            upgrade = value
        elif kind == IDEMPOTENCY_KEY:
            has_idempotency_key = True
            parts += (name, b": ", value, b"\r\n")
        elif kind == REQUEST_ID:
            request_id = value if request_id is None and is_request_id(value) else b""
        elif kind == TE:
            wants_trailers = any(part.partition(b";")[0].strip().lower() == b"trailers" for part in value.split(b","))
        else:
            if forwarded is None:
                forwarded = {}
            forwarded.setdefault(kind, []).append(value)
    if is_chunked and (length >= 0 or not is_http_11):
        raise RequestError(Problem.BAD_REQUEST, "Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    if target[:1] != b"/" or method == b"CONNECT":
        target, host = _origin_form(method, target, host)
    elif b"#" in target:
        raise RequestError(Problem.BAD_REQUEST, "a fragment in the request target")
    if host is None:
        if is_http_11:
            raise RequestError(Problem.BAD_REQUEST, "no Host field")
        host = b""
    elif not is_host(host):
        raise RequestError(Problem.BAD_REQUEST, "a Host that is none")
    is_keep_alive = is_http_11
    has_upgrade = bool(upgrade)
    if options:
        if b"close" in options:
            is_keep_alive = False
        elif b"keep-alive" in options:
            is_keep_alive = True
        if b"upgrade" not in options:
            upgrade = b""
        parts = _without(parts, options, kinds)
    else:
        upgrade = b""
    parts.append(forwarder.write(host, forwarded))
    if wants_trailers and not upgrade:
        parts.append(b"Connection: TE\r\nTE: trailers\r\n")
    return RequestHead(
        method,
        target,
        b"".join(parts),
        host,
        key_values,
        length,
        is_chunked,
        is_keep_alive,
        is_http_11,
        expects_continue and is_http_11,
        upgrade,
        has_upgrade,
        has_idempotency_key,
        request_id or b"",
    )


def is_request_id(value: bytes) -> bool:
    """Whether it can be passed on, and stand in logs."""
    return 0 < len(value) <= _REQUEST_ID_BYTES_MAX and not value.translate(None, _REQUEST_ID_BYTES)


def _origin_form(method: bytes, target: bytes, host: bytes | None) -> tuple[bytes, bytes | None]:
    """The target as "/path?query" and the Host that goes with it (RFC 9112, 3.2: the absolute form's wins)."""
    if target == b"*" and method == b"OPTIONS":
        return target, host
    if method == b"CONNECT":
        raise RequestError(Problem.BAD_REQUEST, "CONNECT is for forward proxies, which this is none", status=501)
    if target[:7].lower() == b"http://" and b"#" not in target:
        authority, slash, path = target[7:].partition(b"/")
        if b"?" not in authority and authority:
            return slash + path or b"/", authority
    raise RequestError(Problem.BAD_REQUEST, "the request target is not a path")


_ORDINARY_OPTIONS: Final = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings", b""})


def _without(parts: list[bytes], options: list[bytes], kinds: Kinds) -> list[bytes]:
    """The fields that pass, less those that `Connection` names; fields we need ourselves cannot be named away."""
    named = {option for option in options if option not in _ORDINARY_OPTIONS}
    if not named:
        return parts
    kept: list[bytes] = []
    for at in range(0, len(parts), 4):
        if parts[at].lower() not in named or kinds.learn(parts[at]) != PASS:
            kept += parts[at : at + 4]
    return kept


@dataclass(slots=True)
class AnswerHead:
    """A worker's answer's head, understood. `fields` pass on as they are, Content-Length among them. `length` -1: none
    given."""

    status: int
    fields: list[bytes]
    length: int
    is_chunked: bool
    is_last: bool  # the worker says Connection: close
    upgrade: bytes
    refused: bytes
    epoch: int
    leader: bytes
    outcome: bytes
    has_date: bool


def _without_length(parts: list[bytes]) -> list[bytes]:
    """An answer's fields without Content-Length: a 1xx or 204 has none (RFC 9110, 8.6)."""
    return [
        piece
        for at in range(0, len(parts), 4)
        if parts[at].lower() != b"content-length"
        for piece in parts[at : at + 4]
    ]


def read_answer(status: int, came: Fields, kinds: Kinds) -> AnswerHead:
    """Understand an answer's head. Raises RequestError for a framing that could be read in two ways."""
    spellings = kinds._by_spelling  # noqa: SLF001  # as above
    parts: list[bytes] = []
    length = -1
    is_chunked = is_last = has_date = False
    upgrade = refused = leader = outcome = b""
    epoch = 0
    options: list[bytes] = []
    for name, value in came:
        kind = spellings.get(name)
        if kind is None:
            kind = kinds.learn(name)
        if kind == PASS:
            parts += (name, b": ", value, b"\r\n")
        elif kind == DATE:
            has_date = True
            parts += (name, b": ", value, b"\r\n")
        elif kind == DROP:
            pass
        elif kind == CONTENT_LENGTH:
            value = value.strip(b" \t")  # as above
            if length >= 0 or not value.isdigit() or len(value) > _LENGTH_DIGITS_MAX:
                raise RequestError(Problem.UPSTREAM_FAILED, "the worker's Content-Length is not one number")
            length = int(value)
            parts += (name, b": ", b"%d" % length, b"\r\n")
        elif kind == TRANSFER_ENCODING:
            if is_chunked or value.strip().lower() != b"chunked":
                raise RequestError(Problem.UPSTREAM_FAILED, "the worker's Transfer-Encoding is not understood")
            is_chunked = True
        elif kind == CONNECTION:
            options += [option.strip().lower() for option in value.split(b",")]
        elif kind == UPGRADE:
            upgrade = value
        elif kind == REFUSED:
            refused = value
        elif kind == EPOCH:
            epoch = int(value) if value.isdigit() and len(value) < 20 else 0
        elif kind == LEADER:
            leader = value
        else:
            outcome = value
    if is_chunked and length >= 0:
        raise RequestError(Problem.UPSTREAM_FAILED, "the worker's answer has two framings")
    if length >= 0 and (status < 200 or status == 204):
        parts = _without_length(parts)
    if options:
        is_last = b"close" in options
        parts = _without(parts, options, kinds)
    return AnswerHead(status, parts, length, is_chunked, is_last, upgrade, refused, epoch, leader, outcome, has_date)


def trailer_lines(came: Fields, kinds: Kinds) -> bytes:
    """Those trailers that may pass on, ready to be sent. What a header field decides, no trailer can: a field that
    frames, routes, authenticates or controls a message is left out, and so is one that we look at ourselves."""
    return b"".join(
        b"%b: %b\r\n" % field
        for field in came
        if kinds.learn(field[0]) == PASS and field[0].lower() not in _NEVER_TRAILERS
    )
