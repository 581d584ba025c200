"""Store keys and values: spelled the same for ever, read back whole, and foreign ones told apart."""

from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.core.keyspace import (
    RECORD_OF,
    Keyspace,
    Place,
    decode,
    encode,
    is_cluster_name,
    is_worker_name,
)
from shardlead.core.model import (
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
)
from shardlead.errors import KeyspaceError

KEYS = Keyspace("shop-1")

# Every kind of key: how it is spelled, and where it belongs. The spelling is the protocol; it never changes.
GOLDEN_KEYS = [
    (KEYS.leader(0), b"/shop-1/leaders/000000", Place("leaders", shard=0)),
    (KEYS.leader(123_456), b"/shop-1/leaders/123456", Place("leaders", shard=123_456)),
    (KEYS.meta, b"/shop-1/meta", Place("meta")),
    (KEYS.ring, b"/shop-1/ring", Place("ring")),
    (KEYS.seat, b"/shop-1/seat", Place("seat")),
    (KEYS.tick, b"/shop-1/tick", Place("tick")),
    (KEYS.freeze, b"/shop-1/wishes/freeze", Place("freeze")),
    (KEYS.cordon("w-1"), b"/shop-1/wishes/cordon/w-1", Place("cordon", worker="w-1")),
    (KEYS.drain("w-1"), b"/shop-1/wishes/drain/w-1", Place("drain", worker="w-1")),
    (KEYS.pin(7), b"/shop-1/wishes/pin/000007", Place("pin", shard=7)),
    (KEYS.worker("w-1"), b"/shop-1/workers/w-1", Place("workers", worker="w-1")),
    (KEYS.history(7), b"/shop-1/history/000007", Place("history", shard=7)),
    (KEYS.assignment("w-1", 7), b"/shop-1/inbox/w-1/assignments/000007", Place("assignments", "w-1", 7)),
    (KEYS.eviction("w-1"), b"/shop-1/inbox/w-1/eviction", Place("eviction", worker="w-1")),
    (KEYS.offer("w-1", 7), b"/shop-1/inbox/w-1/offers/000007", Place("offers", "w-1", 7)),
    (KEYS.want("w-1", 7), b"/shop-1/inbox/w-1/wants/000007", Place("wants", "w-1", 7)),
]

GOLDEN_VALUES = [
    (
        Meta("shop-1", 256, 16_384, 0, 77),
        (
            b'{"v":1,"cluster":"shop-1","generation":0,"hash_tags":false,"protocol":1,"ring_crc":77,"seed":0,'
            b'"shards":256,"slot_count":16384}'
        ),
    ),
    (LeaderRecord("w-1", "7a-9"), b'{"v":1,"sid":"7a-9","worker":"w-1"}'),
    (Assignment(("w-1", "w-2"), "even"), b'{"v":1,"order":["w-1","w-2"],"reason":"even"}'),
    (Tick(5), b'{"v":1,"n":5}'),
    (Wish("ann"), b'{"v":1,"by":"ann","reason":"","worker":""}'),
]

RECORDS = [
    *(record for record, _ in GOLDEN_VALUES),
    WorkerRecord("7a-9", "10.0.0.1:80", 12, "b", 2.0, "1.2", "draining", 3.5, True, False, "10.0.0.1:81"),
    History("w-1", "7a-9", 1.5, "claimed", True, 2, True, (PastLeader("w-0", 2**50, 0.5),)),
    Eviction("7a-9", "ann", "wedged"),
    Offer("7a-9", "w-2", "orphan", True),
    Want("w-1", "7a-9", 2**62, 2**52, "assigned"),
]


@pytest.mark.parametrize(("key", "spelling", "place"), GOLDEN_KEYS)
def test_keys_are_spelled_so_for_ever_and_parse_back(key: bytes, spelling: bytes, place: Place) -> None:
    """Each key has one spelling, and the spelling tells the place."""
    assert spelling == key
    assert place == KEYS.parse(key)


@pytest.mark.parametrize(("record", "spelling"), GOLDEN_VALUES)
def test_values_are_spelled_so_for_ever(record: Record, spelling: bytes) -> None:
    """A version, then the fields by name in order."""
    assert spelling == encode(record)


@pytest.mark.parametrize("record", RECORDS)
def test_records_come_back_as_they_were(record: Record) -> None:
    """What is written is what is read, for every kind."""
    assert record == decode(type(record), b"k", encode(record))


def test_every_kind_of_place_has_its_record() -> None:
    """All places but the binary ring name the record that stands there."""
    assert {place.kind for _, _, place in GOLDEN_KEYS} - {"ring"} == set(RECORD_OF)
    assert {type(record) for record in RECORDS} == set(RECORD_OF.values())


@pytest.mark.parametrize("record", RECORDS)
def test_unknown_fields_survive_a_rewrite(record: Record) -> None:
    """An older build that rewrites a newer build's record loses nothing."""
    newer = orjson.dumps({**orjson.loads(encode(record)), "colour": "red", "nested": {"a": [1, None]}})
    read = decode(type(record), b"k", newer)

    assert read.extra == {"colour": "red", "nested": {"a": [1, None]}}
    assert orjson.loads(encode(replace(read))) == orjson.loads(newer)


def test_missing_fields_take_their_defaults() -> None:
    """A record of an older build, without the fields that came later, is still read."""
    assert decode(WorkerRecord, b"k", b'{"v":1,"sid":"s","address":"h:1"}') == WorkerRecord("s", "h:1")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"{}",
        b'{"worker":"a","sid":"b"}',
        b'{"v":0,"worker":"a","sid":"b"}',
        b'{"v":true,"worker":"a","sid":"b"}',
        b'{"v":"1","worker":"a","sid":"b"}',
        b'{"v":1,"worker":"a"}',
        b'{"v":1,"worker":5,"sid":"b"}',
        b'{"v":1,"worker":null,"sid":"b"}',
    ],
)
def test_what_is_not_a_record_is_an_error_that_names_its_key(value: bytes) -> None:
    """Foreign values never pass and never raise anything else."""
    with pytest.raises(KeyspaceError, match="/some/key"):
        decode(LeaderRecord, b"/some/key", value)


@given(st.binary(max_size=60))
def test_no_value_raises_anything_but_a_keyspace_error(value: bytes) -> None:
    """Whatever stands there, it is read or refused by name."""
    for kind in set(RECORD_OF.values()):
        try:
            record = decode(kind, b"k", value)
        except KeyspaceError:
            continue
        assert isinstance(record, kind)


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"/",
        b"/shop-1",
        b"/shop-1/",
        b"/shop-12/meta",
        b"/other/meta",
        b"/shop-1/meta/",
        b"/shop-1/leaders/",
        b"/shop-1/leaders/7",
        b"/shop-1/leaders/0000007",
        b"/shop-1/leaders/00000x",
        b"/shop-1/leaders/-00001",
        b"/shop-1/leaders/ 00001",
        "/shop-1/leaders/00000٣".encode(),  # a digit to str.isdigit, not to us
        b"/shop-1/leaders/\xff00001",
        b"/shop-1/workers/",
        b"/shop-1/workers/a/b",
        b"/shop-1/workers/.hidden",
        b"/shop-1/workers/sp ace",
        b"/shop-1/wishes/pin/w-1",
        b"/shop-1/wishes/thaw",
        b"/shop-1/inbox/w-1",
        b"/shop-1/inbox/w-1/other/000001",
        b"/shop-1/novelty",
    ],
)
def test_foreign_keys_are_nobodys(key: bytes) -> None:
    """Keys of other clusters, tools and newer builds are passed over."""
    assert KEYS.parse(key) is None


@given(st.binary(max_size=40))
def test_parsing_never_fails(tail: bytes) -> None:
    """Any bytes at all under our prefix are a place or None, and a place is spelled only once."""
    place = KEYS.parse(KEYS.prefix + tail)

    assert place is None or KEYS.prefix + tail in spellings(place)


def spellings(place: Place) -> set[bytes]:
    match place.kind:
        case "meta" | "ring" | "seat" | "tick":
            return {KEYS.prefix + place.kind.encode()}
        case "leaders" | "history":
            return {KEYS.leader(place.shard), KEYS.history(place.shard)}
        case "workers":
            return {KEYS.worker(place.worker)}
        case kind:
            raise AssertionError(f"too unlikely to be drawn: {kind}")


def test_shard_numbers_have_one_width_so_that_order_is_number_order() -> None:
    """No two keys can be confused, and a range of keys is a range of shards."""
    shards = [0, 1, 9, 10, 99, 100, 32_767, 999_999]

    assert sorted(map(KEYS.leader, shards)) == [KEYS.leader(shard) for shard in shards]
    assert len({len(KEYS.leader(shard)) for shard in shards}) == 1
    with pytest.raises(AssertionError):
        KEYS.leader(1_000_000)
    with pytest.raises(AssertionError):
        KEYS.leader(-1)


def test_routers_see_one_contiguous_range() -> None:
    """Everything between leaders/ and the end of workers/ is for routers; inboxes and history stand before."""
    inside = [KEYS.leader(1), KEYS.meta, KEYS.ring, KEYS.seat, KEYS.tick, KEYS.freeze, KEYS.pin(1), KEYS.worker("z")]
    before = [KEYS.history(1), KEYS.assignment("z", 1), KEYS.eviction("z"), KEYS.want("z", 1)]
    end = KEYS.workers[:-1] + b"0"

    assert all(KEYS.leaders <= key < end for key in inside)
    assert all(key < KEYS.leaders for key in before)


@pytest.mark.parametrize(
    ("name", "is_cluster", "is_worker"),
    [
        ("a", True, True),
        ("shop-1.eu_2", True, True),
        ("Shop", False, True),
        ("", False, False),
        ("-a", False, False),
        ("a/b", False, False),
        ("a b", False, False),
        ("a\n", False, False),
        ("é", False, False),
        ("a" * 63, True, True),
        ("a" * 64, False, True),
        ("a" * 128, False, True),
        ("a" * 129, False, False),
    ],
)
def test_names_that_fit_a_key(name: str, is_cluster: bool, is_worker: bool) -> None:
    """Names cannot break out of their part of a key."""
    assert (is_cluster, is_worker) == (is_cluster_name(name), is_worker_name(name))
    if not is_cluster:
        with pytest.raises(KeyspaceError, match="not a cluster name"):
            Keyspace(name)
