"""Processes that are started are gone afterwards, however it ends."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardlead import watchdog
from shardlead.errors import ProcessFailed
from shardlead.processes import Process, Processes, Ready, WorkerProcess, free_port, is_port_free, settings_flags
from tests.support.load import settled

SLEEPER = "import time; print('ready router r 127.0.0.1:1 admin 127.0.0.1:2', flush=True); time.sleep(600)"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], process_group=0)
sys.exit(child.wait() & 255)
"""


async def _start(processes: Processes, code: str, name: str = "p", *, is_worker: bool = False) -> Process:
    return await processes.start(name, [sys.executable, "-c", code], is_worker=is_worker)


def test_a_process_is_ready_when_it_says_so_and_gone_at_the_end(tmp_path: Path) -> None:
    """The ready line is parsed, the rest of the output stands in the log, and leaving the block ends the process."""

    async def main() -> Process:
        async with Processes(tmp_path) as processes:
            process = await _start(processes, "print('hello');" + SLEEPER)
            ready = await process.wait_ready(20)
            assert ready == Ready("router", "r", "127.0.0.1:1", "127.0.0.1:2")
            assert process.is_running
        return process

    process = asyncio.run(main())
    assert process.returncode == -signal.SIGKILL
    assert not watchdog.members([process.root_pid])
    assert process.log.read_text().startswith("hello\nready router")


def test_an_error_ends_everything_too(tmp_path: Path) -> None:
    """An exception in the block leaves nothing running, forked children in other groups included."""
    seen: list[int] = []

    async def main() -> None:
        async with Processes(tmp_path) as processes:
            process = await _start(processes, PARENT, is_worker=True)
            await process.wait_ready(20)
            seen.extend([process.root_pid, process.pid])
            raise RuntimeError("a test fails here")

    with pytest.raises(RuntimeError):
        asyncio.run(main())
    assert len(set(seen)) == 2
    assert not watchdog.members(seen)


def test_a_process_that_ends_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    """Who waits for readiness learns at once that there will be none, and why."""

    async def main() -> None:
        async with Processes(tmp_path) as processes:
            process = await _start(processes, "import sys; sys.exit('no such settings')")
            with pytest.raises(ProcessFailed, match="no such settings") as caught:
                await process.wait_ready(20)
            assert "code 1" in caught.value.reason
            silent = await _start(processes, "import time; time.sleep(600)", "silent")
            with pytest.raises(ProcessFailed, match="not ready within"):
                await silent.wait_ready(0.05)
            with pytest.raises(ProcessFailed, match="cannot be started"):
                await processes.start("none", [str(tmp_path / "missing")])

    asyncio.run(main())


def test_signals_reach_the_worker_and_not_its_parent(tmp_path: Path) -> None:
    """`kill` is the worker's crash, which its parent outlives to report; `kill_host` ends both."""

    async def main() -> None:
        async with Processes(tmp_path) as processes:
            crashed = await _start(processes, PARENT, "crashed", is_worker=True)
            await crashed.wait_ready(20)
            crashed.kill()
            assert await crashed.exited(20) == 256 - signal.SIGKILL  # the parent's own report
            lost = await _start(processes, PARENT, "lost", is_worker=True)
            await lost.wait_ready(20)
            assert isinstance(lost, WorkerProcess)
            lost.kill_host()
            assert await lost.exited(20) == -signal.SIGKILL  # of the parent; both were killed in one breath
            await settled(lambda: not watchdog.members([lost.root_pid, lost.pid]), timeout_s=20)
            lost.kill()  # nothing is left that it could reach
            processes.forget(lost)
            assert processes.all == [crashed]

    asyncio.run(main())


def test_a_killed_starter_leaves_nothing_running(tmp_path: Path) -> None:
    """Even SIGKILL to the process that started them ends them all: the watchdog sees its pipe close."""
    program = f"""
import asyncio, sys
from pathlib import Path
from shardlead.processes import Processes
async def main():
    async with Processes(Path({str(tmp_path)!r})) as processes:
        process = await processes.start("p", [sys.executable, "-c", {PARENT!r}], is_worker=True)
        await process.wait_ready(20)
        print(process.root_pid, process.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pids = [int(word) for word in starter.stdout.readline().split()]
        assert len(pids) == 2
        starter.kill()
        starter.wait(20)
    asyncio.run(settled(lambda: not _living(pids), timeout_s=20))  # nobody is left who could tell


def _living(pids: list[int]) -> set[int]:
    living = set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            living.add(pid)
    return living & {row.pid for row in watchdog.table() if row.state not in "ZX"}


def test_a_port_is_free_until_somebody_listens() -> None:
    """A taken port is seen before anything is started."""
    port = free_port()
    assert is_port_free(port)

    async def main() -> None:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
        async with server:
            assert not is_port_free(port)

    asyncio.run(main())


def test_settings_become_flags() -> None:
    """Each setting is one --set, in the spelling of the command line."""
    assert settings_flags({"lease.ttl_s": 5, "store.endpoints": ("a", "b"), "cluster.hash_tags": True}) == [
        *("--set", "lease.ttl_s=5"),
        *("--set", "store.endpoints=a,b"),
        *("--set", "cluster.hash_tags=true"),
    ]
