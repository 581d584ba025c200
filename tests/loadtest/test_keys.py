"""Which keys are drawn, and which shard each belongs to."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.keys import KeyChoice, Ring
from shardlead.core.ring import build_table, encode_table, slot_count_for, slot_of

DRAWS = 40_000


def drawn(choice: str, count: int, draws: int = DRAWS) -> Counter[int]:
    draw = KeyChoice.parse(choice).drawer(count, random.Random(3))
    return Counter(draw() for _ in range(draws))


def test_uniform_draws_every_key_alike() -> None:
    """Each of a hundred keys gets its hundredth, give or take what chance allows."""
    counts = drawn("uniform", 100)
    assert set(counts) == set(range(100))
    assert max(counts.values()) < 1.3 * DRAWS / 100
    assert min(counts.values()) > 0.7 * DRAWS / 100


def test_zipf_draws_key_n_for_an_nth_of_the_first_ones() -> None:
    """With exponent 1 key 1 comes half as often as key 0, key 9 a tenth as often; with 2 a quarter and a hundredth."""
    counts = drawn("zipf", 1000, 200_000)
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.1)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)
    steep = drawn("zipf:2", 1000, 200_000)
    assert steep[0] / steep[1] == pytest.approx(4, rel=0.1)
    assert steep[0] / steep[9] == pytest.approx(100, rel=0.3)


def test_hot_draws_one_key_for_its_share() -> None:
    """hot:0.5 is key 0 for half of all draws, the others share the rest evenly."""
    counts = drawn("hot:0.5", 101)
    assert counts[0] / DRAWS == pytest.approx(0.5, abs=0.02)
    assert max(count for key, count in counts.items() if key) < 1.4 * DRAWS / 200
    assert set(counts) == set(range(101))


@pytest.mark.parametrize("choice", ["uniform", "zipf", "hot"])
def test_one_key_is_enough(choice: str) -> None:
    """Of one key there is nothing to choose."""
    assert set(drawn(choice, 1, 100)) == {0}


@pytest.mark.parametrize("text", ["", "even", "uniform:2", "zipf:0", "zipf:nan", "zipf:99", "hot:0", "hot:2", "hot:x"])
def test_what_is_no_choice_is_refused_with_what_is_allowed(text: str) -> None:
    """The error says the forms that there are."""
    with pytest.raises(ValueError, match="must be uniform, zipf"):
        KeyChoice.parse(text)


@pytest.mark.parametrize("text", ["uniform", "zipf:1.2", "hot:0.25"])
def test_a_choice_is_written_as_it_is_read(text: str) -> None:
    """So it can be sent to another process."""
    assert str(KeyChoice.parse(text)) == text


SHARDS = 48
SLOTS = slot_count_for(SHARDS)
TABLE = build_table(SHARDS, SLOTS)


@given(key=st.binary(max_size=40), hash_tags=st.booleans())
def test_the_shard_is_the_one_that_shardlead_computes(key: bytes, hash_tags: bool) -> None:
    """Two readings of the same rule, written apart: crc32, a power of two, the stored table, hash tags."""
    ring = Ring.decode(encode_table(TABLE), shards=SHARDS, hash_tags=hash_tags)
    assert ring.shard_of(key) == TABLE[slot_of(key, SLOTS, hash_tags)]


@pytest.mark.parametrize(("raw", "shards"), [(b"", 4), (b"\0", 4), (b"\0\0" * 3, 4), (b"\0\7" * 4, 4)])
def test_what_is_no_table_is_refused(raw: bytes, shards: int) -> None:
    """Not a power of two, or a shard that is not there."""
    with pytest.raises(ValueError, match="slot table"):
        Ring.decode(raw, shards=shards)
