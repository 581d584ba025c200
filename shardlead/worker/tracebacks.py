"""Which of the application's failures have their traceback logged: the first of a kind, and another one after a while.

A storage that is away fails the open() of a thousand shards, again and again, or each of a thousand requests a second.
A thousand tracebacks would hide all else, and say nothing that the first has not said. Each failure keeps its line.
"""

from typing import Final

from shardlead.clock import NS_PER_S, Clock

AGAIN_S: Final = 60
KINDS_MAX: Final = 100  # that are kept apart; beyond, all begin again
REASON_CHARACTERS_MAX: Final = 300

Kind = tuple[type[BaseException], str, int]


class Tracebacks:
    """What was told, and when. A kind is an exception's type and the line that raised it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._told_ns: dict[Kind, int] = {}

    def of(self, error: BaseException) -> BaseException | None:
        """For `exc_info=`: the error, or None if its traceback was told within AGAIN_S."""
        kind, now_ns = kind_of(error), self._clock.now_ns()
        told_ns = self._told_ns.get(kind)
        if told_ns is not None and now_ns - told_ns < AGAIN_S * NS_PER_S:
            return None
        if len(self._told_ns) >= KINDS_MAX:
            self._told_ns.clear()
        self._told_ns[kind] = now_ns
        return error


def kind_of(error: BaseException) -> Kind:
    """Type and place; a change of the text (a key, a shard) makes no other kind."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return (type(error), "", 0)
    return (type(error), place.tb_frame.f_code.co_filename, place.tb_lineno)


def in_a_line(error: BaseException) -> str:
    """Type and text, without line breaks, not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:REASON_CHARACTERS_MAX]
