"""etcd's JSON gateway as its server reads it: requests in. `store.answers` is the other half, `store.gateway` the
client's side.

Pure: no sockets, no state. Fields go by their protobuf or their JSON names, numbers of 64 bits as text or as numbers,
bytes in base64. An option that the embedded store does not have is refused (code 12), never ignored.
"""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, cast

import orjson

from shardlead.errors import StoreRejected
from shardlead.store.base import Compare, Delete, Op, Put, Range, Target, Txn

Json = dict[str, Any]

INVALID_ARGUMENT: Final = 3
UNIMPLEMENTED: Final = 12
_NUMBER: Final = re.compile(r"-?[0-9]{1,20}")
NESTING_MAX: Final = 32  # transactions within transactions; etcd would stop at its 128 operations


def parse_object(body: bytes) -> Json:
    """The JSON object that a request carries; an empty body and null are an empty one. Raises StoreRejected."""
    if not body.strip():
        return {}
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise StoreRejected(INVALID_ARGUMENT, f"invalid JSON: {exc}") from exc
    return {} if raw is None else _object(raw)


def parse_range(raw: Json) -> Range:
    """RangeRequest. `serializable` is accepted: there is one member."""
    fields = _Fields(raw, "RangeRequest")
    fields.boolean("serializable")
    op = Range(
        fields.bytes("key"),
        fields.bytes("range_end"),
        limit=fields.integer("limit"),
        revision=fields.integer("revision"),
        keys_only=fields.boolean("keys_only"),
        count_only=fields.boolean("count_only"),
    )
    fields.refuse_rest()
    return op


def parse_put(raw: Json) -> Put:
    """PutRequest."""
    fields = _Fields(raw, "PutRequest")
    op = Put(fields.bytes("key"), fields.bytes("value"), fields.integer("lease"))
    fields.refuse_rest()
    return op


def parse_delete(raw: Json) -> Delete:
    """DeleteRangeRequest."""
    fields = _Fields(raw, "DeleteRangeRequest")
    op = Delete(fields.bytes("key"), fields.bytes("range_end"))
    fields.refuse_rest()
    return op


def parse_txn(raw: Json, depth: int = 0) -> Txn:
    """TxnRequest, nested ones included."""
    if depth > NESTING_MAX:
        raise StoreRejected(INVALID_ARGUMENT, f"transactions nested deeper than {NESTING_MAX}")
    fields = _Fields(raw, "TxnRequest")
    txn = Txn(
        tuple(_parse_compare(each) for each in fields.objects("compare")),
        tuple(_parse_op(each, depth) for each in fields.objects("success")),
        tuple(_parse_op(each, depth) for each in fields.objects("failure")),
    )
    fields.refuse_rest()
    return txn


def _parse_op(raw: Json, depth: int) -> Op:
    fields = _Fields(raw, "RequestOp")
    if (inner := fields.object("request_range")) is not None:
        return parse_range(inner)
    if (inner := fields.object("request_put")) is not None:
        return parse_put(inner)
    if (inner := fields.object("request_delete_range")) is not None:
        return parse_delete(inner)
    if (inner := fields.object("request_txn")) is not None:
        return parse_txn(inner, depth + 1)
    raise StoreRejected(INVALID_ARGUMENT, "etcdserver: key not found")  # etcd's word for an empty operation


_TARGETS: Final = ("VERSION", "CREATE", "MOD", "VALUE", "LEASE")
_OPERANDS: Final = ("version", "create_revision", "mod_revision", "value", "lease")
_RELATIONS: Final = ("EQUAL", "GREATER", "LESS", "NOT_EQUAL")


def _parse_compare(raw: Json) -> Compare:
    fields = _Fields(raw, "Compare")
    target = Target(fields.name("target", _TARGETS))
    relation = cast(Literal["EQUAL", "NOT_EQUAL", "GREATER", "LESS"], fields.name("result", _RELATIONS))
    operands = {name: fields.bytes(name) if name == "value" else fields.integer(name) for name in _OPERANDS}
    # what does not belong to the target counts as not given, as in etcd
    operand = operands[_OPERANDS[_TARGETS.index(target.value)]]
    compare = Compare(fields.bytes("key"), target, operand, relation, fields.bytes("range_end"))
    fields.refuse_rest()
    return compare


T = TypeVar("T")


class _Fields:
    """A message's fields, by their protobuf or their JSON name. Options that nobody took are refused if they are
    switched on and etcd would heed them."""

    UNSUPPORTED: Final = frozenset(
        {
            "fragment",
            "filters",
            "ignore_lease",
            "ignore_value",
            "max_create_revision",
            "max_mod_revision",
            "min_create_revision",
            "min_mod_revision",
            "prev_kv",
            "sort_order",
            "sort_target",
        }
    )

    def __init__(self, raw: Json, message: str) -> None:
        self._raw = {_snake(name): value for name, value in raw.items() if value is not None}
        self._message = message

    def _take(self, name: str, convert: Callable[[Any], T], default: T) -> T:
        if name not in self._raw:
            return default
        try:
            return convert(self._raw.pop(name))
        except (ValueError, TypeError) as exc:  # binascii.Error is a ValueError
            raise StoreRejected(INVALID_ARGUMENT, f"{self._message}.{name}: {exc}") from exc

    def bytes(self, name: str) -> bytes:
        return self._take(name, _bytes, b"")

    def integer(self, name: str) -> int:
        return self._take(name, _integer, 0)

    def boolean(self, name: str) -> bool:
        return self._take(name, _boolean, False)

    def name(self, name: str, names: Sequence[str]) -> str:
        return self._take(name, lambda value: _name(value, names), names[0])

    def object(self, name: str) -> Json | None:
        return self._take(name, _object, None)

    def objects(self, name: str) -> list[Json]:
        return self._take(name, _objects, [])

    def refuse_rest(self) -> None:
        for name, value in self._raw.items():
            if name in self.UNSUPPORTED and value not in (False, 0, "0", "NONE", "KEY", []):
                raise StoreRejected(UNIMPLEMENTED, f"the embedded store has no {self._message}.{name}")


def _snake(name: str) -> str:
    if name.islower() or name.isupper():  # "ID", "TTL"
        return name
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def _bytes(value: object) -> bytes:
    if not isinstance(value, str):
        raise TypeError("base64 text is wanted")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as exc:
        raise ValueError(f"illegal base64 data: {exc}") from exc


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError("an integer, or its text, is wanted")
    if isinstance(value, str) and _NUMBER.fullmatch(value) is None:
        raise ValueError("an integer in plain digits is wanted")
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("does not fit 64 bits")
    return number


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false is wanted")
    return value


def _name(value: object, names: Sequence[str]) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, str) and value in names:
        return value
    raise ValueError("unknown value")


def _object(value: object) -> Json:
    if not isinstance(value, dict):
        raise StoreRejected(INVALID_ARGUMENT, "a JSON object is wanted")
    return value


def _objects(value: object) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError("a list is wanted")
    return [_object(each) for each in value]


@dataclass(frozen=True, slots=True)
class Watch:
    """WatchCreateRequest. `start_revision` 0: from now on."""

    key: bytes
    range_end: bytes
    start_revision: int
    watch_id: int
    has_progress: bool


def parse_watch(raw: Json) -> Watch | None:
    """What a watch asks for; None for a request that creates none."""
    create = _Fields(raw, "WatchRequest").object("create_request")
    if create is None:
        return None
    fields = _Fields(create, "WatchCreateRequest")
    watch = Watch(
        fields.bytes("key") or b"\0",  # etcd takes an empty key for the first of all
        fields.bytes("range_end"),
        fields.integer("start_revision"),
        fields.integer("watch_id"),
        fields.boolean("progress_notify"),
    )
    fields.refuse_rest()
    return watch


def integer_of(raw: Json, name: str) -> int:
    """One integer field of a small request (ID, TTL, revision)."""
    return _Fields(raw, "request").integer(name)


def boolean_of(raw: Json, name: str) -> bool:
    """One boolean field of a small request."""
    return _Fields(raw, "request").boolean(name)


def bytes_in(op: Op) -> int:
    """About what this operation weighs in etcd's own encoding: keys and values, and a little for each part."""
    match op:
        case Put():
            return len(op.key) + len(op.value) + 16
        case Delete() | Range():
            return len(op.key) + len(op.range_end) + 16
        case Txn():
            compares = sum(
                len(each.key) + (len(each.operand) if isinstance(each.operand, bytes) else 8) + 16
                for each in op.compares
            )
            return compares + sum(bytes_in(each) for each in (*op.success, *op.failure))
