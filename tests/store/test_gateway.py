"""The gateway's JSON, with every trap of it that is known."""

import base64
import contextlib
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.store import gateway
from shardlead.store.base import (
    Committed,
    Compare,
    Conflict,
    Delete,
    DeleteResult,
    Event,
    Grant,
    KeyValue,
    LeaseKeys,
    Op,
    OpResult,
    Put,
    PutResult,
    Range,
    RangeResult,
    Target,
    Txn,
    TxnResult,
    WatchBatch,
)
from shardlead.store.faults import Fault, Verdict, fault_of, judge
from shardlead.store.jsonfields import parse
from shardlead.store.watchstream import LineSplitter

INT64 = st.integers(0, 2**63 - 1)
KEYS = st.binary(min_size=1, max_size=8)
VALUES = st.binary(max_size=8)


# --- a second, independent reading of the wire, to hold the first to ---------------------------------------------


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _drop_zeros(raw: dict[str, Any]) -> dict[str, Any]:
    """As the gateway does: zero, false and empty fields are not there."""
    return {name: value for name, value in raw.items() if value not in ("0", "", False, [], None)}


def _wire_kv(kv: KeyValue) -> dict[str, Any]:
    return _drop_zeros(
        {
            "key": _b64(kv.key),
            "value": _b64(kv.value),
            "create_revision": str(kv.create_revision),
            "mod_revision": str(kv.mod_revision),
            "version": str(kv.version),
            "lease": str(kv.lease),
        }
    )


def _wire_result(result: OpResult) -> dict[str, Any]:
    header = _drop_zeros({"revision": str(result.revision)})
    match result:
        case PutResult():
            return {"response_put": {"header": header}}
        case DeleteResult(_, deleted):
            return {"response_delete_range": _drop_zeros({"header": header, "deleted": str(deleted)})}
        case RangeResult():
            return {"response_range": {"header": header, **_wire_range(result)}}
        case TxnResult(_, succeeded, results):
            answers = [_wire_result(item) for item in results]
            return {"response_txn": {"header": {}, **_drop_zeros({"succeeded": succeeded, "responses": answers})}}


def _wire_range(result: RangeResult) -> dict[str, Any]:
    kvs = [_wire_kv(kv) for kv in result.kvs]
    return _drop_zeros({"kvs": kvs, "count": str(result.count), "more": result.more})


def _read_txn(raw: dict[str, Any]) -> Txn:
    return Txn(
        tuple(_read_compare(item) for item in raw.get("compare", [])),
        tuple(_read_op(item) for item in raw.get("success", [])),
        tuple(_read_op(item) for item in raw.get("failure", [])),
    )


def _read_compare(raw: dict[str, Any]) -> Compare:
    target = Target(raw["target"])
    (name,) = raw.keys() & {"version", "create_revision", "mod_revision", "value", "lease"}  # a oneof, always there
    assert name.startswith(target.value.lower())
    operand = _raw(raw[name]) if target is Target.VALUE else int(raw[name])
    return Compare(_raw(raw["key"]), target, operand, raw["result"], _raw(raw.get("range_end", "")))


def _read_op(raw: dict[str, Any]) -> Op:
    ((name, op),) = raw.items()
    match name:
        case "request_put":
            return Put(_raw(op["key"]), _raw(op["value"]), int(op.get("lease", "0")))
        case "request_delete_range":
            return Delete(_raw(op["key"]), _raw(op.get("range_end", "")))
        case "request_range":
            return _read_range(op)
        case "request_txn":
            return _read_txn(op)
        case _:
            raise AssertionError(name)


def _read_range(raw: dict[str, Any]) -> Range:
    return Range(
        _raw(raw["key"]),
        _raw(raw.get("range_end", "")),
        int(raw.get("limit", "0")),
        int(raw.get("revision", "0")),
        raw.get("keys_only", False),
        raw.get("count_only", False),
    )


# --- strategies --------------------------------------------------------------------------------------------------

RELATIONS = st.sampled_from(("EQUAL", "NOT_EQUAL", "GREATER", "LESS"))
COMPARES = st.one_of(
    st.builds(Compare, KEYS, st.sampled_from([t for t in Target if t is not Target.VALUE]), INT64, RELATIONS, VALUES),
    st.builds(Compare, KEYS, st.just(Target.VALUE), VALUES, RELATIONS, VALUES),
)
RANGES = st.builds(Range, KEYS, VALUES, INT64, INT64, st.booleans(), st.booleans())
FLAT_OPS: st.SearchStrategy[Op] = st.one_of(
    st.builds(Put, KEYS, VALUES, INT64), st.builds(Delete, KEYS, VALUES), RANGES
)


def _txns(ops: st.SearchStrategy[Op]) -> st.SearchStrategy[Op]:
    some = st.lists(ops, max_size=3).map(tuple)
    return st.builds(Txn, st.lists(COMPARES, max_size=3).map(tuple), some, some)


TXNS = _txns(st.recursive(FLAT_OPS, _txns, max_leaves=6))
KVS = st.builds(KeyValue, KEYS, VALUES, INT64, INT64, INT64, INT64)
FLAT_RESULTS: st.SearchStrategy[OpResult] = st.one_of(
    st.builds(PutResult, st.just(9)),
    st.builds(DeleteResult, st.just(9), INT64),
    st.builds(RangeResult, st.just(9), st.lists(KVS, min_size=1, max_size=3).map(tuple), INT64, st.booleans()),
    st.builds(RangeResult, st.just(9), st.just(()), INT64),
)
RESULTS = st.recursive(
    FLAT_RESULTS,
    lambda inner: st.builds(TxnResult, st.just(9), st.booleans(), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=5,
)
FIELDS = (
    *(
        "header",
        "kvs",
        "count",
        "more",
        "responses",
        "succeeded",
        "ID",
        "TTL",
        "grantedTTL",
        "keys",
        "token",
        "version",
    ),
    *("events", "kv", "type", "key", "value", "created", "canceled", "compact_revision", "cancel_reason"),
    *("response_txn", "response_range", "error", "code", "message", "grpc_code", "revision", "cluster_id", "result"),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5)),
    max_leaves=12,
)


# --- out ---------------------------------------------------------------------------------------------------------


@given(TXNS)
def test_a_transaction_arrives_as_it_was_meant(txn: Op) -> None:
    """Whatever its nesting, a zero operand included: it is a oneof, and left out it would compare with nothing."""
    assert isinstance(txn, Txn)
    assert _read_txn(orjson.loads(gateway.txn_body(txn))) == txn


@given(RANGES)
def test_a_range_arrives_as_it_was_meant(op: Range) -> None:
    """Every field of it; int64 as strings."""
    assert _read_range(orjson.loads(gateway.range_body(op))) == op


def test_a_watch_asks_for_progress_and_never_for_now() -> None:
    """A start revision always stands in it."""
    expected = {"create_request": {"key": "YQ==", "range_end": "Yg==", "start_revision": "5", "progress_notify": True}}
    assert orjson.loads(gateway.watch_body(b"a", b"b", 5)) == expected


# --- in ----------------------------------------------------------------------------------------------------------


@given(INT64, st.lists(KVS, max_size=4), INT64, st.booleans())
def test_a_range_comes_back_whole(revision: int, kvs: list[KeyValue], count: int, more: bool) -> None:
    """Zero fields are not in the answer, int64 are strings, bytes are base64."""
    result = RangeResult(revision, tuple(kvs), count, more and bool(kvs))  # an empty page has nothing behind it
    raw = {"header": _drop_zeros({"revision": str(revision)}), **_wire_range(result)}
    assert gateway.range_result(parse(orjson.dumps(raw))) == result


@given(st.lists(RESULTS, max_size=4), st.booleans())
def test_a_transaction_comes_back_whole(results: list[OpResult], succeeded: bool) -> None:
    """`succeeded` is left out when false; a nested answer's header is empty and the outer revision stands in."""
    raw = {
        "header": {"cluster_id": "1", "revision": "9"},
        **_drop_zeros({"succeeded": succeeded, "responses": [_wire_result(result) for result in results]}),
    }
    kind = Committed if succeeded else Conflict
    assert gateway.txn_outcome(parse(orjson.dumps(raw))) == kind(9, tuple(results))


@given(INT64, st.lists(st.tuples(st.booleans(), KVS), max_size=4))
def test_a_watch_message_comes_back_whole(revision: int, changes: list[tuple[bool, KeyValue]]) -> None:
    """PUT is the type that is left out."""
    events = [_drop_zeros({"type": "DELETE" if gone else "", "kv": _wire_kv(kv)}) for gone, kv in changes]
    raw = {"result": {"header": _drop_zeros({"revision": str(revision)}), **_drop_zeros({"events": events})}}
    item = gateway.stream_item(orjson.dumps(raw))
    assert isinstance(item, dict)
    expected = WatchBatch(revision, tuple(Event(gone, kv) for gone, kv in changes))
    assert gateway.watch_message(item).batch == expected


def test_a_cancel_is_told_by_the_fields_that_are_there() -> None:
    """`created`, `canceled`, reason and compact revision."""
    raw = {"header": {"revision": "12"}, "canceled": True, "cancel_reason": "gone", "compact_revision": "7"}
    message = gateway.watch_message(raw)
    expected = (False, True, "gone", 7)
    assert (message.is_created, message.is_canceled, message.reason, message.compact_revision) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [({"ID": "5", "TTL": "10"}, 10), ({"ID": "5"}, 0), ({"ID": "5", "TTL": "0"}, 0), ({"ID": "5", "TTL": "-1"}, 0)],
)
def test_a_renewal_without_a_ttl_is_a_lost_lease(raw: dict[str, Any], expected: int) -> None:
    """The gateway leaves a TTL of zero out."""
    assert gateway.renewed_ttl_s(raw) == expected


def test_a_grant_is_what_the_server_gives() -> None:
    """Not what was asked; and one without an id or TTL is no answer."""
    assert gateway.grant_result({"ID": "7587862094150541121", "TTL": "2"}) == Grant(7587862094150541121, 2)
    for raw in ({"ID": "5"}, {"TTL": "5"}, {}):
        with pytest.raises(ValueError, match="without an id"):
            gateway.grant_result(raw)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"ID": "5", "TTL": "3", "grantedTTL": "10", "keys": ["YQ=="]}, LeaseKeys(5, 3, 10, (b"a",))),
        ({"ID": "5", "grantedTTL": "10"}, LeaseKeys(5, 0, 10, ())),  # its last second
        ({"ID": "5", "TTL": "-1"}, None),
        ({"ID": "5"}, None),
    ],
)
def test_the_keys_of_a_lease_or_none(raw: dict[str, Any], expected: LeaseKeys | None) -> None:
    """A lease that is not there has a TTL of -1; one in its last second has none and is there."""
    assert gateway.lease_keys(raw, 5) == expected


DECODERS: list[Callable[[dict[str, Any]], object]] = [
    gateway.header_of,
    gateway.range_result,
    gateway.txn_outcome,
    gateway.grant_result,
    gateway.renewed_ttl_s,
    lambda raw: gateway.check_lease(raw, 7),
    lambda raw: gateway.lease_keys(raw, 1),
    gateway.token_of,
    gateway.version_of,
    gateway.watch_message,
    lambda raw: fault_of(500, orjson.dumps(raw)),
    lambda raw: gateway.stream_item(orjson.dumps(raw)),
]


@given(JSON, st.sampled_from(DECODERS))
def test_no_answer_breaks_a_decoder(raw: Any, decode: Callable[[dict[str, Any]], object]) -> None:
    """A value or a ValueError, whatever the server said."""
    with contextlib.suppress(ValueError):
        decode(parse(orjson.dumps(raw)))


@given(st.binary(max_size=50), st.integers(400, 599))
def test_no_error_body_breaks_its_reading(body: bytes, status: int) -> None:
    """A proxy in between may say anything."""
    assert isinstance(fault_of(status, body), Fault)


# --- in: the stream ----------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"").strip()), max_size=8), st.data())
def test_lines_do_not_depend_on_chunks(lines: list[bytes], data: st.DataObject) -> None:
    """A newline may come in its own chunk, and after the last line never."""
    stream = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    splitter = LineSplitter()
    seen = [line for chunk in chunks for line in splitter.feed(chunk)]
    rest = splitter.rest()
    assert seen + ([rest] if rest else []) == [line for line in lines if line]


def test_a_line_has_a_bound() -> None:
    """A stream that never breaks its line must not fill the memory."""
    splitter = LineSplitter(bytes_max=10)
    assert splitter.feed(b"0123456789") == ()
    with pytest.raises(ValueError, match="more than 10 bytes"):
        splitter.feed(b"x")


# --- errors ------------------------------------------------------------------------------------------------------


def _unary_34(code: int, text: str) -> bytes:
    return orjson.dumps({"error": text, "message": text, "code": code})


def _unary_36(code: int, text: str) -> bytes:
    return orjson.dumps({"code": code, "message": text, "details": []})


@pytest.mark.parametrize("shape", [_unary_34, _unary_36], ids=["3.4-3.5", "3.6"])
@pytest.mark.parametrize(
    ("code", "text", "verdict"),
    [
        (3, "etcdserver: duplicate key given in txn request", Verdict.REFUSED),
        (3, "etcdserver: too many operations in txn request", Verdict.REFUSED),
        (3, "etcdserver: request is too large", Verdict.REFUSED),
        (3, "etcdserver: key is not provided", Verdict.REFUSED),
        (3, "unexpected EOF", Verdict.REFUSED),
        (5, "etcdserver: requested lease not found", Verdict.LEASE_GONE),
        (5, "Not Found", Verdict.REFUSED),
        (7, "etcdserver: permission denied", Verdict.REFUSED),
        (8, "etcdserver: mvcc: database space exceeded", Verdict.REFUSED),
        (8, "etcdserver: too many requests", Verdict.NOT_NOW),
        (8, "grpc: received message larger than max", Verdict.UNCERTAIN),
        (9, "etcdserver: authentication is not enabled", Verdict.REFUSED),
        (11, "etcdserver: mvcc: required revision has been compacted", Verdict.COMPACTED),
        (11, "etcdserver: mvcc: required revision is a future revision", Verdict.REFUSED),
        (16, "etcdserver: invalid auth token", Verdict.UNAUTHENTICATED),
        (2, "etcdserver: invalid auth token", Verdict.UNAUTHENTICATED),
        (3, "etcdserver: revision of auth store is old", Verdict.UNAUTHENTICATED),
        (3, "etcdserver: user name is empty", Verdict.UNAUTHENTICATED),
        (14, "etcdserver: request timed out", Verdict.UNCERTAIN),
        (14, "etcdserver: leader changed", Verdict.UNCERTAIN),
        (14, "etcdserver: no leader", Verdict.UNCERTAIN),
        (14, "transport is closing", Verdict.UNCERTAIN),
        (4, "context deadline exceeded", Verdict.UNCERTAIN),
        (2, "context deadline exceeded", Verdict.UNCERTAIN),
        (1, "context canceled", Verdict.UNCERTAIN),
        (13, "anything internal", Verdict.UNCERTAIN),
        (99, "a code of the future", Verdict.UNCERTAIN),
    ],
)
def test_what_a_fault_proves(shape: Callable[[int, str], bytes], code: int, text: str, verdict: Verdict) -> None:
    """The same in the shape of each gateway. What is not known to be a refusal proves nothing."""
    fault = fault_of(500, shape(code, text))
    assert fault == Fault(code, text)
    assert judge(fault) is verdict


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            b'{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader","http_status":"x"}}',
            Fault(14, "etcdserver: no leader"),
        ),
        (b'{"error":{"code":14,"message":"etcdserver: no leader","details":[]}}', Fault(14, "etcdserver: no leader")),
        (b'{"error":"plain text"}', Fault(2, "plain text")),
    ],
)
def test_an_error_in_a_stream_has_another_shape(line: bytes, expected: Fault) -> None:
    """As grpc-gateway 1 (3.4, 3.5) and 2 (3.6) say it."""
    assert gateway.stream_item(line) == expected


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (404, b"Not Found\n", Verdict.REFUSED),
        (413, b"<html>too large</html>", Verdict.REFUSED),
        (502, b"<html>bad gateway</html>", Verdict.UNCERTAIN),
        (503, b"", Verdict.UNCERTAIN),
        (429, b"slow down", Verdict.UNCERTAIN),
        (500, b"{}", Verdict.UNCERTAIN),
    ],
)
def test_what_a_proxy_says_is_believed_by_its_status(status: int, body: bytes, verdict: Verdict) -> None:
    """Its errors are no JSON, or not ours."""
    assert judge(fault_of(status, body)) is verdict
