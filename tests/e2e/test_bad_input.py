"""Wrong keys, wrong commands, foreign records, broken applications: each gets a clear answer, and nothing is lost.

One cluster for the keys and commands (the embedded store: what is wrong here is wrong before any store is asked).
"""

import asyncio
import base64
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
import pytest
from yarl import URL

from shardlead.errors import ProcessFailed
from shardlead.processes import free_port, settings_flags, shardlead_command
from tests.e2e.conftest import COUNTER, EVEN_S, Scene, ask, stage

SAID_S = 8.0  # 5 are promised; starting two Pythons on a busy machine takes its time
RULES = "path:/counters/{key},header:X-Shard-Key,query:key"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Scene]:
    with stage(COUNTER, "embedded", {"workers": 2, "settings": {"router.key_rules": RULES}}) as scene:
        yield scene


def problem_of(answer: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    return answer[0], str(answer[1].get("type", "")).rpartition("/")[2]


# --- keys --------------------------------------------------------------------------------------------------------


def test_no_key(fleet: Scene) -> None:
    """A request without a key is a 400 that says so."""
    assert problem_of(fleet.run(ask(fleet, "GET", "/"))) == (400, "key-missing")


def test_an_empty_key(fleet: Scene) -> None:
    """An empty key is no key."""
    assert problem_of(fleet.run(ask(fleet, "GET", "/counters/"))) == (400, "key-missing")
    assert problem_of(fleet.run(ask(fleet, "GET", "/x", headers={"X-Shard-Key": " "}))) == (400, "key-missing")


def test_two_keys_that_differ(fleet: Scene) -> None:
    """Path and header that name different keys are a 400; that name the same one are fine."""
    same, other = {"X-Shard-Key": "alice"}, {"X-Shard-Key": "bob"}
    assert problem_of(fleet.run(ask(fleet, "POST", "/counters/alice", headers=other))) == (400, "key-ambiguous")
    assert fleet.run(ask(fleet, "POST", "/counters/alice", headers=same))[0] == 200
    assert problem_of(fleet.run(ask(fleet, "GET", "/counters/alice?key=bob"))) == (400, "key-ambiguous")


def test_a_key_of_64_kib(fleet: Scene) -> None:
    """A key that is too long is a client's error, however it comes, and costs no worker anything."""
    status, _ = fleet.run(ask(fleet, "GET", f"/counters/{'k' * 65_536}"))
    assert status in (400, 414, 431)
    status, _ = fleet.run(ask(fleet, "GET", "/x", headers={"X-Shard-Key": "k" * 65_536}))
    assert status in (400, 431)
    assert problem_of(fleet.run(ask(fleet, "GET", f"/counters/{'k' * 2_049}"))) == (400, "key-too-long")


def test_keys_beyond_ascii_are_one_key_however_spelled(fleet: Scene) -> None:
    """%2F, + and UTF-8 in path, query and header name the same key: the one that the client's str names."""

    async def story() -> None:
        async with aiohttp.ClientSession() as session:
            for name in ("a/b", "a+b", "grün", "東京", "50%", "a b"):
                spelled = quote(name, safe="")
                values = []
                url = f"{fleet.cluster.url}/counters/{spelled}"
                headers = {"X-Shard-Key": name}
                for target in (url, f"{url}?key={spelled}"):
                    async with session.post(URL(target, encoded=True), headers=headers) as answer:
                        body = await answer.json(content_type=None)
                        assert answer.status == 200, (name, body)
                        assert body["name"] == name
                        values.append(body["value"])
                assert values == [1, 2]

    fleet.run(story())


# --- commands ----------------------------------------------------------------------------------------------------


def test_commands_about_what_does_not_exist(fleet: Scene) -> None:
    """An unknown shard or worker is named, with exit code 1 or 2 and no traceback."""

    async def story() -> None:
        for words, named in (
            (("move", "9999", "w1"), "9999"),
            (("move", "1", "nobody"), "nobody"),
            (("drain", "nobody"), "nobody"),
            (("shards", "--worker", "nobody"), "nobody"),
        ):
            code, out, err = await fleet.cluster.command(*words)
            assert code in (1, 2), (words, out, err)
            assert named in err
            assert "Traceback" not in err

    fleet.run(story())


def test_a_second_worker_under_a_living_name(fleet: Scene) -> None:
    """The start is refused after the lease's time, and names the other's address and pid."""
    cluster = fleet.cluster

    async def story() -> str:
        first = cluster.workers["w1"]
        with pytest.raises(ProcessFailed) as caught:
            await cluster.add_worker("w1")
        cluster.workers["w1"] = first
        assert str(first.pid) in caught.value.output
        await cluster.wait_led(5)
        return caught.value.output

    assert "w1" in fleet.run(story())


def test_a_cluster_of_another_shape(fleet: Scene) -> None:
    """A worker whose settings contradict the stored shape refuses to start and names the field."""

    async def story() -> None:
        with pytest.raises(ProcessFailed, match="shards"):
            await fleet.cluster.add_worker("w9", {"cluster.shards": 63})
        del fleet.cluster.workers["w9"]

    fleet.run(story())


def test_foreign_records_are_passed_over(fleet: Scene) -> None:
    """Garbage under our prefix, in every place: said in the log, never a crash, and nothing moves."""
    cluster = fleet.cluster

    async def story() -> None:
        before = await cluster.wait_even(EVEN_S)
        places = ["leaders/000999", "leaders/x", "workers/ghost", "wishes/pin/000001", "tick2", "history/000001"]
        places += ["inbox/w1/offers/000001", "inbox/w1/wants/000002", "inbox/w1/assignments/000003", "nonsense"]
        for place in places:
            for value in (b"garbage", b"\xff\xfe", b'{"v": 1}'):
                body = {
                    "key": base64.b64encode(f"/{cluster.name}/{place}".encode()).decode(),
                    "value": base64.b64encode(value).decode(),
                }
                async with cluster.session.post(f"{cluster.store_url}/v3/kv/put", data=orjson.dumps(body)) as answer:
                    assert answer.status == 200
        for name in ("alice", "bob", "carol"):
            status, _ = await ask(fleet, "POST", f"/counters/{name}")
            assert status == 200
        await asyncio.sleep(1)
        after = await cluster.wait_led(5)
        assert after.leaders == before.leaders
        assert all(worker.is_running for worker in cluster.workers.values())
        assert all(router.is_running for router in cluster.routers)

    fleet.run(story())


@pytest.mark.parametrize("role", ["worker", "router", "controller"])
def test_a_store_that_does_not_answer(role: str, tmp_path: Path) -> None:
    """It is said within 5 s with the URL, and tried on; with --fail-fast the exit code is 1."""
    url = f"http://127.0.0.1:{free_port()}"
    app = [COUNTER] if role == "worker" else []
    settings = {"store.endpoints": url, "admin.port": 0, "router.port": 0}
    command = shardlead_command(role, *app, *settings_flags(settings))
    environment = {**os.environ, "SHARDLEAD_DEMO_DB": str(tmp_path / "counters.sqlite3")}

    async def story() -> None:
        started = [
            await asyncio.create_subprocess_exec(*command, *flags, stderr=asyncio.subprocess.PIPE, env=environment)
            for flags in ((), ("--fail-fast",))
        ]
        patient, fast = started
        assert patient.stderr is not None
        assert fast.stderr is not None
        try:
            async with asyncio.timeout(SAID_S):
                while "the store does not answer" not in (said := (await patient.stderr.readline()).decode()):
                    assert said, "it ended without a word"
                assert url in said
                assert url in (await fast.stderr.read()).decode()
                assert await fast.wait() == 1
            assert patient.returncode is None
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            async with asyncio.timeout(10):
                for process in started:
                    await process.communicate()

    asyncio.run(story())


# --- applications ------------------------------------------------------------------------------------------------


def broken(app: str, tmp_path: Path, **settings: object) -> Any:
    options = {
        "workers": 2,
        "shards": 8,
        "environment": {"SHARDLEAD_TEST_FOLDER": str(tmp_path)},
        "settings": {"router.hold_timeout_s": 3.5, "worker.open_timeout_s": 1, **settings},
        "until_led": False,
    }
    return stage(f"tests.e2e.apps:{app}", "embedded", options)


def test_a_handler_that_raises(tmp_path: Path) -> None:
    """One request gets a 500 problem; the shard, its epoch and all other requests are as before."""
    with broken("Raises", tmp_path) as scene:

        async def story() -> None:
            headers = {"X-Shard-Key": "k"}
            _, before = await ask(scene, "GET", "/", headers=headers)
            answer = await ask(scene, "POST", "/raise", headers=headers)
            assert problem_of(answer) == (500, "application-error")
            assert "more than I can bear" not in str(answer[1]), "details are for the log"
            status, after = await ask(scene, "GET", "/", headers=headers)
            assert (status, after["epoch"]) == (200, before["epoch"])

        scene.run(story())


def test_an_open_that_fails_stops_its_shard_alone(tmp_path: Path) -> None:
    """Shards whose open() raises or hangs answer 503 after the hold and walk through no fleet; the others serve."""
    with broken("OpenFails", tmp_path) as scene:

        async def story() -> None:
            asked = (ask(scene, "GET", "/", headers={"X-Shard-Key": f"k{number}"}) for number in range(40))
            answers = await asyncio.gather(*asked)
            statuses = {(int(body["shard"]) % 2, status) for status, body in answers}
            assert statuses == {(0, 200), (1, 503)}
            assert all(worker.is_running for worker in scene.cluster.workers.values())

        scene.run(story())


def test_an_application_that_cannot_be_made(tmp_path: Path) -> None:
    """A class that takes no leadership is named, and the worker does not start or does not lead."""

    async def story() -> str:
        process = await asyncio.create_subprocess_exec(
            *shardlead_command("worker", "tests.e2e.apps:Missing"),
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(20):
            _, err = await process.communicate()
        assert process.returncode in (1, 2)
        return err.decode()

    said = asyncio.run(story())
    assert "Missing" in said
    assert "Traceback" not in said
