"""The smart client under load while a fleet grows, shrinks, is rolled and is hurt: what was promised to the router's
clients holds for it, too.

One cluster a store for all these tests: three workers, and one router that only tells who leads.
"""

import asyncio
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import orjson
import pytest

from shardlead import Client, RequestFailed, Unserved
from tests.e2e.conftest import COUNTER, EVEN_S, SHARDS, STORES, TTL_S, Scene, stage
from tests.e2e.test_fleet import CALM_S, FAILOVER_S, TRIO, changes, check_counts, led_again
from tests.support.load import MIB, Entry, Ledger, Load, Mix


@pytest.fixture(scope="module", params=STORES)
def fleet(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with stage(COUNTER, request.param, {}) as scene:
        yield scene


class ClientLoad(Load):
    """The same load, each request by one smart client."""

    def __init__(self, fleet: Scene, mix: Mix) -> None:
        super().__init__("none:0", mix)
        self.client = Client(fleet.cluster.store_url, cluster=fleet.cluster.name)

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)
        assert not self.client._calls
        await self.client.close()

    async def _exchange(self, entry: Entry) -> None:
        headers = {"Idempotency-Key": entry.idempotency_key} if entry.idempotency_key else {}
        data: Any = bytes(entry.body_bytes) if entry.is_post else None
        if entry.body_bytes and entry.number % 2:
            data = _streamed(entry.body_bytes)
        entry.sent_s = self.now_s()
        try:
            path = f"/counters/{entry.key}"
            async with self.client.request(entry.method, path, key=entry.key, data=data, headers=headers) as answer:
                content = orjson.loads(await answer.read())
                entry.status = answer.status
        except RequestFailed as exc:
            entry.status, entry.error, entry.detail = (503 if isinstance(exc, Unserved) else 502), exc.kind, str(exc)
            return
        if entry.status == 200:
            entry.worker, entry.value = content["worker"], content["value"]
            entry.shard, entry.epoch = content["shard"], content["epoch"]
            assert content["name"] == entry.key
            assert (entry.shard, entry.epoch, entry.worker) == (answer.shard, answer.epoch, answer.worker)
        else:
            entry.error = str(content.get("type", "")).rpartition("/")[2]
            entry.detail = str(content)


async def _streamed(size: int) -> Any:
    for _ in range(0, size, MIB // 16):
        yield bytes(MIB // 16)


def test_scale_out_fails_no_request(fleet: Scene) -> None:
    """A fourth worker under load: leadership becomes even, and not one request fails."""
    prefix = fleet.prefix("client-scale-out")

    async def story() -> Ledger:
        await fleet.prepare(*TRIO)
        async with ClientLoad(fleet, Mix(prefix=prefix)) as load:
            await asyncio.sleep(CALM_S)
            before = await fleet.cluster.map()
            await fleet.cluster.add_worker("w4")
            await fleet.cluster.wait_even(EVEN_S)
            await asyncio.sleep(CALM_S)
            assert len(changes(fleet.cluster.events.after(before.revision))) == SHARDS // 4
        return load.ledger

    ledger = fleet.run(story())
    assert ledger.failures() == [], ledger.summary()
    assert {entry.worker for entry in ledger.entries} == {*TRIO, "w4"}
    check_counts(fleet, ledger, prefix)


def test_a_drain_and_moves_fail_no_request(fleet: Scene) -> None:
    """An operator's drain, its end and a move, all under load: not one request fails."""
    prefix = fleet.prefix("client-drain")

    async def story() -> Ledger:
        before = await fleet.prepare(*TRIO)
        cluster = fleet.cluster
        shard = next(shard for shard, worker in before.leaders.items() if worker == "w1")
        async with ClientLoad(fleet, Mix(prefix=prefix)) as load:
            await asyncio.sleep(CALM_S)
            for words in (
                ("drain", "w2"),
                ("move", str(shard), "w3"),
                ("unpin", str(shard)),
                ("drain", "w2", "--undo"),
            ):
                code, out, err = await cluster.command(*words)
                assert code == 0, out + err
            await cluster.wait_even(EVEN_S)
            await asyncio.sleep(CALM_S)
        return load.ledger

    ledger = fleet.run(story())
    assert ledger.failures() == [], ledger.summary()
    check_counts(fleet, ledger, prefix)


def test_a_rolling_restart_fails_no_request(fleet: Scene) -> None:
    """All workers restarted one after another (the controller's too), with POSTs of 0 bytes and 1 MiB, half of these
    streamed: not one request fails."""
    prefix = fleet.prefix("client-roll")

    async def story() -> Ledger:
        await fleet.prepare(*TRIO)
        async with ClientLoad(fleet, Mix(prefix=prefix, big_share=0.03)) as load:
            await asyncio.sleep(CALM_S)
            for name in TRIO:
                await fleet.cluster.restart(name)
            await fleet.cluster.wait_even(EVEN_S)
            await asyncio.sleep(CALM_S)
        return load.ledger

    ledger = fleet.run(story())
    assert ledger.failures() == [], ledger.summary()
    assert sum(entry.body_bytes > 0 for entry in ledger.entries) > 10
    check_counts(fleet, ledger, prefix)


@pytest.mark.parametrize("is_host", [False, True], ids=["worker", "host"])
def test_a_crash_costs_what_the_router_would_make_it_cost(fleet: Scene, is_host: bool) -> None:
    """SIGKILL to a worker, alone and with its parent: its shards are led again in time, nothing acknowledged is lost,
    and of what was with the killed worker already only plain POSTs may have an unknown outcome."""
    prefix = fleet.prefix("client-crash")

    async def story() -> tuple[Ledger, float, float]:
        before = await fleet.prepare(*TRIO)
        lost = {shard for shard, worker in before.leaders.items() if worker == "w2"}
        async with ClientLoad(fleet, Mix(prefix=prefix, idempotent_share=0.5, big_share=0)) as load:
            await asyncio.sleep(CALM_S)
            mark = fleet.cluster.events.mark()
            killed_wall_s = time.time()
            worker = fleet.cluster.workers["w2"]
            worker.kill_host() if is_host else worker.kill()
            killed_s = load.now_s()
            led_s = await led_again(fleet, lost, mark, TTL_S + 10) - killed_wall_s
            await asyncio.sleep(CALM_S)
        return load.ledger, killed_s, led_s

    ledger, killed_s, led_s = fleet.run(story())
    print(f"crash: led again after {led_s * 1000:.0f} ms")
    assert led_s < (TTL_S + 1 if is_host else FAILOVER_S)
    for entry in ledger.failures():
        assert (entry.method, entry.status, entry.error) == ("POST", 502, "outcome-unknown"), ledger.summary()
        assert entry.idempotency_key == "", ledger.summary()
        assert entry.sent_s < killed_s + 0.1, ledger.summary()
    check_counts(fleet, ledger, prefix)
