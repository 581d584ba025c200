"""What the store's two ends make of messages bent out of shape: a value or the one error they name, and no more.

Answers go to the client's decoders and watch, requests to the embedded store's whole answering; both as JSON with its
inner values replaced and as bytes with places overwritten.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import astuple, is_dataclass
from typing import Any, Final

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.clock import SystemClock
from shardlead.errors import CommandError, StoreError, StoreRejected
from shardlead.store import gateway, requests
from shardlead.store.base import Event, KeyValue, RangeResult, WatchBatch
from shardlead.store.embedded import EmbeddedStore
from shardlead.store.faults import Fault, Faulted, fault_of, judge
from shardlead.store.jsonfields import parse
from shardlead.store.mark import RevisionMark
from shardlead.store.mirror import Picture
from shardlead.store.model import Model
from shardlead.store.watchstream import LineSplitter, WatchStream
from tests.support.fuzz import bent_bytes, bent_json, cut, examples, json_values, written

PIECES: Final = (b"[", b"{", b"}", b"]", b'"', b",", b":", b"null", b"\n", b"\xc3", b"1e999", b"-0", b"true")
KV: Final = {"key": "YQ==", "create_revision": "2", "mod_revision": "5", "version": "3", "value": "dg==", "lease": "7"}
HEADER: Final = {"cluster_id": "14841639068965178418", "member_id": "1", "revision": "9", "raft_term": "2"}
PAGE: Final = {"header": HEADER, "kvs": [KV, {**KV, "key": "Yg=="}], "more": True, "count": "7"}
TXN_ANSWER: Final = {
    "header": HEADER,
    "succeeded": True,
    "responses": [
        {"response_put": {"header": {"revision": "9"}}},
        {"response_range": PAGE},
        {"response_delete_range": {"header": {}, "deleted": "1"}},
        {"response_txn": {"header": {}, "succeeded": True, "responses": [{"response_put": {}}]}},
    ],
}
DELETION: Final = {"type": "DELETE", "kv": {"key": "YQ==", "mod_revision": "9"}}
FAULT: Final = {"error": "etcdserver: requested lease not found", "code": 5, "message": "etcdserver: x", "details": []}
MESSAGES: Final = (
    {"result": {"header": HEADER, "created": True}},
    {"result": {"header": {**HEADER, "revision": "10"}, "events": [{"kv": {**KV, "mod_revision": "10"}}, DELETION]}},
    {"result": {"header": {**HEADER, "revision": "12"}}},
    {"result": {"header": HEADER, "canceled": True, "cancel_reason": "gone", "compact_revision": "7"}},
    {"error": {"grpc_code": 14, "http_code": 503, "message": "etcdserver: no leader", "http_status": "x"}},
)
Reader = Callable[[dict[str, Any]], object]
READERS: Final[tuple[tuple[Any, Reader], ...]] = (
    (PAGE, gateway.range_result),
    (TXN_ANSWER, gateway.txn_outcome),
    ({"header": HEADER, "ID": "7587862094150541121", "TTL": "10"}, gateway.grant_result),
    ({"header": HEADER, "ID": "7", "TTL": "10"}, gateway.renewed_ttl_s),
    (
        {"header": HEADER, "ID": "7", "TTL": "3", "grantedTTL": "10", "keys": ["YQ=="]},
        lambda raw: gateway.lease_keys(raw, 7),
    ),
    ({"header": HEADER, "token": "abc.7"}, gateway.token_of),
    ({"header": HEADER, "version": "3.5.28", "dbSize": "1"}, gateway.version_of),
    *((message["result"], gateway.watch_message) for message in MESSAGES if "result" in message),
)


def _names(value: Any) -> set[str]:
    """Every name in a value of JSON."""
    if isinstance(value, dict):
        return set(value).union(*map(_names, value.values()))
    return set().union(*map(_names, value)) if isinstance(value, list | tuple) else set()


NAMES: Final = tuple(sorted(_names([raw for raw, _ in READERS]) | _names(FAULT) | _names(MESSAGES)))


@st.composite
def _bent(draw: st.DrawFn, good: Any, names: tuple[str, ...] = NAMES) -> bytes:
    """A message as its sender would write it, then bent, as JSON or as bytes."""
    if draw(st.booleans()):
        return draw(bent_bytes(written(good), PIECES))
    return written(draw(bent_json(good, names)))


# --- answers -----------------------------------------------------------------------------------------------------


def _small(value: Any) -> bool:
    """Whether every number in what was read fits where etcd keeps it."""
    if isinstance(value, tuple | list):
        return all(map(_small, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**64


@examples(400)
@given(st.sampled_from(READERS).flatmap(lambda each: st.tuples(_bent(each[0]), st.just(each[1]))))
def test_a_bent_answer_is_a_value_or_a_value_error(bent: tuple[bytes, Reader]) -> None:
    """Nothing else is raised, what is said of it is short, and no number is larger than etcd's."""
    body, read = bent
    reason = ""
    value: object = None
    try:
        value = read(parse(body))
    except ValueError as exc:
        reason = str(exc)
    assert len(reason) < 1_000
    assert _small(astuple(value) if is_dataclass(value) and not isinstance(value, type) else value)
    if isinstance(value, RangeResult):
        assert value.kvs or not value.more, "whoever reads on needs a last key"


@examples(150)
@given(_bent(FAULT), st.integers(100, 999))
def test_a_bent_error_is_a_fault(body: bytes, status: int) -> None:
    """It is judged, and its words are short enough for a log."""
    fault = fault_of(status, body)
    assert isinstance(fault, Fault)
    judge(fault)
    assert len(str(fault)) < len(body) + 100


@pytest.mark.parametrize("levels", [33, 250, 340, 500])
def test_answers_nested_deep_are_no_answer(levels: int) -> None:
    """JSON that can be read may still be deeper than Python can go."""
    for read, name in ((gateway.txn_outcome, "response_txn"), (gateway.watch_message, "events")):
        body = b'{"responses":[{"%b":' % name.encode() * levels + b"{}" + b"}]}" * levels
        try:
            read(parse(body))
        except ValueError:
            continue
        assert name == "events"  # which has no place there and is not looked at


@pytest.mark.parametrize("text", ["9" * 4_300, str(2**64), "1_0", " 9", "٩", "+9", ""])
def test_a_number_is_plain_digits_of_64_bits(text: str) -> None:
    """A revision of 4,300 digits would be the floor of all later answers; the next one has no text."""
    with pytest.raises(ValueError, match="revision is not a number"):
        gateway.header_of({"header": {"revision": text}})


# --- a watch -----------------------------------------------------------------------------------------------------


class Chunks:
    """A stream that brings these chunks and ends."""

    status = 200

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = [*chunks]

    async def read(self) -> bytes:
        return self.chunks.pop(0) if self.chunks else b""

    def close(self) -> None:
        self.chunks.clear()


def _watched(chunks: list[bytes]) -> tuple[list[WatchBatch], str]:
    """The batches that a watch makes of these chunks, and how it ends."""

    async def main() -> tuple[list[WatchBatch], str]:
        watch = WatchStream(Chunks(chunks), "http://e", 60, lambda _: None, is_trusted=True)
        batches: list[WatchBatch] = []
        try:
            await watch.created()
            async for batch in watch:
                batches.append(batch)  # those before an error count, too
                if len(batches) > 1_000:
                    break
        except (StoreError, Faulted, ValueError) as exc:
            return batches, repr(exc)
        except Exception as exc:
            if type(exc).__name__ == "TransportError":
                return batches, repr(exc)
            raise
        return batches, "no end"

    return asyncio.run(main())


@st.composite
def _bent_lines(draw: st.DrawFn, messages: list[Any], newline: bytes) -> bytes:
    lines = [written(message) for message in messages]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = draw(_bent(messages[at]))
    return newline.join(lines) + draw(st.sampled_from((b"", newline)))


STREAMS: Final = st.lists(st.sampled_from(MESSAGES[1:]), max_size=4).flatmap(
    lambda some: st.sampled_from((0, 1)).flatmap(
        lambda newlines: _bent_lines([MESSAGES[0], *some], b"\n" if newlines else b"\n\n")
    )
)


@examples(150)
@given(STREAMS, st.data())
def test_a_bent_watch_ends_alike_however_it_is_cut(stream: bytes, data: st.DataObject) -> None:
    """The same batches and the same end; and a picture can take whatever batches there are."""
    batches, end = _watched([stream])
    assert (batches, end) == _watched(data.draw(cut(stream)))
    assert end != "no end"
    picture = Picture()
    picture.load({}, 1)
    for batch in batches:
        picture.apply(batch)


@examples(100)
@given(st.lists(st.sampled_from((b"\n", b"a", b"\r\n", b" ", b"0123456789")), max_size=20).map(b"".join), st.data())
def test_a_splitter_keeps_no_more_than_its_bound(stream: bytes, data: st.DataObject) -> None:
    """What it keeps is an unfinished line; a ValueError comes before more than one chunk above the bound."""
    splitter = LineSplitter(bytes_max=15)
    for chunk in data.draw(cut(stream)):
        try:
            for line in splitter.feed(chunk):
                assert b"\n" not in line
                assert line.strip()
        except ValueError:
            return
        assert len(splitter.rest()) <= max(15, len(chunk))


# --- requests ----------------------------------------------------------------------------------------------------

PUT: Final = {"key": "YQ==", "value": "dg==", "lease": "7"}
READ: Final = {"key": "YQ==", "range_end": "Yg==", "limit": "2", "revision": "1", "keys_only": True}
DELETE: Final = {"key": "Yw==", "rangeEnd": "AA=="}
OPS: Final = ({"request_put": PUT}, {"requestRange": READ}, {"request_delete_range": DELETE})
GUARD: Final = {"key": "YQ==", "target": "MOD", "result": "GREATER", "mod_revision": "1", "range_end": "Yg=="}
TXN: Final = {"compare": [GUARD], "success": [*OPS], "failure": [{"request_txn": {"success": [OPS[1]]}}]}
REQUESTS: Final[tuple[tuple[str, Any], ...]] = (
    ("/v3/kv/range", {**READ, "serializable": True, "sort_order": "NONE"}),
    ("/v3/kv/put", PUT),
    ("/v3/kv/deleterange", DELETE),
    ("/v3/kv/txn", TXN),
    ("/v3/kv/compaction", {"revision": "3"}),
    ("/v3/lease/grant", {"TTL": "60", "ID": "9"}),
    ("/v3/lease/keepalive", {"ID": "7"}),
    ("/v3/lease/revoke", {"ID": "7"}),
    ("/v3/lease/timetolive", {"ID": "7", "keys": True}),
    ("/v3/lease/leases", {}),
    ("/v3/maintenance/status", {}),
    ("/v3/auth/authenticate", {"name": "a", "password": "b"}),
)
ASKED: Final = tuple(sorted(_names([raw for _, raw in REQUESTS]) | requests._Fields.UNSUPPORTED | {"create_request"}))
CLIENT: Final[dict[str, Reader]] = {
    "/v3/kv/range": gateway.range_result,
    "/v3/kv/txn": gateway.txn_outcome,
    "/v3/lease/timetolive": lambda raw: gateway.lease_keys(raw, 7),
}


@st.composite
def _bent_requests(draw: st.DrawFn) -> tuple[str, bytes]:
    path, good = draw(st.sampled_from(REQUESTS))
    return path, draw(_bent(good, ASKED))


@examples(120)
@given(st.lists(_bent_requests(), min_size=1, max_size=12))
def test_a_bent_request_is_answered_or_refused(asked: list[tuple[str, bytes]]) -> None:
    """With JSON that the client reads, or with a refusal that has code and message; the store's invariants hold on:
    revisions never go back, and whatever stands there can be read and leased anew."""
    store = EmbeddedStore(Model(rng=random.Random(1)), clock=SystemClock(), rng=random.Random(2))
    store.answer("/v3/lease/grant", b'{"ID":"7","TTL":"60"}')
    store.answer("/v3/kv/put", b'{"key":"YQ==","lease":"7"}')
    for path, body in asked:
        before = store.model.revision
        status, answer = store.answer(path, body)
        assert store.model.revision >= before
        raw = parse(answer)
        if status == 200:
            CLIENT.get(path, gateway.header_of)(raw)
        else:
            assert 400 <= status < 600
            assert raw["code"] > 0
            assert raw["message"] == raw["error"]
            assert store.model.revision == before
    status, answer = store.answer("/v3/kv/range", b'{"key":"AA==","range_end":"AA=="}')
    assert status == 200
    assert gateway.range_result(parse(answer)).count == len(gateway.range_result(parse(answer)).kvs)
    store.model.expire(2**62)


@examples(100)
@given(
    _bent(
        {"create_request": {"key": "YQ==", "range_end": "Yg==", "start_revision": "5", "progress_notify": True}},
        (*ASKED, "start_revision", "progress_notify", "watch_id"),
    )
)
def test_a_bent_watch_request_is_understood_or_refused(body: bytes) -> None:
    """StoreRejected says which field, and what is understood has numbers of 64 bits."""
    asked, code = None, 3
    try:
        asked = requests.parse_watch(requests.parse_object(body))
    except StoreRejected as refusal:
        code = refusal.code
    assert code in (3, 12)
    assert asked is None or _small(astuple(asked))


@examples(100)
@given(json_values(ASKED), st.sampled_from([path for path, _ in REQUESTS]))
def test_any_json_is_answered_or_refused(value: Any, path: str) -> None:
    """Whatever its shape."""
    store = EmbeddedStore(Model(rng=random.Random(1)), clock=SystemClock(), rng=random.Random(2))
    status, answer = store.answer(path, written(value))
    assert isinstance(orjson.loads(answer), dict)
    assert 200 <= status < 600


def test_null_asks_for_nothing() -> None:
    """As etcd's gateway takes it."""
    assert requests.parse_object(b" null\n") == requests.parse_object(b"") == {}


# --- the mark ----------------------------------------------------------------------------------------------------


@examples(60)
@given(content=st.one_of(bent_bytes(b"1000001\n", (b"0", b"-", b".", b"\xff", b"9" * 20, b"9" * 5_000)), st.binary()))
def test_a_bent_mark_is_a_revision_or_stops_the_start(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A number that can be in an epoch, or a CommandError that names the file; the folder is free again then."""
    folder = tmp_path_factory.getbasetemp() / "mark"
    folder.mkdir(exist_ok=True)
    (folder / "revision").write_bytes(content)
    try:
        mark = RevisionMark(folder)
    except CommandError as exc:
        assert str(folder / "revision") in str(exc)  # noqa: PT017  # a bent mark may still be a number
        (folder / "revision").write_bytes(b"7\n")
        mark = RevisionMark(folder)
    with contextlib.closing(mark):
        assert 0 < mark.reserved < 2**48


def test_a_deletion_of_a_watch_is_no_more_than_its_key() -> None:
    """What the messages here are: good ones give good batches."""
    batches, end = _watched([b"\n".join(written(message) for message in MESSAGES[:3])])
    gone = Event(is_delete=True, kv=KeyValue(b"a", b"", 0, 9, 0, 0))
    assert batches[0].events[1] == gone
    assert len(batches) == 2
    assert "the watch broke" in end
