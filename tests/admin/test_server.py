"""The admin server's pages, over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import pytest
from prometheus_client import CollectorRegistry

from shardlead.admin import server
from shardlead.admin.server import AdminServer, Window
from shardlead.clock import SystemClock
from shardlead.config import AdminSettings
from shardlead.core.keyspace import Place
from shardlead.core.model import LeaderRecord, WorkerRecord
from shardlead.core.shardmap import Delta, Fact, ShardMap
from shardlead.metrics import ControllerMetrics, new_registry

TIMEOUT_S = 10.0


@dataclass
class Scene:
    """A map that the test changes, as a view would."""

    shard_map: ShardMap = field(default_factory=ShardMap)
    callbacks: list[Callable[[Delta], None]] = field(default_factory=list)
    reason: str = ""
    subscribed: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def subscribe(self, callback: Callable[[Delta], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        self.subscribed.set()

        def unsubscribe() -> None:
            self.callbacks.remove(callback)
            self.left.set()

        return unsubscribe

    def window(self) -> Window:
        return Window(lambda: self.shard_map, self.subscribe, lambda: 0.25, lambda: True)

    def change(self, revision: int, *puts: Fact, deletes: tuple[Place, ...] = ()) -> None:
        self.shard_map, delta = self.shard_map.apply(puts, deletes, revision)
        for callback in tuple(self.callbacks):
            callback(delta)


def up(name: str, sid: str, revision: int, state: Any = "up") -> Fact:
    record = WorkerRecord(sid=sid, address=f"{name}:80", pid=7, state=state)
    return Fact(Place("workers", worker=name), record, 5, revision, revision)


def led(shard: int, name: str, sid: str, revision: int) -> Fact:
    return Fact(Place("leaders", shard=shard), LeaderRecord(name, sid), 5, revision, revision)


@asynccontextmanager
async def serving(scene: Scene, *, port: int = 0) -> AsyncIterator[tuple[AdminServer, aiohttp.ClientSession, str]]:
    registry = new_registry("router", "1.2.3")
    ControllerMetrics(registry).moves.labels("evenness").inc(3)
    admin = AdminServer(
        AdminSettings(port=port),
        role="router",
        name="r1",
        registry=registry,
        clock=SystemClock(),
        ready=lambda: scene.reason,
        window=scene.window(),
    )
    address = await admin.start()
    try:
        async with asyncio.timeout(TIMEOUT_S), aiohttp.ClientSession() as session:
            yield admin, session, f"http://{address}"
    finally:
        await admin.close()


def test_readiness_says_why_not() -> None:
    """200 and 503 follow the callable at the moment of asking, and the reason stands in the JSON."""

    async def main() -> None:
        scene = Scene()
        async with serving(scene) as (_, session, url):
            for reason, status in (("", 200), ("the store does not answer", 503), ("", 200)):
                scene.reason = reason
                async with session.get(f"{url}/readyz") as answer:
                    page = await answer.json()
                    assert (answer.status, page["ready"], page["reason"]) == (status, not reason, reason or None)
                async with session.get(f"{url}/livez") as answer:
                    assert answer.status == 200

    asyncio.run(main())


def test_metrics_are_prometheus_text() -> None:
    """The registry that was handed in is what is shown, with the build."""

    async def main() -> None:
        async with serving(Scene()) as (_, session, url), session.get(f"{url}/metrics") as answer:
            text = await answer.text()
            assert 'shardlead_controller_moves_total{reason="evenness"} 3.0' in text
            assert 'shardlead_build_info{role="router",version="1.2.3"} 1.0' in text
            assert answer.headers["Content-Type"].startswith("text/plain")

    asyncio.run(main())


def test_the_map_shows_leaders_and_workers() -> None:
    """Shard to leader with epoch and address; workers with their count; before a first load an empty map."""

    async def main() -> None:
        scene = Scene()
        async with serving(scene) as (_, session, url):
            async with session.get(f"{url}/v1/map") as answer:
                page = await answer.json()
                assert (page["cluster"], page["shards"], page["leaders"], page["workers"]) == (None, 0, [], [])
            scene.change(9, up("w2", "s2", 8), up("w1", "s1", 7), led(300, "w1", "s1", 9), led(4, "gone", "s0", 5))
            async with session.get(f"{url}/v1/map") as answer:
                page = await answer.json()
        assert page["revision"] == 9
        assert page["leaders"] == [
            {"shard": 4, "worker": "gone", "epoch": 5, "address": ""},
            {"shard": 300, "worker": "w1", "epoch": 9, "address": "w1:80"},
        ]
        assert [(item["name"], item["shards"], item["pid"]) for item in page["workers"]] == [("w1", 1, 7), ("w2", 0, 7)]

    asyncio.run(main())


def test_events_are_streamed_line_by_line() -> None:
    """Each change of leader or membership is one line, in order, while it happens; a closed stream unsubscribes."""

    async def main() -> None:
        scene = Scene()
        scene.change(3, up("w1", "s1", 3))
        async with serving(scene) as (_, session, url):
            async with session.get(f"{url}/v1/events") as answer:
                lines: list[dict[str, Any]] = []
                scene.change(4, led(0, "w1", "s1", 4))
                scene.change(5, led(0, "w1", "s1", 5), up("w1", "s1", 3, state="draining"))
                scene.change(6, deletes=(Place("leaders", shard=0), Place("workers", worker="w1")))
                while len(lines) < 5:
                    lines.append(orjson.loads(await answer.content.readline()))
            said = [{key: value for key, value in line.items() if key not in ("t", "event")} for line in lines]
            assert said == [
                {"shard": 0, "worker": "w1", "epoch": 4, "previous": None, "revision": 4},
                {"worker": "w1", "state": "draining", "revision": 5},
                {"shard": 0, "worker": "w1", "epoch": 5, "previous": "w1", "revision": 5},
                {"worker": "w1", "state": "gone", "revision": 6},
                {"shard": 0, "worker": None, "epoch": None, "previous": "w1", "revision": 6},
            ]
            await scene.left.wait()
            assert scene.callbacks == []

    asyncio.run(main())


def test_a_slow_listener_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the stream ends instead of growing."""
    monkeypatch.setattr(server, "EVENTS_WAITING_MAX", 2)

    async def main() -> None:
        scene = Scene()
        async with serving(scene) as (_, session, url), session.get(f"{url}/v1/events") as answer:
            scene.change(4, *(led(shard, "w1", "s1", 4) for shard in range(3)))
            assert await answer.content.read() == b""

    asyncio.run(main())


def test_close_ends_listeners_at_once() -> None:
    """A stop does not wait for those who listen to events."""

    async def main() -> None:
        scene = Scene()
        async with serving(scene) as (admin, session, url), session.get(f"{url}/v1/events") as answer:
            await scene.subscribed.wait()
            await admin.close()
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()

    asyncio.run(main())


def test_a_taken_port_is_an_oserror_and_minus_one_is_no_server() -> None:
    """Whoever starts it says which flag; nothing is left listening."""

    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(OSError, match="in use"):
                async with serving(Scene(), port=taken.getsockname()[1]):
                    pass
        silent = AdminServer(
            AdminSettings(port=-1), role="router", name="r1", registry=CollectorRegistry(), clock=SystemClock()
        )
        assert await silent.start() == ""
        await silent.close()

    asyncio.run(main())
