"""The gate: whatever an application sends by, nothing leaves once its leadership is not valid."""

import asyncio
import gzip
import io
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from shardlead.clock import SystemClock
from shardlead.core.ownership import Idle, Serving
from shardlead.errors import Fenced, LeadershipLost, NotLeading
from shardlead.worker.gate import AnswerCut, _GuardedTransport
from shardlead.worker.leadership import Leadership
from tests.worker.stage import EPOCH, KEY, LOOPS, SHARD, Stage, peer, play, staged, until, words

pytestmark = pytest.mark.parametrize("loop", LOOPS)

PIECE = b"p" * 1_000
THIS_FILE = Path(__file__).read_text()


# --- before the answer has begun -----------------------------------------------------------------------------------


def test_a_read_whose_guard_fails_is_refused_as_if_it_had_not_run(loop: str) -> None:
    """GET: the answer of an ended leadership is kept back, and the router may send again."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def late(lead: Leadership, request: web.Request) -> web.Response:
                stage.switch.is_on = False
                return web.Response(text="a stale read")

            answer = await router.ask("GET", "/x")
            assert (answer.status, answer.headers["shardlead-refused"]) == (503, "suspended")
            assert b"stale read" not in answer.body
            stage.switch.is_on = True
            assert stage.handled == ["GET /x"]
            assert (await router.ask("GET", "/x")).status == 503

    play(loop, main())


def test_a_write_whose_guard_fails_has_an_unknown_outcome(loop: str) -> None:
    """POST: 502 outcome-unknown, marked by a header that no application can send; never a refusal."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def late(lead: Leadership, request: web.Request) -> web.Response:
                stage.switch.is_on = False
                return web.Response(text="done")

            answer = await router.ask("POST", "/x", body=b"1")
            assert answer.status == 502
            assert b"/outcome-unknown" in answer.body
            assert answer.headers["shardlead-outcome"] == "unknown"
            assert "shardlead-refused" not in answer.headers
            assert stage.count("outcome-unknown") == 1
            assert (await router.ask("GET", "/x", words(epoch=EPOCH - 1))).status == 421

    play(loop, main())


@pytest.mark.parametrize("swallows", [False, True])
def test_a_lost_leadership_cancels_its_handlers(loop: str, swallows: bool) -> None:
    """Reads are refused, writes unknown, at once, whether the handler lets the cancellation through or not."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as reading, peer(stage) as writing:

            @stage.on("/x")
            async def slow(lead: Leadership, request: web.Request) -> web.Response:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if not swallows:
                        raise
                return web.Response(text="in spite of all")

            reading.send("GET", "/x")
            writing.send("POST", "/x", body=b"1")
            await until(lambda: len(stage.handled) == 2)
            stage.lose()
            refused, unknown = await reading.answer(), await writing.answer()
            assert refused.status == 421
            assert refused.headers["shardlead-refused"] in {"draining", "stale"}
            assert (unknown.status, unknown.headers["shardlead-outcome"]) == (502, "unknown")
            await stage.until(SHARD, Idle)
            assert stage.closed == [EPOCH]
            assert (await writing.ask("GET", "/x", words(epoch=EPOCH))).status == 421

    play(loop, main())


@pytest.mark.parametrize("by", ["check", "fence"])
def test_a_leadership_error_of_the_application_is_no_application_error(
    loop: str, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    """lead.check() and a fence raise it: the rule of the failed guard applies. A fence's word makes a new epoch."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def checks(lead: Leadership, request: web.Request) -> web.Response:
                if by == "check":
                    stage.switch.is_on = False
                    lead.check()
                if lead.epoch == EPOCH:
                    raise Fenced(SHARD, EPOCH, EPOCH + 1)
                return web.Response()

            answer = await router.ask("POST", "/x", body=b"1")
            assert (answer.status, answer.headers["shardlead-outcome"]) == (502, "unknown")
            if by == "fence":
                await until(lambda: stage.host.state(SHARD) == Serving(EPOCH + 1))
                assert (await router.ask("GET", "/x", words(epoch=EPOCH + 1))).status == 200
            else:
                assert (await router.ask("GET", "/x")).headers["shardlead-refused"] == "suspended"
            assert stage.count("application-error") == 0

    play(loop, main())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "error",
    [
        LeadershipLost(SHARD, EPOCH, "it asked for more time than there is"),
        NotLeading(SHARD + 1, 0, reason="stale"),
        Fenced(SHARD + 1, EPOCH, EPOCH + 1),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_error_that_says_nothing_of_a_good_leadership_is_the_applications_own(
    loop: str, method: str, error: Exception
) -> None:
    """A refusal would speak for the whole shard, and routers would hold all its requests."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def fails(_lead: Leadership, _request: web.Request) -> web.Response:
                raise error

            answer = await router.ask(method, "/x", body=b"1" if method == "POST" else b"")
            assert answer.status == 500
            assert not {"shardlead-refused", "shardlead-outcome"} & set(answer.headers)
            assert stage.host.state(SHARD) == Serving(EPOCH)

    play(loop, main())


def test_an_application_that_fails_because_it_lost_its_leadership_has_an_unknown_outcome(loop: str) -> None:
    """A 500 would say that it failed; in truth nobody knows."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def broken(lead: Leadership, request: web.Request) -> web.Response:
                stage.switch.is_on = False
                raise OSError("the pool was closed")

            assert (await router.ask("POST", "/x")).headers["shardlead-outcome"] == "unknown"

    play(loop, main())


def test_a_stalled_loop_answers_nothing_of_the_time_before(loop: str) -> None:
    """The loop stands still past the deadline with requests queued: no timer has run yet, and none is needed."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def stalls(lead: Leadership, request: web.Request) -> web.Response:
                stage.switch.deadline_ns = SystemClock().now_ns() + 1_000_000
                while lead.is_valid(0.0):
                    pass
                return web.Response(text="late")

            for _ in range(3):
                router.send("POST", "/x", body=b"1")
            answers = [await router.answer() for _ in range(3)]
            assert [answer.status for answer in answers] == [502, 503, 503]
            assert stage.handled == ["POST /x"]

    play(loop, main())


# --- every way to send ---------------------------------------------------------------------------------------------

Sender = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def plain(request: web.Request) -> web.StreamResponse:
    return web.Response(body=PIECE)


async def empty(request: web.Request) -> web.StreamResponse:
    return web.Response(status=204)


async def compressed(request: web.Request) -> web.StreamResponse:
    response = web.Response(body=PIECE * 5_000)  # large: compressed in a thread, with an await in between
    response.enable_compression(web.ContentCoding.gzip)
    return response


async def payload(request: web.Request) -> web.StreamResponse:
    return web.Response(body=io.BytesIO(PIECE * 500))


async def generated(request: web.Request) -> web.StreamResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield PIECE

    return web.Response(body=pieces())


async def multipart(request: web.Request) -> web.StreamResponse:
    with aiohttp.MultipartWriter() as writer:
        writer.append(PIECE)
    return web.Response(body=writer)


async def raised(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")


async def streamed(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(PIECE)
    return response


async def streamed_with_length(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(PIECE))})
    await response.prepare(request)
    await response.write(PIECE)
    await response.write_eof()
    return response


async def by_hand(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    raise AssertionError("it passed")


async def by_hand_in_lines(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.writelines([b"HTTP/1.1 200 OK\r\n", b"Content-Length: 0\r\n\r\n"])
    raise AssertionError("it passed")


async def by_the_protocol(request: web.Request) -> web.StreamResponse:
    assert request.protocol.transport is not None
    request.protocol.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    raise AssertionError("it passed")


async def by_the_writer(request: web.Request) -> web.StreamResponse:
    await request.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    raise AssertionError("it passed")


async def by_a_clone(request: web.Request) -> web.StreamResponse:
    clone = request.clone(method="GET")
    response = web.Response(body=PIECE)
    await response.prepare(clone)
    await response.write_eof()
    return response


async def file(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(Path(__file__))


SENDERS: list[Sender] = [
    plain,
    empty,
    compressed,
    payload,
    generated,
    multipart,
    raised,
    streamed,
    streamed_with_length,
    by_hand,
    by_hand_in_lines,
    by_the_protocol,
    by_the_writer,
    by_a_clone,
    file,
]


@pytest.mark.parametrize("sender", SENDERS)
def test_no_way_of_answering_passes_a_failed_guard(loop: str, sender: Sender) -> None:
    """With the guard down before the first byte, the only bytes that leave are the runtime's 502."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def late(lead: Leadership, request: web.Request) -> web.StreamResponse:
                stage.switch.is_on = False
                return await sender(request)

            answer = await router.ask("POST", "/x", words() | {"Accept-Encoding": "gzip"}, b"1")
            assert (answer.status, answer.headers["shardlead-outcome"]) == (502, "unknown")
            assert "content-encoding" not in answer.headers

    play(loop, main())


@pytest.mark.parametrize("sender", [sender for sender in SENDERS if not sender.__name__.startswith("by_")])
def test_every_way_of_answering_works_with_a_valid_guard(loop: str, sender: Sender) -> None:
    """The gate changes nothing of an answer that may leave, and the connection can be used again."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def send(lead: Leadership, request: web.Request) -> web.StreamResponse:
                return await sender(request)

            for method in ("POST", "GET", "HEAD"):
                router.send(method, "/x", words() | {"Accept-Encoding": "gzip"})
                answer = await (router.head() if method == "HEAD" else router.answer())
                assert answer.status in {200, 204, 302}
                if sender is file and method != "HEAD":
                    assert answer.body == THIS_FILE.encode()
                if sender is compressed and method != "HEAD":
                    assert gzip.decompress(answer.body) == PIECE * 5_000
            assert stage.count("answered") == 3

    play(loop, main())


def test_the_guard_is_asked_when_the_bytes_leave_not_when_the_answer_is_made(loop: str) -> None:
    """A guard that fails while a large body is compressed in a thread holds back the whole answer."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def late(lead: Leadership, request: web.Request) -> web.StreamResponse:
                class Ends(Executor):
                    """Compresses in a thread; meanwhile the leadership ends."""

                    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
                        stage.switch.is_on = False
                        return pool.submit(function, *args, **kwargs)

                response = web.Response(body=PIECE * 5_000, zlib_executor=Ends(), zlib_executor_size=1)
                response.enable_compression(web.ContentCoding.gzip)
                assert lead.is_valid()
                return response

            with ThreadPoolExecutor(1) as pool:
                answer = await router.ask("POST", "/x", words() | {"Accept-Encoding": "gzip"}, b"1")
            assert stage.switch.is_on is False
            assert (answer.status, answer.headers["shardlead-outcome"]) == (502, "unknown")

    play(loop, main())


def test_the_guarded_transport_answers_for_every_method_of_a_transport(loop: str) -> None:
    """What asyncio's transports can do is either passed on here or refused; nothing is inherited that could send."""
    refused = {"set_protocol", "get_protocol"}  # NotImplementedError, as in asyncio's base class
    public = {name for name in dir(asyncio.Transport) if not name.startswith("_")}
    assert public - refused <= set(vars(_GuardedTransport))


# --- after the answer has begun --------------------------------------------------------------------------------------


async def ends_in_a_reset(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends in an error rather than an end."""
    try:
        while await reader.read(65_536):
            pass
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize(("method", "how"), [("GET", "length"), ("POST", "chunked"), ("GET", "http/1.0")])
def test_a_stream_whose_guard_fails_is_reset(loop: str, method: str, how: str) -> None:
    """The next write raises in the handler and resets the connection; even a body that only its end delimits."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            go_on = asyncio.Event()
            raised: list[BaseException] = []

            @stage.on("/x")
            async def stream(lead: Leadership, request: web.Request) -> web.StreamResponse:
                response = web.StreamResponse(headers={"Content-Length": "3000"} if how == "length" else None)
                await response.prepare(request)
                await response.write(PIECE)
                await go_on.wait()
                for _ in range(2):
                    try:
                        await response.write(PIECE)
                    except ConnectionResetError as exc:
                        raised.append(exc)
                return response

            router.send(method, "/x", line="1.0" if how == "http/1.0" else "1.1")
            assert (await router.head()).status == 200
            assert await router.reader.read(1) != b""
            stage.switch.is_on = False
            go_on.set()
            assert await ends_in_a_reset(router.reader)
            await until(lambda: stage.count("outcome-unknown" if method == "POST" else "suspended") == 1)
            assert [isinstance(each, ConnectionResetError) for each in raised] == [True, True]
            assert isinstance(raised[0], AnswerCut)

    play(loop, main())


def test_a_lost_leadership_resets_its_streams_at_once(loop: str) -> None:
    """A handler that waits for its next piece is cancelled, and its stream ends in a reset."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def stream(lead: Leadership, request: web.Request) -> web.StreamResponse:
                response = web.StreamResponse()
                await response.prepare(request)
                await response.write(PIECE)
                await asyncio.Event().wait()
                return response

            router.send("GET", "/x")
            assert await router.reader.read(1) != b""
            stage.lose()
            assert await ends_in_a_reset(router.reader)

    play(loop, main())


def test_a_stream_whose_application_fails_is_reset(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """Half an answer never looks whole, and the failure is in the log."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def stream(lead: Leadership, request: web.Request) -> web.StreamResponse:
                response = web.StreamResponse()
                await response.prepare(request)
                await response.write(PIECE)
                raise LookupError("half way")

            router.send("GET", "/x")
            assert await ends_in_a_reset(router.reader)

    play(loop, main())
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]


def test_a_file_is_cut_between_two_pieces(loop: str, tmp_path: Path) -> None:
    """No sendfile: a file goes piece by piece through the gate, so that a failed guard stops it in the middle."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            large = tmp_path / "large"
            large.write_bytes(b"f" * 20_000_000)

            @stage.on("/x")
            async def send(lead: Leadership, request: web.Request) -> web.StreamResponse:
                stage.switch.off_after = stage.switch.asked + 20
                return web.FileResponse(large)

            router.send("GET", "/x")
            assert (await router.head()).headers["content-length"] == "20000000"
            assert await ends_in_a_reset(router.reader)

    play(loop, main())


def test_a_second_answer_to_one_request_is_a_reset(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """Two heads on one connection would be taken for the answer to the next request."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def twice(lead: Leadership, request: web.Request) -> web.StreamResponse:
                await streamed(request)
                return web.Response(text="and another")

            router.send("GET", "/x")
            assert await ends_in_a_reset(router.reader)

    play(loop, main())
    assert "RuntimeError: a second answer to one request" in caplog.text


def test_what_a_handler_left_running_writes_no_more(loop: str) -> None:
    """After the answer's end the gate is shut: a forgotten task cannot write into the next answer."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            may_write = asyncio.Event()
            left: list[asyncio.Task[None]] = []

            @stage.on("/x")
            async def forgetful(lead: Leadership, request: web.Request) -> web.Response:
                async def later() -> None:
                    await may_write.wait()
                    assert request.transport is not None
                    request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

                left.append(asyncio.create_task(later()))
                return web.Response(text="first")

            assert (await router.ask("GET", "/x")).body == b"first"
            may_write.set()
            with pytest.raises(AnswerCut):
                await left[0]
            assert (await router.ask("GET", "/x")).body == b"first"
            left[1].cancel()

    play(loop, main())


# --- tunnels -------------------------------------------------------------------------------------------------------


def ws_url(stage: Stage) -> str:
    return f"{stage.url}/ws"


async def echo_messages(lead: Leadership, request: web.Request) -> web.StreamResponse:
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    async for message in ws:
        await ws.send_str(message.data)
    return ws


def test_a_websocket_works_and_closes_at_once_on_drain(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """The tunnel is told "going away", its handler ends by itself, and the handoff does not wait for the time-out."""

    async def main() -> None:
        async with staged() as stage, aiohttp.ClientSession() as session:
            stage.on("/ws")(echo_messages)
            async with session.ws_connect(ws_url(stage), headers=words()) as ws:
                await ws.send_str("hello")
                assert await ws.receive_str() == "hello"
                stage.hand_over()
                message = await ws.receive()
                assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.GOING_AWAY)
            await stage.until(SHARD, Idle)
            assert stage.closed == [EPOCH]
            assert stage.speaker.passed
            assert stage.count("answered") == 1

    play(loop, main())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_websocket_whose_peer_reads_nothing_does_not_hold_up_a_drain(loop: str) -> None:
    """What it has not taken within a second it never gets: the connection is reset."""

    async def main() -> None:
        async with staged(drain_timeout_s=30.0) as stage, aiohttp.ClientSession() as session:
            is_full = asyncio.Event()

            @stage.on("/ws")
            async def flood(lead: Leadership, request: web.Request) -> web.StreamResponse:
                ws = web.WebSocketResponse()
                await ws.prepare(request)
                while True:
                    sending = asyncio.ensure_future(ws.send_bytes(bytes(1_000_000)))
                    try:
                        async with asyncio.timeout(0.3):
                            await asyncio.shield(sending)
                    except TimeoutError:
                        is_full.set()
                        await sending

            async with session.ws_connect(ws_url(stage), headers=words(), max_msg_size=0) as ws:
                await is_full.wait()
                began = time.monotonic()
                stage.hand_over()
                await stage.until(SHARD, Idle)
                assert time.monotonic() - began < 10.0
                assert stage.speaker.passed
                while (message := await ws.receive()).type is aiohttp.WSMsgType.BINARY:
                    pass
                assert message.type is not aiohttp.WSMsgType.TEXT
                assert ws.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE

    play(loop, main())


def test_a_websocket_that_would_open_in_a_drain_is_for_the_next_leader(loop: str) -> None:
    """Its handler took a while; the handoff waits for the handler, not for what it wanted to open."""

    async def main() -> None:
        async with staged() as stage, aiohttp.ClientSession() as session:
            has_begun, may_open = asyncio.Event(), asyncio.Event()

            @stage.on("/ws")
            async def slowly(lead: Leadership, request: web.Request) -> web.StreamResponse:
                has_begun.set()
                await may_open.wait()  # it asks who this is, say
                return await echo_messages(lead, request)

            opening = asyncio.create_task(session.ws_connect(ws_url(stage), headers=words()))
            await has_begun.wait()
            stage.hand_over()
            may_open.set()
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await opening
            assert refused.value.status == 421
            assert refused.value.headers is not None
            assert refused.value.headers["Shardlead-Refused"] == "draining"
            await stage.until(SHARD, Idle)
            assert stage.speaker.passed

    play(loop, main())


def test_a_websocket_of_a_lost_leadership_is_reset(loop: str) -> None:
    """No goodbye in the name of a leadership that is over."""

    async def main() -> None:
        async with staged() as stage, aiohttp.ClientSession() as session:
            stage.on("/ws")(echo_messages)
            async with session.ws_connect(ws_url(stage), headers=words()) as ws:
                await ws.send_str("hello")
                assert await ws.receive_str() == "hello"
                stage.lose()
                message = await ws.receive()
                assert message.type is not aiohttp.WSMsgType.TEXT
                assert ws.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE
            await stage.until(SHARD, Idle)

    play(loop, main())


def test_websocket_frames_are_guarded_one_by_one(loop: str) -> None:
    """A frame after the guard has failed does not leave; the tunnel is reset."""

    async def main() -> None:
        async with staged() as stage, aiohttp.ClientSession() as session:
            stage.on("/ws")(echo_messages)
            async with session.ws_connect(ws_url(stage), headers=words()) as ws:
                await ws.send_str("one")
                assert await ws.receive_str() == "one"
                stage.switch.is_on = False
                await ws.send_str("two")
                message = await ws.receive()
                assert message.type is not aiohttp.WSMsgType.TEXT
                assert ws.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE

    play(loop, main())


def test_a_refused_upgrade_is_an_ordinary_refusal(loop: str) -> None:
    """Stale or draining: 421 instead of 101, and the connection stays usable."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            upgrade: dict[str, Any] = {
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            }
            answer = await router.ask("GET", "/ws", words(KEY, epoch=EPOCH - 1) | upgrade)
            assert (answer.status, answer.headers["shardlead-refused"]) == (421, "stale")
            answer = await router.ask("GET", "/ws", words(KEY, epoch=EPOCH - 1))
            assert answer.status == 421

    play(loop, main())
