"""The ring: level, deterministic for ever, and growing by exactly what must move."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlead.core.model import SHARDS_MAX, Meta
from shardlead.core.ring import (
    SLOTS_PER_SHARD_MIN,
    build_table,
    decode_table,
    encode_table,
    grow,
    hash_tag,
    slot_count_for,
    slot_of,
    table_crc,
)
from shardlead.errors import RingError


def counts_of(table: tuple[int, ...], shards: int) -> list[int]:
    counter = Counter(table)
    return [counter[shard] for shard in range(shards)]


def moved(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    return [slot for slot, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


# --- the golden table: a change here would send keys to other shards in every cluster that exists ---------------

GOLDEN = {
    (1, 16_384, 0): 0x011FFCA6,
    (3, 16_384, 0): 0xBE7EF117,
    (256, 16_384, 0): 0x9954BF0F,
    (256, 16_384, 7): 0x11B2B8AA,
    (256, 65_536, 0): 0x6F65A1B0,
    (1_000, 16_384, 0): 0xCB351CAF,
    (1_024, 16_384, 0): 0x8D767371,
    (2_000, 32_768, 1): 0x6AF5B84A,
}

GOLDEN_KEYS = {
    b"": (0, 27),
    b"alice": (15_431, 159),
    b"bob": (12_608, 42),
    "müller".encode(): (3_673, 177),
    b"order/17": (4_730, 197),
    b"{user42}.cart": (4_857, 148),
    bytes(range(256)): (3_187, 21),
}


@pytest.mark.parametrize(("shape", "crc"), GOLDEN.items())
def test_the_table_of_a_shape_never_changes(shape: tuple[int, int, int], crc: int) -> None:
    """The same shards, slots and seed give the same table on every machine, Python and uhashring."""
    assert crc == table_crc(build_table(*shape))


@pytest.mark.parametrize(("key", "place"), GOLDEN_KEYS.items())
def test_the_place_of_a_key_never_changes(key: bytes, place: tuple[int, int]) -> None:
    """A key keeps its slot and, in a cluster of 256 shards, its shard."""
    table = build_table(256, 16_384)
    slot = slot_of(key, 16_384)

    assert place == (slot, table[slot])


def test_hash_randomisation_takes_no_part() -> None:
    """Processes with different string hash seeds build the same table."""
    program = "from shardlead.core.ring import build_table, table_crc; print(table_crc(build_table(64, 16384, 3)))"
    expected = table_crc(build_table(64, 16_384, 3))

    for hash_seed in ("0", "1", "4711"):
        answer = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert expected == int(answer.stdout)


# --- the shape -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "slots"),
    [(1, 16_384), (256, 16_384), (1_024, 16_384), (1_025, 32_768), (10_000, 262_144), (SHARDS_MAX, 524_288)],
)
def test_the_slot_count_follows_the_shards(shards: int, slots: int) -> None:
    """16,384 slots, or the next power of two from 16 a shard."""
    assert slots == slot_count_for(shards)


@pytest.mark.parametrize("shards", [0, -1, SHARDS_MAX + 1])
def test_a_shard_count_out_of_bounds_is_refused(shards: int) -> None:
    """There are 1 to 32,768 shards."""
    with pytest.raises(RingError, match=f"shards = {shards}"):
        slot_count_for(shards)
    with pytest.raises(RingError, match=f"shards = {shards}"):
        build_table(shards, 16_384)


@pytest.mark.parametrize(("shards", "slots"), [(1, 1_000), (1, 0), (1_025, 16_384), (2, 16)])
def test_a_slot_count_that_does_not_fit_is_refused(shards: int, slots: int) -> None:
    """Slots are a power of two, and at least 16 a shard."""
    with pytest.raises(RingError, match=f"slot_count = {slots}"):
        build_table(shards, slots)


@settings(max_examples=30, deadline=None)
@given(shards=st.integers(1, 256), seed=st.integers(-(2**63), 2**63))
def test_slots_per_shard_differ_by_at_most_one(shards: int, seed: int) -> None:
    """Every shard has floor or ceil of slots ÷ shards."""
    counts = counts_of(build_table(shards, 4_096, seed), shards)

    assert max(counts) - min(counts) <= 1
    assert sum(counts) == 4_096


def test_a_seed_makes_another_table() -> None:
    """Two clusters with different seeds place keys differently."""
    assert build_table(16, 4_096, 0) != build_table(16, 4_096, 1)


def test_a_large_table_is_built_in_seconds() -> None:
    """10,000 shards take about a second and a half; the bound is loose because test machines are."""
    begin = perf_counter()
    table = build_table(10_000, slot_count_for(10_000))

    assert perf_counter() - begin < 20
    assert set(counts_of(table, 10_000)) == {26, 27}


# --- growth ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shards=st.integers(1, 100), more=st.integers(1, 28), seed=st.integers(0, 3))
def test_growth_moves_exactly_what_must_and_only_to_new_shards(shards: int, more: int, seed: int) -> None:
    """Old shards only give, new shards only take, the result is level, and no table with fewer moves is."""
    slots = 2_048
    before = build_table(shards, slots, seed)
    after = grow(before, shards + more)
    moves = moved(before, after)

    assert all(after[slot] >= shards for slot in moves)
    counts = counts_of(after, shards + more)
    assert max(counts) - min(counts) <= 1
    # A level table leaves an old shard at most ceil, and at most `ceilings` of all shards have it.
    floor, ceilings = divmod(slots, shards + more)
    kept = sorted(counts_of(before, shards), reverse=True)
    most_kept = sum(min(count, floor + (rank < ceilings)) for rank, count in enumerate(kept))
    assert len(moves) == slots - most_kept


def test_growth_step_by_step_stays_level_and_never_moves_between_old_shards() -> None:
    """From 8 to 64 shards one at a time: each step takes floor or ceil slots, all to the new shard."""
    tables = [build_table(8, 1_024)]
    for shards in range(9, 65):
        tables.append(grow(tables[-1], shards))

    for shards, (before, after) in enumerate(pairwise(tables), start=9):
        moves = moved(before, after)
        assert {shards - 1} == {after[slot] for slot in moves}
        assert len(moves) in {1_024 // shards, 1_024 // shards + 1}
        counts = counts_of(after, shards)
        assert max(counts) - min(counts) <= 1


def test_growth_refuses_to_shrink_stand_still_or_thin_out() -> None:
    """Fewer or as many shards are refused, and so are fewer than 16 slots a shard."""
    table = build_table(64, 1_024)

    for shards in (63, 64):
        with pytest.raises(RingError, match="cannot grow"):
            grow(table, shards)
    with pytest.raises(RingError, match="need 16 slots each"):
        grow(table, 1_024 // SLOTS_PER_SHARD_MIN + 1)


# --- the stored form -------------------------------------------------------------------------------------------


def meta_of(table: tuple[int, ...], shards: int) -> Meta:
    return Meta("test", shards, len(table), 0, table_crc(table))


def test_a_stored_table_comes_back() -> None:
    """Two bytes a slot, big-endian, so that other languages read it without us."""
    table = build_table(300, 16_384)
    raw = encode_table(table)

    assert len(raw) == 2 * len(table)
    assert table[5] == raw[10] * 256 + raw[11]
    assert table == decode_table(raw, meta_of(table, 300))


def test_a_damaged_or_foreign_table_is_refused() -> None:
    """Length, checksum and shard numbers are held against meta."""
    table = build_table(300, 16_384)
    raw = encode_table(table)
    meta = meta_of(table, 300)

    with pytest.raises(RingError, match="bytes"):
        decode_table(raw[:-1], meta)
    with pytest.raises(RingError, match="checksum"):
        decode_table(raw[:-1] + bytes([raw[-1] ^ 1]), meta)
    with pytest.raises(RingError, match="names shard"):
        decode_table(raw, replace(meta, shards=299))


# --- hash tags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "tag"),
    [
        (b"user42", b"user42"),
        (b"{user42}.cart", b"user42"),
        (b"cart.{user42}", b"user42"),
        (b"foo{}{bar}", b"foo{}{bar}"),
        (b"foo{{bar}}zap", b"{bar"),
        (b"foo{bar}{zap}", b"bar"),
        (b"}{", b"}{"),
        (b"a}b{c}d", b"c"),
        (b"", b""),
    ],
)
def test_hash_tags_are_those_of_redis(key: bytes, tag: bytes) -> None:
    """The examples of the Redis cluster specification, and the edges around them."""
    assert tag == hash_tag(key)
    assert slot_of(key, 16_384, hash_tags=True) == slot_of(tag, 16_384)


def test_without_hash_tags_braces_are_plain_bytes() -> None:
    """They count only where the cluster was created with them."""
    assert slot_of(b"{a}b", 16_384) != slot_of(b"a", 16_384)
