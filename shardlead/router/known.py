"""Heads that have come before: what the parser has read and the rules have found good is known again by its bytes.

Clients and workers say the same fields over and over: a request differs from the last one in its first line and in the
value of its key, an answer in its date, once a second. What is known again need not be parsed and judged again.

What it never does: judge. Law: a value may hang on the bytes that it is kept under and on nothing else.
"""

from typing import Final, Generic, NamedTuple, TypeVar

from shardlead.router.heads import Fields

KNOWN_MAX: Final = 2_048  # of each generation: the younger one takes the older one's place when it is full
BYTES_MAX: Final = 1_024  # longer ones are not kept

V = TypeVar("V")


class RequestFields(NamedTuple):
    """An ordinary request's fields, whatever the value of its key's. `first` and `rest`: the lines as they leave, each
    with a line end before it, up to the key's value and behind it (all in `first` if no field has the key); `length`:
    of the body."""

    fields: Fields
    key_at: int  # among the fields; -1: no field has the key
    length: int
    first: bytes
    rest: bytes
    host: bytes
    has_request_id: bool


class AnswerLooks(NamedTuple):
    """An ordinary answer. `head`: as it leaves, without the empty line; `length`: of the body."""

    head: bytes
    length: int


class Known(Generic[V]):
    """Values by strings of bytes: at least the last 2,048 different ones that were kept or asked for."""

    __slots__ = ("_new", "_old")

    def __init__(self) -> None:
        self._new: dict[bytes, V] = {}
        self._old: dict[bytes, V] = {}

    def get(self, seen: bytes) -> V | None:
        value = self._new.get(seen)
        if value is None and self._old:
            value = self._old.get(seen)
            if value is not None:
                self.keep(seen, value)
        return value

    def keep(self, seen: bytes, value: V) -> None:
        if len(seen) > BYTES_MAX:
            return
        if len(self._new) >= KNOWN_MAX:
            self._old, self._new = self._new, {}
        self._new[seen] = value
