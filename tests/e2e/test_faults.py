"""Faults at a chosen step: a target that dies in a handoff, a worker that is frozen, a store that is silent.

One cluster a store: three workers whose application can be held at a step, one router that holds requests for long.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardlead.processes import ClusterMap, lease_settings, read_key
from tests.e2e.conftest import EVEN_S, STORES, Scene, ask, direct, stage, status_of
from tests.support.load import settled

TTL_S = 4
TRIO = ("w1", "w2", "w3")
SERVED_S = 2.0  # "at once": a claim, an open and what a busy machine adds


@pytest.fixture(scope="module", params=STORES)
def slow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("steps")
    options = {
        "ttl_s": TTL_S,
        "shards": 12,
        "environment": {"SHARDLEAD_TEST_FOLDER": str(folder)},
        "settings": {"router.hold_timeout_s": 40, "router.answer_timeout_s": 40, "worker.drain_timeout_s": 3},
    }
    with stage("tests.e2e.apps:Slow", request.param, options) as scene:
        yield scene


def steps(scene: Scene) -> Path:
    """The folder whose files hold the application at a step."""
    return Path(scene.cluster.environment["SHARDLEAD_TEST_FOLDER"])


async def key_on(scene: Scene, worker: str) -> tuple[str, dict[str, Any]]:
    """A key whose shard that worker leads, and what it answered."""
    for number in range(500):
        key = f"k{number}"
        status, body = await ask(scene, "GET", "/", headers={"X-Shard-Key": key})
        assert status == 200, body
        if body["worker"] == worker:
            return key, body
    raise AssertionError(f"{worker} leads nothing")


async def begin_move(scene: Scene, shard: int, worker: str) -> None:
    code, out, err = await scene.cluster.command("move", str(shard), worker, "--wait", "0")
    assert code == 0, out + err
    scene.moved.add(shard)


async def served(scene: Scene, key: str) -> tuple[float, dict[str, Any]]:
    """How long a GET takes that must succeed, and the answer of a POST that follows it. (A POST may be with the dead
    one already, and then nobody can know what became of it.)"""
    began_s = time.monotonic()
    status, body = await ask(scene, "GET", "/", headers={"X-Shard-Key": key})
    assert status == 200, body
    took_s = time.monotonic() - began_s
    status, body = await ask(scene, "POST", "/", headers={"X-Shard-Key": key})
    assert status == 200, body
    return took_s, body


async def clean(scene: Scene) -> ClusterMap:
    for path in steps(scene).iterdir():
        path.unlink()
    while scene.moved:  # or it would be moved again as soon as the target is back
        await scene.cluster.command("unpin", str(scene.moved.pop()))
    return await scene.prepare(*TRIO)


def test_the_target_dies_after_its_want(slow: Scene) -> None:
    """The target has put its want and dies before the leader sees it: the leader goes on serving."""

    async def story() -> tuple[float, dict[str, Any], dict[str, Any]]:
        await clean(slow)
        cluster = slow.cluster
        seated = await cluster.controller()  # not the one that is stopped: somebody has to plan the move
        leader, target = (name for name in TRIO if name != seated)
        key, before = await key_on(slow, leader)
        cluster.workers[leader].stop()  # for less than its lease: it cannot answer the want
        await begin_move(slow, before["shard"], target)
        await wait_want(slow, leader, before["shard"])
        cluster.workers[target].kill()
        await cluster.workers[target].exited(10)
        cluster.workers[leader].cont()
        took_s, after = await served(slow, key)
        assert after["worker"] != target
        return took_s, before, after

    took_s, before, after = slow.run(story())
    assert took_s < SERVED_S
    assert after["epoch"] >= before["epoch"]


async def wait_want(scene: Scene, leader: str, shard: int) -> None:
    async with asyncio.timeout(10):
        key = f"/{scene.cluster.name}/inbox/{leader}/wants/{shard:06d}"
        while await read_key(scene.cluster.session, scene.cluster.store_url, key) is None:  # noqa: ASYNC110 - it stands in the store alone
            await asyncio.sleep(0.02)


def test_the_target_dies_while_the_leader_drains(slow: Scene) -> None:
    """The target dies while the leader waits for a running request: that request ends well, and the shard is served
    again at once, by the old leader under a new epoch or by another."""

    async def story() -> tuple[int, float, dict[str, Any], dict[str, Any]]:
        await clean(slow)
        key, before = await key_on(slow, "w1")
        hold = steps(slow) / "hold-handle-w1"
        hold.touch()
        running = asyncio.ensure_future(ask(slow, "POST", "/", headers={"X-Shard-Key": key}))
        await settled((steps(slow) / "handling-w1").exists, timeout_s=10)
        await begin_move(slow, before["shard"], "w2")
        await draining(slow, key, before)
        slow.cluster.workers["w2"].kill()
        await slow.cluster.workers["w2"].exited(10)
        hold.unlink()
        status, _ = await running
        took_s, after = await served(slow, key)
        return status, took_s, before, after

    status, took_s, before, after = slow.run(story())
    assert status == 200
    assert took_s < SERVED_S
    assert after["epoch"] > before["epoch"]


async def draining(scene: Scene, key: str, leadership: dict[str, Any]) -> None:
    """Returns once the leader takes no new request for this shard."""
    address = (await scene.cluster.map()).workers[leadership["worker"]].address
    async with asyncio.timeout(10):
        status = 200
        while status != 421:
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(direct("GET", key, leadership))
            with contextlib.suppress(TimeoutError):
                status = await status_of(reader, timeout_s=0.2)  # one that is admitted waits with the first
            writer.close()


def test_the_target_dies_while_it_opens(slow: Scene) -> None:
    """The transaction has moved the leadership and the target dies before it serves: another one serves at once."""

    async def story() -> tuple[float, dict[str, Any], dict[str, Any]]:
        await clean(slow)
        key, before = await key_on(slow, "w1")
        (steps(slow) / "hold-open-w2").touch()
        mark = slow.cluster.events.mark()
        await begin_move(slow, before["shard"], "w2")
        await slow.cluster.events.wait(
            lambda event: event.get("shard") == before["shard"] and event["worker"] == "w2", timeout_s=10, since=mark
        )
        slow.cluster.workers["w2"].kill()
        took_s, after = await served(slow, key)
        return took_s, before, after

    took_s, before, after = slow.run(story())
    assert took_s < SERVED_S
    assert after["epoch"] > before["epoch"]
    assert after["worker"] != "w2"


def test_a_silent_store_stops_the_work_and_a_healed_one_resumes_it(slow: Scene, is_long: bool) -> None:
    """The store is gone for several leases' time: workers stop serving before their leases could end, work that runs
    is cancelled, the router answers 503; afterwards all goes on by itself: on etcd idle shards under the same epoch,
    those whose work was cancelled under a new one."""
    cluster = slow.cluster
    outage_s = 30.0 if is_long else 1.6 * TTL_S
    is_etcd = cluster.store is not None and "etcd" in cluster.store.command[0]

    async def story() -> None:
        before = await clean(slow)
        impatient = await cluster.add_router({**lease_settings(2), "router.hold_timeout_s": 2.1})
        key, busy = await key_on(slow, "w1")
        _, idle = await key_on(slow, "w2")
        hold = steps(slow) / "hold-handle-w1"
        hold.touch()
        running = asyncio.ensure_future(ask(slow, "POST", "/", router=1, headers={"X-Shard-Key": key}))
        await settled((steps(slow) / "handling-w1").exists, timeout_s=10)

        began_s = time.monotonic()
        await store_goes(slow, is_etcd)
        await asyncio.sleep(TTL_S)
        for name in TRIO:  # all leases could be over: nobody may serve
            shard, epoch = next((shard, before.epochs[shard]) for shard, at in before.leaders.items() if at == name)
            reader, writer = await asyncio.open_connection(*before.workers[name].address.split(":"))
            writer.write(direct("GET", await key_of(slow, shard), {"shard": shard, "epoch": epoch}))
            assert await status_of(reader) in (421, 503)
            writer.close()
        status, body = await ask(slow, "GET", "/", router=1, headers={"X-Shard-Key": key})
        assert status == 503, body
        status, body = await running
        assert status in (502, 503), body
        hold.unlink()
        await asyncio.sleep(max(0.0, outage_s - (time.monotonic() - began_s)))
        await store_comes_back(slow, is_etcd)

        status, body = await ask(slow, "POST", "/", headers={"X-Shard-Key": key})
        assert status == 200, body
        assert body["epoch"] > busy["epoch"], "its work was cancelled"
        after = await cluster.wait_led(20)
        await cluster.wait_ready(20)
        if is_etcd:
            assert after.epochs[idle["shard"]] == idle["epoch"], "nothing ran there"
            changed = {shard for shard, epoch in after.epochs.items() if epoch != before.epochs[shard]}
            assert changed == {busy["shard"]}
        impatient.terminate()
        assert await impatient.exited(20) == 0
        cluster.routers.remove(impatient)

    slow.run(story())


async def key_of(scene: Scene, shard: int) -> str:
    """A key of that shard; found by the ring's own rule, for the store may be gone."""
    from shardlead.core.ring import build_table, slot_count_for, slot_of

    slot_count = slot_count_for(12)
    table = build_table(12, slot_count, 0)
    return next(key for key in map(str, range(10_000)) if table[slot_of(key.encode(), slot_count)] == shard)


async def store_goes(scene: Scene, is_etcd: bool) -> None:
    """etcd is stopped; the embedded store, which keeps nothing, is frozen."""
    if is_etcd:
        await scene.cluster.stop_store()
    else:
        assert scene.cluster.store is not None
        scene.cluster.store.stop()


async def store_comes_back(scene: Scene, is_etcd: bool) -> None:
    if is_etcd:
        await scene.cluster.start_store()
    else:
        assert scene.cluster.store is not None
        scene.cluster.store.cont()


@pytest.mark.parametrize("store", STORES)
def test_an_unfenced_worker_is_given_time_to_be_dead(store: str, tmp_path: Path) -> None:
    """A killed worker of a class with `fenced = False`: nobody ends its lease early, and its successor serves only
    after TTL + the margin more; a clean handoff serves at once."""
    ttl_s, renew_s, margin_s = 2, 0.56 * 1.1, 0.5
    options = {
        "ttl_s": ttl_s,
        "shards": 6,
        "environment": {"SHARDLEAD_TEST_FOLDER": str(tmp_path)},
        "settings": {"router.hold_timeout_s": 40},
    }
    with stage("tests.e2e.apps:Unfenced", store, options) as scene:

        async def story() -> tuple[float, float]:
            await scene.cluster.wait_even(EVEN_S)
            key, before = await key_on(scene, "w1")
            moved_at_s = time.time()
            await begin_move(scene, before["shard"], "w2")
            await scene.cluster.wait_map(lambda seen: seen.leaders[before["shard"]] == "w2", "moved", 10)
            _, after = await served(scene, key)
            handoff_s = float(after["opened_s"]) - moved_at_s
            killed_at_s = time.time()
            scene.cluster.workers["w2"].kill()
            _, last = await served(scene, key)
            assert last["worker"] != "w2"
            return handoff_s, float(last["opened_s"]) - killed_at_s

        handoff_s, crash_s = scene.run(story())
    assert handoff_s < SERVED_S + 1
    assert crash_s > (ttl_s - renew_s) + ttl_s + margin_s, "its lease ran out, then as much again"
    assert crash_s < (ttl_s + 1) + (ttl_s + margin_s) + 1.5
