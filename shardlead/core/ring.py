"""Which shard a key belongs to: key → slot by crc32, slot → shard by a table that is made once and stored.

Law: a lookup is one crc32 and one index, so any language or proxy can do it with the stored table. The table is
*made* with consistent hashing (uhashring) and then levelled; after that nobody computes it again, everybody reads
it. The same input gives the same table on every machine, Python and uhashring: the hash is our own (blake2b), names
are fixed text, and no order of a dict or set takes part. A golden test holds this.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final
from zlib import crc32

from uhashring import HashRing

from shardlead.core.model import SHARDS_MAX, Meta
from shardlead.errors import RingError

SlotTable = tuple[int, ...]
"""The shard of each slot; its length is the slot count, a power of two."""

SLOTS_MIN: Final = 16_384
SLOTS_PER_SHARD_MIN: Final = 16  # below this, floor and ceil differ by more than 6 %
_POINTS_PER_SHARD: Final = 40  # on the ring; more only brings the raw ring nearer to level, and levelling does the rest


def slot_count_for(shards: int) -> int:
    """The slot count of a new cluster: 16,384, or the next power of two from 16 slots a shard. Raises RingError."""
    if not 1 <= shards <= SHARDS_MAX:
        raise RingError(f"shards = {shards}: must be 1 to {SHARDS_MAX}")
    return max(SLOTS_MIN, 1 << (SLOTS_PER_SHARD_MIN * shards - 1).bit_length())


def build_table(shards: int, slot_count: int, seed: int = 0) -> SlotTable:
    """A new cluster's table. Every shard has floor or ceil of slot_count ÷ shards slots.

    Consistent hashing first, then as few slots as possible move to make it level. Takes about a second for 10,000
    shards. Raises RingError for a shape that cannot be.
    """
    _check_shape(shards, slot_count)

    # blake2b with the seed as its key: there under FIPS too, unlike md5; and uhashring's own default may change.
    salt = b"shardlead ring %d" % seed

    def position(name: str) -> int:
        return int.from_bytes(blake2b(name.encode(), digest_size=8, key=salt).digest(), "big")

    # `hash_fn` selects uhashring's MetaRing, whose points are hash_fn(f"{name}-{i}") for i < vnodes. (Its "ketama"
    # ring inserts each point into a sorted list, which takes minutes for 10,000 shards.)
    shard_of = {f"shard {shard}": shard for shard in range(shards)}
    ring = HashRing(list(shard_of), hash_fn=position, vnodes=_POINTS_PER_SHARD)
    return _level([shard_of[ring.get_node(f"slot {slot}")] for slot in range(slot_count)], shards)


def grow(table: SlotTable, shards: int) -> SlotTable:
    """The table for more shards: only the slots that must move do, and all of them to new shards.

    Raises RingError if `shards` is not more than the table has, or leaves fewer than 16 slots a shard.
    """
    _check_shape(shards, len(table))
    have = max(table) + 1
    if shards <= have:
        raise RingError(f"a table of {have} shards cannot grow to {shards}: it can only get more")
    return _level(table, shards)


def _check_shape(shards: int, slot_count: int) -> None:
    if not 1 <= shards <= SHARDS_MAX:
        raise RingError(f"shards = {shards}: must be 1 to {SHARDS_MAX}")
    if slot_count < 1 or slot_count & (slot_count - 1):
        raise RingError(f"slot_count = {slot_count}: must be a power of two")
    if slot_count < SLOTS_PER_SHARD_MIN * shards:
        raise RingError(f"slot_count = {slot_count}: {shards} shards need {SLOTS_PER_SHARD_MIN} slots each")


def _level(table: Sequence[int], shards: int) -> SlotTable:
    """Bring every shard to floor or ceil with the fewest slots moved.

    The ceilings go to the shards that have most already (lowest number first among equals): any other choice moves
    more. A shard that has too many gives up its highest-numbered slots; those are dealt out in slot order to the
    shards that have too few, in shard order. For a level table and more shards only new shards have too few.
    """
    counts = [0] * shards
    for shard in table:
        counts[shard] += 1
    floor, ceilings = divmod(len(table), shards)
    room = [floor] * shards
    for shard in sorted(range(shards), key=lambda shard: (-counts[shard], shard))[:ceilings]:
        room[shard] += 1

    level = list(table)
    homeless: list[int] = []
    for slot, shard in enumerate(table):
        if room[shard] > 0:
            room[shard] -= 1
        else:
            homeless.append(slot)
    takers = (shard for shard in range(shards) for _ in range(room[shard]))
    for slot, shard in zip(homeless, takers, strict=True):
        level[slot] = shard
    return tuple(level)


# --- the stored form -------------------------------------------------------------------------------------------


def encode_table(table: SlotTable) -> bytes:
    """The stored form: two bytes a slot, big-endian, in slot order."""
    return struct.pack(f">{len(table)}H", *table)


def decode_table(raw: bytes, meta: Meta) -> SlotTable:
    """The table as stored, checked against `meta`. Raises RingError if it is damaged or of another cluster."""
    if len(raw) != 2 * meta.slot_count:
        raise RingError(f"the stored slot table has {len(raw)} bytes, {meta.slot_count} slots need two each")
    if crc32(raw) != meta.ring_crc:
        raise RingError(f"the stored slot table has checksum {crc32(raw):08x}, meta says {meta.ring_crc:08x}")
    _check_shape(meta.shards, meta.slot_count)
    table: SlotTable = struct.unpack(f">{meta.slot_count}H", raw)
    if max(table) >= meta.shards:
        raise RingError(f"the stored slot table names shard {max(table)}, meta says there are {meta.shards}")
    numbers = tuple(range(meta.shards))  # one object for each shard instead of one for each slot
    return tuple([numbers[shard] for shard in table])


def table_crc(table: SlotTable) -> int:
    """The checksum that `meta` carries: crc32 of the stored form."""
    return crc32(encode_table(table))


# --- lookups ---------------------------------------------------------------------------------------------------


def slot_of(key: bytes, slot_count: int, hash_tags: bool = False) -> int:
    """The slot of a key: crc32 of the key, or of its hash tag where the cluster uses them, mod slot_count."""
    return crc32(hash_tag(key) if hash_tags else key) & (slot_count - 1)


def hash_tag(key: bytes) -> bytes:
    """The part of a key that is hashed where hash tags are on: as Redis, what stands between the first `{` and the
    first `}` after it, if that is not empty; else the whole key."""
    start = key.find(b"{")
    if start < 0:
        return key
    end = key.find(b"}", start + 1)
    return key[start + 1 : end] if end > start + 1 else key
