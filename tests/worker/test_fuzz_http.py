"""Whatever a router, or somebody who is none, sends to a worker: a call or a refusal, and the next one is served."""

import asyncio
import contextlib
import logging
from typing import Final
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from shardlead.core import contract
from shardlead.core.model import SHARDS_MAX
from shardlead.errors import RequestError
from shardlead.worker.leadership import Leadership
from shardlead.worker.wire import read_call
from tests.support.fuzz import TEXTS, bent_bytes, cut, examples
from tests.worker.stage import LOOPS, Handler, Stage, peer, play, staged, until, words

# --- the words ---------------------------------------------------------------------------------------------------

NUMBERS: Final = st.one_of(st.integers(-1, 2**64).map(str), TEXTS)
FIELDS: Final = st.lists(
    st.one_of(
        st.tuples(st.sampled_from((contract.SHARD, "shardlead-shard", contract.EPOCH)), NUMBERS),
        st.tuples(st.just(contract.KEY), st.one_of(TEXTS, st.binary(max_size=8).map(quote))),
        st.tuples(st.just("Expect"), st.sampled_from(("100-continue", "100-Continue ", "", "200-ok"))),
        st.tuples(st.just("X-Shard-Key"), TEXTS),
    ),
    max_size=5,
)


@examples(200)
@given(FIELDS, st.sampled_from((HttpVersion10, HttpVersion11)))
def test_any_words_are_a_call_or_a_refusal(fields: list[tuple[str, str]], version: tuple[int, int]) -> None:
    """RequestError with a status of 400 or 417; a call has a shard there can be, and an epoch and key in bounds."""
    headers = CIMultiDict([(contract.SHARD, "3"), (contract.EPOCH, "9"), *fields] if len(fields) % 2 else fields)
    request = make_mocked_request("POST", "/x", headers=headers, version=version)  # type: ignore[arg-type]
    status = 400
    try:
        call = read_call(request)
    except RequestError as exc:
        status = exc.status
    else:
        assert 0 <= call.shard < SHARDS_MAX
        assert 0 <= call.epoch < 10**16
        assert call.key is None or 0 < len(call.key) <= contract.KEY_BYTES_MAX
        assert str(call.shard) == headers[contract.SHARD].lstrip("0").rjust(1, "0")
    assert status in (400, 417)


@examples(200)
@given(st.integers(0, SHARDS_MAX - 1), st.integers(0, 2**53 - 1), st.binary(min_size=1, max_size=40))
def test_a_routers_words_are_understood(shard: int, epoch: int, key: bytes) -> None:
    """What is written is what is read."""
    spelled = {contract.SHARD: str(shard), contract.EPOCH: str(epoch), contract.KEY: quote(key, safe="")}
    call = read_call(make_mocked_request("GET", "/", headers=spelled))
    assert (call.shard, call.epoch, call.key, call.expects_continue) == (shard, epoch, key, False)


# --- the door ----------------------------------------------------------------------------------------------------

WORDS: Final = "".join(f"{name}: {value}\r\n" for name, value in words().items()).encode()
GOOD: Final = (
    b"GET /x HTTP/1.1\r\nHost: w\r\n" + WORDS + b"\r\n",
    b"POST /x?a=%20b HTTP/1.1\r\nHost: w\r\nContent-Length: 5\r\n" + WORDS + b"\r\nhello",
    b"PUT /x HTTP/1.1\r\nHost: w\r\nTransfer-Encoding: chunked\r\n" + WORDS + b"\r\n5\r\nhello\r\n0\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: w\r\nExpect: 100-continue\r\nContent-Length: 2\r\n" + WORDS + b"\r\nhi",
    b"HEAD /x HTTP/1.1\r\nHost: w\r\nCookie: a=b; c\r\n" + WORDS + b"\r\n",
)
PIECES: Final = (
    *(b"\r\n", b"\n", b"\0", b" ", b":", b"%", b"\xff", b"%zz", b"#", b"//", b"http://[", b"*", b"CONNECT ", b"@:"),
    *(b"\r\nContent-Length: 3", b"\r\nContent-Length: " + b"0" * 5_000 + b"1", b"\r\nTransfer-Encoding: chunked"),
    *(b"\r\nContent-Encoding: gzip", b"\r\nExpect: x", b"\r\nUpgrade: websocket\r\nConnection: upgrade", b"HTTP/1.0"),
    *(b"\r\nShardlead-Shard: 1", b"\r\nShardlead-Epoch: " + b"9" * 5_000, b"\r\nShardlead-Key: %FF", b"ffffffffffff"),
    *(b"\r\nContent-Type: multipart/form-data", b"\r\nContent-Type: \xff", b"\r\nHost: \xff", b"HTTP/9.9"),
)


def _drawn(strategy: st.SearchStrategy[list[bytes]], count: int) -> list[list[bytes]]:
    found: list[list[bytes]] = []

    @examples(count)
    @given(strategy)
    def draw(pieces: list[bytes]) -> None:
        found.append(pieces)

    draw()
    return found


def _few(pieces: list[bytes]) -> list[bytes]:
    """At most 16 pieces. aiohttp's C parser does not tell a body that its chunks went wrong, and takes each packet
    behind that for a bad request of its own: after 32 it reads no more, and so does not see the peer leave."""
    return [*pieces[:15], b"".join(pieces[15:])]


class _Everywhere(dict[str, Handler]):
    """An application that does the same for every path."""

    def __missing__(self, path: str) -> Handler:
        return _echo


async def _echo(lead: Leadership, request: web.Request) -> web.Response:
    try:
        body = await request.read()
    except (web.RequestPayloadError, aiohttp.ClientError, HttpProcessingError) as exc:
        raise web.HTTPBadRequest from exc
    return web.Response(body=request.method.encode() + b" " + body)


def _answering(stage: Stage) -> None:
    stage.script = _Everywhere()


@pytest.mark.parametrize("loop", LOOPS)
def test_bent_requests_leave_nothing_behind(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """No failure is logged, no exception reaches the loop, no connection stays, and others are served."""
    some = st.lists(st.sampled_from(GOOD), min_size=1, max_size=2).map(b"".join)
    streams = _drawn(some.flatmap(lambda raw: bent_bytes(raw, PIECES)).flatmap(lambda raw: cut(raw, 3)).map(_few), 80)
    mishaps: list[str] = []

    async def main(batch: list[list[bytes]]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: mishaps.append(f"{context}"))
        async with staged() as stage, peer(stage) as router:
            _answering(stage)
            async with contextlib.AsyncExitStack() as bent:
                for pieces in batch:
                    other = await bent.enter_async_context(peer(stage))
                    for piece in pieces:
                        with contextlib.suppress(RuntimeError):  # uvloop's way to say that the worker has closed it
                            other.writer.write(piece)
                        await asyncio.sleep(0)
                    assert (await router.ask("POST", "/x", body=b"1")).body == b"POST 1"
            await until(lambda: stage.front.open_connections == 1)
            assert (await router.ask("GET", "/x")).status == 200

    for at in range(0, len(streams), 40):
        play(loop, main(streams[at : at + 40]))
    assert not mishaps
    failures = [record for record in caplog.records if record.levelno >= logging.ERROR]
    failures = [record for record in failures if "another ring" not in record.message]
    assert not failures, failures[0].exc_text


@pytest.mark.parametrize("loop", LOOPS)
def test_good_requests_are_answered_however_they_are_cut(loop: str) -> None:
    """The same answers in the same order."""
    streams = _drawn(st.lists(st.sampled_from(GOOD), min_size=1, max_size=3).map(b"".join).flatmap(cut), 25)

    async def main() -> None:
        async with staged() as stage:
            _answering(stage)
            for pieces in streams:
                whole = b"".join(pieces)
                async with peer(stage) as one, peer(stage) as other:
                    one.writer.write(whole)
                    for piece in pieces:
                        other.writer.write(piece)
                        await asyncio.sleep(0)
                    for method in (raw for raw in whole.split(b" HTTP/1.1")[:-1]):
                        answers = [await self.head() for self in (one, other)]
                        while [answer.status for answer in answers] != [200, 200]:
                            assert 100 in [answer.status for answer in answers]
                            answers = [
                                await self.head() if answer.status == 100 else answer
                                for self, answer in zip((one, other), answers, strict=True)
                            ]
                        length = int(answers[0].headers["content-length"])
                        assert length == int(answers[1].headers["content-length"])
                        if b"HEAD" not in method.rpartition(b"\n")[2]:
                            assert await one.reader.readexactly(length) == await other.reader.readexactly(length)

    play(loop, main())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_length_of_five_thousand_zeros_is_a_bad_request(loop: str) -> None:
    """Python converts no number of so many digits; the peer is told, and nothing is taken for our failure."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            _answering(stage)
            answer = await router.ask("POST", "/x", {**words(), "Content-Length": "0" * 5_000})
            assert answer.status == 400
            assert stage.count("bad-request") == 1

    play(loop, main())
