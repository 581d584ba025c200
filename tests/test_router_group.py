"""The parent of several router processes, with processes that speak to it as routers do."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from shardlead.cli import router_group
from shardlead.cli.joint_metrics import Families
from shardlead.cli.router_group import Group, Member
from shardlead.cli.running import Stop
from shardlead.config import RouterSettings
from shardlead.metrics import RouterGroupMetrics

WAIT_S = 10.0
ROUTER = f"""#!{sys.executable}
# Says that it is ready, and numbers its pages; the one named in STALLED stops in its middle until GO exists.
import os, socket, sys, time
parent = socket.socket(fileno=int(sys.argv[sys.argv.index("--tell") + 1]))
parent.sendall(b"ready 127.0.0.1:1\\n")
number = 0
while parent.recv(100):
    number += 1
    page = f"# HELP q_total q\\n# TYPE q_total counter\\nq_total {{number}}.0\\n".encode()
    parent.sendall(f"{{len(page)}}\\n".encode() + page[:20])
    while str(number) == os.environ.get("STALLED") and not os.path.exists(os.environ["GO"]):
        time.sleep(0.01)
    parent.sendall(page[20:])
"""


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110  # processes tell nobody
            await asyncio.sleep(0.01)


def test_a_page_that_is_late_is_not_taken_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router stalls in the middle of an answer: its former figures are told meanwhile, and then the newest."""
    go = tmp_path / "go"
    monkeypatch.setenv("STALLED", "2")
    monkeypatch.setenv("GO", str(go))
    monkeypatch.setattr(router_group, "PAGE_TIMEOUT_S", 0.2)

    def value(page: Families) -> list[float]:
        return [sample.value for family in page for sample in family.samples]

    async def main() -> None:
        member = Member(1)
        await member.start([sys.executable, "-c", ROUTER])
        assert member.process is not None
        try:
            assert await member.ready() == "127.0.0.1:1"
            assert value(await member.page()) == [1]
            for _ in range(3):
                assert value(await member.page()) == [1]
            go.touch()
            await until(lambda: value(member.last) == [2])
            for number in (3, 4, 5):
                assert value(await member.page()) == [number]
        finally:
            member.close()
            await asyncio.wait_for(member.process.wait(), WAIT_S)

    asyncio.run(main())


def test_a_router_that_cannot_be_started_again_takes_no_other_with_it(tmp_path: Path) -> None:
    """No process is to be had for a while: the others go on, and it is tried again."""
    program = tmp_path / "router"
    program.write_text(ROUTER)
    program.chmod(0o755)

    async def main() -> None:
        stop = Stop()
        metrics = RouterGroupMetrics(CollectorRegistry())
        group = Group([str(program)], "test", RouterSettings(processes=2), 1, metrics)
        async with router_group._kept(group, stop):
            await until(lambda: group.serving() == 2)
            first, second = group.members
            assert first.process is not None
            assert second.process is not None
            kept = second.process.pid
            program.rename(tmp_path / "away")
            os.kill(first.process.pid, 9)
            await until(lambda: first.process is None)
            assert group.serving() == 1
            (tmp_path / "away").rename(program)
            await until(lambda: group.serving() == 2)
            assert second.process.pid == kept
            assert not stop.asked.is_set()

    asyncio.run(main())
