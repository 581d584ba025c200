"""Clusters for the end-to-end tests, shared by the tests of a module: to start one costs seconds.

Every test asks for the fleet it needs (`Scene.prepare`) and may leave it hurt; the next one repairs it.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import aiohttp
import pytest

from shardlead.processes import ClusterMap
from shardlead.testing import LocalCluster
from tests.support.etcd import etcd_binary

T = TypeVar("T")

COUNTER: Final = "shardlead.demo:Counter"
TTL_S: Final = 3
SHARDS: Final = 64
EVEN_S: Final = 20.0

STORES: Final = ("embedded", pytest.param("etcd", marks=pytest.mark.etcd))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e" in item.path.as_posix():
            item.add_marker(pytest.mark.e2e)


@dataclass
class Scene:
    """A cluster and the loop it lives on."""

    cluster: LocalCluster
    runner: asyncio.Runner
    prefixes: Iterator[int] = field(default_factory=lambda: iter(range(1_000)))
    moved: set[int] = field(default_factory=set)
    """Shards that an operator's `move` holds at a worker."""

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        """Play one test's story on the cluster's loop."""
        return self.runner.run(story)

    def prefix(self, name: str) -> str:
        """Begins this test's keys, so that no other test counts on them."""
        return f"{name}-{next(self.prefixes)}"

    async def prepare(self, *names: str) -> ClusterMap:
        """Exactly these workers, all up, leadership even among them."""
        cluster = self.cluster
        for worker in [*cluster.workers.values(), *cluster.controllers, *cluster.routers]:
            worker.cont()
        for name, worker in list(cluster.workers.items()):
            if name not in names:
                if worker.is_running:
                    worker.kill()
                    await worker.exited(20)
                del cluster.workers[name]
        missing = [name for name in names if name not in cluster.workers or not cluster.workers[name].is_running]
        await asyncio.gather(*(cluster.add_worker(name) for name in missing))
        await cluster.wait_map(lambda seen: set(seen.workers) == set(names), f"of {names} alone", EVEN_S)
        return await cluster.wait_even(EVEN_S)

    def stored(self, prefix: str) -> dict[str, int]:
        """What the demo's SQLite file holds for keys of that prefix."""
        with contextlib.closing(sqlite3.connect(f"file:{self.cluster.database}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT name, SUM(value) FROM counters GROUP BY name").fetchall()
        return {name: value for name, value in rows if name.startswith(f"{prefix}-")}


@contextlib.contextmanager
def stage(app: str, store: str, options: Mapping[str, Any]) -> Iterator[Scene]:
    """A cluster on a loop of its own, for as long as the block lasts."""
    etcd = {"etcd": etcd_binary("3.5")} if store == "etcd" else {}
    with asyncio.Runner() as runner:
        cluster = LocalCluster(app, **{"store": store, "ttl_s": TTL_S, "shards": SHARDS, **etcd, **options})
        runner.run(cluster.__aenter__())
        try:
            yield Scene(cluster, runner)
        finally:
            runner.run(cluster.__aexit__(None, None, None))


@pytest.fixture(autouse=True)
def last_words(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a test fails, what the processes said last."""
    failed_before = request.session.testsfailed
    yield
    for name in ("fleet", "lone", "slow"):
        if name in request.fixturenames and request.session.testsfailed > failed_before:
            scene: Scene = request.getfixturevalue(name)
            scene.cluster.show_logs()


async def ask(
    scene: Scene, method: str, path: str, *, router: int = 0, timeout_s: float = 30.0, **options: Any
) -> tuple[int, dict[str, Any]]:
    """One request through a router: status and JSON body."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
        session.request(method, f"http://{scene.cluster.routers[router].address}{path}", **options) as answer,
    ):
        body = await answer.json(content_type=None)
        return answer.status, body if isinstance(body, dict) else {"body": body}


def direct(method: str, key: str, leadership: Mapping[str, Any], path: str = "/") -> bytes:
    """A request as a router sends it to a worker."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: worker",
        "Content-Length: 0",
        f"Shardlead-Shard: {leadership['shard']}",
        f"Shardlead-Epoch: {leadership['epoch']}",
        f"Shardlead-Key: {key}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def status_of(reader: asyncio.StreamReader, timeout_s: float = 20.0) -> int:
    """The status of the next answer; 0 if the connection was closed instead."""
    async with asyncio.timeout(timeout_s):
        line = await reader.readline()
    return int(line.split()[1]) if line else 0
