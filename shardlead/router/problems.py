"""Answers that the router itself gives: problem+json (RFC 9457), ready to be written.

Law: `type` is stable and ends with one of `contract.Problem`; `shard` is there as soon as it is known; every 503 says
when to come again.
"""

from email.utils import formatdate
from http import HTTPStatus
from typing import Final

import orjson

from shardlead.clock import Clock
from shardlead.core.contract import PROBLEM_BASE, PROBLEM_JSON, Problem

RETRY_AFTER_S: Final = 1


def problem_bytes(
    problem: str,
    status: int,
    detail: str,
    *,
    shard: int = -1,
    retry_after_s: int = 0,
    is_head: bool = False,
    is_last: bool = False,
    date: bytes,
    request_id: bytes = b"",
) -> bytes:
    """A whole HTTP/1.1 answer. `is_head`: without its body; `is_last`: it says `Connection: close`."""
    value: dict[str, object] = {
        "type": PROBLEM_BASE + problem,
        "title": problem.replace("-", " "),
        "status": status,
        "detail": detail,
    }
    if shard >= 0:
        value["shard"] = shard
    if request_id:
        value["request_id"] = request_id.decode("ascii")
    body = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)  # a prompt after curl's output begins a line
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    if status == 503 and not retry_after_s:
        retry_after_s = RETRY_AFTER_S
    lines = [
        f"HTTP/1.1 {status} {phrase}",
        f"Date: {date.decode('ascii')}",
        f"Content-Type: {PROBLEM_JSON}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
    ]
    if retry_after_s:
        lines.append(f"Retry-After: {retry_after_s}")
    if is_last:
        lines.append("Connection: close")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return head if is_head else head + body


class HttpDate:
    """The time as a Date field says it (RFC 9110, 5.6.7), written anew once a second at most."""

    __slots__ = ("_clock", "_second", "_text")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._second = -1
        self._text = b""

    def __call__(self) -> bytes:
        second = int(self._clock.wall_s())
        if second != self._second:
            self._second = second
            self._text = formatdate(second, usegmt=True).encode()
        return self._text


STATUS_OF: Final[dict[str, int]] = {
    Problem.OVERLOADED: 503,
    Problem.NOT_READY: 503,
    Problem.NOT_LED: 503,
    Problem.TOO_LARGE: 413,
    Problem.TIMED_OUT: 504,
    Problem.UPSTREAM_FAILED: 502,
    Problem.OUTCOME_UNKNOWN: 502,
}
