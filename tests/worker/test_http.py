"""The contract between router and worker, row by row, over real sockets."""

import asyncio
import json
import logging
import socket
from collections.abc import Mapping

import pytest
from aiohttp import web

from shardlead.core.model import epoch_of
from shardlead.core.ownership import Draining, Idle, Serving, Won
from shardlead.errors import CommandError
from shardlead.worker.leadership import Leadership
from tests.worker.stage import EPOCH, KEY, LOOPS, SHARD, Answer, is_opening, peer, play, shard_of, staged, until, words

pytestmark = pytest.mark.parametrize("loop", LOOPS)


async def echo(lead: Leadership, request: web.Request) -> web.Response:
    """Answers with who answered, and how much came."""
    body = await request.read()
    return web.json_response({"epoch": lead.epoch, "shard": lead.shard, "bytes": len(body)})


def kind(answer: Answer) -> str:
    """The stable end of a problem's type."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem = json.loads(answer.body)
    assert problem["status"] == answer.status
    return str(problem["type"]).rpartition("/")[2]


# --- admitted ----------------------------------------------------------------------------------------------------


def test_the_leader_answers(loop: str) -> None:
    """A request for a shard led here under the router's epoch reaches the application, and its answer the router."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            stage.on("/x")(echo)
            for method, body in (("GET", b""), ("POST", b"a" * 100_000), ("DELETE", b"")):
                answer = await router.ask(method, "/x", body=body)
                assert answer.status == 200
                assert json.loads(answer.body) == {"epoch": EPOCH, "shard": SHARD, "bytes": len(body)}
            assert stage.count("answered") == 3

    play(loop, main())


def test_reserved_headers_are_stripped_from_answers(loop: str) -> None:
    """What an application says in Shardlead-* headers never leaves, so a refusal can be believed."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            false = {"Shardlead-Refused": "stale", "SHARDLEAD-Outcome": "unknown", "X-Kept": "1"}

            @stage.on("/returned")
            async def returned(lead: Leadership, request: web.Request) -> web.Response:
                return web.Response(status=421, headers=false)

            @stage.on("/raised")
            async def raised(lead: Leadership, request: web.Request) -> web.Response:
                raise web.HTTPConflict(headers=false)

            @stage.on("/streamed")
            async def streamed(lead: Leadership, request: web.Request) -> web.StreamResponse:
                response = web.StreamResponse(headers=false)
                await response.prepare(request)
                return response

            for path, status in (("/returned", 421), ("/raised", 409), ("/streamed", 200)):
                answer = await router.ask("GET", path)
                assert answer.status == status
                assert answer.headers["x-kept"] == "1"
                assert not [name for name in answer.headers if name.startswith("shardlead-")]

    play(loop, main())


def test_pipelined_requests_are_answered_in_order(loop: str) -> None:
    """Requests sent ahead on one connection are handled one after another; refusals keep their place."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            stage.on("/x")(echo)
            router.send("POST", "/x", body=b"one")
            router.send("POST", "/x", words(epoch=EPOCH - 1), body=b"refused")
            router.send("POST", "/x", body=b"three")
            answers = [await router.answer() for _ in range(3)]
            assert [answer.status for answer in answers] == [200, 421, 200]
            assert json.loads(answers[2].body)["bytes"] == 5
            assert stage.handled == ["POST /x", "POST /x"]

    play(loop, main())


def test_heads_as_large_as_a_router_may_pass_are_taken(loop: str) -> None:
    """A path of 32 KiB, a header of 64 KiB and 500 headers are within a worker's limits."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            seen: list[tuple[int, int, int]] = []

            @stage.on("/" + "p" * 32_768)
            async def long(lead: Leadership, request: web.Request) -> web.Response:
                seen.append((len(request.path), len(request.headers["X-Long"]), len(request.headers)))
                return web.Response()

            headers = words() | {"X-Long": "v" * 65_536} | {f"X-{n}": "1" for n in range(500)}
            assert (await router.ask("GET", "/" + "p" * 32_768, headers)).status == 200
            assert seen == [(32_769, 65_536, 505)]

    play(loop, main())


@pytest.mark.parametrize("key", ["a/b c+d%", "grüße/日本", "k" * 2_048])
def test_keys_are_percent_decoded_once(loop: str, key: str) -> None:
    """The shard is recomputed from the decoded key: any bytes, up to 2,048 of them."""

    async def main() -> None:
        async with staged(is_led=False) as stage, peer(stage) as router:
            stage.on("/x")(echo)
            shard = shard_of(key.encode())
            await stage.lead(shard)
            answer = await router.ask("GET", "/x", words(key))
            assert answer.status == 200
            assert json.loads(answer.body)["shard"] == shard

    play(loop, main())


# --- refused before the handler ------------------------------------------------------------------------------------


def test_a_smaller_epoch_is_stale(loop: str) -> None:
    """421 with the worker's own epoch; nothing was handled; the connection stays."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            stage.on("/x")(echo)
            answer = await router.ask("POST", "/x", words(epoch=EPOCH - 1), b"body")
            assert (answer.status, kind(answer)) == (421, "misdirected")
            assert answer.headers["shardlead-refused"] == "stale"
            assert answer.headers["shardlead-epoch"] == str(EPOCH)
            assert stage.handled == []
            assert (await router.ask("POST", "/x")).status == 200
            assert stage.count("stale") == 1

    play(loop, main())


def test_a_draining_shard_refuses_and_lets_running_requests_end(loop: str) -> None:
    """New requests get 421 draining, the running one its answer; then 421 names the new leader."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as early, peer(stage) as late:
            entered, may_end = asyncio.Event(), asyncio.Event()

            @stage.on("/slow")
            async def slow(lead: Leadership, request: web.Request) -> web.Response:
                entered.set()
                await may_end.wait()
                return web.Response(text=str(lead.draining.is_set()))

            early.send("POST", "/slow")
            await entered.wait()
            stage.hand_over()
            refused = await late.ask("POST", "/slow")
            assert (refused.status, refused.headers["shardlead-refused"]) == (421, "draining")
            assert stage.closed == []
            may_end.set()
            answer = await early.answer()
            assert (answer.status, answer.body) == (200, b"True")
            await stage.until(SHARD, Idle)
            assert stage.closed == [EPOCH]
            refused = await late.ask("POST", "/slow")
            assert (refused.status, refused.headers["shardlead-refused"]) == (421, "stale")
            assert refused.headers["shardlead-leader"] == f"w2 10.0.0.2:9000 {EPOCH + 1}"

    play(loop, main())


def test_a_caller_that_takes_this_worker_for_a_leader_it_is_not_waits_while_it_is_looked_up(loop: str) -> None:
    """Nothing is known of the shard: the leader is looked up; until then the request is parked, then turned away."""

    async def main() -> None:
        async with staged(is_led=False) as stage, peer(stage) as router:
            router.send("POST", "/x", body=b"1")
            await until(lambda: stage.speaker.looked_up)
            stage.host.note_elsewhere(SHARD, EPOCH + 1, f"w2 10.0.0.2:9000 {EPOCH + 1}")
            answer = await router.answer()
            assert (answer.status, answer.headers["shardlead-refused"]) == (421, "unknown")
            assert answer.headers["shardlead-leader"] == f"w2 10.0.0.2:9000 {EPOCH + 1}"
            assert stage.handled == []

    play(loop, main())


def test_an_unknown_shard_of_a_stopping_worker_is_unknown(loop: str) -> None:
    """421 unknown: nothing is known of it, and nothing will be."""

    async def main() -> None:
        async with staged(is_led=False) as stage, peer(stage) as router:
            stage.host.is_stopping = True
            answer = await router.ask("GET", "/x")
            assert (answer.status, answer.headers["shardlead-refused"]) == (421, "unknown")

    play(loop, main())


def test_a_suspended_session_asks_for_patience(loop: str) -> None:
    """503 suspended with Retry-After, before the handler; afterwards the same epoch serves again."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            stage.on("/x")(echo)
            stage.switch.is_on = False
            answer = await router.ask("POST", "/x", body=b"1")
            assert (answer.status, kind(answer)) == (503, "suspended")
            assert answer.headers["shardlead-refused"] == "suspended"
            assert answer.headers["retry-after"] == "1"
            assert stage.handled == []
            stage.switch.is_on = True
            assert (await router.ask("POST", "/x", body=b"1")).status == 200

    play(loop, main())


# --- parked --------------------------------------------------------------------------------------------------------


def test_a_request_waits_for_its_shard_to_open(loop: str) -> None:
    """While open() runs requests are parked, and all are answered once it has ended."""

    async def main() -> None:
        async with staged(is_led=False) as stage, peer(stage) as one, peer(stage) as two:
            stage.on("/x")(echo)
            stage.host.feed(SHARD, Won(EPOCH))
            assert is_opening(stage)
            one.send("POST", "/x", body=b"1")
            two.send("GET", "/x")
            await until(lambda: "parked=2" in repr(stage.front))
            assert stage.handled == []
            stage.may_open.set()
            assert [(await each.answer()).status for each in (one, two)] == [200, 200]

    play(loop, main())


def test_news_of_a_larger_epoch_parks_and_never_fences(loop: str) -> None:
    """A caller that knows a larger epoch waits; the present leadership goes on meanwhile, and is looked after."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as ahead, peer(stage) as other:
            stage.on("/x")(echo)
            ahead.send("POST", "/x", words(epoch=EPOCH + 5))
            await until(lambda: stage.speaker.doubts)
            assert stage.speaker.doubts[0] == (SHARD, EPOCH)
            assert (await other.ask("GET", "/x")).status == 200
            stage.lose()
            await stage.until(SHARD, Idle)
            await stage.lead(epoch=EPOCH + 5)
            assert json.loads((await ahead.answer()).body)["epoch"] == EPOCH + 5

    play(loop, main())


def test_a_parked_request_is_told_when_the_shard_went_elsewhere(loop: str) -> None:
    """A shard that does not open here but goes to another worker turns its parked requests away, unhandled."""

    async def main() -> None:
        async with staged(is_led=False) as stage, peer(stage) as router:
            stage.host.feed(SHARD, Won(EPOCH))
            router.send("POST", "/x")
            await until(lambda: "parked=1" in repr(stage.front))
            stage.lose()
            answer = await router.answer()
            assert answer.status == 421
            assert stage.handled == []

    play(loop, main())


def test_parked_requests_have_a_bound_in_number(loop: str) -> None:
    """Beyond parked_max the router is told to ask again under the same epoch; nothing is handled."""

    async def main() -> None:
        async with staged(is_led=False, parked_max=1) as stage, peer(stage) as one, peer(stage) as two:
            stage.on("/x")(echo)
            stage.host.feed(SHARD, Won(EPOCH))
            one.send("GET", "/x")
            await until(lambda: "parked=1" in repr(stage.front))
            answer = await two.ask("GET", "/x")
            assert (answer.status, answer.headers["shardlead-refused"]) == (503, "suspended")
            stage.may_open.set()
            assert (await one.answer()).status == 200
            assert (await two.ask("GET", "/x")).status == 200

    play(loop, main())


def test_parked_requests_have_a_bound_in_time(loop: str) -> None:
    """After park_timeout_s the router is told to ask again under the same epoch."""

    async def main() -> None:
        async with staged(is_led=False, park_timeout_s=0.02) as stage, peer(stage) as router:
            stage.host.feed(SHARD, Won(EPOCH))
            answer = await router.ask("POST", "/x")
            assert (answer.status, answer.headers["shardlead-refused"]) == (503, "suspended")
            assert stage.handled == []

    play(loop, main())


def test_a_parked_request_whose_caller_left_is_not_begun(loop: str) -> None:
    """Nobody waits for it any more, so it must not take effect."""

    async def main() -> None:
        async with staged(is_led=False) as stage:
            stage.on("/x")(echo)
            stage.host.feed(SHARD, Won(EPOCH))
            async with peer(stage) as router:
                router.send("POST", "/x")
                await until(lambda: "parked=1" in repr(stage.front))
            await until(lambda: stage.front.open_connections == 0)
            stage.may_open.set()
            await stage.until(SHARD, Serving)
            await until(lambda: stage.count("cancelled") == 1)
            assert stage.handled == []

    play(loop, main())


# --- requests that cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status", "problem"),
    [
        ({}, 400, "bad-request"),
        ({"Shardlead-Shard": str(SHARD)}, 400, "bad-request"),
        (words() | {"Shardlead-Shard": "-1"}, 400, "bad-request"),
        (words() | {"Shardlead-Shard": "٣"}, 400, "bad-request"),
        (words() | {"Shardlead-Epoch": "1e3"}, 400, "bad-request"),
        (words() | {"Shardlead-Epoch": "9" * 400}, 400, "bad-request"),
        (words() | {"Shardlead-Key": ""}, 400, "bad-request"),
        (words() | {"Shardlead-Key": "%4"}, 400, "bad-request"),
        (words() | {"Shardlead-Key": "a b"}, 400, "bad-request"),
        (words() | {"shardlead-key": KEY}, 400, "bad-request"),
        (words("k" * 2_049), 400, "key-too-long"),
        (words() | {"Shardlead-Shard": str((SHARD + 1) % 8)}, 400, "bad-request"),
        (words() | {"Content-Length": "11"}, 413, "too-large"),  # as long as the body that is sent below
        (words() | {"Expect": "the-unexpected"}, 417, "bad-request"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    loop: str, headers: Mapping[str, str], status: int, problem: str
) -> None:
    """Missing, doubled, malformed or contradicting words get a problem, and never reach the application."""

    async def main() -> None:
        async with staged(body_bytes_max=10) as stage, peer(stage) as router:
            answer = await router.ask("POST", "/x", headers, b"eleven byte")
            assert (answer.status, kind(answer)) == (status, problem)
            assert "shardlead-refused" not in answer.headers
            assert stage.handled == []
            assert stage.count("bad-request") == 1

    play(loop, main())


def test_a_direct_call_is_told_about_the_router(loop: str) -> None:
    """Somebody who asks a worker by hand learns where to ask."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as curl:
            answer = await curl.ask("GET", "/counters/alice", {})
            assert "router" in json.loads(answer.body)["detail"]

    play(loop, main())


def test_another_ring_is_named_and_logged_once(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """A caller with another slot table would never succeed: it is told both shards, and the log has one line."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            for _ in range(3):
                answer = await router.ask("GET", "/x", words() | {"Shardlead-Shard": str((SHARD + 1) % 8)})
                assert f"shard {SHARD} here" in json.loads(answer.body)["detail"]

    play(loop, main())
    assert [record.message for record in caplog.records].count("a caller has another ring; told once") == 1


def test_garbage_is_answered_and_closed(loop: str) -> None:
    """Bytes that are no HTTP get a 400 and the connection's end; the next connection is served."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as noise, peer(stage) as router:
            stage.on("/x")(echo)
            noise.writer.write(b"\x16\x03\x01 what is this\r\n\r\n")
            assert (await noise.head()).status == 400
            assert await noise.reader.read() is not None
            assert (await router.ask("GET", "/x")).status == 200

    play(loop, main())


# --- 100-continue --------------------------------------------------------------------------------------------------


def test_a_body_is_asked_for_only_after_admission(loop: str) -> None:
    """A 10 MB body waits for the 100, which comes once the parked request is admitted; then it is read whole."""

    async def main() -> None:
        async with staged(is_led=False) as stage, peer(stage) as router:
            stage.on("/x")(echo)
            stage.host.feed(SHARD, Won(EPOCH))
            body = b"b" * 10_000_000
            router.send("POST", "/x", words() | {"Expect": "100-continue", "Content-Length": str(len(body))})
            await until(lambda: "parked=1" in repr(stage.front))
            stage.may_open.set()
            assert (await router.head()).status == 100
            router.writer.write(body)
            answer = await router.answer()
            assert answer.status == 200
            assert json.loads(answer.body)["bytes"] == len(body)
            assert (await router.ask("GET", "/x")).status == 200

    play(loop, main())


def test_a_large_upload_that_meets_a_drain_is_taken_to_its_end(loop: str) -> None:
    """Admitted is admitted: the handoff waits for the second half of 10 MB."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            stage.on("/x")(echo)
            half = b"b" * 5_000_000
            router.send("POST", "/x", words() | {"Expect": "100-continue", "Content-Length": "10000000"})
            assert (await router.head()).status == 100
            router.writer.write(half)
            await router.writer.drain()
            stage.hand_over()
            router.writer.write(half)
            assert json.loads((await router.answer()).body)["bytes"] == 10_000_000
            await stage.until(SHARD, Idle)

    play(loop, main())


def test_a_large_upload_whose_leadership_is_lost_is_told_at_once(loop: str) -> None:
    """The 502 does not wait for the rest of the body, and says that the connection ends."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            stage.on("/x")(echo)
            router.send("POST", "/x", words() | {"Expect": "100-continue", "Content-Length": "10000000"})
            assert (await router.head()).status == 100
            router.writer.write(b"b" * 1_000)
            await until(lambda: stage.handled)
            stage.lose()
            answer = await router.answer()
            assert (answer.status, answer.headers["connection"]) == (502, "close")
            router.writer.write(b"b" * 9_999_000)
            assert await router.reader.read() == b""

    play(loop, main())


def test_a_drain_that_takes_too_long_ends_in_an_unknown_outcome(loop: str) -> None:
    """After drain_timeout_s what still runs is cancelled; its caller is told the truth, the object closed once."""

    async def main() -> None:
        async with staged(drain_timeout_s=0.02) as stage, peer(stage) as router:

            @stage.on("/x")
            async def stuck(lead: Leadership, request: web.Request) -> web.Response:
                await asyncio.Event().wait()
                raise AssertionError

            router.send("POST", "/x", body=b"1")
            await until(lambda: stage.handled)
            stage.hand_over()
            assert (await router.answer()).headers["shardlead-outcome"] == "unknown"
            await stage.until(SHARD, Idle)
            assert stage.closed == [EPOCH]

    play(loop, main())


def test_a_refused_body_is_never_asked_for(loop: str) -> None:
    """The refusal comes without a 100, the body unread, and the connection ends at once."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            headers = words(epoch=EPOCH - 1) | {"Expect": "100-continue", "Content-Length": "10000000"}
            answer = await router.ask("POST", "/x", headers)
            assert (answer.status, answer.headers["connection"]) == (421, "close")
            assert await router.reader.read() == b""
            assert stage.handled == []

    play(loop, main())


# --- the application fails ---------------------------------------------------------------------------------------


def test_what_an_application_raises_is_logged_and_not_shown(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """500 application-error without a word of the exception; one log record with traceback and facts."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/x")
            async def broken(lead: Leadership, request: web.Request) -> web.Response:
                raise LookupError("the secret")

            answer = await router.ask("POST", "/x", body=b"1")
            assert (answer.status, kind(answer)) == (500, "application-error")
            assert b"secret" not in answer.body
            assert b"LookupError" not in answer.body
            assert (stage.count("application-error"), stage.count("answered")) == (1, 0)
            stage.on("/x")(echo)
            assert (await router.ask("GET", "/x")).status == 200

    play(loop, main())
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)
    assert vars(record)["shard"] == SHARD
    assert vars(record)["epoch"] == EPOCH


def test_a_body_that_is_not_as_coded_is_the_clients_fault(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """400 bad-request for who reads it, the application's own answer for who does not; no traceback for either."""

    async def main() -> None:
        async with staged() as stage:
            stage.on("/reads")(echo)

            @stage.on("/ignores")
            async def ignores(lead: Leadership, request: web.Request) -> web.Response:
                return web.Response(text="fine")

            headers = {**words(), "Content-Encoding": "gzip"}
            async with peer(stage) as router:
                answer = await router.ask("POST", "/reads", headers, body=b"no gzip at all")
                assert (answer.status, kind(answer)) == (400, "bad-request")
                assert (stage.count("bad-request"), stage.count("application-error")) == (1, 0)
            async with peer(stage) as router:
                assert (await router.ask("POST", "/ignores", headers, body=b"no gzip at all")).body == b"fine"
            await until(lambda: stage.front.open_connections == 0)
            async with peer(stage) as router:
                assert (await router.ask("POST", "/reads", body=b"1")).status == 200

    play(loop, main())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_handlers_that_return_no_fresh_answer_are_application_errors(loop: str) -> None:
    """Nothing, a cancellation of their own, a response that was sent before: a 500, no broken or hanging connection."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:

            @stage.on("/none")
            async def none(lead: Leadership, request: web.Request) -> web.Response:
                return None  # type: ignore[return-value]  # the mistake that is tried here

            @stage.on("/cancelled")
            async def cancelled(lead: Leadership, request: web.Request) -> web.Response:
                task = asyncio.create_task(asyncio.sleep(1))
                task.cancel()
                await task
                raise AssertionError

            kept = web.Response(text="kept")

            @stage.on("/kept")
            async def keeps(lead: Leadership, request: web.Request) -> web.Response:
                return kept

            assert (await router.ask("GET", "/kept")).body == b"kept"
            for path in ("/none", "/cancelled", "/kept"):
                answer = await router.ask("GET", path)
                assert (answer.status, kind(answer)) == (500, "application-error")

    play(loop, main())


def test_a_caller_that_leaves_is_no_application_error(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """The handler's effect stands, its answer has nowhere to go, and nobody is blamed."""

    async def main() -> None:
        async with staged() as stage:
            entered, may_end = asyncio.Event(), asyncio.Event()

            @stage.on("/x")
            async def slow(lead: Leadership, request: web.Request) -> web.Response:
                entered.set()
                await may_end.wait()
                return web.Response(body=b"x" * 100_000)

            async with peer(stage) as router:
                router.send("POST", "/x")
                await entered.wait()
            await until(lambda: stage.front.open_connections == 0)
            may_end.set()
            await until(lambda: stage.count("cancelled") == 1)

    play(loop, main())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- its life ------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named(loop: str) -> None:
    """The error says which port, and which flag to use."""

    async def main() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(CommandError, match=rf"127\.0\.0\.1:{port} is taken.*--port"):
                async with staged(port=port):
                    pass

    play(loop, main())


def test_the_advertised_address_is_what_start_returns(loop: str) -> None:
    """Routers may see the worker at another address than where it listens."""

    async def main() -> None:
        async with staged(advertise="worker.example:9000") as stage:
            assert stage.address == "worker.example:9000"

    play(loop, main())


def test_a_stopping_front_answers_until_its_peers_have_left(loop: str) -> None:
    """No new connections, no idle one is closed, answers say close, and linger ends with the last connection."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as idle, peer(stage) as router:
            stage.on("/x")(echo)
            assert (await idle.ask("GET", "/x")).status == 200
            assert (await router.ask("GET", "/x")).status == 200
            await stage.front.stop_accepting()
            await stage.front.stop_accepting()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", stage.port)
            assert await stage.front.linger(0.02) is False
            stage.hand_over()
            await stage.until(SHARD, Idle)
            answer = await router.ask("POST", "/x", body=b"1")
            assert (answer.status, answer.headers["connection"]) == (421, "close")
            assert await router.reader.read() == b""
            lingering = asyncio.create_task(stage.front.linger(5.0))
            assert (await idle.ask("GET", "/x")).status == 421
            assert await lingering is True

    play(loop, main())


def test_closing_twice_or_unstarted_is_harmless(loop: str) -> None:
    """close() may be called whatever came before."""

    async def main() -> None:
        async with staged() as stage:
            await stage.front.close()
            await stage.front.close()
            assert await stage.front.linger(0.01) is True

    play(loop, main())


def test_epochs_of_a_later_generation_are_numbers_as_well(loop: str) -> None:
    """generation 31 and a large revision fit the header and the comparison."""

    async def main() -> None:
        async with staged(is_led=False) as stage, peer(stage) as router:
            stage.on("/x")(echo)
            epoch = epoch_of(31, (1 << 48) - 1)
            await stage.lead(epoch=epoch)
            assert json.loads((await router.ask("GET", "/x", words(epoch=epoch))).body)["epoch"] == epoch

    play(loop, main())


def test_draining_is_seen_by_running_handlers_at_once(loop: str) -> None:
    """`lead.draining` is set before anything else of a handoff, so that a long answer can come to an end."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            entered = asyncio.Event()

            @stage.on("/poll")
            async def poll(lead: Leadership, request: web.Request) -> web.Response:
                entered.set()
                await lead.draining.wait()
                return web.Response(text="come again")

            router.send("GET", "/poll")
            await entered.wait()
            stage.hand_over()
            assert isinstance(stage.host.state(SHARD), Draining)
            assert (await router.answer()).body == b"come again"
            await stage.until(SHARD, Idle)

    play(loop, main())


def test_a_request_without_a_key_is_guarded_like_any_other(loop: str) -> None:
    """A router that sends requests without a key says shard and epoch alone; a shard that cannot be is refused."""

    async def main() -> None:
        async with staged() as stage, peer(stage) as router:
            stage.on("/x")(echo)
            said = {name: value for name, value in words().items() if name != "Shardlead-Key"}
            assert (await router.ask("POST", "/x", said)).status == 200
            stale = await router.ask("POST", "/x", said | {"Shardlead-Epoch": str(EPOCH - 1)})
            assert (stale.status, stale.headers["shardlead-refused"]) == (421, "stale")
            assert (await router.ask("POST", "/x", said | {"Shardlead-Shard": "999999"})).status == 400

    play(loop, main())
