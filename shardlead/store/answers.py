"""etcd's JSON gateway as its server spells it: answers out. `store.requests` is the other half, `store.gateway` the
client's side.

Pure: no sockets, no state. Shapes are those of etcd 3.5: numbers of 64 bits as strings, bytes in base64, whatever is
zero, false or empty left out, fields in the order of etcd's protobuf definitions.
"""

import base64
from collections.abc import Mapping
from typing import Any, Final

import orjson

from shardlead.errors import Compacted, StoreRejected
from shardlead.store.base import (
    DeleteResult,
    Event,
    KeyValue,
    LeaseKeys,
    OpResult,
    PutResult,
    RangeResult,
    TxnResult,
)

Json = dict[str, Any]

COMPACTED: Final = "etcdserver: mvcc: required revision has been compacted"

HTTP_STATUS: Final[Mapping[int, int]] = {
    1: 408,
    2: 500,
    3: 400,
    4: 504,
    5: 404,
    6: 409,
    7: 403,
    8: 429,
    9: 400,
    10: 409,
    11: 400,
    12: 501,
    13: 500,
    14: 503,
    15: 500,
    16: 401,
}
"""gRPC status code → HTTP status, as grpc-gateway has it."""


def encode_bytes(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def encode_kv(kv: KeyValue) -> Json:
    """KeyValue; a tombstone has a key and the revision of its deletion."""
    out: Json = {"key": encode_bytes(kv.key)}
    if kv.create_revision:
        out["create_revision"] = str(kv.create_revision)
    out["mod_revision"] = str(kv.mod_revision)
    if kv.version:
        out["version"] = str(kv.version)
    if kv.value:
        out["value"] = encode_bytes(kv.value)
    if kv.lease:
        out["lease"] = str(kv.lease)
    return out


def encode_event(event: Event) -> Json:
    """Event; a put's type is the zero of its enum and so left out."""
    if event.is_delete:
        return {"type": "DELETE", "kv": encode_kv(event.kv)}
    return {"kv": encode_kv(event.kv)}


def encode_range(result: RangeResult, header: Json) -> Json:
    out: Json = {"header": header}
    if result.kvs:
        out["kvs"] = [encode_kv(kv) for kv in result.kvs]
    if result.more:
        out["more"] = True
    if result.count:
        out["count"] = str(result.count)
    return out


def encode_delete(result: DeleteResult, header: Json) -> Json:
    return {"header": header, "deleted": str(result.deleted)} if result.deleted else {"header": header}


def encode_txn(result: TxnResult, header: Json) -> Json:
    """TxnResponse. The answers inside have a header with a revision only, those of nested transactions an empty one."""
    out: Json = {"header": header}
    if result.succeeded:
        out["succeeded"] = True
    if result.results:
        out["responses"] = [_encode_op(each) for each in result.results]
    return out


def _encode_op(result: OpResult) -> Json:
    header = {"revision": str(result.revision)}
    match result:
        case PutResult():
            return {"response_put": {"header": header}}
        case DeleteResult():
            return {"response_delete_range": encode_delete(result, header)}
        case RangeResult():
            return {"response_range": encode_range(result, header)}
        case TxnResult():
            return {"response_txn": encode_txn(result, {})}


def encode_lease(lease: int, ttl_s: int, header: Json) -> Json:
    """LeaseGrantResponse and LeaseKeepAliveResponse."""
    out: Json = {"header": header}
    if lease:
        out["ID"] = str(lease)
    if ttl_s:
        out["TTL"] = str(ttl_s)
    return out


def encode_time_to_live(lease: int, found: LeaseKeys | None, header: Json, *, with_keys: bool) -> Json:
    """LeaseTimeToLiveResponse."""
    out = encode_lease(lease, 0, header)
    if found is None:
        out["TTL"] = "-1"
        return out
    if found.ttl_s:
        out["TTL"] = str(found.ttl_s)
    out["grantedTTL"] = str(found.granted_ttl_s)
    if with_keys and found.keys:
        out["keys"] = [encode_bytes(key) for key in found.keys]
    return out


def encode_refusal(refusal: StoreRejected) -> tuple[int, bytes]:
    """HTTP status and body of a refused unary request."""
    message = COMPACTED if isinstance(refusal, Compacted) else refusal.message
    body = {"error": message, "code": refusal.code, "message": message}
    return HTTP_STATUS.get(refusal.code, 500), orjson.dumps(body)
