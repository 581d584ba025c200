"""Answers that the router itself gives: problem+json (RFC 9457), ready to be written.

Law: `type` is stable and ends with one of `contract.Problem`; `shard` is there as soon as it is known; every 503 says
when to come again.
"""

from http import HTTPStatus
from typing import Final

import orjson

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
    body = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)  # a prompt after curl's output begins a line
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    if status == 503 and not retry_after_s:
        retry_after_s = RETRY_AFTER_S
    lines = [
        f"HTTP/1.1 {status} {phrase}",
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


STATUS_OF: Final[dict[str, int]] = {
    Problem.OVERLOADED: 503,
    Problem.NOT_READY: 503,
    Problem.NOT_LED: 503,
    Problem.TOO_LARGE: 413,
    Problem.TIMED_OUT: 504,
    Problem.UPSTREAM_FAILED: 502,
    Problem.OUTCOME_UNKNOWN: 502,
}
