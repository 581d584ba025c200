"""Adds to one counter as fast as it can and says each acknowledged value, until it is killed: `poster.py EPOCH`."""

import asyncio
import os
import sys

from shardlead.demo import Counter
from tests.fencing.rivals import lead_of


async def main(epoch: int) -> None:
    async with Counter() as make:
        counter = make(lead_of(3, epoch))
        await counter.open()
        while True:
            answer = await counter._post("a", "")
            assert isinstance(answer.body, bytes)
            os.write(1, answer.body)  # a line


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
