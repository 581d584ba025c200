"""A request's body on its way through: kept while it may have to be sent again, else streamed.

What it never does: touch a connection; it says what to write.

Law: up to 64 KiB all of it is kept until the answer has come. A longer one, or one whose end is not in sight, is
*large*: what has come of it is kept only until a worker has admitted the request, then it streams and is gone.
"""

from typing import Final

from shardlead.core.contract import RESEND_BODY_BYTES_MAX

_PIECES_MAX: Final = 64  # more are joined: a body that comes in tiny chunks must not cost many times its bytes


class Body:
    """`length` is the Content-Length; -1: it comes in chunks."""

    __slots__ = (
        "_kept",
        "_pace_bytes",
        "_pace_s",
        "is_large",
        "is_torn",
        "is_whole",
        "kept_bytes",
        "length",
        "sent_bytes",
        "total_bytes",
        "trailers",
    )

    def __init__(self, length: int) -> None:
        self.length = length
        self.is_large = length > RESEND_BODY_BYTES_MAX
        self.is_whole = False
        self.is_torn = False  # some of it was thrown away
        self.kept_bytes = 0
        self.sent_bytes = 0  # by streaming
        self.total_bytes = 0  # that have come
        self.trailers = b""  # lines that may pass on, where the next hop is chunked
        self._kept: list[bytes] = []
        self._pace_s = 0.0
        self._pace_bytes = 0

    def __repr__(self) -> str:
        size = "large" if self.is_large else "short"
        return f"<Body {size}, {self.total_bytes} of {self.length}, {self.kept_bytes} kept, {self.sent_bytes} streamed>"

    @property
    def is_kept(self) -> bool:
        """Whether all that has come of it can be sent (again)."""
        return not (self.is_torn or (self.sent_bytes and self.is_large))

    @property
    def is_as_long_as_said(self) -> bool:
        """Whether what was streamed is what its Content-Length has announced."""
        return self.length < 0 or self.sent_bytes == self.length

    def is_moving(self, now_s: float, window_s: float, rate_min: float, *, is_held_back: bool) -> bool:
        """Whether it arrives at `rate_min` bytes a second at least, over windows of this length; what we hold back
        ourselves is no fault of the client's."""
        passed_s = now_s - self._pace_s
        if not self._pace_s or is_held_back or passed_s > window_s:
            is_good = not self._pace_s or is_held_back or self.total_bytes - self._pace_bytes >= rate_min * passed_s
            self._pace_s, self._pace_bytes = now_s, self.total_bytes
            return is_good
        return True

    def settle(self) -> None:
        """What has arrived has been read: one without a length that is not whole by now is streamed."""
        if self.length < 0 and not self.is_whole:
            self.is_large = True

    def take_whole(self, data: bytes) -> None:
        """Keep a short one that has come whole."""
        self._kept.append(data)
        self.kept_bytes = self.total_bytes = len(data)
        self.is_whole = True

    def keep(self, data: bytes) -> bool:
        """Keep a piece. True: as much is kept as may be, so no more should come for now."""
        kept = self._kept
        kept.append(data)
        if len(kept) >= _PIECES_MAX:
            self._kept = [b"".join(kept)]
        self.kept_bytes += len(data)
        if self.kept_bytes > RESEND_BODY_BYTES_MAX:
            self.is_large = True
            return True
        return False

    def all_kept(self) -> bytes:
        """The whole of a short body."""
        return self._kept[0] if len(self._kept) == 1 else b"".join(self._kept)

    def let_go(self) -> list[bytes]:
        """Keep nothing any more; what was kept."""
        kept, self._kept = self._kept, []
        self.kept_bytes = 0
        return kept

    @property
    def framing(self) -> bytes:
        """The header field that announces a large one."""
        return b"Content-Length: %d\r\n" % self.length if self.length >= 0 else b"Transfer-Encoding: chunked\r\n"

    def framed(self, data: bytes) -> bytes:
        """A piece as it is streamed."""
        self.sent_bytes += len(data)
        return data if self.length >= 0 else b"%x\r\n%b\r\n" % (len(data), data)

    @property
    def ending(self) -> bytes:
        """What is written behind the last piece."""
        return b"" if self.length >= 0 else b"0\r\n%b\r\n" % self.trailers

    def all_chunked(self) -> bytes:
        """The whole of a short body with its trailers."""
        data = self.all_kept()
        return (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + b"0\r\n%b\r\n" % self.trailers


def _nothing() -> Body:
    body = Body(0)
    body.is_whole = True
    return body


NO_BODY: Final = _nothing()
"""That of all requests that have none; nothing is ever kept in it."""
