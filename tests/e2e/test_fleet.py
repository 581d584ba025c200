"""A fleet under load: it grows, shrinks, is rolled and is hurt, and what was promised to its clients holds.

One cluster a store for all these tests: three workers with the controller's seat among them, one router.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from shardlead.testing import Event
from tests.e2e.conftest import COUNTER, EVEN_S, SHARDS, STORES, TTL_S, Scene, direct, stage, status_of
from tests.support.load import Ledger, Load, Mix, settled

FAILOVER_S = 0.5
CALM_S = 1.0  # of load before and after what happens
TRIO = ("w1", "w2", "w3")


@pytest.fixture(scope="module", params=STORES)
def fleet(request: pytest.FixtureRequest) -> Iterator[Scene]:
    options = {"settings": {"router.key_rules": "path:/counters/{key},header:X-Shard-Key"}}
    with stage(COUNTER, request.param, options) as scene:
        yield scene


def load_on(fleet: Scene, mix: Mix) -> Load:
    return Load(fleet.cluster.routers[0].address, mix)


def check_counts(fleet: Scene, ledger: Ledger, prefix: str) -> None:
    """Whatever failed: no acknowledged increment is lost, none happened twice, no two leaders answered."""
    print(f"{prefix}: {ledger.summary()}")
    assert ledger.split_leaderships() == []
    assert ledger.values_answered_twice() == []
    assert ledger.lost(fleet.stored(prefix)) == []


def changes(events: list[Event]) -> Counter[int]:
    """How often each shard got a leader."""
    return Counter(event["shard"] for event in events if event["event"] == "leader" and event["worker"])


def test_a_thousand_posts_over_two_hundred_keys(fleet: Scene) -> None:
    """Each acknowledged increment is in the SQLite store; each key is always on one shard; each shard's requests are
    on one worker for each epoch."""
    prefix = fleet.prefix("thousand")

    async def story() -> Ledger:
        await fleet.prepare(*TRIO)
        async with load_on(fleet, Mix(rate=400, keys=200, post_share=1.0, big_share=0, prefix=prefix)) as load:
            await load.answered(1_000)
        return load.ledger

    ledger = fleet.run(story())
    assert ledger.failures() == [], ledger.summary()
    assert len(ledger.done()) >= 1_000
    assert fleet.stored(prefix) == ledger.acknowledged()
    assert len({entry.worker for entry in ledger.entries}) == 3
    check_counts(fleet, ledger, prefix)


def test_scale_out_fails_no_request(fleet: Scene) -> None:
    """A fourth worker under load: leadership becomes even within one, exactly the necessary moves are made, and not
    one request fails."""
    prefix = fleet.prefix("scale-out")

    async def story() -> tuple[Ledger, Counter[int], Counter[str]]:
        await fleet.prepare(*TRIO)
        async with load_on(fleet, Mix(prefix=prefix)) as load:
            await asyncio.sleep(CALM_S)
            before = await fleet.cluster.map()
            await fleet.cluster.add_worker("w4")
            seen = await fleet.cluster.wait_even(EVEN_S)
            await asyncio.sleep(2 * CALM_S)  # time for a move too many
            moved = changes(fleet.cluster.events.after(before.revision))
            assert (await fleet.cluster.map()).spread <= 1
        return load.ledger, moved, Counter(seen.counts())

    ledger, moved, counts = fleet.run(story())
    assert ledger.failures() == [], ledger.summary()
    assert sorted(counts.values()) == [SHARDS // 4] * 4
    assert len(moved) == SHARDS // 4, "only what the newcomer leads has moved"
    assert set(moved.values()) == {1}
    check_counts(fleet, ledger, prefix)


def test_a_graceful_stop_of_the_controller_fails_no_request(fleet: Scene) -> None:
    """SIGTERM to the worker that holds the controller's seat: its shards are led elsewhere, it exits 0, and not one
    request fails."""
    prefix = fleet.prefix("stop")

    async def story() -> Ledger:
        await fleet.prepare(*TRIO)
        victim = await fleet.cluster.controller()
        assert victim in TRIO
        async with load_on(fleet, Mix(prefix=prefix)) as load:
            await asyncio.sleep(CALM_S)
            fleet.cluster.workers[victim].terminate()
            assert await fleet.cluster.workers[victim].exited(30) == 0
            seen = await fleet.cluster.wait_led(5)
            assert victim not in seen.counts()
            await asyncio.sleep(CALM_S)
        assert await fleet.cluster.controller() not in ("", victim)
        return load.ledger

    ledger = fleet.run(story())
    assert ledger.failures() == [], ledger.summary()
    check_counts(fleet, ledger, prefix)


def test_an_operators_drain_and_moves_fail_no_request(fleet: Scene) -> None:
    """`drain` empties a worker, `drain --undo` lets it lead again, `move` passes single shards, all under load: not
    one request fails, and each command says what became of it."""
    prefix = fleet.prefix("drain")

    async def story() -> Ledger:
        before = await fleet.prepare(*TRIO)
        cluster = fleet.cluster
        async with load_on(fleet, Mix(prefix=prefix)) as load:
            code, out, err = await cluster.command("drain", "w2")
            assert code == 0, out + err
            assert (await cluster.map()).counts()["w2"] == 0
            shard = next(shard for shard, worker in before.leaders.items() if worker == "w1")
            code, out, err = await cluster.command("move", str(shard), "w3")
            assert code == 0, out + err
            assert (await cluster.leaders())[shard] == "w3"
            for words in (("unpin", str(shard)), ("drain", "w2", "--undo")):
                code, out, err = await cluster.command(*words)
                assert code == 0, out + err
            await cluster.wait_even(EVEN_S)
            await asyncio.sleep(CALM_S)
        return load.ledger

    ledger = fleet.run(story())
    assert ledger.failures() == [], ledger.summary()
    check_counts(fleet, ledger, prefix)


def test_a_rolling_restart_fails_no_request(fleet: Scene, is_long: bool) -> None:
    """All workers restarted one after another, several times over, with POSTs of 0 bytes and 1 MiB on kept-alive
    connections: not one request fails. In the first round each is stopped as soon as the one before it says that it is
    ready: a shard moves 1 + 2/N times on average, here 107 moves for 64 shards, and a few more where a shutdown
    outruns an order."""
    prefix = fleet.prefix("roll")

    async def story() -> tuple[Ledger, Counter[int]]:
        await fleet.prepare(*TRIO)
        cluster = fleet.cluster
        async with load_on(fleet, Mix(prefix=prefix, big_share=0.03)) as load:
            before = await cluster.map()
            for name in TRIO:
                await cluster.restart(name)
            await cluster.wait_even(EVEN_S)
            await cluster.wait_quiet(CALM_S, EVEN_S)
            moved = changes(cluster.events.after(before.revision))
            for number in range(9 if is_long else 2):
                for name in TRIO:
                    await cluster.restart(name)
                    if number % 2:  # every other round in a hurry
                        await cluster.wait_even(EVEN_S)
            await asyncio.sleep(CALM_S)
        return load.ledger, moved

    ledger, moved = fleet.run(story())
    print(f"rolling restart: {sum(moved.values()) / SHARDS:.2f} moves a shard, at most {max(moved.values())}")
    assert ledger.failures() == [], ledger.summary()
    assert sum(entry.body_bytes > 0 for entry in ledger.entries) > 10
    assert sum(moved.values()) <= 1.75 * SHARDS
    check_counts(fleet, ledger, prefix)


def test_a_crash_is_over_in_half_a_second(fleet: Scene) -> None:
    """SIGKILL under load: its shards are led again within 500 ms, no acknowledged increment is lost; whoever waits or
    arrives meanwhile succeeds; of what was with the killed worker already, only plain POSTs may get one 502."""
    prefix = fleet.prefix("crash")

    async def story() -> tuple[Ledger, float, float]:
        before = await fleet.prepare(*TRIO)
        lost = {shard for shard, worker in before.leaders.items() if worker == "w2"}
        async with load_on(fleet, Mix(prefix=prefix, idempotent_share=0.5)) as load:
            await asyncio.sleep(CALM_S)
            mark = fleet.cluster.events.mark()
            killed_wall_s = time.time()
            fleet.cluster.workers["w2"].kill()
            killed_s = load.now_s()  # the signal is sent; a process that dies holds its sockets a moment longer
            led_s = await led_again(fleet, lost, mark, 10) - killed_wall_s
            await asyncio.sleep(CALM_S)
        return load.ledger, killed_s, led_s

    ledger, killed_s, led_s = fleet.run(story())
    print(f"crash: led again after {led_s * 1000:.0f} ms")
    assert led_s < FAILOVER_S
    for entry in ledger.failures():
        assert (entry.method, entry.status, entry.error) == ("POST", 502, "outcome-unknown"), ledger.summary()
        assert entry.idempotency_key == "", ledger.summary()
        assert entry.sent_s < killed_s + 0.1, ledger.summary()
    check_counts(fleet, ledger, prefix)


async def led_again(fleet: Scene, lost: set[int], mark: int, timeout_s: float) -> float:
    """When (wall seconds, as the router saw it) the last of these shards got a leader again after `mark`."""

    def led() -> dict[int, float]:
        return {
            event["shard"]: event["t"]
            for event in reversed(fleet.cluster.events.since(mark, "leader"))
            if event["worker"] is not None
        }

    await settled(lambda: lost <= led().keys(), timeout_s=timeout_s)
    return max(at for shard, at in led().items() if shard in lost)


def test_a_lost_host_costs_its_lease(fleet: Scene) -> None:
    """Worker and parent killed together: nobody can revoke the lease, so its shards are led again within TTL + 1 s,
    and waiting requests succeed."""
    prefix = fleet.prefix("host")

    async def story() -> tuple[Ledger, float, float]:
        before = await fleet.prepare(*TRIO)
        lost = {shard for shard, worker in before.leaders.items() if worker == "w3"}
        async with load_on(fleet, Mix(prefix=prefix, idempotent_share=0.5)) as load:
            await asyncio.sleep(CALM_S)
            mark = fleet.cluster.events.mark()
            killed_wall_s = time.time()
            fleet.cluster.workers["w3"].kill_host()
            killed_s = load.now_s()  # the signal is sent; a process that dies holds its sockets a moment longer
            led_s = await led_again(fleet, lost, mark, TTL_S + 10) - killed_wall_s
            await asyncio.sleep(CALM_S)
        return load.ledger, killed_s, led_s

    ledger, killed_s, led_s = fleet.run(story())
    print(f"lost host: led again after {led_s * 1000:.0f} ms, TTL {TTL_S} s")
    assert led_s < TTL_S + 1
    for entry in ledger.failures():
        assert (entry.method, entry.status, entry.error) == ("POST", 502, "outcome-unknown"), ledger.summary()
        assert entry.idempotency_key == "", ledger.summary()
        assert entry.sent_s < killed_s + 0.1, ledger.summary()
    check_counts(fleet, ledger, prefix)


def test_a_frozen_worker_counts_nothing_under_its_old_epochs(fleet: Scene) -> None:
    """SIGSTOP under load for longer than the lease, then SIGCONT: others lead its shards, the requests that lie in its
    sockets under the old epochs are refused, nothing that it does under them is acknowledged or stored, and it comes
    back as a worker like any other."""
    prefix = fleet.prefix("frozen")
    statuses: list[int] = []

    async def story() -> tuple[Ledger, dict[int, int], float, float]:
        before = await fleet.prepare(*TRIO)
        old = {shard: before.epochs[shard] for shard, worker in before.leaders.items() if worker == "w1"}
        async with load_on(fleet, Mix(prefix=prefix, idempotent_share=0.5)) as load:
            await asyncio.sleep(CALM_S)
            led = next(entry for entry in load.ledger.entries if entry.is_ok and entry.worker == "w1")
            address = before.workers["w1"].address.split(":")
            connections = [await asyncio.open_connection(*address) for _ in range(6)]
            mark, stopped_s = fleet.cluster.events.mark(), load.now_s()
            fleet.cluster.workers["w1"].stop()
            for number, (_, writer) in enumerate(connections):
                leadership = {"shard": led.shard, "epoch": led.epoch}
                writer.write(direct(("GET", "POST")[number % 2], led.key, leadership, f"/counters/{led.key}"))
            await led_again(fleet, set(old), mark, TTL_S + 5)
            await asyncio.sleep(CALM_S)
            cont_s = load.now_s()
            fleet.cluster.workers["w1"].cont()
            for reader, writer in connections:
                statuses.append(await status_of(reader))
                writer.close()
            await fleet.cluster.wait_map(lambda seen: len(seen.workers) == 3, "three again", EVEN_S)
            await fleet.cluster.wait_even(EVEN_S)
            await asyncio.sleep(CALM_S)
        return load.ledger, old, stopped_s, cont_s

    ledger, old, stopped_s, cont_s = fleet.run(story())
    late = [
        entry
        for entry in ledger.entries
        if entry.is_ok and entry.done_s > cont_s and entry.worker == "w1" and entry.epoch == old.get(entry.shard)
    ]
    assert late == []
    assert set(statuses) <= {0, 421, 503}, statuses
    for entry in ledger.failures():
        assert stopped_s - 0.1 < entry.done_s, ledger.summary()
        if entry.status == 503 and "file is busy" in entry.detail:
            continue  # it was frozen in the middle of a commit: SQLite has one writer, and no epoch can wake it
        assert (entry.method, entry.status, entry.error) == ("POST", 502, "outcome-unknown"), ledger.summary()
        assert entry.idempotency_key == "", ledger.summary()
    check_counts(fleet, ledger, prefix)


def test_a_crashed_worker_that_comes_back_claws_nothing_back(fleet: Scene) -> None:
    """After a crash and a return under the same name each shard moves only as evenness needs: once to the newcomer,
    and as many as make it even."""

    async def story() -> tuple[Counter[int], dict[str, int]]:
        await fleet.prepare(*TRIO)
        fleet.cluster.workers["w1"].kill()
        await fleet.cluster.workers["w1"].exited(20)
        await fleet.cluster.wait_gone("w1", 10)
        before = await fleet.cluster.wait_even(EVEN_S)
        await fleet.cluster.add_worker("w1")
        seen = await fleet.cluster.wait_even(EVEN_S)
        await asyncio.sleep(2 * CALM_S)
        return changes(fleet.cluster.events.after(before.revision)), seen.counts()

    moved, counts = fleet.run(story())
    assert set(moved.values()) == {1}
    assert len(moved) == counts["w1"]
    assert max(counts.values()) - min(counts.values()) <= 1
