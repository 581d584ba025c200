"""How fast bytes move: whether a slow sender or taker is slow, or only pretends to move.

What it never does: end anything; the connection's sweep asks, about once a second, and acts.

Law: slow is who moves less than `rate_min` bytes a second, measured over windows of some length, so that a pause is no
offence. What the kernel has not sent yet counts as not moved: it takes megabytes from us at once, and says nothing for
as long as the client needs to take a third of them.
"""

import asyncio
import fcntl
import socket
import sys
import termios
from typing import Final

_NOTHING: Final = bytes(4)


class Pace:
    """Bytes that become fewer; asked again and again whether they do so too slowly."""

    __slots__ = ("_left", "_moved", "_since_s")

    def __init__(self, since_s: float) -> None:
        self._since_s = since_s
        self._left = -1
        self._moved = 0

    def falls(self, left: int, now_s: float, window_s: float, rate_min: float) -> bool:
        """Whether `left`, the bytes still to be moved, falls by `rate_min` a second; a window that is not over yet
        counts as good."""
        if 0 <= left < self._left:
            self._moved += self._left - left
        self._left = left
        passed_s = now_s - self._since_s
        if passed_s <= window_s:
            return True
        is_good = self._moved > 0 and self._moved >= rate_min * passed_s
        self._since_s, self._moved = now_s, 0
        return is_good


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Bytes written that have not been acknowledged by the peer, those in the kernel included (where it tells)."""
    size = transport.get_write_buffer_size()
    raw: socket.socket | None = transport.get_extra_info("socket")
    if raw is None:
        return size
    try:
        queued = int.from_bytes(fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, _NOTHING), sys.byteorder)
    except OSError:
        return size
    return size + queued
