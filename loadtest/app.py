"""An application that costs next to nothing, so that a load test measures shardlead: counters in memory.

    POST /counters/{key}   adds one          GET /counters/{key}   only looks
    both answer {"value", "shard", "epoch", "worker"}

Like the demo it registers its epoch with a SQLite fence before it serves, so that a handoff costs what it costs with
real storage; unlike the demo it then counts in memory alone and forgets when the shard moves. It is fenced in the
sense that nothing of an older leader can be seen by a newer one: nothing is shared. For writes that are stored and
checked take `--app sqlite`, which is `shardlead.demo:Counter`.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar, Final

from aiohttp import web

from shardlead import Leadership
from shardlead.fencing import SqliteFence

FOLDER_VARIABLE: Final = "SHARDLEAD_DEV_DATA"
"""The folder that a local cluster gives its applications."""


class Shard:
    """The counters of one led shard."""

    fenced: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False

    def __init__(self, lead: Leadership, fence: SqliteFence) -> None:
        self._lead, self._fence = lead, fence
        self._values: dict[str, int] = {}
        self._rest = f'"shard":{lead.shard},"epoch":{lead.epoch},"worker":"{lead.worker}"}}'

    async def open(self) -> None:
        """Register the epoch; there is nothing to load."""
        await self._fence.barrier(self._lead)

    async def handle(self, request: web.Request) -> web.Response:
        """Look, or read the body to its end and add one."""
        key = request.path.rpartition("/")[2]
        if request.method == "POST":
            await request.read()
            self._values[key] = self._values.get(key, 0) + 1
        body = f'{{"value":{self._values.get(key, 0)},{self._rest}'.encode()
        return web.Response(body=body, content_type="application/json")


@asynccontextmanager
async def memory() -> AsyncIterator[Callable[[Leadership], Shard]]:
    """The application: one fence file for all workers of the machine, in the cluster's own folder."""
    folder = Path(os.environ.get(FOLDER_VARIABLE, "."))
    async with SqliteFence(folder / "loadtest.sqlite3", synchronous="NORMAL") as fence:
        yield lambda lead: Shard(lead, fence)
