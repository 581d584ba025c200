"""Ordinary messages: which lists of fields they carry, judged once for each list of names and remembered.

What it never does: parse, or judge what a field says beyond its being what the plan expects.

Law: an ordinary message has no hop-by-hop field but `Connection: keep-alive`, none of the contract's, none of whose
meaning a router takes part but Host, the key's and Idempotency-Key, each of these once, and at most one Content-Length.
Its other lines may pass as the bytes they came in: the parser has read them, and no other reading of them exists.
"""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final, Generic, NamedTuple, TypeVar

from shardlead.router.heads import (
    CONNECTION,
    CONTENT_LENGTH,
    DATE,
    HOST,
    IDEMPOTENCY_KEY,
    KEY_BIT,
    PASS,
    REQUEST_ID,
    Kinds,
)

PLANS_MAX: Final = 4_096  # lists of names remembered; a client that invents more just goes the long way
NAMES_BYTES_MAX: Final = 2_048
_PHRASES: Final = frozenset(status.phrase.encode() for status in HTTPStatus)
_KEEP_ALIVE: Final = frozenset({b"keep-alive", b"Keep-Alive"})

P = TypeVar("P")


class RequestPlan(NamedTuple):
    """How the fields are spelled that are looked at, in a request whose other fields pass; empty: there is none."""

    host: bytes
    key: bytes
    length: bytes
    connection: bytes
    request_id: bytes


class AnswerPlan(NamedTuple):
    """The same for an answer."""

    length: bytes
    connection: bytes


class Plans(Generic[P]):
    """What becomes of messages by their fields' names, in order and as spelled; None: they go the long way."""

    __slots__ = ("_kinds", "_known", "_make")

    def __init__(self, kinds: Kinds, make: Callable[[list[tuple[bytes, int]]], P | None]) -> None:
        self._known: dict[tuple[bytes, ...], P | None] = {}
        self._kinds = kinds
        self._make = make

    def of(self, names: tuple[bytes, ...]) -> P | None:
        """The plan of a message whose fields have these names."""
        plan = self._known.get(names)
        return self._learn(names) if plan is None and names not in self._known else plan

    def _learn(self, names: tuple[bytes, ...]) -> P | None:
        plan = self._make([(name, self._kinds.of(name)) for name in names])
        if len(self._known) < PLANS_MAX and sum(map(len, names)) <= NAMES_BYTES_MAX:
            self._known[names] = plan
        return plan


def request_plans(kinds: Kinds, headers_max: int) -> Plans[RequestPlan]:
    """For requests, whose field kinds are `kinds`."""

    def make(found: list[tuple[bytes, int]]) -> RequestPlan | None:
        keys = [name for name, kind in found if kind >= KEY_BIT]
        plain = [(name, kind & ~KEY_BIT) for name, kind in found]
        kinds_of_one = (HOST, CONTENT_LENGTH, CONNECTION, REQUEST_ID)
        hosts, lengths, connections, ids = (_of(kind, plain) for kind in kinds_of_one)
        if (
            len(found) > headers_max
            or not {kind for _, kind in plain} <= {PASS, IDEMPOTENCY_KEY, *kinds_of_one}
            or not set(keys).isdisjoint((*lengths, *connections, *ids))
            or len(hosts) != 1
            or max(map(len, (keys, lengths, connections, ids))) > 1
        ):
            return None
        return RequestPlan(hosts[0], *(names[0] if names else b"" for names in (keys, lengths, connections, ids)))

    return Plans(kinds, make)


def answer_plans(kinds: Kinds) -> Plans[AnswerPlan]:
    """For answers, whose field kinds are `kinds`."""

    def make(found: list[tuple[bytes, int]]) -> AnswerPlan | None:
        lengths, connections = _of(CONTENT_LENGTH, found), _of(CONNECTION, found)
        is_plain = {kind for _, kind in found} <= {PASS, CONTENT_LENGTH, CONNECTION, DATE}
        has_date = len(_of(DATE, found)) == 1  # one without is given one
        if not is_plain or not has_date or len(lengths) != 1 or len(connections) > 1:
            return None
        return AnswerPlan(lengths[0], connections[0] if connections else b"")

    return Plans(kinds, make)


def _of(kind: int, found: list[tuple[bytes, int]]) -> list[bytes]:
    return [name for name, each in found if each == kind]


def split_fields(head: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a head that the parser has read and found good, without its last line end."""
    fields = []
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        fields.append((name, value.strip(b" \t")))
    return fields


def without_keep_alive(message: bytes, name: bytes, value: bytes) -> bytes:
    """The message without its one `Connection: keep-alive`; empty if that is not what the field says."""
    if value not in _KEEP_ALIVE:
        return b""
    line = b"\r\n%b: %b\r\n" % (name, value)
    head, found, rest = message.partition(line)
    return b"%b\r\n%b" % (head, rest) if found else b""


def is_whole_answer(
    data: bytes, phrase: bytes, fields: Sequence[tuple[bytes, bytes]], length: bytes, body_bytes: int
) -> bool:
    """Whether the packet is one answer, framed as its Content-Length says, and nothing else."""
    end = data.find(b"\r\n\r\n")
    return (
        length == b"%d" % body_bytes
        and end + 4 + body_bytes == len(data)
        and data[13 + len(phrase) : end] == plain_lines(fields)  # 13: "HTTP/1.1 200 "
        and data.startswith(b"HTTP/1.1 ")
        and phrase in _PHRASES
    )


def plain_lines(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Their lines, each behind a line end and spelled "name: value". A head's own may be spelled otherwise: without
    the space, or with more of it, which is no part of the value."""
    return b"".join([b"\r\n%b: %b" % field for field in fields])
