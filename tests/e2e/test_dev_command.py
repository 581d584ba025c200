"""`shardlead dev`, as a new user meets it: one command, a working cluster, nothing left behind."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from shardlead import watchdog
from shardlead.processes import free_port
from tests.support.load import settled

READY_S = 30
STOP_S = 40


class Terminal:
    """One `shardlead dev` in a terminal of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, environment: Mapping[str, str]) -> None:
        self.process, self.port, self.environment = process, port, environment
        self.lines: list[str] = []
        self.url = f"http://127.0.0.1:{port}"
        self._reading = asyncio.create_task(self._read())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode().rstrip("\n"))

    async def shows(self, text: str, timeout_s: float = READY_S) -> None:
        try:
            await settled(lambda: text in self.text or self.process.returncode is not None, timeout_s=timeout_s)
        except TimeoutError:
            raise AssertionError(f"{text!r} is not in:\n{self.text}") from None
        assert text in self.text, f"ended with {self.process.returncode}:\n{self.text}"

    async def ended(self) -> int:
        async with asyncio.timeout(STOP_S):
            await self._reading
            return await self.process.wait()

    def members(self) -> set[int]:
        """All processes of this cluster."""
        return watchdog.members([self.process.pid])


@contextlib.asynccontextmanager
async def dev(
    folder: Path, *words: str, port: int | None = None, variables: Mapping[str, str] | None = None
) -> AsyncIterator[Terminal]:
    """Start it, wait until it welcomes, end it whatever happens."""
    port = free_port() if port is None else port
    own = {"XDG_RUNTIME_DIR": str(folder / "run"), "XDG_CACHE_HOME": str(folder / "cache"), **(variables or {})}
    environment = {**os.environ, **own}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shardlead", "dev", "--port", str(port), *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    terminal = Terminal(process, port, environment)
    family: set[int] = set()
    try:
        await terminal.shows("Ctrl-C stops everything")
        family = terminal.members()
        yield terminal
    finally:
        was_killed = process.returncode is None
        if was_killed:
            process.kill()
        await terminal.ended()
    if was_killed:  # its watchdog sees to the others, and is the last to go
        await settled(lambda: not running(family), timeout_s=10)
    assert not running(family), f"still running: {running(family)}\n{terminal.text}"


def running(family: set[int]) -> set[int]:
    return family & {row.pid for row in watchdog.table() if row.state not in "ZX"}


async def post(url: str, **options: Any) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(url, **options) as answer:
        return answer.status, await answer.json(content_type=None)


async def other_terminal(terminal: Terminal, folder: Path, *words: str) -> tuple[int, str, str]:
    """`shardlead WORDS…` typed elsewhere."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shardlead", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=terminal.environment,
        cwd=folder,
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("store", ["embedded", pytest.param("etcd", marks=pytest.mark.etcd)])
def test_one_command_gives_a_working_cluster(tmp_path: Path, store: str) -> None:
    """What it prints to try works; other commands find it from any directory; a second one on its port starts nothing
    and says who has it; a crash is told as it happens; Ctrl-C ends it with 0 and leaves nothing running."""

    async def story() -> None:
        events = tmp_path / "events.jsonl"
        words = ["--json-events", str(events), *(["--etcd"] if store == "etcd" else [])]
        async with dev(tmp_path, *words) as terminal:
            assert await post(f"{terminal.url}/counters/alice") == (200, ANY({"name": "alice", "value": 1}))
            assert await post(f"{terminal.url}/counters/alice") == (200, ANY({"name": "alice", "value": 2}))

            code, out, err = await other_terminal(terminal, tmp_path, "workers", "--json")
            assert (code, err) == (0, "")
            rows = orjson.loads(out)
            assert [row["name"] for row in rows] == ["w1", "w2", "w3"]
            assert sum(row["shards"] for row in rows) == 64

            code, out, err = await other_terminal(terminal, tmp_path, "dev", "--port", str(terminal.port))
            assert (code, out) == (1, "")
            assert re.search(rf"port {terminal.port} is taken.*shardlead dev.*--port", err)

            victim = rows[0]
            assert f"kill -9 {victim['pid']}" in terminal.text
            os.kill(victim["pid"], signal.SIGKILL)
            await terminal.shows("w1 died (SIGKILL)")
            await terminal.shows("(w1 died)")
            assert (await post(f"{terminal.url}/counters/alice"))[1]["value"] == 3

            terminal.process.send_signal(signal.SIGINT)
            assert await terminal.ended() == 0, terminal.text
            assert "Traceback" not in terminal.text
            lines = [orjson.loads(line) for line in events.read_text().splitlines()]
            assert {"leader", "worker", "process"} <= {line["event"] for line in lines}
        code, _, err = await other_terminal(terminal, tmp_path, "workers", "--set", "store.call_timeout_s=1")
        assert code == 1, "no dev cluster is found any more"

    asyncio.run(story())


class ANY(dict[str, Any]):
    """Equal to every mapping that has at least these items."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and self.items() <= other.items()

    __hash__ = None


def test_counts_outlive_the_command_in_a_data_folder(tmp_path: Path) -> None:
    """A second start with --data continues the counts, under larger epochs; --for SECONDS ends it like Ctrl-C."""
    data = ("--data", str(tmp_path / "data"), "--workers", "1", "--shards", "8")

    async def one_life(seconds: float) -> dict[str, Any]:
        async with dev(tmp_path, *data, "--for", str(seconds)) as terminal:
            status, body = await post(f"{terminal.url}/counters/bob")
            assert status == 200, body
            if seconds > STOP_S:
                terminal.process.send_signal(signal.SIGTERM)
            assert await terminal.ended() == 0, terminal.text
            assert terminal.lines[-1].startswith("stopped")
            return body

    async def story() -> None:
        first, second = await one_life(600), await one_life(1)
        assert (first["value"], second["value"]) == (1, 2)
        assert second["epoch"] > first["epoch"]
        assert second["shard"] == first["shard"]

    asyncio.run(story())


def test_the_printed_line_starts_one_worker_more(tmp_path: Path) -> None:
    """It joins under the others' lease time-out, takes its share of the shards and serves the same counts; Ctrl-C in
    its own terminal takes them back."""

    async def story() -> None:
        async with dev(tmp_path, "--workers", "1", "--shards", "8", "--ttl", "4") as terminal:
            at = terminal.lines.index("  # one worker more:")
            other = await asyncio.create_subprocess_shell(
                f"exec env {terminal.lines[at + 1].strip()}",
                stderr=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                env=terminal.environment,
                start_new_session=True,
            )
            try:
                await terminal.shows("w1 4   w2 4")
                answers = [await post(f"{terminal.url}/counters/{number}") for number in range(20)]
                assert {(status, body["worker"]) for status, body in answers} == {(200, "w1"), (200, "w2")}
                other.send_signal(signal.SIGINT)
                async with asyncio.timeout(STOP_S):
                    _, said = await other.communicate()
                assert other.returncode == 0, said
                assert b"ttl_s=4" in said
                await settled(lambda: terminal.lines[-1].endswith("  w1 8"), timeout_s=READY_S)
            finally:
                watchdog.end([other.pid] if other.returncode is None else [])
                await other.wait()

    asyncio.run(story())


def test_a_home_that_cannot_be_written_costs_the_finding_alone(tmp_path: Path) -> None:
    """The cluster works, and says with what the other commands find it."""
    file = tmp_path / "file"
    file.touch()
    nowhere = {"XDG_RUNTIME_DIR": str(file), "XDG_CACHE_HOME": str(file)}

    async def story() -> None:
        async with dev(tmp_path, "--workers", "1", variables=nowhere) as terminal:
            assert (await post(f"{terminal.url}/counters/alice"))[0] == 200
            found = re.search(
                r"other commands cannot find this cluster and need (--store \S+ --cluster dev)", terminal.text
            )
            assert found is not None
            code, out, _ = await other_terminal(terminal, tmp_path, "workers", "--json", *found[1].split(" "))
            assert (code, len(orjson.loads(out))) == (0, 1)

    asyncio.run(story())


def test_a_killed_dev_leaves_nothing_running(tmp_path: Path) -> None:
    """kill -9 on the command itself: all its processes end, and the next command does not see it any more."""

    async def story() -> None:
        async with dev(tmp_path, "--workers", "2") as terminal:
            family = terminal.members()
            assert len(family) > 6, "dev, its watchdog, store, router, two workers and their parents"
            terminal.process.kill()
            await terminal.ended()
            await settled(lambda: not running(family), timeout_s=10)

    asyncio.run(story())


def test_an_application_that_cannot_run_is_told(tmp_path: Path) -> None:
    """A worker that cannot start ends the command with the worker's own words and exit code: 2 for a wrong name."""

    async def story() -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shardlead", "dev", "--port", "0", "--app", "no.such:Thing"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        async with asyncio.timeout(STOP_S):
            out, _ = await process.communicate()
        assert process.returncode == 2
        assert "no.such" in out.decode()

    asyncio.run(story())
