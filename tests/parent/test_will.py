"""The worker's end of its parent's socket: never in the way, the last word counts."""

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from shardlead import parent
from shardlead.config import StoreSettings
from shardlead.worker import will
from shardlead.worker.will import LastWill

WAIT_S: Final = 10.0
SETTINGS: Final = StoreSettings(endpoints=("http://a:1", "http://b:2"), username="u", password="p")


@dataclass
class Pair:
    """Both ends, and the environment that names the worker's."""

    ours: socket.socket
    theirs: socket.socket
    environment: dict[str, str] = field(default_factory=dict)

    def will(self) -> LastWill:
        self.environment = {will.FD_VARIABLE: str(self.theirs.detach())}
        found = LastWill.from_environment(self.environment)
        assert found is not None
        return found


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Pair(ours, theirs)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    """Runs a test's coroutine on each kind of loop."""

    def runner(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(WAIT_S):
                await main()

        if request.param == "uvloop":
            uvloop.run(bounded())
        else:
            asyncio.run(bounded())

    return runner


Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


def test_both_ends_agree() -> None:
    """On the variable, and on what a will looks like."""
    assert parent.FD_VARIABLE == will.FD_VARIABLE


def test_without_a_parent_there_is_no_will() -> None:
    """A process started by hand has none, and says nothing about it."""
    assert LastWill.from_environment({}) is None


@pytest.mark.parametrize("text", ["x", "-1", "999999", ""])
def test_a_descriptor_that_is_not_ours_is_left_alone(text: str) -> None:
    """Somebody else's variable of that name is a warning, not a crash."""
    assert LastWill.from_environment({will.FD_VARIABLE: text}) is None


def test_a_descriptor_that_is_a_file_is_left_alone(tmp_path: Any) -> None:
    """It may have been opened by something else under the same number."""
    with (tmp_path / "file").open("w") as file:
        assert LastWill.from_environment({will.FD_VARIABLE: str(file.fileno())}) is None
        file.write("it is open still")


def test_programs_started_from_the_worker_do_not_take_the_parent_for_theirs(pair: Pair) -> None:
    """The descriptor is not inherited and the variable is gone."""
    descriptor = pair.theirs.fileno()
    os.set_inheritable(descriptor, True)
    last_will = pair.will()
    assert pair.environment == {}
    assert not os.get_inheritable(descriptor)
    last_will.close()


def test_the_last_word_counts(pair: Pair, run: Run) -> None:
    """What was declared is read by the parent's own reader, credentials and all; a withdrawal takes its place."""

    async def main() -> None:
        last_will = pair.will()
        reader = parent.WillReader(pair.ours)
        last_will.declare(171, SETTINGS, fenced=True)
        last_will.declare(172, SETTINGS, fenced=False)
        assert reader.read()
        assert orjson.loads(reader.last) == {
            "lease": "172",
            "fenced": False,
            "endpoints": ["http://a:1", "http://b:2"],
            "username": "u",
            "password": "p",
            "ca_file": "",
            "cert_file": "",
            "key_file": "",
        }
        last_will.withdraw()
        assert reader.read()
        assert orjson.loads(reader.last) == {"lease": None}
        last_will.close()
        assert not reader.read()

    run(main)


def test_a_frozen_parent_holds_nothing_up(pair: Pair, run: Run) -> None:
    """While it reads nothing, declaring returns at once; once it reads again it learns the newest."""

    async def main() -> None:
        last_will = pair.will()
        for lease in range(10_000):
            last_will.declare(lease, SETTINGS, fenced=True)
        assert "unsent" in repr(last_will)
        reader = parent.WillReader(pair.ours)
        while "unsent" in repr(last_will):
            assert reader.read()
            await asyncio.sleep(0)
        assert reader.read()
        assert orjson.loads(reader.last)["lease"] == "9999"
        last_will.close()

    run(main)


def test_a_dead_parent_is_noticed_and_does_no_harm(pair: Pair, run: Run) -> None:
    """parent_died returns, for all who wait and for who asks later; declaring goes nowhere, quietly."""

    async def main() -> None:
        last_will = pair.will()
        waiting = [asyncio.create_task(last_will.parent_died()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        pair.ours.close()
        await asyncio.gather(*waiting)
        last_will.declare(171, SETTINGS, fenced=True)
        last_will.withdraw()
        await last_will.parent_died()
        last_will.close()
        last_will.close()

    run(main)


def test_a_parent_that_died_unnoticed_is_noticed_by_declaring(pair: Pair, run: Run) -> None:
    """No SIGPIPE, no exception."""

    async def main() -> None:
        last_will = pair.will()
        pair.ours.close()
        last_will.declare(171, SETTINGS, fenced=True)
        await last_will.parent_died()
        last_will.close()

    run(main)


@given(st.lists(st.binary(max_size=20).map(lambda text: text.replace(b"\n", b"")), max_size=10), st.data())
def test_the_parent_reads_whole_lines_only(lines: list[bytes], data: st.DataObject) -> None:
    """However the stream is cut, the last *whole* line is the will; one that broke off is not."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = parent.WillReader(ours)
        stream = b"\n".join(lines)
        while stream:
            size = data.draw(st.integers(1, len(stream)))
            theirs.sendall(stream[:size])
            stream = stream[size:]
            assert reader.read()
        theirs.close()
        assert not reader.read()
        assert reader.last == (lines[-2] if len(lines) > 1 else b"")


def test_a_will_without_end_is_not_read_on(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    """The parent's memory is bounded; the last whole will stands."""
    reader = parent.WillReader(pair.ours)
    pair.theirs.sendall(b"whole\n")
    pair.theirs.setblocking(False)
    while reader.read():
        pair.theirs.send(b"x" * 30_000)
    assert reader.last == b"whole"
    assert "longer than" in capfd.readouterr().err
