"""The application that the simulated workers host: lists, kept in memory by their leader, written whole.

A leader that works on after another has taken over would write its stale list over the other's: what a fence is for.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from shardlead.errors import EpochRegressed, Fenced, WriteUnknown
from shardlead.worker.leadership import Leadership
from tests.simulation.storage import NoAnswer, Refused, Storage


@dataclass
class Manners:
    """How an application behaves; of all objects of one world, and may be changed while it runs."""

    slow: float = 0.1  # share of the requests that think
    slow_s: float = 0.4
    stubborn: float = 0.0  # share of those that go on for a while although cancelled
    stubborn_s: float = 0.5  # at most so long
    fails_to_open: float = 0.0
    skips_barrier: bool = False  # ablation
    loads_first: bool = False  # another one
    poison: int = -1  # the shard whose open() kills its process
    background_s: float = 1.5  # how often run() writes
    polite: float = 0.5  # share of the objects whose run() returns when the shard drains


class Lists:
    """One shard's object."""

    fenced = True

    def __init__(self, lead: Leadership, world: "Surroundings") -> None:
        self.lead = lead
        self.world = world
        self.lists: dict[str, tuple[str, ...]] = {}
        self._turn = asyncio.Lock()
        world.watch.made(self)

    async def open(self) -> None:
        lead, world = self.lead, self.world
        world.watch.opening(lead)
        if world.manners.poison == lead.shard:
            world.die()
            await asyncio.sleep(60)
        if world.rng.random() < world.manners.fails_to_open:
            raise RuntimeError("the simulated open() failed")
        before: dict[str, tuple[str, ...]] = {}
        try:
            if world.manners.loads_first:
                before = await world.storage.load(lead.shard, 0, world.keys(lead.shard))
            if not world.manners.skips_barrier:
                try:
                    await world.storage.barrier(lead.shard, lead.epoch)
                except Refused as exc:
                    raise EpochRegressed(lead.shard, lead.epoch, exc.registered) from None
            lead.note_barrier()
            if world.manners.loads_first:
                self.lists = before
            else:
                self.lists = await world.storage.load(lead.shard, lead.epoch, world.keys(lead.shard))
        except Refused as exc:
            raise Fenced(lead.shard, lead.epoch, exc.registered) from None
        except NoAnswer as exc:
            raise WriteUnknown(lead.shard, lead.epoch, str(exc)) from None
        world.watch.opened(lead)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        world = self.world
        world.watch.handler_begins(self.lead, request)
        try:
            return await self._handle(request)
        finally:
            world.watch.handler_ends(self.lead)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        world, manners = self.world, self.world.manners
        key = request.path.rpartition("/")[2]
        if world.rng.random() < manners.slow:
            await self._think(world.rng.uniform(0.0, manners.slow_s))
        if request.method == "GET":
            if "cached" in request.query_string:
                return _answer(self.lists.get(key, ()))
            async with self._turn:  # a write under way may be seen there before our memory has it
                return _answer(await self._read(key))
        word = (await request.read()).decode()
        async with self._turn:
            known = self.lists.get(key, ())
            if world.is_idempotent and word in known:  # sent again under its Idempotency-Key
                return _answer(known[: known.index(word) + 1])
            value = (*self.lists.get(key, ()), word)
            try:
                await world.storage.put(self.lead.shard, self.lead.epoch, key, value)
            except Refused as exc:
                raise Fenced(self.lead.shard, self.lead.epoch, exc.registered) from None
            except NoAnswer as exc:
                raise WriteUnknown(self.lead.shard, self.lead.epoch, str(exc)) from None
            self.lists[key] = value
        return _answer(value)

    async def run(self) -> None:
        """Background work while leading: now and then a word in one of the lists, behind the same fence. Some return
        when the shard drains, others have to be cancelled."""
        world, lead = self.world, self.lead
        is_polite = world.rng.random() < world.manners.polite
        world.watch.handler_begins(lead, None)
        try:
            while not (is_polite and lead.draining.is_set()):
                pause_s = world.rng.uniform(0.5, 1.5) * world.manners.background_s
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await (lead.draining.wait() if is_polite else asyncio.sleep(2 * pause_s))
                    continue
                async with self._turn:
                    await self._add(world.rng.choice(world.keys(lead.shard)))
        finally:
            world.watch.handler_ends(lead)

    async def _add(self, key: str) -> None:
        """A word of its own."""
        world, lead = self.world, self.lead
        operation = world.watch.background(key)
        value = (*self.lists.get(key, ()), operation.word)
        try:
            await world.storage.put(lead.shard, lead.epoch, key, value)
        except Refused as exc:
            operation.outcome = "fail"
            raise Fenced(lead.shard, lead.epoch, exc.registered) from None
        except NoAnswer as exc:
            raise WriteUnknown(lead.shard, lead.epoch, str(exc)) from None
        self.lists[key] = value
        world.watch.background_done(operation, value)

    async def _read(self, key: str) -> tuple[str, ...]:
        """Behind the fence, which a leader's own memory is not."""
        lead = self.lead
        try:
            return (await self.world.storage.load(lead.shard, lead.epoch, (key,)))[key]
        except Refused as exc:
            raise Fenced(lead.shard, lead.epoch, exc.registered) from None
        except NoAnswer as exc:
            raise web.HTTPGatewayTimeout(text=str(exc)) from None

    async def _think(self, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if self.world.rng.random() < self.world.manners.stubborn:
                await asyncio.sleep(self.world.rng.uniform(0.0, self.world.manners.stubborn_s))
            raise

    async def close(self) -> None:
        self.world.watch.closed(self.lead)


def background_key(shard: int) -> str:
    """Where that shard's run() writes."""
    return f"run{shard}"


def _answer(words: tuple[str, ...]) -> web.Response:
    return web.Response(body=orjson.dumps({"list": words}), content_type="application/json")


@dataclass
class Surroundings:
    """What an object of one process reaches."""

    storage: Storage
    manners: Manners
    rng: random.Random
    watch: Any  # tests.simulation.watch.Watch, as one process sees it
    keys: Callable[[int], tuple[str, ...]]
    die: Callable[[], None]
    is_idempotent: bool = False  # the service removes duplicates
