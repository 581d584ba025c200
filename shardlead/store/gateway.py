"""The JSON of etcd's gRPC gateway: the store's values out, the server's answers in.

Law: protocol.md C. int64 comes and goes as a string; zero, false and empty fields are left out by the server; keys and
values are base64. Errors: `store.faults`.
Pure: no I/O, no clock. A decoder returns its value or raises ValueError, whatever the bytes were.
"""

from binascii import b2a_base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, assert_never

import orjson

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
from shardlead.store.faults import Fault, fault_in
from shardlead.store.jsonfields import as_bytes, as_object, bool_of, bytes_of, int_of, list_of, parse, shown, text_of

RANGE: Final = "/v3/kv/range"
TXN: Final = "/v3/kv/txn"
GRANT: Final = "/v3/lease/grant"
RENEW: Final = "/v3/lease/keepalive"
REVOKE: Final = "/v3/lease/revoke"
LEASE_KEYS: Final = "/v3/lease/timetolive"
WATCH: Final = "/v3/watch"
STATUS: Final = "/v3/maintenance/status"
AUTHENTICATE: Final = "/v3/auth/authenticate"

NESTING_MAX: Final = 32  # transactions within transactions, as `store.requests` takes them; ours are two deep

HEADERS: Final[Mapping[str, str]] = {"Content-Type": "application/json"}
# an isolated member then ends the watch by itself, after 3 s instead of never
WATCH_HEADERS: Final[Mapping[str, str]] = {**HEADERS, "Grpc-Metadata-hasleader": "true"}


# --- out -------------------------------------------------------------------------------------------------------


def b64(raw: bytes) -> str:
    """The JSON form of bytes."""
    return b2a_base64(raw, newline=False).decode("ascii")


def range_body(op: Range) -> bytes:
    return orjson.dumps(_range(op))


def txn_body(txn: Txn) -> bytes:
    return orjson.dumps(_txn(txn))


def grant_body(ttl_s: int) -> bytes:
    return orjson.dumps({"TTL": str(ttl_s)})


def lease_body(lease: int) -> bytes:
    """Renew and revoke ask alike."""
    return orjson.dumps({"ID": str(lease)})


def lease_keys_body(lease: int) -> bytes:
    return orjson.dumps({"ID": str(lease), "keys": True})


def watch_body(key: bytes, range_end: bytes, start_revision: int) -> bytes:
    create: dict[str, Any] = {"key": b64(key), "start_revision": str(start_revision), "progress_notify": True}
    if range_end:
        create["range_end"] = b64(range_end)
    return orjson.dumps({"create_request": create})


def authenticate_body(username: str, password: str) -> bytes:
    return orjson.dumps({"name": username, "password": password})


def _range(op: Range) -> dict[str, Any]:
    raw: dict[str, Any] = {"key": b64(op.key)}
    if op.range_end:
        raw["range_end"] = b64(op.range_end)
    if op.limit:
        raw["limit"] = str(op.limit)
    if op.revision:
        raw["revision"] = str(op.revision)
    if op.keys_only:
        raw["keys_only"] = True
    if op.count_only:
        raw["count_only"] = True
    return raw


_OPERAND: Final[Mapping[Target, str]] = {
    Target.VERSION: "version",
    Target.CREATE: "create_revision",
    Target.MOD: "mod_revision",
    Target.VALUE: "value",
    Target.LEASE: "lease",
}


def _compare(compare: Compare) -> dict[str, Any]:
    operand = compare.operand
    raw: dict[str, Any] = {
        "key": b64(compare.key),
        "target": compare.target.value,
        "result": compare.relation,
        # written even if zero: it is a oneof, and unset would compare with nothing
        _OPERAND[compare.target]: b64(operand) if isinstance(operand, bytes) else str(operand),
    }
    if compare.range_end:
        raw["range_end"] = b64(compare.range_end)
    return raw


def _txn(txn: Txn) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    if txn.compares:
        raw["compare"] = [_compare(compare) for compare in txn.compares]
    if txn.success:
        raw["success"] = [_op(op) for op in txn.success]
    if txn.failure:
        raw["failure"] = [_op(op) for op in txn.failure]
    return raw


def _op(op: Op) -> dict[str, Any]:
    match op:
        case Put(key, value, lease):
            put = {"key": b64(key), "value": b64(value)}
            if lease:
                put["lease"] = str(lease)
            return {"request_put": put}
        case Delete(key, range_end):
            delete = {"key": b64(key)}
            if range_end:
                delete["range_end"] = b64(range_end)
            return {"request_delete_range": delete}
        case Range():
            return {"request_range": _range(op)}
        case Txn():
            return {"request_txn": _txn(op)}
        case _:
            assert_never(op)


# --- in --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """Which cluster answered, and the largest revision that the answering member had."""

    cluster_id: int
    revision: int


def header_of(raw: Mapping[str, Any]) -> Header:
    header = as_object(raw.get("header") or {})
    return Header(int_of(header, "cluster_id"), int_of(header, "revision"))


def range_result(raw: Mapping[str, Any], revision: int = 0) -> RangeResult:
    """`revision` stands in where a nested answer's header has none. Raises ValueError, for a page besides that is
    empty and has more behind it: whoever reads on from its last key could not."""
    kvs = tuple(_key_value(as_object(item)) for item in list_of(raw, "kvs"))
    has_more = bool_of(raw, "more")
    if has_more and not kvs:
        raise ValueError("an empty page with more behind it")
    return RangeResult(header_of(raw).revision or revision, kvs, int_of(raw, "count"), has_more)


def txn_outcome(raw: Mapping[str, Any]) -> Committed | Conflict:
    revision = header_of(raw).revision
    results = _results(raw, revision)
    return Committed(revision, results) if bool_of(raw, "succeeded") else Conflict(revision, results)


def grant_result(raw: Mapping[str, Any]) -> Grant:
    grant = Grant(int_of(raw, "ID"), int_of(raw, "TTL"))
    if grant.lease <= 0 or grant.ttl_s <= 0:
        raise ValueError(f"a grant without an id or a TTL: {shown(raw)}")
    return grant


def renewed_ttl_s(raw: Mapping[str, Any]) -> int:
    """The TTL granted anew; 0 if the answer has none, which means that the lease is gone."""
    return max(0, int_of(raw, "TTL"))


def check_lease(raw: Mapping[str, Any], lease: int) -> None:
    """Raises ValueError for an answer about another lease, which says nothing about this one, good or bad."""
    if (answered := int_of(raw, "ID")) != lease:
        raise ValueError(f"an answer about lease {answered:x} to a question about {lease:x}")


def lease_keys(raw: Mapping[str, Any], lease: int) -> LeaseKeys | None:
    """None for a lease that does not exist: the server says TTL -1. A TTL that is left out is the last second."""
    ttl_s = int_of(raw, "TTL")
    granted_ttl_s = int_of(raw, "grantedTTL")
    if ttl_s < 0 or granted_ttl_s <= 0:
        return None
    return LeaseKeys(lease, ttl_s, granted_ttl_s, tuple(as_bytes(key) for key in list_of(raw, "keys")))


def token_of(raw: Mapping[str, Any]) -> str:
    token = raw.get("token")
    if not isinstance(token, str) or not token:
        raise ValueError("authenticated, but got no token")
    return token


def version_of(raw: Mapping[str, Any]) -> str:
    return text_of(raw, "version")


def _results(raw: Mapping[str, Any], revision: int, depth: int = 0) -> tuple[OpResult, ...]:
    if depth > NESTING_MAX:
        raise ValueError(f"answers nested deeper than {NESTING_MAX}")
    return tuple(_result(as_object(item), revision, depth) for item in list_of(raw, "responses"))


def _result(raw: Mapping[str, Any], revision: int, depth: int) -> OpResult:
    for name, item in raw.items():
        answer = as_object(item)
        own = header_of(answer).revision or revision
        match name:
            case "response_range":
                return range_result(answer, revision)
            case "response_put":
                return PutResult(own)
            case "response_delete_range":
                return DeleteResult(own, int_of(answer, "deleted"))
            case "response_txn":  # its header is empty on 3.4 and 3.5
                return TxnResult(own, bool_of(answer, "succeeded"), _results(answer, revision, depth + 1))
            case _:
                pass
    raise ValueError(f"not an answer to an operation: {shown(raw)}")


def _key_value(raw: Mapping[str, Any]) -> KeyValue:
    return KeyValue(
        bytes_of(raw, "key"),
        bytes_of(raw, "value"),
        int_of(raw, "create_revision"),
        int_of(raw, "mod_revision"),
        int_of(raw, "version"),
        int_of(raw, "lease"),
    )


# --- in: watch -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WatchMessage:
    """One line of a watch. `batch` is empty of events for `created`, `canceled` and progress."""

    header: Header
    batch: WatchBatch
    is_created: bool
    is_canceled: bool
    reason: str
    compact_revision: int


def watch_message(raw: Mapping[str, Any]) -> WatchMessage:
    """A line's `result`."""
    header = header_of(raw)
    return WatchMessage(
        header,
        WatchBatch(header.revision, tuple(_event(as_object(item)) for item in list_of(raw, "events"))),
        bool_of(raw, "created"),
        bool_of(raw, "canceled"),
        text_of(raw, "cancel_reason"),
        int_of(raw, "compact_revision"),
    )


def _event(raw: Mapping[str, Any]) -> Event:
    kv = _key_value(as_object(raw.get("kv") or {}))
    match raw.get("type", "PUT"):
        case "PUT":
            return Event(is_delete=False, kv=kv)
        case "DELETE":
            return Event(is_delete=True, kv=kv)
        case other:
            raise ValueError(f"not a kind of event: {shown(other)}")


def stream_item(line: bytes) -> "dict[str, Any] | Fault":
    """One line of a streamed answer: the object under `result`, or the fault under `error`."""
    raw = parse(line)
    if "error" in raw:
        return fault_in(raw["error"])
    return as_object(raw.get("result"))
