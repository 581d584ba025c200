"""The JSON of etcd's gRPC gateway: the store's values out, the server's answers in.

Law: protocol.md C. int64 comes and goes as a string; zero, false and empty fields are left out by the server; keys and
values are base64; an error has one shape for a unary call and another in a stream, and both changed with etcd 3.6.
Pure: no I/O, no clock. A decoder returns its value or raises ValueError, whatever the bytes were.
"""

from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
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

RANGE: Final = "/v3/kv/range"
TXN: Final = "/v3/kv/txn"
GRANT: Final = "/v3/lease/grant"
RENEW: Final = "/v3/lease/keepalive"
REVOKE: Final = "/v3/lease/revoke"
LEASE_KEYS: Final = "/v3/lease/timetolive"
WATCH: Final = "/v3/watch"
STATUS: Final = "/v3/maintenance/status"
AUTHENTICATE: Final = "/v3/auth/authenticate"

HEADERS: Final[Mapping[str, str]] = {"Content-Type": "application/json"}
# an isolated member then ends the watch by itself, after 3 s instead of never
WATCH_HEADERS: Final[Mapping[str, str]] = {**HEADERS, "Grpc-Metadata-hasleader": "true"}

LINE_BYTES_MAX: Final = 64 * 1024 * 1024  # 5,000 deletions are 0.4 MB; 50,000 were 3.4 MB

# gRPC status codes that decide something here
_INVALID_ARGUMENT: Final = 3
_NOT_FOUND: Final = 5
_RESOURCE_EXHAUSTED: Final = 8
_OUT_OF_RANGE: Final = 11
_UNIMPLEMENTED: Final = 12
_UNAVAILABLE: Final = 14
_UNAUTHENTICATED: Final = 16
# not found, already exists, permission denied, failed precondition, out of range, unimplemented: said before anything
# was applied. Not in it: canceled (1), unknown (2), deadline (4), aborted (10), internal (13), unavailable (14).
_REFUSALS: Final = frozenset({_INVALID_ARGUMENT, _NOT_FOUND, 6, 7, 9, _OUT_OF_RANGE, _UNIMPLEMENTED})


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


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of an answer."""
    return _object(orjson.loads(body))


def header_of(raw: Mapping[str, Any]) -> Header:
    header = _object(raw.get("header") or {})
    return Header(_int(header, "cluster_id"), _int(header, "revision"))


def range_result(raw: Mapping[str, Any], revision: int = 0) -> RangeResult:
    """`revision` stands in where a nested answer's header has none."""
    kvs = tuple(_key_value(_object(item)) for item in _list(raw, "kvs"))
    return RangeResult(header_of(raw).revision or revision, kvs, _int(raw, "count"), _bool(raw, "more"))


def txn_outcome(raw: Mapping[str, Any]) -> Committed | Conflict:
    revision = header_of(raw).revision
    results = _results(raw, revision)
    return Committed(revision, results) if _bool(raw, "succeeded") else Conflict(revision, results)


def grant_result(raw: Mapping[str, Any]) -> Grant:
    grant = Grant(_int(raw, "ID"), _int(raw, "TTL"))
    if grant.lease <= 0 or grant.ttl_s <= 0:
        raise ValueError(f"a grant without an id or a TTL: {raw}")
    return grant


def renewed_ttl_s(raw: Mapping[str, Any]) -> int:
    """The TTL granted anew; 0 if the answer has none, which means that the lease is gone."""
    return max(0, _int(raw, "TTL"))


def lease_keys(raw: Mapping[str, Any], lease: int) -> LeaseKeys | None:
    """None for a lease that does not exist: the server says TTL -1. A TTL that is left out is the last second."""
    ttl_s = _int(raw, "TTL")
    granted_ttl_s = _int(raw, "grantedTTL")
    if ttl_s < 0 or granted_ttl_s <= 0:
        return None
    return LeaseKeys(lease, ttl_s, granted_ttl_s, tuple(_decoded(key) for key in _list(raw, "keys")))


def token_of(raw: Mapping[str, Any]) -> str:
    token = raw.get("token")
    if not isinstance(token, str) or not token:
        raise ValueError("authenticated, but got no token")
    return token


def version_of(raw: Mapping[str, Any]) -> str:
    return _str(raw, "version")


def _results(raw: Mapping[str, Any], revision: int) -> tuple[OpResult, ...]:
    return tuple(_result(_object(item), revision) for item in _list(raw, "responses"))


def _result(raw: Mapping[str, Any], revision: int) -> OpResult:
    for name, item in raw.items():
        answer = _object(item)
        own = header_of(answer).revision or revision
        match name:
            case "response_range":
                return range_result(answer, revision)
            case "response_put":
                return PutResult(own)
            case "response_delete_range":
                return DeleteResult(own, _int(answer, "deleted"))
            case "response_txn":  # its header is empty on 3.4 and 3.5
                return TxnResult(own, _bool(answer, "succeeded"), _results(answer, revision))
            case _:
                pass
    raise ValueError(f"not an answer to an operation: {raw}")


def _key_value(raw: Mapping[str, Any]) -> KeyValue:
    return KeyValue(
        _bytes(raw, "key"),
        _bytes(raw, "value"),
        _int(raw, "create_revision"),
        _int(raw, "mod_revision"),
        _int(raw, "version"),
        _int(raw, "lease"),
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
        WatchBatch(header.revision, tuple(_event(_object(item)) for item in _list(raw, "events"))),
        _bool(raw, "created"),
        _bool(raw, "canceled"),
        _str(raw, "cancel_reason"),
        _int(raw, "compact_revision"),
    )


def _event(raw: Mapping[str, Any]) -> Event:
    kv = _key_value(_object(raw.get("kv") or {}))
    match raw.get("type", "PUT"):
        case "PUT":
            return Event(is_delete=False, kv=kv)
        case "DELETE":
            return Event(is_delete=True, kv=kv)
        case other:
            raise ValueError(f"not a kind of event: {other!r}")


def stream_item(line: bytes) -> "dict[str, Any] | Fault":
    """One line of a streamed answer: the object under `result`, or the fault under `error`."""
    raw = parse(line)
    if "error" in raw:
        return _fault(raw["error"], 0)
    return _object(raw.get("result"))


class LineSplitter:
    """Cuts a stream of chunks into lines. A newline may come alone, late or (after an error) never."""

    __slots__ = ("_buffer", "_bytes_max")

    def __init__(self, bytes_max: int = LINE_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._bytes_max = bytes_max

    def feed(self, chunk: bytes) -> Sequence[bytes]:
        """The lines that this chunk completes, without newlines and without empty ones. Raises ValueError for a
        line above the bound."""
        before = len(self._buffer)
        self._buffer += chunk
        if self._buffer.find(b"\n", before) < 0:  # looks at each byte once, however many chunks a line comes in
            if len(self._buffer) > self._bytes_max:
                raise ValueError(f"a line of more than {self._bytes_max} bytes")
            return ()
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        return tuple(line for line in lines if line.strip())

    def rest(self) -> bytes:
        """What stands after the last newline: at the end of a stream, its last line."""
        return bytes(self._buffer).strip()


# --- in: errors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that the server (or something in between) gave as its answer."""

    code: int  # gRPC status code
    message: str

    def __str__(self) -> str:
        return f"{self.message} (code {self.code})"


class Faulted(Exception):
    """The server answered with a fault. Stays within the store: translated to a StoreError or an outcome there."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(str(fault))


class Verdict(Enum):
    """What a fault proves about the request."""

    REFUSED = "refused"  # for good; nothing was applied
    LEASE_GONE = "lease gone"  # nothing was applied
    COMPACTED = "compacted"  # nothing was applied
    UNAUTHENTICATED = "unauthenticated"  # nothing was applied; a new token may help
    NOT_NOW = "not now"  # nothing was applied; the same request may succeed later
    UNCERTAIN = "uncertain"  # proves nothing


def fault_of(status: int, body: bytes) -> Fault:
    """The fault of a unary answer: 3.4 and 3.5 say {"error", "message", "code"}, 3.6 {"code", "message", "details"},
    a stream that failed at once {"error": {...}}, and a proxy in between anything."""
    try:
        raw = parse(body)
        inner = raw.get("error")
        return _fault(inner if isinstance(inner, dict) else raw, status)
    except ValueError:
        text = body[:200].decode("utf-8", "backslashreplace").strip()
        code = _UNAVAILABLE if status >= 500 or status == 429 else _UNIMPLEMENTED
        return Fault(code, f"HTTP {status}: {text}" if text else f"HTTP {status}")


def judge(fault: Fault) -> Verdict:
    """What the fault proves. Whatever is not known to be a refusal is UNCERTAIN."""
    text = fault.message
    if fault.code == _UNAUTHENTICATED or any(sign in text for sign in _SIGNS_OF_A_BAD_TOKEN):
        return Verdict.UNAUTHENTICATED
    if fault.code == _NOT_FOUND and "lease not found" in text:
        return Verdict.LEASE_GONE
    if fault.code == _OUT_OF_RANGE and "compacted" in text:
        return Verdict.COMPACTED
    if fault.code == _RESOURCE_EXHAUSTED:
        if "too many requests" in text:  # said before the request is proposed
            return Verdict.NOT_NOW
        return Verdict.REFUSED if "space exceeded" in text else Verdict.UNCERTAIN
    return Verdict.REFUSED if fault.code in _REFUSALS else Verdict.UNCERTAIN


_SIGNS_OF_A_BAD_TOKEN: Final = (
    "invalid auth token",
    "revision of auth store is old",  # code 3: roles or users changed after the token was made
    "user name is empty",  # code 3: no token came, or one that this member has forgotten
)


def _fault(raw: Any, status: int) -> Fault:
    if not isinstance(raw, dict):
        return Fault(2, str(raw)[:200])
    code = _int(raw, "grpc_code") or _int(raw, "code")
    message = _str(raw, "message") or (_str(raw, "error") if isinstance(raw.get("error"), str) else "")
    if not code and not message:
        raise ValueError("an error without code and message")
    return Fault(code or 2, message or f"HTTP {status}")


# --- fields ----------------------------------------------------------------------------------------------------


def _object(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"not an object: {str(raw)[:100]!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return raw


def _list(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def _int(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if value is None:
        return 0
    if isinstance(value, str):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} is not a number: {value!r}")


def _bool(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is not true or false: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def _str(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def _bytes(raw: Mapping[str, Any], name: str) -> bytes:
    value = raw.get(name)
    return b"" if value is None else _decoded(value)


def _decoded(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"not base64: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return a2b_base64(value)
