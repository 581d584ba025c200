"""What is the smart client's own: bodies and answers as streams, its errors, its connections, its bounds."""

import asyncio
import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from shardlead.client import Client, Led
from shardlead.client.body import body_of
from shardlead.client.call import WAITING, Call
from shardlead.errors import AnswerBroken, OutcomeUnknown, RequestError, StoreUnavailable, Unserved
from shardlead.store.base import Delete
from tests.client.support import ClientStage, client_stage, drop, reset
from tests.router.support import Request, Worker, echo, run


def scene(main: Callable[[ClientStage], Awaitable[None]], *, is_uvloop: bool = True, **changes: Any) -> None:
    async def staged() -> None:
        async with client_stage(**changes) as here:
            await main(here)

    run(staged, is_uvloop=is_uvloop)


async def led(here: ClientStage, script: Callable[[Request], Awaitable[None]] = echo, **record: Any) -> Worker:
    worker = await here.start("w1", script, **record)
    await here.lead(worker)
    return worker


async def pieces(count: int, size: int = 1_000) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(size)


# --- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["taken back", "cancelled, taken back", "taken back, cancelled"])
def test_a_cancellation_by_the_caller_is_never_taken_for_ones_own(order: str) -> None:
    """A call that waits for a connection is taken back in the same turn of the loop in which its caller gives it up."""

    async def main() -> None:
        made: asyncio.Future[Call] = asyncio.get_running_loop().create_future()

        async def ask() -> str:
            task = asyncio.current_task()
            call = Call(1, "POST", 0, await body_of(None, None), has_idempotency_key=False, task=task,
                        timeout_ns=1, deadline_ns=1)  # fmt: skip
            call.state = WAITING
            made.set_result(call)
            try:
                await asyncio.sleep(10.0)
            except asyncio.CancelledError:
                if not call.was_taken_back():
                    raise
            return "goes on"

        asking = asyncio.create_task(ask())
        call = await made
        for deed in order.split(", "):
            if deed == "cancelled":
                asking.cancel()
            else:
                assert call.take_back()
        if order == "taken back":
            assert await asking == "goes on"
        else:
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(main())


@pytest.mark.parametrize("is_uvloop", [True, False])
def test_a_request_and_its_answer(is_uvloop: bool) -> None:
    """Method, path, query, headers and body arrive as given, with the contract's headers; the answer comes back; the
    next request takes the same connection."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await request.read_body()
            await request.answer(201, b'{"a":1}', Content_Type="application/json", X_Custom="b")

        worker = await led(here, script)
        epochs = set()
        for number in range(3):
            asking = here.direct.request(
                "post", "/a b?c=d", key="ü/", json={"n": number}, params={"e": "f"}, headers={"X-One": "1"}
            )
            async with asking as answer:
                assert (answer.status, answer.reason, answer.headers["x-custom"]) == (201, "Because", "b")
                assert (answer.worker, answer.shard) == ("w1", here.shard_of("ü/"))
                assert await answer.json() == {"a": 1}
                assert await answer.text() == '{"a":1}'
                epochs.add(answer.epoch)
        request = worker.requests[0]
        assert (request.method, request.target, request.body) == ("POST", "/a%20b?c=d&e=f", b'{"n":0}')
        assert (request.headers["x-one"], request.headers["content-type"]) == ("1", "application/json")
        assert (request.headers["shardlead-key"], request.shard) == ("%C3%BC%2F", here.shard_of("ü/"))
        assert epochs == {request.epoch}
        assert worker.connections == 1

    scene(main, is_uvloop=is_uvloop)


def test_a_key_is_bytes_or_text_in_utf_8() -> None:
    """Both spell one key; an empty one and one over 2,048 bytes are refused before anything is sent."""

    async def main(here: ClientStage) -> None:
        worker = await led(here)
        for key in ("ß", "ß".encode()):
            assert (await here.direct.request("GET", "/", key=key)).status == 200
        assert len({request.headers["shardlead-key"] for request in worker.requests}) == 1
        assert (await here.direct.request("GET", "/", key=b"x" * 2_048)).status == 200
        for key in ("", b"", b"x" * 2_049):
            with pytest.raises(RequestError, match="key"):
                await here.direct.request("GET", "/", key=key)

    scene(main)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"path": "http://elsewhere/"}, "slash"),
        ({"path": ""}, "slash"),
        ({"path": "*"}, "slash"),
        ({"method": "CONNECT"}, "CONNECT"),
        ({"method": "GET /"}, "method"),
        ({"method": ""}, "method"),
        ({"headers": {"X": "a\r\nShardlead-Epoch: 9"}}, "header"),
        ({"headers": {"X\r\nY": "a"}}, "header"),
        ({"data": b"", "json": 1}, "not both"),
        ({"json": object()}, "json"),
        ({"data": object()}, "a body cannot be"),
        ({"data": 7}, "a body cannot be"),
    ],
)
def test_what_cannot_be_sent_is_said_and_not_sent(arguments: dict[str, Any], reason: str) -> None:
    """A RequestError, and the next request is none the worse for it."""

    async def main(here: ClientStage) -> None:
        worker = await led(here)
        with pytest.raises(RequestError, match=f"(?i){reason}"):
            await here.direct.request(**{"method": "GET", "path": "/", "key": "a", **arguments})
        assert not worker.requests
        assert not here.direct._calls
        assert (await here.direct.request("GET", "/", key="a")).status == 200

    scene(main)


def test_nobody_but_the_runtimes_speaks_the_contract() -> None:
    """`Shardlead-*` and what frames a message are taken from the caller's headers and from the answer's."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await request.answer(200, b"", Shardlead_Epoch="7", shardlead_x="y", X_Kept="1")

        worker = await led(here, script)
        headers = [("Shardlead-Epoch", "9"), ("shardlead-Refused", "x"), ("Transfer-Encoding", "chunked"),
                   ("Content-Length", "99"), ("Connection", "close"), ("Upgrade", "h2c"), ("X-Two", "1"),
                   ("X-Two", "2")]  # fmt: skip
        answer = await here.direct.request("POST", "/", key="a", data=b"abc", headers=headers)
        assert not [name for name in answer.headers if name.lower().startswith("shardlead")]
        assert answer.headers["X-Kept"] == "1"
        sent = [(name, value) for name, value in worker.requests[0].raw_headers if not name.startswith(("Accept", "U"))]
        assert sorted(sent) == [
            ("Content-Length", "3"),
            ("Content-Type", "application/octet-stream"),
            ("Host", worker.address),
            ("Shardlead-Epoch", str(answer.epoch)),
            ("Shardlead-Key", "a"),
            ("Shardlead-Shard", str(answer.shard)),
            ("X-Two", "1"),
            ("X-Two", "2"),
        ]

    scene(main)


def test_redirects_and_cookies_are_the_applications_and_the_callers() -> None:
    """No redirect is followed (it would leave the key's leader), and no cookie is sent back by itself."""

    async def main(here: ClientStage) -> None:
        worker = await led(here, lambda request: request.answer(307, b"", Location="/there", Set_Cookie="a=b"))
        for _ in range(2):
            answer = await here.direct.request("GET", "/", key="a")
            assert (answer.status, answer.headers["location"]) == (307, "/there")
        assert "cookie" not in worker.requests[1].headers

    scene(main)


@pytest.mark.parametrize(
    ("data", "content_type", "body"),
    [
        (b"bytes", "application/octet-stream", b"bytes"),
        (bytearray(b"bytes"), "application/octet-stream", b"bytes"),
        ("tëxt", "text/plain; charset=utf-8", "tëxt".encode()),
        ({"a": "b c"}, "application/x-www-form-urlencoded", b"a=b+c"),
        (io.BytesIO(b"a file"), "application/octet-stream", b"a file"),
        (b"", "application/octet-stream", b""),
    ],
)
def test_bodies(data: object, content_type: str, body: bytes) -> None:
    """Short ones of every kind leave whole, with their length, and are not announced."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await request.read_body()
            await request.answer()

        worker = await led(here, script)
        assert (await here.direct.request("PUT", "/", key="a", data=data)).status == 200
        request = worker.requests[0]
        assert (request.headers["content-type"], request.body) == (content_type, body)
        assert request.headers["content-length"] == str(len(body))
        assert not request.expects_continue

    scene(main)


# --- large bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "file", "stream"])
@pytest.mark.parametrize("is_uvloop", [True, False])
def test_a_large_body_is_announced_and_not_touched_before_it_is_admitted(kind: str, is_uvloop: bool) -> None:
    """Refused without a 100, nothing of it was consumed, and the connection is not used again: it goes to the next
    leader whole."""

    async def main(here: ClientStage) -> None:
        begun = []

        async def stream() -> AsyncIterator[bytes]:
            begun.append(1)
            async for piece in pieces(200):
                yield piece

        old = await led(here, lambda request: request.refuse("draining"))
        new = await here.start("w2")
        data = os.urandom(200_000)
        body = {"bytes": data, "file": io.BytesIO(data), "stream": stream()}[kind]
        asking = asyncio.create_task(here.ask("POST", "/k/a", body))
        await here.held(1)
        assert not begun
        await here.true(lambda: not old.open)
        await here.lead(new)
        assert (await asking).json["body"] == 200_000
        assert new.requests[0].expects_continue
        assert ("content-length" in new.requests[0].headers) == (kind != "stream")
        assert kind == "stream" or new.requests[0].body == data

    scene(main, is_uvloop=is_uvloop)


def test_a_large_body_that_was_consumed_is_not_sent_again() -> None:
    """After the 100 a stream is spent: what follows is an unknown outcome, also for an idempotent class; bytes in
    memory are sent again."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await request.read_body()
            await (request.close() if request.number in (0, 1) else request.answer(200))

        worker = await led(here, script, idempotent=True)
        headers = {"Idempotency-Key": "1"}
        with pytest.raises(OutcomeUnknown):
            await here.direct.request("POST", "/", key="a", data=pieces(100), headers=headers)
        answer = await here.direct.request("POST", "/", key="a", data=bytes(100_000), headers=headers)
        assert (answer.status, len(worker.requests)) == (200, 3)

    scene(main)


def test_what_the_callers_own_source_raises_reaches_the_caller() -> None:
    """Not a failure of the request's way; the worker sees a torn body."""

    async def main(here: ClientStage) -> None:
        async def bad() -> AsyncIterator[bytes]:
            yield b"x"
            raise ZeroDivisionError

        worker = await led(here)
        with pytest.raises(ZeroDivisionError):
            await here.direct.request("POST", "/", key="a", data=bad())
        await here.true(lambda: not worker.open)
        assert (await here.direct.request("GET", "/", key="a")).status == 200

    scene(main)


def test_a_slow_upload_is_not_a_silent_worker() -> None:
    """The time-out counts from the last piece of the body on."""

    async def main(here: ClientStage) -> None:
        await led(here)

        async def slow() -> AsyncIterator[bytes]:
            for _ in range(6):
                await asyncio.sleep(0.15)
                yield b"x"

        answer = await here.direct.request("POST", "/", key="a", data=slow(), timeout_s=0.6)
        assert (await answer.json())["body"] == 6

    scene(main)


def test_an_answer_before_the_body_was_asked_for() -> None:
    """The application's 413 is the answer, the body is not consumed, and the connection ends."""

    async def main(here: ClientStage) -> None:
        worker = await led(here, lambda request: request.answer(413, b"too much", Connection="close"))
        async with here.direct.request("POST", "/", key="a", data=bytes(100_000)) as answer:
            assert (answer.status, await answer.read()) == (413, b"too much")
        await here.true(lambda: not worker.open)

    scene(main)


# --- answers as streams --------------------------------------------------------------------------------------------


def test_an_answer_is_read_while_it_comes() -> None:
    """Its head is here before its body; pieces come when they come; leaving early closes the connection."""

    async def main(here: ClientStage) -> None:
        go = asyncio.Event()

        async def script(request: Request) -> None:
            await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n")
            await go.wait()
            await request.send(b"3\r\nb\nc\r\n0\r\n\r\n")

        worker = await led(here, script)
        async with here.direct.request("GET", "/", key="a") as answer:
            assert await answer.content.readline() == b"a\n"
            go.set()
            assert [line async for line in answer.content] == [b"b\n", b"c"]
            assert answer.content.at_eof()
        async with here.direct.request("GET", "/", key="a") as answer:
            assert await answer.content.readexactly(3) == b"a\nb"
            assert b"".join([piece async for piece in answer.content.iter_chunked(1)]) == b"\nc"
        assert worker.connections == 1
        go.clear()
        async with here.direct.request("GET", "/", key="a") as answer:
            assert await answer.content.read(100) == b"a\n"
        assert not here.direct._calls
        go.set()
        await here.true(lambda: not worker.open)

    scene(main)


FRAMES = {
    "length": b"Content-Length: 100\r\n\r\nbegun",
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n",
    "until the end": b"Connection: close\r\n\r\nbegun",
}


@pytest.mark.parametrize("framing", FRAMES)
@pytest.mark.parametrize("is_uvloop", [True, False])
def test_an_answer_that_breaks_off_is_never_taken_for_whole(framing: str, is_uvloop: bool) -> None:
    """A reset in the middle raises AnswerBroken, also where only the connection's end would end the answer."""

    async def main(here: ClientStage) -> None:
        go = asyncio.Event()

        async def script(request: Request) -> None:
            await request.send(b"HTTP/1.1 200 OK\r\n" + FRAMES[framing])
            await go.wait()
            reset(request.writer)

        await led(here, script)
        async with here.direct.request("GET", "/", key="a") as answer:
            assert await answer.content.readany() == b"begun"
            go.set()
            with pytest.raises(AnswerBroken) as caught:
                await answer.read()
            assert caught.value.shard == here.shard_of("a")
        assert not here.direct._calls

    scene(main, is_uvloop=is_uvloop)


def test_a_forced_change_breaks_an_answer_under_way() -> None:
    """The leader's session is gone while its connection still stands: whoever reads is told, and does not wait for
    TCP. A reset cannot be what ends it here, so it is not taken for an end either."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await request.send(b"HTTP/1.1 200 OK\r\n" + FRAMES[request.target[1:].replace("-", " ")])
            await request.reader.readexactly(1)

        worker = await led(here, script)
        answers = [await here.direct.request("GET", f"/{framing.replace(' ', '-')}", key="a") for framing in FRAMES]
        reading = [asyncio.create_task(answer.read()) for answer in answers]
        await here.gone(worker)
        for task in reading:
            with pytest.raises(AnswerBroken, match="session"):
                await task

    scene(main)


def test_a_forced_change_ends_what_is_in_flight() -> None:
    """A GET goes to the next leader, a POST's outcome is unknown."""

    async def main(here: ClientStage) -> None:
        old = await led(here, lambda request: request.reader.readexactly(1))  # type: ignore[arg-type,return-value]
        new = await here.start("w2")
        get = asyncio.create_task(here.ask("GET", "/k/a"))
        post = asyncio.create_task(here.ask("POST", "/k/a"))
        await old.received(2)
        await here.gone(old)
        assert (await post).problem == "outcome-unknown"
        await here.held(1)
        await here.lead(new)
        assert (await get).status == 200

    scene(main)


def test_an_answer_that_stands_still_is_given_up() -> None:
    """After the request's time-out, counted while somebody reads; a reader may take its own time."""

    async def main(here: ClientStage) -> None:
        go = asyncio.Event()

        async def script(request: Request) -> None:
            await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nbegun")
            await go.wait()

        await led(here, script)
        async with here.direct.request("GET", "/", key="a", timeout_s=0.3) as answer:
            assert await answer.content.readany() == b"begun"
            await asyncio.sleep(0.6)
            with pytest.raises(AnswerBroken, match="stood still"):
                await answer.read()
        go.set()

    scene(main)


def test_the_runtimes_own_words_about_an_unknown_outcome() -> None:
    """Its 502 is an OutcomeUnknown; sent again under a new epoch where that is harmless."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await request.read_body()
            if request.number < 2:
                await request.answer(502, b"own words", Shardlead_Outcome="unknown")
            else:
                await request.answer(200)

        worker = await led(here, script, idempotent=True)
        with pytest.raises(OutcomeUnknown) as caught:
            await here.direct.request("POST", "/", key="a", data=b"x")
        assert (caught.value.kind, caught.value.is_retryable) == ("outcome-unknown", False)
        asking = asyncio.create_task(here.ask("POST", "/k/a", b"x", Idempotency_Key="1"))
        await worker.received(2)
        await here.held(1)
        await here.lead(worker)
        assert (await asking).status == 200

    scene(main)


def test_what_may_have_been_done_is_not_denied_after_a_hold() -> None:
    """Sent, broken, sent again under its Idempotency-Key, refused until its hold is over: an OutcomeUnknown, not an
    Unserved, which would say that nothing was done."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await request.read_body()
            if request.number == 0:
                await request.close()
            else:
                await request.refuse("suspended")

        worker = await led(here, script, idempotent=True, drain_timeout_s=-0.7)
        with pytest.raises(OutcomeUnknown):
            await here.direct.request("POST", "/", key="a", data=b"x", headers={"Idempotency-Key": "1"})
        assert len(worker.requests) > 1

    scene(main, hold_timeout_s=0.4)


def test_an_application_may_say_502_and_421_itself() -> None:
    """Without the contract's headers they are answers like any other."""

    async def main(here: ClientStage) -> None:
        worker = await led(here, lambda request: request.answer(int(request.target[1:]), b"mine"))
        for status in (421, 502, 503):
            async with here.direct.request("GET", f"/{status}", key="a") as answer:
                assert (answer.status, await answer.read()) == (status, b"mine")
        assert len(worker.requests) == 3

    scene(main)


# --- connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("size", [None, 0, 1, 100_000])
@pytest.mark.parametrize("is_uvloop", [True, False])
def test_a_connection_that_is_dead_is_not_used(method: str, size: int | None, is_uvloop: bool) -> None:
    """The worker's end of an idle connection closes before our loop has heard of it: what must not be sent twice takes
    another one."""

    async def main(here: ClientStage) -> None:
        worker = await led(here)
        data = None if size is None else bytes(size)
        for number in range(5):
            assert (await here.direct.request(method, "/", key="a", data=data)).status == 200
            assert worker.connections == number + 1
            drop(next(iter(worker.open)))

    scene(main, is_uvloop=is_uvloop)


@pytest.mark.parametrize("is_uvloop", [True, False])
def test_a_connection_that_dies_before_a_large_bodys_head_is_written_is_not_used(is_uvloop: bool) -> None:
    """aiohttp writes that head in a task, a turn after the connection was looked at: it is looked at there again."""

    async def main(here: ClientStage) -> None:
        worker = await led(here)
        for _ in range(5):
            assert (await here.direct.request("POST", "/", key="a", data=bytes(100_000))).status == 200
            asyncio.get_running_loop().call_soon(drop, next(iter(worker.open)))
        assert len(worker.requests) == 5

    scene(main, is_uvloop=is_uvloop)


class SlowConnector(aiohttp.TCPConnector):
    """Opens a connection when it is let."""

    def __init__(self, go: asyncio.Event, *, hides_cancelling: bool = False) -> None:
        super().__init__()
        self.go = go
        self.is_asked = asyncio.Event()
        self.hides_cancelling = hides_cancelling

    async def connect(self, *arguments: Any, **options: Any) -> Any:
        self.is_asked.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            if self.hides_cancelling:
                raise OSError("as some resolver might") from None
            raise
        return await super().connect(*arguments, **options)


@pytest.mark.parametrize("hides_cancelling", [False, True])
@pytest.mark.parametrize("how", ["moved", "gone"])
def test_a_leader_that_changes_while_a_connection_is_opened(how: str, hides_cancelling: bool) -> None:
    """Moved: once the connection is open it is not used, for the epoch is below the largest seen. Gone: the opening is
    not waited for. Either way a POST goes to the next leader, once, and its task is not left cancelled."""

    async def main(here: ClientStage) -> None:
        old = await led(here)
        new = await here.start("w2")
        go = asyncio.Event()
        assert here.direct._pools is not None
        pool = here.direct._pools.to("w1", old.address)
        await pool._connector.close()
        pool._connector = slow = SlowConnector(go, hides_cancelling=hides_cancelling)

        async def post() -> int:
            answer = await here.ask("POST", "/k/a", b"x")
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()
            await asyncio.sleep(0)  # would raise if it were
            return answer.status

        asking = asyncio.create_task(post())
        await slow.is_asked.wait()
        if how == "moved":
            await here.lead(new)
            go.set()
        else:
            await here.gone(old)
            await here.lead(new)
        assert await asking == 200
        assert (len(old.requests), len(new.requests)) == (0, 1)
        go.set()

    scene(main)


def test_a_get_whose_connection_is_dead_is_sent_again() -> None:
    """It is not looked at before; after the failure it is."""

    async def main(here: ClientStage) -> None:
        worker = await led(here)
        for _ in range(3):
            assert (await here.direct.request("GET", "/", key="a")).status == 200
            drop(next(iter(worker.open)))
        assert worker.connections == 3

    scene(main)


def test_connections_are_bounded_and_waiters_come_in_turn() -> None:
    """Two at once to one worker; the others wait their turn, and one that is cancelled loses its place to nobody."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            await asyncio.sleep(0.01)
            await echo(request)

        worker = await led(here, script)
        tasks = [asyncio.create_task(here.ask("POST", f"/k/{number}", b"x")) for number in range(20)]
        await worker.received(2)
        for task in tasks[5:8]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, BaseException) for each in done] == [number in (5, 6, 7) for number in range(20)]
        assert [request.target for request in worker.requests] == [
            f"/k/{number}" for number in range(20) if number not in (5, 6, 7)
        ]
        assert worker.connections == 2
        pool = here.direct._pools.values()[0]  # type: ignore[union-attr]
        assert pool.is_empty

    scene(main, upstream_connections_max=2)


def test_who_waits_for_a_connection_follows_the_leader() -> None:
    """All connections to the old leader are in use when the shard moves: those that wait go to the new leader at once;
    those whose shard stays wait on, but not for ever."""

    async def main(here: ClientStage) -> None:
        old = await led(here, lambda request: request.reader.readexactly(1))  # type: ignore[arg-type,return-value]
        new = await here.start("w2")
        shard = here.shard_of("a")
        other = next(key for key in "bcdefghij" if here.shard_of(key) != shard)
        stuck = asyncio.create_task(here.ask("POST", "/k/a", b"x"))
        await old.received(1)
        moving = asyncio.create_task(here.ask("POST", "/k/a", b"x"))
        staying = asyncio.create_task(here.ask("POST", f"/k/{other}", b"x"))
        await here.true(lambda: len(here.direct._pools.to("w1", old.address).waiting) == 2)  # type: ignore[union-attr]
        await here.lead(new, shard)
        assert (await moving).status == 200
        answer = await staying
        assert (answer.status, answer.problem) == (503, "overloaded")
        assert len(old.requests) == 1
        stuck.cancel()

    scene(main, upstream_connections_max=1, hold_timeout_s=1.0)


def test_a_worker_that_leaves_is_left() -> None:
    """It drains and leads nothing any more: unused connections to it are closed, so that it need not wait."""

    async def main(here: ClientStage) -> None:
        worker = await led(here)
        other = await here.start("w2")
        assert (await here.ask()).status == 200
        await here.start_again(worker, state="draining")
        assert worker.open
        await here.lead(other)
        await here.true(lambda: not worker.open)

    scene(main)


# --- bounds and ends -----------------------------------------------------------------------------------------------


def test_bounds_on_holding() -> None:
    """More than a shard's share, or than all may be, are Unserved at once, and may be asked again."""

    async def main(here: ClientStage) -> None:
        tasks = [asyncio.create_task(here.ask("GET", "/k/a")) for _ in range(2)]
        await here.held(2)
        with pytest.raises(Unserved) as caught:
            await here.direct.request("GET", "/", key="a")
        assert (caught.value.kind, caught.value.shard, caught.value.is_retryable) == (
            "overloaded", here.shard_of("a"), True,
        )  # fmt: skip
        await led(here)
        assert [(await task).status for task in tasks] == [200, 200]

    scene(main, held_per_shard_max=2)


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_request_that_is_cancelled_while_it_waits_is_not_sent(is_refused: bool) -> None:
    """Nothing is done for nobody, and its place is free."""

    async def main(here: ClientStage) -> None:
        if is_refused:
            await led(here, lambda request: request.refuse("draining"))
        worker = await here.start("w2")
        asking = asyncio.create_task(here.ask("GET", "/k/a"))
        await here.held(1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert here.direct.counts.held == 0
        await here.lead(worker)
        assert (await here.ask("GET", "/k/a")).status == 200
        assert len(worker.requests) == 1

    scene(main)


def test_a_time_out_while_a_request_is_held() -> None:
    """Its own time-out is shorter than the hold: it ends then, and surely was not processed."""

    async def main(here: ClientStage) -> None:
        with pytest.raises(Unserved, match="no leader"):
            await here.direct.request("POST", "/", key="a", timeout_s=0.2)
        assert here.direct.counts.held == 0
        await here.true(lambda: not here.direct._traffic.gates or not here.view.map.led)

    scene(main, hold_timeout_s=30.0)


def test_a_callers_own_time_out_is_its_own() -> None:
    """asyncio.timeout around a request works as around anything else, wherever the request stands."""

    async def main(here: ClientStage) -> None:
        worker = await here.start("w1", lambda request: request.reader.readexactly(1))  # type: ignore[arg-type,return-value]
        for is_led in (False, True):
            if is_led:
                await here.lead(worker)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await here.direct.request("GET", "/", key="a")
            assert not here.direct._calls
        assert len(worker.requests) == 1

    scene(main)


def test_closing_the_client_ends_everything() -> None:
    """Held: Unserved. Sent: outcome unknown. Being read: broken. Afterwards: Unserved."""

    async def main(here: ClientStage) -> None:
        async def script(request: Request) -> None:
            if request.target == "/stream":
                await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nbegun")
            await request.reader.readexactly(1)

        shard = here.shard_of("a")
        worker = await here.start("w1", script)
        await here.lead(worker, shard)
        other = next(key for key in "bcdefghij" if here.shard_of(key) != shard)
        stream = await here.direct.request("GET", "/stream", key="a")
        tasks = [
            asyncio.ensure_future(asking)
            for asking in (
                stream.read(),
                here.ask("POST", "/k/a", b"x"),
                here.ask("GET", "/k/a"),
                here.ask("GET", f"/k/{other}"),
                here.direct.leader(other),
            )
        ]
        await here.held(1)
        await worker.received(3)
        await here.direct.close()
        results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        reading, post, get, held, asked = results
        assert isinstance(reading, AnswerBroken)
        assert [each.problem for each in (post, get, held)] == ["outcome-unknown", "outcome-unknown", "not-ready"]
        assert isinstance(asked, Unserved)
        for key in ("a", other):
            with pytest.raises(Unserved, match="not open"):
                await here.direct.request("GET", "/", key=key)

    scene(main)


def test_a_client_is_entered_once() -> None:
    """Neither while it is open nor after its end; what is under way goes on."""

    async def main(here: ClientStage) -> None:
        await led(here)
        with pytest.raises(RuntimeError, match="make a new Client"):
            await here.direct.__aenter__()
        assert (await here.ask("GET", "/k/a")).status == 200
        await here.direct.close()
        with pytest.raises(RuntimeError, match="make a new Client"):
            await here.direct.__aenter__()
        with pytest.raises(Unserved, match="not open"):
            await here.direct.leader("a")

    scene(main)


# --- for other protocols -------------------------------------------------------------------------------------------


def test_who_leads_a_key() -> None:
    """Told at once if known; waited for, also above an epoch that was refused; Unserved beyond the hold."""

    async def main(here: ClientStage) -> None:
        with pytest.raises(Unserved) as caught:
            await here.direct.leader("a", timeout_s=0.05)
        assert caught.value.shard == here.shard_of("a")
        waiting = asyncio.create_task(here.direct.leader(b"a"))
        worker = await here.start("w1")
        epoch = await here.lead(worker)
        assert await waiting == Led("w1", worker.address, here.shard_of("a"), epoch)
        assert await here.direct.leader("a") == await waiting
        again = asyncio.create_task(here.direct.leader("a", above=epoch))
        await asyncio.sleep(0)
        assert (await here.lead(worker)) == (await again).epoch
        await here.write(Delete(here.keyspace.meta))
        with pytest.raises(Unserved):
            await here.direct.leader("a", timeout_s=0.05)

    scene(main)


def test_a_store_that_is_not_there() -> None:
    """Entering says so within a bound; nothing is left behind."""

    async def main() -> None:
        client = Client("http://127.0.0.1:9", cluster="test")
        with pytest.raises(StoreUnavailable):
            async with client:
                pass
        with pytest.raises(Unserved):
            await client.request("GET", "/", key="a")

    run(main)


def test_a_client_by_url() -> None:
    """The store's URL is enough."""

    async def main(here: ClientStage) -> None:
        await led(here)
        urls = here.store._endpoints
        async with Client(list(urls), cluster="test") as client:
            assert (await client.request("GET", "/", key="a")).status == 200
            assert repr(client) == "<Client of 'test': 0 under way, 0 held>"

    scene(main)


def test_no_error_of_aiohttp_reaches_the_caller() -> None:
    """An answer that is no HTTP is a broken connection like any other."""

    async def main(here: ClientStage) -> None:
        worker = await led(here, lambda request: request.send(b"SSH-2.0-nonsense\r\n\r\n"))
        with pytest.raises(OutcomeUnknown) as caught:
            await here.direct.request("POST", "/", key="a", data=b"x")
        assert not isinstance(caught.value, aiohttp.ClientError)
        assert len(worker.requests) == 1

    scene(main)
