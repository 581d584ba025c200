"""An application that fails a thousand times is not worth a thousand tracebacks."""

import logging

import pytest

from shardlead.worker.leadership import Leadership
from shardlead.worker.tracebacks import AGAIN_S, KINDS_MAX, Tracebacks, in_a_line
from tests.cluster.stage import SteppedClock
from tests.worker.scene import Scene, Script, play


def raised(kind: type[Exception], text: str = "") -> Exception:
    try:
        raise kind(text)
    except kind as exc:
        return exc


def test_the_first_of_a_kind_is_told_and_another_after_a_while() -> None:
    """A kind is the type and the line, whatever the text says."""
    clock = SteppedClock()
    tracebacks = Tracebacks(clock)
    first = raised(LookupError, "shard 1")
    assert tracebacks.of(first) is first
    assert tracebacks.of(raised(LookupError, "shard 2")) is None
    other = raised(OSError, "shard 1")
    assert tracebacks.of(other) is other
    clock.jump(AGAIN_S)
    again = raised(LookupError, "shard 1")
    assert tracebacks.of(again) is again


def test_the_kinds_that_are_remembered_have_a_bound() -> None:
    """Who raises ever new types is told of again and again, and costs no memory."""
    tracebacks = Tracebacks(SteppedClock())
    for number in range(3 * KINDS_MAX):
        assert tracebacks.of(raised(type(f"Error{number}", (Exception,), {}))) is not None
    assert len(tracebacks._told_ns) <= KINDS_MAX


def test_an_exception_is_one_line() -> None:
    """Its type first; never longer than fits a screen."""
    assert in_a_line(ValueError("a\n  b")) == "ValueError: a b"
    assert len(in_a_line(ValueError("x" * 5_000))) == 300


def test_shards_that_fail_alike_are_told_with_one_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """Each has its line with the reason; the first has the traceback."""

    async def act(scene: Scene) -> None:
        async def fail(lead: Leadership) -> None:
            raise ConnectionError(f"no volume for {lead.shard}")

        await scene.start("w1", Script(open=fail), backoff_s=30.0)
        await scene.start("w2")
        shards = tuple(range(6))
        await scene.assign(dict.fromkeys(shards, ("w1", "w2")))
        await scene.until_serving("w2", *shards)

    play("embedded", act)
    told = [record for record in caplog.records if record.message == "open() failed"]
    assert {vars(record)["reason"] for record in told} == {f"ConnectionError: no volume for {n}" for n in range(6)}
    assert [record.exc_info is not None for record in told] == [True, *(len(told) - 1) * [False]]
    assert all(record.levelno == logging.ERROR for record in told)
