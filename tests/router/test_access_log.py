"""The access log: a line a request, and no request waits for it."""

import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from shardlead.clock import SystemClock
from shardlead.errors import CommandError
from shardlead.router.access import AccessLog
from shardlead.router.counts import Counts
from tests.router.support import Stage, request_bytes, run, stage


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


async def _has_lines(here: Stage, path: Path, count: int) -> list[dict[str, Any]]:
    await here.true(lambda: len(_lines(path)) >= count)
    return _lines(path)


def test_each_request_is_a_line(tmp_path: Path) -> None:
    """With who asked for what, what came of it, where it went, how long it took and its id; what was no request, too.
    A file that was moved away is opened anew."""
    path = tmp_path / "access.log"

    async def main() -> None:
        async with stage(access_log=str(path)) as here:
            worker = await here.start("w1")
            epoch = await here.lead(worker)
            answer = await here.ask("POST", '/k/a?x="', b"hello", X_Request_Id="id-1")
            await here.ask("GET", "/none")
            bad = await here.client()
            await bad.send(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n")
            await bad.answer()
            posted, keyless, refused = await _has_lines(here, path, 3)
            assert abs(posted.pop("t") - here.clock.wall_s()) < 10
            assert 0 < posted.pop("ms") < 5_000
            assert posted == {
                "outcome": "answered",
                "peer": "127.0.0.1",
                "method": "POST",
                "target": '/k/a?x="',
                "status": 200,
                "received": 5,
                "sent": len(answer.body),
                "shard": here.shard_of("a"),
                "worker": "w1",
                "epoch": epoch,
                "id": "id-1",
            }
            assert (keyless["status"], keyless["outcome"], keyless["worker"]) == (400, "bad-request", None)
            assert (refused["status"], refused["outcome"], refused["peer"]) == (400, "bad-request", "127.0.0.1")
            path.rename(tmp_path / "access.log.1")
            await here.ask("GET", "/k/b")
            assert [line["target"] for line in await _has_lines(here, path, 1)] == ["/k/b"]
        assert len(_lines(tmp_path / "access.log.1")) == 3

    run(main)


def test_a_stop_writes_what_is_left(tmp_path: Path) -> None:
    """The last requests are in the file when the router has stopped."""
    path = tmp_path / "access.log"

    async def main() -> None:
        async with stage(access_log=str(path)) as here:
            await here.lead(await here.start("w1"))
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a") * 700)
            for _ in range(700):
                await client.answer()

    run(main)
    assert len(_lines(path)) == 700


def test_what_cannot_be_written_fast_enough_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stands still costs lines, not requests."""
    readable, writable = os.pipe()
    counts = Counts()
    log = AccessLog(f"/dev/fd/{writable}", clock=SystemClock(), counts=counts)
    monkeypatch.setattr(log._writer, "_is_still_there", lambda _: True)  # a pipe has no place of its own
    detail = "x" * 100_000
    while not counts.access_log_dropped:
        log.add_refused("p", 400, detail)
    assert log._bytes_given < 200_000_000
    os.close(readable)  # the writer's write fails, and it goes on
    log.close()
    os.close(writable)


def test_a_log_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    """In one line that names the setting; the port is free again."""

    with pytest.raises(CommandError, match=r"router\.access_log"):
        AccessLog(str(tmp_path / "none" / "access.log"), clock=SystemClock(), counts=Counts())
