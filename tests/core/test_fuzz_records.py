"""Whatever stands in the store: it is read, or refused by name; nobody who reads it fails, waits or forgets."""

import dataclasses
import random
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.controller.picture import Picture
from shardlead.core.keyspace import RECORD_OF, Keyspace, Place, decode, encode
from shardlead.core.model import (
    SHARDS_MAX,
    Assignment,
    Eviction,
    History,
    LeaderRecord,
    Meta,
    Offer,
    PastLeader,
    Record,
    Tick,
    Want,
    Wish,
    WorkerRecord,
    epoch_of,
)
from shardlead.core.planner import Limits, plan
from shardlead.core.ring import decode_table, encode_table, table_crc
from shardlead.core.shardmap import Fact, ShardMap, read_fact
from shardlead.errors import KeyspaceError, RingError
from shardlead.store.base import KeyValue
from shardlead.store.mirror import Change
from tests.support.fuzz import SCALARS, bent_bytes, bent_json, cut, deep, examples, json_values, written

KEYS = Keyspace("shop-1")
INT64 = st.integers(0, 2**63 - 1)
SECONDS = st.floats(0, 1e12)
NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z")
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SHARDS = st.integers(0, 999_999)
FIELDS = tuple(
    sorted(
        {"v", "extra", "colour", "worker", "sid", "shards", "slot_count", "ring_crc", "generation", "order", "state"}
        | {"address", "capacity", "drain_timeout_s", "previous", "epoch", "since", "reason", "n", "by", "zone"}
    )
)
EXTRA = st.dictionaries(
    st.sampled_from(("colour", "extra", "été", "")), json_values(("a", "b")).filter(lambda value: value is not None)
)
FIELDS_OF: dict[type[Record], dict[str, st.SearchStrategy[Any]]] = {
    Meta: {
        "cluster": TEXT,
        "shards": st.integers(1, SHARDS_MAX),
        "slot_count": st.sampled_from((16, 16_384, 524_288)),
        "seed": INT64,
        "ring_crc": st.integers(0, 2**32 - 1),
        "generation": st.integers(0, 31),
        "protocol": INT64,
        "hash_tags": st.booleans(),
    },
    WorkerRecord: {
        "sid": TEXT,
        "address": TEXT,
        "pid": INT64,
        "zone": TEXT,
        "capacity": st.floats(0.001, 1_000),
        "version": TEXT,
        "state": st.sampled_from(("up", "draining")),
        "drain_timeout_s": SECONDS,
        "idempotent": st.booleans(),
        "fenced": st.booleans(),
        "admin": TEXT,
    },
    LeaderRecord: {"worker": TEXT, "sid": TEXT},
    History: {
        "worker": TEXT,
        "sid": TEXT,
        "since": SECONDS,
        "reason": TEXT,
        "clean": st.booleans(),
        "short_tenures": INT64,
        "ended": st.booleans(),
        "previous": st.lists(st.builds(PastLeader, TEXT, INT64, SECONDS), max_size=3).map(tuple),
        "tick": INT64,
        "ttl_s": SECONDS,
    },
    Assignment: {"order": st.lists(NAMES, max_size=4).map(tuple), "reason": TEXT},
    Eviction: {"sid": TEXT, "by": TEXT, "reason": TEXT},
    Offer: {
        "sid": TEXT,
        "by": TEXT,
        "reason": TEXT,
        "handoff": st.booleans(),
        "clean": st.booleans(),
        "ttl_s": SECONDS,
    },
    Want: {
        "target": TEXT,
        "target_sid": TEXT,
        "target_lease": INT64,
        "epoch_seen": INT64,
        "reason": TEXT,
        "ttl_s": SECONDS,
    },
    Wish: {"by": TEXT, "reason": TEXT, "worker": TEXT},
    Tick: {"n": INT64},
}
KINDS: dict[type[Record], st.SearchStrategy[Any]] = {
    kind: st.builds(kind, extra=EXTRA, **drawn) for kind, drawn in FIELDS_OF.items()
}
RECORDS: st.SearchStrategy[Record] = st.one_of(*KINDS.values())
PLACES = st.one_of(
    st.builds(Place, st.sampled_from(("meta", "ring", "seat", "tick", "freeze"))),
    st.builds(Place, st.sampled_from(("leaders", "history", "pin")), shard=SHARDS),
    st.builds(Place, st.sampled_from(("workers", "cordon", "drain", "eviction")), worker=NAMES),
    st.builds(Place, st.sampled_from(("assignments", "offers", "wants")), worker=NAMES, shard=SHARDS),
)


def key_of(place: Place) -> bytes:
    """The key of a place, by the makers that writers use."""
    worker, shard = place.worker, place.shard
    spelled = {
        "meta": lambda: KEYS.meta,
        "ring": lambda: KEYS.ring,
        "seat": lambda: KEYS.seat,
        "tick": lambda: KEYS.tick,
        "freeze": lambda: KEYS.freeze,
        "leaders": lambda: KEYS.leader(shard),
        "history": lambda: KEYS.history(shard),
        "pin": lambda: KEYS.pin(shard),
        "workers": lambda: KEYS.worker(worker),
        "cordon": lambda: KEYS.cordon(worker),
        "drain": lambda: KEYS.drain(worker),
        "eviction": lambda: KEYS.eviction(worker),
        "assignments": lambda: KEYS.assignment(worker, shard),
        "offers": lambda: KEYS.offer(worker, shard),
        "wants": lambda: KEYS.want(worker, shard),
    }
    return spelled[place.kind]()


def test_every_kind_of_record_is_drawn() -> None:
    """A new kind of record joins these tests, and so does a new field."""
    assert set(KINDS) == set(RECORD_OF.values())
    for kind, drawn in FIELDS_OF.items():
        assert {field.name for field in dataclasses.fields(kind)} == {"extra", *drawn}


@examples(200)
@given(RECORDS)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    """What is written is what is read, unknown fields and all."""
    assert decode(type(record), b"k", encode(record)) == record


@st.composite
def _bent_records(draw: st.DrawFn) -> tuple[type[Record], bytes]:
    record = draw(RECORDS)
    kind = draw(st.sampled_from((type(record), type(record), *KINDS)))
    raw = encode(record)
    if draw(st.booleans()):
        return kind, draw(bent_bytes(raw, (b"[", b"{", b"}", b'"', b",", b":1", b"null", b"\xc3", b"1e999", b"-0")))
    return kind, written(draw(bent_json(orjson.loads(raw), FIELDS)))


@examples(300)
@given(_bent_records())
def test_a_bent_record_is_read_for_good_or_refused_by_name(bent: tuple[type[Record], bytes]) -> None:
    """KeyspaceError names the key; what is read can be written again, and is the same then."""
    kind, value = bent
    try:
        record = decode(kind, b"/the/key", value)
    except KeyspaceError as exc:
        said = exc
    else:
        assert decode(kind, b"k", encode(record)) == record
        known = {name for name in orjson.loads(encode(record)) if name not in record.extra}
        assert {name: item for name, item in orjson.loads(value).items() if name not in known} == dict(record.extra)
        return
    assert said.key == b"/the/key"
    assert str(said).startswith("/the/key: ")
    assert len(str(said)) < 2_000


@pytest.mark.parametrize("levels", [100, 250, 252, 300, 500, 1_000])
def test_what_could_be_read_but_not_written_again_is_refused(levels: int) -> None:
    """orjson reads 1,024 levels and writes 254: a record in between would fail whoever passes it on."""
    value = b'{"v":1,"worker":"a","sid":"b","colour":%b}' % written(deep(levels))
    try:
        record = decode(LeaderRecord, b"k", value)
    except KeyspaceError:
        assert levels > 200
    else:
        assert orjson.loads(encode(record)) == orjson.loads(value)
        assert levels <= 252


@examples(200)
@given(PLACES)
def test_a_place_has_one_key_and_the_key_one_place(place: Place) -> None:
    """For every kind of key."""
    assert KEYS.parse(key_of(place)) == place
    assert Keyspace("shop-2").parse(key_of(place)) is None


@examples(300)
@given(PLACES.flatmap(lambda place: bent_bytes(key_of(place), (b"/", b"0", b"\xff", b"leaders", b"inbox/", b"-"))))
def test_a_bent_key_is_a_place_of_its_own_or_nobodys(key: bytes) -> None:
    """Whatever parses is spelled in exactly that way."""
    place = KEYS.parse(key)
    assert place is None or key_of(place) == key


# --- the slot table ----------------------------------------------------------------------------------------------


@st.composite
def _tables(draw: st.DrawFn) -> tuple[bytes, Meta]:
    shards = draw(st.integers(1, 8))
    slots = draw(st.sampled_from((16, 64, 128)))
    table = tuple(random.Random(draw(st.integers(0, 9))).randrange(shards) for _ in range(slots))
    crc = table_crc(table)
    return encode_table(table), Meta("shop-1", shards, slots, 0, crc)


@examples(100)
@given(_tables(), st.data())
def test_a_bent_table_is_no_table(stored: tuple[bytes, Meta], data: st.DataObject) -> None:
    """RingError, or exactly the table that meta speaks of; never one that names a shard there is not."""
    raw, meta = stored
    bent = data.draw(bent_bytes(raw))
    shape = {
        name: data.draw(st.one_of(st.just(getattr(meta, name)), st.integers(-1, 200), st.integers()))
        for name in ("shards", "slot_count", "ring_crc")
    }
    told = Meta("shop-1", shape["shards"], shape["slot_count"], 0, shape["ring_crc"])
    try:
        table = decode_table(bent, told)
    except RingError:
        return
    assert encode_table(table) == bent
    assert len(table) == told.slot_count
    assert max(table) < told.shards


# --- whoever reads it all ----------------------------------------------------------------------------------------

WORKERS = ("a", "b", "c")
FEW = st.sampled_from(WORKERS)
ODD = st.sampled_from((0.0, -1.0, 1e-300, 1e-9, 1.0, 3.0, 1e300))


def _some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there, now and then anything."""
    return st.integers(0, 19).flatmap(lambda number: values if number else SCALARS)


@st.composite
def _key_values(draw: st.DrawFn) -> KeyValue:
    shard = draw(st.one_of(st.integers(0, 5), st.sampled_from((255, 256, 32_767, 32_768, 999_999))))
    name = draw(FEW)
    sid = draw(_some(st.sampled_from(("s1", "s2"))))
    place, fields = draw(
        st.sampled_from(
            (
                (KEYS.leader(shard), {"worker": name, "sid": sid}),
                (KEYS.worker(name), {"sid": sid, "address": "h:1"}),
                (KEYS.meta, {"cluster": "shop-1", "shards": 6, "slot_count": 16_384, "seed": 0, "ring_crc": 0}),
                (KEYS.ring, {}),
                (KEYS.assignment(name, shard), {"order": [name], "reason": ""}),
                (KEYS.history(shard), {"worker": name, "sid": sid, "since": 1.0, "reason": ""}),
                (KEYS.pin(shard), {"by": "ann", "worker": name}),
                (KEYS.cordon(name), {"by": "ann"}),
                (KEYS.drain(name), {"by": "ann"}),
                (KEYS.freeze, {"by": "ann"}),
                (KEYS.seat, {"worker": name, "sid": sid}),
                (KEYS.tick, {"n": 1}),
                (KEYS.prefix + b"novelty", {}),
            )
        )
    )
    odd: dict[str, Any] = {}
    if place == KEYS.worker(name) and draw(st.booleans()):
        odd = {"capacity": draw(ODD), "drain_timeout_s": draw(ODD), "zone": draw(_some(FEW)), "state": "draining"}
        odd = {field: odd[field] for field in draw(st.sets(st.sampled_from(sorted(odd))))}
    elif place == KEYS.meta and draw(st.booleans()):
        odd = {draw(st.sampled_from(("shards", "slot_count", "generation", "ring_crc"))): draw(_some(INT64))}
    elif "order" in fields:
        odd = {"order": draw(st.lists(FEW, max_size=4))}
    value = written({"v": 1, **fields, **odd})
    revision = draw(st.integers(1, 2**48 - 1))
    return KeyValue(place, value, revision, revision, 1, draw(st.sampled_from((0, 7, 2**63 - 1))))


@examples(150)
@given(st.lists(_key_values(), max_size=25), st.data())
def test_nothing_in_the_store_stops_a_map_a_picture_or_a_plan(kvs: list[KeyValue], data: st.DataObject) -> None:
    """Facts that no writer of ours would write are passed over or borne; a map can be shown as JSON; a plan ends, and
    names only workers that live."""
    facts: list[Fact] = []
    for kv in kvs:
        try:
            fact = read_fact(KEYS, kv.key, kv.value, kv.lease, kv.create_revision, kv.mod_revision)
        except KeyspaceError:
            place = KEYS.parse(kv.key)
            assert place is not None
            fact = Fact(place, None, kv.lease, kv.create_revision, kv.mod_revision)
        if fact is not None:
            facts.append(fact)
    shown = ShardMap()
    for batch in data.draw(cut_list(facts)):
        shown, _ = shown.apply(batch, (), max((fact.mod_revision for fact in batch), default=0))
    assert all(0 < leader.epoch < 2**53 for _, leader in shown.leaders())
    picture = Picture(KEYS, 30.0, 10.0)
    last = {kv.key: kv for kv in kvs}
    picture.apply(Change(2**48, tuple(last.values()), (), is_load=True), 1)
    made = plan(picture.snapshot(10**12), Limits())
    living = set(picture.fleet.members)
    assert all(set(write.order) <= living for write in made.writes)
    assert made.shares.keys() <= living


def cut_list(items: list[Fact]) -> st.SearchStrategy[list[list[Fact]]]:
    """The facts, in order, in batches."""
    raw = bytes(range(len(items)))
    return cut(raw).map(lambda pieces: [[items[number] for number in piece] for piece in pieces])


def test_an_epoch_is_small_enough_for_every_column() -> None:
    """The largest generation above the largest revision, still exact in JSON."""
    assert epoch_of(31, 2**48 - 1) < 2**53
