"""Heads that have come before: what the parser has read and the rules have found good is known again by its bytes.

Clients and workers say the same fields over and over: a request differs from the last one in its first line and in the
values of its key and of an identifier or two, an answer in its date, once a second. What is known again need not be
parsed and judged again.

What it never does: judge. Law: a value may hang on the bytes that it is kept under and on nothing else.
"""

from dataclasses import dataclass
from typing import Final, TypeVar

from shardlead.router.heads import Fields

KNOWN_MAX: Final = 2_048  # of each generation: the younger one takes the older one's place when it is full
BYTES_MAX: Final = 1_024  # longer ones are not kept

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class RequestFields:
    """An ordinary request's fields, whatever the values that were cut out of its lines: the key's, and those that
    differ from request to request of a client. `head`: how it leaves, a template for its method, target, those values,
    what is told of the client, the request's number unless it brings an id, shard, key and epoch; `length`: of the
    body."""

    fields: Fields
    marks: tuple[bytes, ...]  # what stands before each value that was cut out, in order: a line end and a name
    cut: tuple[int, ...]  # which of the fields they are
    key_at: int  # which of those values is the key's; -1: no field has the key
    id_at: int  # which one is the request's id; -1: none of them
    length: int
    head: bytes
    host: bytes
    has_request_id: bool


@dataclass(frozen=True, slots=True)
class AnswerLooks:
    """An ordinary answer. `head`: as it leaves, without the empty line; `length`: of the body."""

    head: bytes
    length: int


class Known(dict[bytes, V | None]):
    """Values by strings of bytes: at least the last 2,048 different ones that were kept or asked for. `known[seen]`
    asks, and gives None for what is not known."""

    __slots__ = ("_old",)

    def __init__(self) -> None:
        self._old: dict[bytes, V | None] = {}

    def __missing__(self, seen: bytes) -> V | None:
        value = self._old.get(seen)
        if value is not None:
            self.keep(seen, value)
        return value

    def keep(self, seen: bytes, value: V) -> None:
        """From now on these bytes are known, unless there are too many of them."""
        if len(seen) > BYTES_MAX:
            return
        if len(self) >= KNOWN_MAX:
            self._old = dict(self)
            self.clear()
        self[seen] = value
