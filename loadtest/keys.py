"""Which keys are asked for, and which shard each belongs to.

The shard is computed here anew, as any proxy in any language could: crc32 of the key, a power of two, the stored
table. It is what every answer is compared with, so it must not come from the code under test.
"""

import itertools
import random
import struct
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from zlib import crc32

KEYS_MAX: Final = 10_000_000

Draw = Callable[[], int]
"""The index of the next key."""


@dataclass(frozen=True)
class Ring:
    """The cluster's stored slot table: the shard of each slot."""

    table: tuple[int, ...]
    shards: int
    hash_tags: bool = False

    @classmethod
    def decode(cls, raw: bytes, *, shards: int, hash_tags: bool = False) -> "Ring":
        """From its stored form, two bytes a slot. Raises ValueError if that cannot be a table of `shards` shards."""
        count = len(raw) // 2
        if len(raw) % 2 or count == 0 or count & (count - 1):
            raise ValueError(f"a slot table of {len(raw)} bytes: the number of slots must be a power of two")
        table = struct.unpack(f">{count}H", raw)
        if max(table) >= shards:
            raise ValueError(f"the slot table names shard {max(table)} of {shards}")
        return cls(table, shards, hash_tags)

    def shard_of(self, key: bytes) -> int:
        """The shard that the key belongs to."""
        return self.table[crc32(_tag(key) if self.hash_tags else key) & (len(self.table) - 1)]


def _tag(key: bytes) -> bytes:
    """What stands between the first { and the } after it, if that is not empty; else the whole key."""
    start = key.find(b"{")
    end = key.find(b"}", start + 1) if start >= 0 else -1
    return key[start + 1 : end] if end > start + 1 else key


@dataclass(frozen=True)
class KeyChoice:
    """How keys are drawn: `uniform`; `zipf` with exponent `value` (1.0 is the classic one: the second key is asked
    for half as often as the first); `hot`, where the share `value` of all requests goes to one key."""

    kind: str = "uniform"
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "KeyChoice":
        """From "uniform", "zipf", "zipf:1.2", "hot" or "hot:0.5". Raises ValueError that says what is allowed."""
        kind, colon, number = text.partition(":")
        allowed = "must be uniform, zipf, zipf:EXPONENT (0.1 to 5), hot or hot:SHARE (above 0, at most 1)"
        if kind not in ("uniform", "zipf", "hot") or (kind == "uniform" and colon):
            raise ValueError(allowed)
        try:
            value = float(number) if colon else {"uniform": 0.0, "zipf": 1.0, "hot": 0.5}[kind]
        except ValueError:
            raise ValueError(allowed) from None
        if (kind == "zipf" and not 0.1 <= value <= 5) or (kind == "hot" and not 0 < value <= 1):
            raise ValueError(allowed)
        return cls(kind, value)

    def __str__(self) -> str:
        return self.kind if self.kind == "uniform" else f"{self.kind}:{self.value:g}"

    def drawer(self, count: int, rng: random.Random) -> Draw:
        """Draws indexes 0 to count - 1. Key 0 is the most frequent one of `zipf` and of `hot`."""
        number = rng.random
        match self.kind:
            case "uniform":
                return lambda: int(number() * count)
            case "hot":
                share = self.value
                others = max(1, count - 1)
                return lambda: 0 if number() < share else min(count - 1, 1 + int(number() * others))
            case _:
                weights = itertools.accumulate((rank + 1) ** -self.value for rank in range(count))
                sums = list(weights)
                return lambda: bisect_left(sums, number() * sums[-1])
