"""Store keys and values: how the nouns of `core.model` are spelled under `/<cluster>/`.

Law: protocol.md A.2. Numbers in keys have a fixed width, so that no two keys can be confused and order is number
order. Values are JSON objects with a version `v`; unknown fields are kept; whatever cannot be read raises
KeyspaceError, which callers log once and pass over: a foreign record never stops anybody.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

import msgspec
import orjson

from shardlead.core.model import (
    Assignment,
    Eviction,
    History,
    LeaderRecord,
    Meta,
    Offer,
    Record,
    Tick,
    Want,
    Wish,
    WorkerRecord,
)
from shardlead.errors import KeyspaceError

VALUE_VERSION: Final = 1
SHARD_DIGITS: Final = 6

_CLUSTER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_WORKER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHARD: Final = re.compile(r"[0-9]{6}")

CLUSTER_NAME_RULE: Final = "1 to 63 of a-z 0-9 . _ - and begins with a letter or digit"
WORKER_NAME_RULE: Final = "1 to 128 of A-Z a-z 0-9 . _ - and begins with a letter or digit"


def is_cluster_name(name: str) -> bool:
    """Whether `name` can name a cluster (CLUSTER_NAME_RULE)."""
    return _CLUSTER_NAME.fullmatch(name) is not None


def is_worker_name(name: str) -> bool:
    """Whether `name` can name a worker (WORKER_NAME_RULE)."""
    return _WORKER_NAME.fullmatch(name) is not None


# --- values ----------------------------------------------------------------------------------------------------

R = TypeVar("R", bound=Record)

_KINDS: Final = (Meta, WorkerRecord, LeaderRecord, History, Assignment, Eviction, Offer, Want, Wish, Tick)
_FIELD_NAMES: Final[Mapping[type[Record], frozenset[str]]] = {
    kind: frozenset(item.name for item in fields(kind)) - {"extra"} for kind in _KINDS
}


def _field_names(kind: type[Record]) -> frozenset[str]:
    return _FIELD_NAMES[kind]


def encode(record: Record) -> bytes:
    """The stored form of a record, fields it did not know included."""
    value: dict[str, Any] = {"v": VALUE_VERSION, **record.extra}
    for name in sorted(_field_names(type(record))):
        value[name] = getattr(record, name)
    return orjson.dumps(value)


def decode(kind: type[R], key: bytes, value: bytes) -> R:
    """The record that `value` spells. Raises KeyspaceError for anything that is not one."""
    try:
        raw = orjson.loads(value)
    except orjson.JSONDecodeError as exc:
        raise KeyspaceError(key, f"not JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise KeyspaceError(key, "not a JSON object")
    version = raw.pop("v", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise KeyspaceError(key, "has no version `v`")
    known = _field_names(kind)
    extra = {name: item for name, item in raw.items() if name not in known}
    own = {name: item for name, item in raw.items() if name in known}
    if extra:
        try:
            orjson.dumps(extra)
        except TypeError as exc:  # it reads deeper nests than it writes, and a rewrite must lose nothing
            raise KeyspaceError(key, f"has unknown fields that could not be kept: {exc}") from exc
    try:
        record = msgspec.convert({**own, "extra": extra}, kind, strict=True)
    except msgspec.ValidationError as exc:
        raise KeyspaceError(key, f"not a {kind.__name__}: {exc}") from exc
    return record


# --- keys ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keyspace:
    """Every key of one cluster. `prefix` is b"/<cluster>/"."""

    cluster: str

    def __post_init__(self) -> None:
        if not is_cluster_name(self.cluster):
            raise KeyspaceError(self.cluster.encode(), f"not a cluster name: {CLUSTER_NAME_RULE}")

    @property
    def prefix(self) -> bytes:
        return b"/%s/" % self.cluster.encode()

    # facts and shape: one contiguous range, [leaders/ .. workers~)
    @property
    def leaders(self) -> bytes:
        return self.prefix + b"leaders/"

    def leader(self, shard: int) -> bytes:
        return self.leaders + _number(shard)

    @property
    def meta(self) -> bytes:
        return self.prefix + b"meta"

    @property
    def ring(self) -> bytes:
        return self.prefix + b"ring"

    @property
    def seat(self) -> bytes:
        return self.prefix + b"seat"

    @property
    def tick(self) -> bytes:
        return self.prefix + b"tick"

    @property
    def wishes(self) -> bytes:
        return self.prefix + b"wishes/"

    @property
    def freeze(self) -> bytes:
        return self.wishes + b"freeze"

    def cordon(self, worker: str) -> bytes:
        return self.wishes + b"cordon/" + worker.encode()

    def drain(self, worker: str) -> bytes:
        return self.wishes + b"drain/" + worker.encode()

    def pin(self, shard: int) -> bytes:
        return self.wishes + b"pin/" + _number(shard)

    @property
    def workers(self) -> bytes:
        return self.prefix + b"workers/"

    def worker(self, name: str) -> bytes:
        return self.workers + name.encode()

    # history and load
    @property
    def histories(self) -> bytes:
        return self.prefix + b"history/"

    def history(self, shard: int) -> bytes:
        return self.histories + _number(shard)

    # inboxes
    @property
    def inboxes(self) -> bytes:
        return self.prefix + b"inbox/"

    def inbox(self, worker: str) -> bytes:
        return self.inboxes + worker.encode() + b"/"

    def assignments(self, worker: str) -> bytes:
        return self.inbox(worker) + b"assignments/"

    def assignment(self, worker: str, shard: int) -> bytes:
        return self.assignments(worker) + _number(shard)

    def eviction(self, worker: str) -> bytes:
        return self.inbox(worker) + b"eviction"

    def offer(self, worker: str, shard: int) -> bytes:
        return self.inbox(worker) + b"offers/" + _number(shard)

    def want(self, worker: str, shard: int) -> bytes:
        return self.inbox(worker) + b"wants/" + _number(shard)

    def parse(self, key: bytes) -> "Place | None":
        """Where a key belongs; None for a key that is not one of ours (foreign, or of a newer build)."""
        if not key.startswith(self.prefix):
            return None
        try:
            parts = key[len(self.prefix) :].decode("ascii").split("/")
        except UnicodeDecodeError:
            return None
        match parts:
            case ["meta" | "ring" | "seat" | "tick" as kind]:
                return Place(kind)
            case ["leaders" | "history" as kind, shard] if _is_shard(shard):
                return Place(kind, shard=int(shard))
            case ["workers", name] if is_worker_name(name):
                return Place("workers", worker=name)
            case ["wishes", "freeze"]:
                return Place("freeze")
            case ["wishes", "cordon" | "drain" as kind, name] if is_worker_name(name):
                return Place(kind, worker=name)
            case ["wishes", "pin", shard] if _is_shard(shard):
                return Place("pin", shard=int(shard))
            case ["inbox", name, "eviction"] if is_worker_name(name):
                return Place("eviction", worker=name)
            case ["inbox", name, "assignments" | "offers" | "wants" as kind, shard] if is_worker_name(
                name
            ) and _is_shard(shard):
                return Place(kind, worker=name, shard=int(shard))
            case _:
                return None


@dataclass(frozen=True, slots=True)
class Place:
    """What a key is about: its kind, and the worker and shard in it (-1: none)."""

    kind: str
    worker: str = ""
    shard: int = -1


RECORD_OF: Final[Mapping[str, type[Record]]] = {
    "meta": Meta,
    "seat": LeaderRecord,
    "tick": Tick,
    "leaders": LeaderRecord,
    "history": History,
    "workers": WorkerRecord,
    "freeze": Wish,
    "cordon": Wish,
    "drain": Wish,
    "pin": Wish,
    "eviction": Eviction,
    "assignments": Assignment,
    "offers": Offer,
    "wants": Want,
}
"""The record that stands at each kind of place. `ring` is missing: its value is binary, see `core.ring`."""


def _number(shard: int) -> bytes:
    assert 0 <= shard < 10**SHARD_DIGITS, f"shard {shard} does not fit {SHARD_DIGITS} digits"
    return b"%06d" % shard


def _is_shard(text: str) -> bool:
    return _SHARD.fullmatch(text) is not None
