"""A process that takes the same shard over again and again and writes as long as it is let: `usurper.py FILE ROUNDS`.

Its rivals do the same, so everybody believes to lead most of the time. Each write is computed from what was loaded
after the barrier, in memory, as a cache would. It says "ready", waits for a line, and at the end prints the values
that were acknowledged and how often it was refused.
"""

import asyncio
import json
import sys
from functools import partial
from typing import Final

from shardlead.errors import EpochRegressed, Fenced
from shardlead.fencing import SqliteFence, Transaction
from tests.fencing.rivals import lead_of

SHARD: Final = 1
WRITES_PER_ROUND: Final = 5
SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS log (number INTEGER PRIMARY KEY AUTOINCREMENT, epoch INTEGER, value INTEGER)",
    "CREATE TABLE IF NOT EXISTS epochs (number INTEGER PRIMARY KEY AUTOINCREMENT)",
)
_LAST: Final = "SELECT coalesce(max(value), 0) FROM log"


async def main(path: str, rounds: int) -> None:
    acknowledged: list[int] = []
    refused = 0
    async with (
        SqliteFence(path, schema=SCHEMA, busy_timeout_s=10, synchronous="NORMAL") as fence,
        SqliteFence(path + ".epochs", schema=SCHEMA, busy_timeout_s=10, synchronous="NORMAL") as store,
    ):
        nobody = lead_of(0, 1)
        await store.barrier(nobody)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for _ in range(rounds):
            cursor = await store.write(nobody, lambda tx: tx.execute("INSERT INTO epochs DEFAULT VALUES").lastrowid)
            assert cursor is not None
            lead = lead_of(SHARD, cursor)
            try:
                await fence.barrier(lead)
                value: int = await fence.read(lambda tx: tx.execute(_LAST).fetchone()[0])
                for _ in range(WRITES_PER_ROUND):
                    value += 1
                    await fence.write(lead, partial(append, epoch=lead.epoch, value=value))
                    acknowledged.append(value)
            except (Fenced, EpochRegressed):
                refused += 1
    print(json.dumps({"acknowledged": acknowledged, "refused": refused}))


def append(tx: Transaction, epoch: int, value: int) -> None:
    tx.execute("INSERT INTO log (epoch, value) VALUES (?, ?)", (epoch, value))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
