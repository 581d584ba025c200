"""Heads, as the parser may give them: understood or refused, and nothing reserved or hop-by-hop passes."""

from typing import Any, Final

import orjson
from hypothesis import given
from hypothesis import strategies as st

from shardlead.core.contract import Problem
from shardlead.errors import RequestError
from shardlead.router.forwarded import Forwarder
from shardlead.router.heads import answer_kinds, read_answer, read_request, request_kinds
from shardlead.router.problems import problem_bytes
from tests.support.fuzz import examples

NAMES: Final = st.one_of(
    st.sampled_from(
        (b"Host", b"host", b"Connection", b"Content-Length", b"Transfer-Encoding", b"Expect", b"Upgrade", b"TE", b"X-A")
    ),
    st.sampled_from((b"Shardlead-Shard", b"shardlead-refused", b"SHARDLEAD-Epoch", b"Shardlead-Leader", b"X-Key")),
    st.sampled_from((b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host", b"Forwarded", b"Idempotency-Key")),
)
VALUES: Final = st.one_of(
    st.sampled_from(
        (b"", b"5", b"0", b"-1", b"+5", b"5, 5", b"chunked", b"CHUNKED ", b"gzip", b"close", b"keep-alive")
    ),
    st.sampled_from(
        (b"upgrade", b"x-a, close", b"host, x-key", b"websocket", b"h2c", b"100-continue", b"a b", b"stale")
    ),
    st.sampled_from((b"0" * 5_000, b"9" * 5_000, b"9" * 20, "²".encode("latin-1"), b"a:1", b"for=_x", b",,", b"\xff")),
)
FIELDS: Final = st.lists(st.tuples(NAMES, VALUES), max_size=7)
HOP: Final = (b"connection:", b"te:", b"transfer-encoding:", b"content-length:", b"upgrade:", b"expect:", b"host:")


def _lines(fields: bytes) -> list[bytes]:
    assert not fields or fields.endswith(b"\r\n")
    return fields.lower().split(b"\r\n")[:-1]


@examples(300)
@given(
    st.sampled_from((b"GET", b"OPTIONS", b"POST")),
    st.sampled_from((b"/", b"/a?b", b"*", b"http://h/x", b"http://h", b"http://", b"//a", b"a", b"/#", b"")),
    st.sampled_from(("1.1", "1.0", "0.9", "2.0", "")),
    FIELDS,
    st.sampled_from(("append", "replace", "off")),
    st.sampled_from(("203.0.113.7", "::1", "")),
)
def test_a_requests_head_is_understood_or_refused(
    method: bytes, target: bytes, version: str, fields: Any, policy: Any, peer: str
) -> None:
    """RequestError with a status of the client's fault; what passes has no framing, no hop and no word of ours."""
    status = 400
    try:
        head = read_request(
            method, target, version, fields, request_kinds(frozenset((b"x-key",))), Forwarder(policy, peer)
        )
    except RequestError as exc:
        status = exc.status
    else:
        lines = _lines(head.fields)
        assert not [line for line in lines if line.startswith((b"shardlead-", *HOP))]
        assert head.target.startswith(b"/") or (head.target, method) == (b"*", b"OPTIONS")
        assert not (head.is_chunked and head.length >= 0)
        assert -1 <= head.length < 10**20
        assert len(head.key_values) == sum(name.lower() == b"x-key" for name, _ in fields)
        if policy == "replace":
            assert sum(line.startswith(b"x-forwarded-for:") for line in lines) == 1
            assert sum(line.startswith(b"forwarded:") for line in lines) == 1
    assert status in (400, 417, 501, 505)


@examples(300)
@given(st.integers(0, 999), FIELDS)
def test_an_answers_head_is_understood_or_refused(status: int, fields: Any) -> None:
    """RequestError, or an answer whose fields that pass are the application's own, and Content-Length once, where it
    may stand."""
    try:
        head = read_answer(status, fields, answer_kinds())
    except RequestError:
        return
    lines = _lines(b"".join(head.fields))
    framing = (b"connection:", b"te:", b"transfer-encoding:", b"upgrade:")
    lengths = [line for line in lines if line.startswith(b"content-length:")]
    has_length = head.length >= 0 and status >= 200 and status != 204
    assert lengths == ([b"content-length: %d" % head.length] if has_length else [])
    assert not [line for line in lines if line.startswith((b"shardlead-", *framing))]
    assert not (head.is_chunked and head.length >= 0)
    assert 0 <= head.epoch < 10**20


@examples(150)
@given(
    st.sampled_from(Problem),
    st.integers(100, 999),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.integers(-1, 9),
)
def test_a_problem_is_whole_http(kind: Problem, status: int, detail: str, shard: int) -> None:
    """Whatever stands in it: one head, a body of its length, and the shard as soon as it is known."""
    head, _, body = problem_bytes(kind, status, detail, shard=shard, date=b"now").partition(b"\r\n\r\n")
    value = orjson.loads(body)
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert (value["status"], value["detail"], value.get("shard", -1)) == (status, detail, shard)
    assert (b"Retry-After" in head) is (status == 503)
