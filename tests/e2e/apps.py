"""Applications that the end-to-end tests run: slow ones, unfenced ones, broken ones.

They are steered by files in the folder that SHARDLEAD_TEST_FOLDER names, so that a test can hold a worker at a step:
while `hold-open-<worker>` exists its objects do not open, while `hold-handle-<worker>` exists its requests wait.
"""

import asyncio
import os
import time
from pathlib import Path

from aiohttp import web

from shardlead.worker.leadership import Leadership

FOLDER_VARIABLE = "SHARDLEAD_TEST_FOLDER"
POLL_S = 0.01


def _folder() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


async def _held(name: str) -> None:
    path = _folder() / name
    while path.exists():  # noqa: ASYNC110 - another process removes the file and sets no event
        await asyncio.sleep(POLL_S)


class Slow:
    """Opens and answers when it is let; says who it is."""

    fenced = True
    idempotent = False

    def __init__(self, lead: Leadership) -> None:
        self.lead = lead
        self.opened_s = 0.0

    async def open(self) -> None:
        await _held(f"hold-open-{self.lead.worker}")
        self.opened_s = time.time()

    async def handle(self, request: web.Request) -> web.Response:
        await request.read()
        (_folder() / f"handling-{self.lead.worker}").touch()
        await _held(f"hold-handle-{self.lead.worker}")
        lead = self.lead
        return web.json_response(
            {"shard": lead.shard, "epoch": lead.epoch, "worker": lead.worker, "opened_s": self.opened_s}
        )

    async def close(self) -> None:
        (_folder() / f"closed-{self.lead.worker}-{self.lead.shard}").touch()


class Unfenced(Slow):
    """Work that nothing at the resource refuses."""

    fenced = False


class Raises(Slow):
    """Its `handle` raises for the path /raise; everything else is answered."""

    async def handle(self, request: web.Request) -> web.Response:
        if request.path.endswith("/raise"):
            raise RuntimeError("this request is more than I can bear")
        return await super().handle(request)


class OpenFails(Slow):
    """Opens shards of an even number; of the others every second one raises and every second one hangs."""

    async def open(self) -> None:
        match self.lead.shard % 4:
            case 1:
                raise RuntimeError("no such volume")
            case 3:
                await asyncio.Event().wait()
            case _:
                pass
