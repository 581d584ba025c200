"""The audit log as a worker writes it: each line before what it proves, and never in the way of the work."""

import errno
import json
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from shardlead import verify
from shardlead.audit import Report
from shardlead.clock import NS_PER_S
from shardlead.core.audit import SUFFIX
from shardlead.core.ownership import Idle, Serving
from shardlead.errors import ConfigError
from shardlead.worker.audit import AuditLog, boot_id_of_this_machine
from shardlead.worker.leadership import Leadership
from tests.worker import scene as scenes
from tests.worker.scene import SHORT, Player, Scene, Script
from tests.worker.stage import CLOCK, EPOCH, SHARD, peer, play, staged, words

FEW = (1, 3, 5)


class Session:
    """What an audit log is told of one."""

    def __init__(self) -> None:
        self.sid = "sid-1"
        self.deadline_ns = CLOCK.now_ns() + 60 * NS_PER_S
        self.on_deadline: Callable[[int], object] = lambda _deadline_ns: None


def audited(folder: Path) -> AuditLog:
    log = AuditLog.open(str(folder), "w1", CLOCK)
    log.begin_session(Session())
    return log


def lines(folder: Path) -> list[dict[str, Any]]:
    """What stands there at this moment, all files together."""
    return [json.loads(line) for path in sorted(folder.glob(f"*{SUFFIX}")) for line in path.read_text().splitlines()]


def events(folder: Path) -> list[str]:
    return [line["event"] for line in lines(folder)]


# --- one leadership ------------------------------------------------------------------------------------------------


def test_a_leaderships_lines(tmp_path: Path) -> None:
    """lead and serve when it begins; accept before its answer can have arrived; reject for what is refused; stop when
    it ends; and verify counts them."""

    async def main() -> None:
        async with staged(audit=audited(tmp_path)) as stage, peer(stage) as router:

            @stage.on("/x")
            async def handle(lead: Leadership, request: web.Request) -> web.Response:
                assert events(tmp_path)[-1] == "serve"
                return web.Response(text="hello")

            assert events(tmp_path) == ["begin", "deadline", "lead", "serve"]
            router.send("GET", "/x")
            await router.head()
            accept = lines(tmp_path)[-1]
            assert (accept["event"], accept["shard"], accept["epoch"]) == ("accept", SHARD, EPOCH)
            assert 0 < accept["admitted_ns"] <= accept["at_ns"] <= CLOCK.now_ns()
            stage.hand_over()
            await stage.until(SHARD, Idle)
            assert events(tmp_path)[-1] == "stop"

    play("asyncio", main())
    facts = {(line["boot_id"], line["worker"]) for line in lines(tmp_path)}
    assert facts == {(boot_id_of_this_machine(), "w1")}
    assert {line["sid"] for line in lines(tmp_path)[1:]} == {"sid-1"}
    assert str(verify(tmp_path)) == "1 leadership, 1 request, 0 violations"


def test_what_is_refused_is_written_as_such(tmp_path: Path) -> None:
    """Before the handler, and where the answer meets the guard; an answer kept back is never an accept."""

    async def main() -> None:
        async with staged(audit=audited(tmp_path)) as stage, peer(stage) as router:

            @stage.on("/late")
            async def late(lead: Leadership, request: web.Request) -> web.Response:
                stage.switch.is_on = False
                return web.Response(text="a stale read")

            assert (await router.ask("GET", "/late", words(epoch=EPOCH - 1))).status == 421
            assert (await router.ask("GET", "/late")).status == 503
            stage.switch.is_on = True
            assert (await router.ask("POST", "/late")).status == 502

    play("asyncio", main())
    refused = [(line["why"], line["epoch"]) for line in lines(tmp_path) if line["event"] == "reject"]
    assert refused == [("stale", EPOCH - 1), ("suspended", EPOCH), ("outcome-unknown", EPOCH)]
    assert "accept" not in events(tmp_path)
    report = verify(tmp_path)
    assert (report.is_good, report.requests, report.refused) == (True, 0, 3)


def test_each_request_is_one_line(tmp_path: Path) -> None:
    """A stream of many pieces, a handler that fails before its answer or amid it: one accept each."""

    async def main() -> None:
        async with staged(audit=audited(tmp_path)) as stage:

            @stage.on("/stream")
            async def stream(lead: Leadership, request: web.Request) -> web.StreamResponse:
                response = web.StreamResponse()
                await response.prepare(request)
                for _ in range(5):
                    await response.write(b"piece")
                return response

            @stage.on("/fails")
            async def fails(lead: Leadership, request: web.Request) -> web.StreamResponse:
                raise ValueError("no answer")

            @stage.on("/breaks")
            async def breaks(lead: Leadership, request: web.Request) -> web.StreamResponse:
                response = web.StreamResponse()
                await response.prepare(request)
                raise ValueError("half an answer")

            async with peer(stage) as router:
                assert (await router.ask("GET", "/stream")).body == b"piece" * 5
            async with peer(stage) as router:
                assert (await router.ask("GET", "/fails")).status == 500
            async with peer(stage) as router:
                router.send("GET", "/breaks")
                with pytest.raises(ConnectionResetError):
                    await router.reader.read()

    play("asyncio", main())
    assert events(tmp_path).count("accept") == 3
    assert verify(tmp_path).is_good


def test_without_an_audit_nothing_is_written(tmp_path: Path) -> None:
    """It is off unless somebody asks for it."""

    async def main() -> None:
        async with staged() as stage:
            assert stage.host.audit is None

    play("asyncio", main())


# --- the file ------------------------------------------------------------------------------------------------------


def test_each_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Also two of one name and pid in one second; the folder is made."""
    folder = tmp_path / "a" / "b"
    logs = [AuditLog.open(str(folder), "w1", CLOCK) for _ in range(3)]
    for log in logs:
        log.close()
    assert len(set(folder.iterdir())) == 3
    assert all(path.name.startswith(f"w1-{os.getpid()}-") for path in folder.iterdir())
    assert events(folder) == ["begin"] * 3


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    """As a wrong setting, with its place; nothing is left behind where only the disk was full."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/none")):
        with pytest.raises(ConfigError, match="must be a folder that can be written") as caught:
            AuditLog.check(str(folder), CLOCK, "--audit")
        (problem,) = caught.value.problems
        assert (problem.source, problem.field, problem.value) == ("--audit", "worker.audit_dir", str(folder))
    AuditLog.check(str(tmp_path / "good"), CLOCK, "--audit")
    assert list((tmp_path / "good").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_refused_at_the_start() -> None:
    """The first line is written before anything depends on the log."""
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        AuditLog(fd, "/dev/full", "w1", CLOCK, "boot")
    os.close(fd)


def test_a_write_that_fails_later_ends_the_log_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once; what comes later is not written, for a log with a gap would lie; requests are answered."""
    readable, writable = os.pipe()
    log = AuditLog(writable, "a pipe", "w1", CLOCK, "boot")

    async def main() -> None:
        async with staged(audit=log) as stage, peer(stage) as router:

            @stage.on("/x")
            async def handle(lead: Leadership, request: web.Request) -> web.Response:
                return web.Response(text="hello")

            is_open = []
            for _ in range(3):
                assert (await router.ask("GET", "/x")).status == 200
                is_open.append(log.is_open)
                if len(is_open) == 1:
                    os.close(readable)
            assert is_open == [True, False, False]
            assert isinstance(stage.host.state(SHARD), Serving)

    with caplog.at_level(logging.ERROR, "shardlead.audit"):
        play("asyncio", main())
    assert [record.message for record in caplog.records] == [
        "the audit log cannot be written and ends here; the work goes on"
    ]


# --- whole workers -------------------------------------------------------------------------------------------------


def verified(folder: Path, act: Callable[[Scene], Coroutine[Any, Any, None]]) -> Report:
    """The verdict on what the scene's workers wrote."""
    scenes.play("embedded", act)
    report = verify(folder)
    assert report.is_good, str(report)
    return report


async def two(scene: Scene, folder: Path, **settings: Any) -> tuple[Player, Player]:
    """w1 leads FEW, w2 waits."""
    players = [await scene.start(name, Script(), audit_dir=str(folder), **settings) for name in ("w1", "w2")]
    await scene.assign(dict.fromkeys(FEW, ("w1", "w2")))
    await scene.until_serving("w1", *FEW)
    return players[0], players[1]


def test_handoff_and_stop(tmp_path: Path) -> None:
    """Shards that are handed over on the way, and at the end: every leadership has lead, serve and stop."""

    async def act(scene: Scene) -> None:
        one, other = await two(scene, tmp_path)
        async with one.request(1):
            pass
        await scene.assign({1: ("w2", "w1")})
        await scene.until_serving("w2", 1)
        assert await one.stop()
        await scene.until_serving("w2", *FEW)
        assert await other.stop()

    report = verified(tmp_path, act)
    assert (report.leaderships, report.requests) == (6, 1)
    for event in ("lead", "serve", "stop"):
        assert events(tmp_path).count(event) == 6


def test_a_lost_lease_is_followed_by_another(tmp_path: Path) -> None:
    """The lease is revoked under a living worker: it ends what it led, and leads again in another session."""

    async def act(scene: Scene) -> None:
        one, _ = await two(scene, tmp_path)
        sid = one.worker.session.sid if one.worker.session else ""
        assert one.worker.session is not None
        one.worker.session.lose("the test says so")
        await scene.until(lambda: one.worker.is_ready and one.worker.session and one.worker.session.sid != sid)
        await scene.until(lambda: scene.serve("w2", FEW))

    verified(tmp_path, act)
    ends = [line for line in lines(tmp_path) if line["event"] == "deadline" and line["deadline_ns"] == 0]
    assert ends


def test_a_suspension_is_written(tmp_path: Path) -> None:
    """The clock runs past the deadline: the guard says no, then yes again, and under the epochs it had."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", Script(), audit_dir=str(tmp_path), lease=SHORT)
        await scene.assign(dict.fromkeys(FEW, ("w1",)))
        await scene.until_serving("w1", *FEW)
        await scene.until(lambda: all(isinstance(one.host.state(shard), Serving) for shard in FEW))
        epochs = dict(one.worker.led)
        assert one.worker.session is not None
        one.worker.session.doubt("the test says so")
        assert lines(tmp_path)[-1]["deadline_ns"] == 0
        await scene.until(lambda: one.worker.session and one.worker.session.is_active)
        await scene.until(lambda: all(isinstance(one.host.state(shard), Serving) for shard in FEW))
        assert one.worker.led == epochs
        async with one.request(1):
            pass

    report = verified(tmp_path, act)
    assert report.requests == 1
    assert events(tmp_path).count("serve") == 2 * len(FEW)


def test_a_deadline_is_written_before_it_counts(tmp_path: Path) -> None:
    """Whatever the guard says yes to lies before a deadline that stands in the log already."""

    async def act(scene: Scene) -> None:
        one, _ = await two(scene, tmp_path)
        session = one.worker.session
        assert session is not None
        write, seen = session.on_deadline, []

        def noted(deadline_ns: int) -> None:
            seen.append((session.deadline_ns, deadline_ns))
            write(deadline_ns)

        session.on_deadline = noted
        await scene.until(lambda: len(seen) > 1)
        assert all(before < after for before, after in seen)
        assert session.deadline_ns == seen[-1][1]

    verified(tmp_path, act)


def test_admit_is_written_too(tmp_path: Path) -> None:
    """Protocols of one's own: what `Worker.admit` lets in is an accept, what it refuses a reject."""

    async def act(scene: Scene) -> None:
        one, _ = await two(scene, tmp_path)
        async with one.request(1):
            assert events(tmp_path).count("accept") == 1
        with pytest.raises(Exception, match="not led here"):
            async with one.worker.admit(scene.key(1), 1):
                pass

    report = verified(tmp_path, act)
    assert (report.requests, report.refused) == (1, 1)


def test_a_worker_with_a_bad_folder_does_not_join(tmp_path: Path) -> None:
    """It says so before it has a record in the store."""

    async def act(scene: Scene) -> None:
        (tmp_path / "file").touch()
        player = scene.player("w1", audit_dir=str(tmp_path / "file"))
        with pytest.raises(ConfigError, match="audit_dir"):
            async with player.store, player.worker:
                pass
        assert scene.kv(scene.keys.worker("w1")) is None

    scenes.play("embedded", act)
