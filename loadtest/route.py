"""What finding a key's leader costs, beside uhashring's ring, which finds a name.

    python -m loadtest route [--shards 64,1024,10000] [--rounds 25] [--json FILE]

Ours answers slot, shard, leader, epoch and address from the map that routers and clients keep (`ShardMap.route`);
`HashRing.get_node` answers a node's name. Both look up the same keys in turns, in one process; told are medians over
the rounds. A round that anything else disturbs costs more, never less, so the least is told, too. Memory is what
Python's allocator gave for building each, the slot table included; each shard's leader is an object of its own, as in a
router.
"""

import argparse
import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from uhashring import HashRing

from loadtest import figures
from loadtest.machine import describe_line
from shardlead.core.keyspace import Keyspace, encode
from shardlead.core.model import SHARDS_MAX, LeaderRecord, Meta, WorkerRecord
from shardlead.core.ring import build_table, encode_table, slot_count_for, table_crc
from shardlead.core.shardmap import ShardMap, read_fact

KEYS: Final = 2_000
WORKERS: Final = 16
SHARDS: Final = (64, 1_024, 10_000)
PROMISED_NS: Final = 600
PROMISED_RATIO: Final = {64: 4.0, 1_024: 8.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One way of looking up, at one size. `ratio` is how many times as long the ring took in the same round; 1 for the
    ring itself."""

    target: str
    shards: int
    key: str
    ns: float
    least_ns: float
    ratio: float
    memory_kib: int


def map_of(shards: int) -> ShardMap:
    """A cluster's map with all shards led, read from records as a router reads them."""
    keyspace = Keyspace("loadtest")
    table = build_table(shards, slot_count_for(shards))
    meta = Meta("loadtest", shards, len(table), 0, table_crc(table))
    records = [(keyspace.meta, encode(meta)), (keyspace.ring, encode_table(table))]
    for number in range(WORKERS):
        record = WorkerRecord(sid=f"sid-{number}", address=f"10.0.0.{number + 1}:9000")
        records.append((keyspace.worker(f"worker-{number}"), encode(record)))
    for shard in range(shards):
        number = shard % WORKERS
        records.append((keyspace.leader(shard), encode(LeaderRecord(f"worker-{number}", f"sid-{number}"))))
    facts = [read_fact(keyspace, key, value, 1, at, at) for at, (key, value) in enumerate(records, 1)]
    return ShardMap().apply([fact for fact in facts if fact is not None], (), len(records))[0]


def with_memory(build: Callable[[], Any]) -> tuple[Any, int]:
    """What it builds, and the KiB that stay allocated for it."""
    gc.collect()
    tracemalloc.start()
    try:
        built = build()
        gc.collect()
        return built, tracemalloc.get_traced_memory()[0] // 1024
    finally:
        tracemalloc.stop()


def time_ns(look_up: Callable[[Any], Any], keys: Sequence[bytes | str]) -> float:
    """Nanoseconds for one key, with the loop around it."""
    began = time.perf_counter_ns()
    for key in keys:
        look_up(key)
    return (time.perf_counter_ns() - began) / len(keys)


def compare(shards: int, rounds: int) -> list[Row]:
    """All ways at one size, in turns."""
    seen, map_kib = with_memory(lambda: map_of(shards))
    ring, ring_kib = with_memory(lambda: HashRing([f"shard-{number}" for number in range(shards)]))
    texts = [f"customer-{number * 7919}" for number in range(KEYS)]
    raws = [text.encode() for text in texts]
    assert all(seen.route(text)[2] is not None for text in texts), "all shards are led"
    ways: list[tuple[str, str, Callable[[Any], Any], Sequence[bytes | str], int]] = [
        ("shardlead", "str", seen.route, texts, map_kib),
        ("shardlead", "bytes", seen.route, raws, map_kib),
        ("uhashring", "str", ring.get_node, texts, ring_kib),
    ]
    spent: list[list[float]] = [[] for _ in ways]
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for (_, _, look_up, keys, _), times in zip(ways, spent, strict=True):
                took_ns = time_ns(look_up, keys)
                if number:  # the first round is for warming up
                    times.append(took_ns)
    finally:
        gc.enable()
    return [
        Row(
            target,
            shards,
            key,
            round(statistics.median(times), 1),
            round(min(times), 1),
            round(statistics.median(theirs / ours for ours, theirs in zip(times, spent[-1], strict=True)), 2),
            memory_kib,
        )
        for (target, key, _, _, memory_kib), times in zip(ways, spent, strict=True)
    ]


def broken(rows: Sequence[Row]) -> list[str]:
    """The promises of the README that these figures do not keep."""
    found = []
    for row in rows:
        if (row.target, row.key) != ("shardlead", "str"):
            continue
        if row.ns > PROMISED_NS:
            found.append(f"{row.shards} shards: {row.ns:.0f} ns a key, promised are {PROMISED_NS}")
        if row.ratio < PROMISED_RATIO.get(row.shards, 0.0):
            found.append(
                f"{row.shards} shards: {row.ratio:.1f} x uhashring, promised is {PROMISED_RATIO[row.shards]:.0f} x"
            )
    return found


def report(rows: Sequence[Row]) -> str:
    """A table."""
    lines = [f"{'shards':>7}  {'by':<10}{'key':<6}{'ns':>8}{'least':>8}{'times faster':>14}{'memory KiB':>12}"]
    for row in rows:
        ratio = f"{row.ratio:.1f}" if row.target == "shardlead" else ""
        lines.append(
            f"{row.shards:>7}  {row.target:<10}{row.key:<6}{row.ns:>8.0f}{row.least_ns:>8.0f}{ratio:>14}"
            f"{row.memory_kib:>12,}"
        )
    return "\n".join(lines)


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if not all(1 <= size <= SHARDS_MAX for size in sizes):
        raise ValueError
    return sizes


def main(arguments: Sequence[str]) -> int:
    """Measure and tell; the exit code, 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m loadtest route", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--shards", type=_sizes, default=list(SHARDS), metavar="N,N", help="sizes (default 64,1024,10000)"
    )
    parser.add_argument("--rounds", type=figures.count, default=25, help="of each way (default 25)")
    parser.add_argument("--json", type=figures.file, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args(arguments)
    print(describe_line())
    rows = [row for shards in options.shards for row in compare(shards, options.rounds)]
    print(report(rows))
    if not figures.write(options.json, rows):
        return 2
    faults = broken(rows)
    for fault in faults:
        print(f"BROKEN: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
