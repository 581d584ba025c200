"""What happens to requests whose shard has no leader, moves, or loses its leader under them."""

import asyncio
import os
import socket

import pytest

from shardlead.core.keyspace import encode
from shardlead.core.model import LeaderRecord
from shardlead.router.server import Router
from shardlead.store.base import Delete, Put
from tests.router.support import WAIT_S, Request, Stage, Worker, echo, request_bytes, run, stage


async def ask_in_order(here: Stage, count: int, method: str = "GET", target: str = "/k/a") -> list[asyncio.Task[int]]:
    """So many requests for one shard, one after the other on hold; the statuses to come."""

    async def one(number: int) -> int:
        return (await here.ask(method, target, str(number).encode() if method == "POST" else b"", N=str(number))).status

    tasks = []
    held = here.router.counts.held
    for number in range(count):
        tasks.append(asyncio.create_task(one(number)))
        await here.held(held + number + 1)
    return tasks


def numbers(worker: Worker) -> list[int]:
    return [int(request.headers["n"]) for request in worker.requests]


def test_requests_wait_for_a_leader_first_in_first_out() -> None:
    """Nobody leads: they wait; somebody does: they go in the order in which they came, all to that one."""

    async def main() -> None:
        async with stage(upstream_connections_max=1) as here:  # one connection shows the order
            worker = await here.start("w1")
            tasks = await ask_in_order(here, 12)
            assert not worker.requests
            await here.lead(worker)
            assert await asyncio.gather(*tasks) == [200] * 12
            assert numbers(worker) == list(range(12))
            assert here.router.counts.held == 0
            assert not here.router.desk.gates, "the shard is ordinary again"

    run(main)


def test_other_shards_do_not_wait() -> None:
    """A shard on hold holds nobody else."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            shard = here.shard_of("a")
            await here.lead(worker, *(each for each in range(16) if each != shard))
            tasks = await ask_in_order(here, 1)
            other = next(key for key in "bcdefghij" if here.shard_of(key) != shard)
            assert (await here.ask("GET", f"/k/{other}")).status == 200
            await here.lead(worker, shard)
            assert await tasks[0] == 200

    run(main)


def test_a_hold_ends_with_a_503_that_names_the_shard() -> None:
    """Beyond the hold: problem+json, not-led, Retry-After; nothing was sent."""

    async def main() -> None:
        async with stage(hold_timeout_s=0.2) as here:
            answer = await here.ask("POST", "/k/a", b"x")
            assert (answer.status, answer.problem) == (503, "not-led")
            assert answer.json["shard"] == here.shard_of("a")
            assert int(answer.headers["retry-after"]) >= 1

    run(main)


def test_bounds_on_holding() -> None:
    """More than a shard's share, or than all may be, get a 503 at once; so do bodies beyond the bytes kept."""

    async def main() -> None:
        async with stage(held_per_shard_max=2, held_max=3, held_bytes_max=50_000) as here:
            shard = here.shard_of("a")
            tasks = await ask_in_order(here, 2)
            assert (await here.ask("GET", "/k/a")).problem == "overloaded"
            other = next(key for key in "bcdefghij" if here.shard_of(key) != shard)
            tasks += await ask_in_order(here, 1, "POST", f"/k/{other}")
            third = next(key for key in "bcdefghij" if here.shard_of(key) not in (shard, here.shard_of(other)))
            assert (await here.ask("GET", f"/k/{third}")).problem == "overloaded"
            assert (await here.ask("POST", f"/k/{third}", bytes(60_000))).problem == "overloaded"
            await here.lead(await here.start("w1"))
            assert await asyncio.gather(*tasks) == [200] * 3
            await here.true(lambda: here.router.counts.kept_bytes == 0)

    run(main)


def test_a_request_that_is_turned_down_again_and_again_does_not_hold_up_its_shard() -> None:
    """Those that wait take turns in asking: the others are answered long before that one's hold is over."""

    async def main() -> None:
        async with stage(hold_timeout_s=60.0) as here:

            async def script(request: Request) -> None:
                await request.read_body()
                if request.target.endswith("?bad"):
                    await request.refuse("suspended")
                else:
                    await request.answer(200, b"")

            worker = await here.start("w1", script)
            await here.lead(worker)
            bad = asyncio.create_task(here.ask("GET", "/k/a?bad"))
            await here.held(1)
            for _ in range(3):
                assert (await here.ask("POST", "/k/a", b"x")).status == 200
                assert not bad.done()
            bad.cancel()

    run(main)


def test_a_client_that_leaves_while_it_waits_is_not_sent() -> None:
    """Nothing is done for nobody, and its place is free."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            client = await here.client()
            await client.send(request_bytes("POST", "/k/a", b"x"))
            await here.held(1)
            client.leave()
            await here.held(0)
            await here.lead(worker)
            assert (await here.ask("GET", "/k/a")).status == 200
            assert len(worker.requests) == 1

    run(main)


def test_a_client_that_leaves_after_a_refusal_is_not_sent_again() -> None:
    """What was refused and waits is held like any other: with its client it goes, body and all."""

    async def main() -> None:
        async with stage() as here:
            old = await here.start("w1", lambda request: _read_and_refuse(request, "draining"))
            new = await here.start("w2")
            await here.lead(old)
            client = await here.client()
            await client.send(request_bytes("POST", "/k/a", b"x"))
            await here.held(1)
            client.leave()
            await here.held(0)
            await here.lead(new)
            assert (await here.ask("GET", "/k/a")).status == 200
            assert [request.method for request in new.requests] == ["GET"]

    run(main)


@pytest.mark.parametrize("reason", ["stale", "draining", "unknown"])
def test_a_refused_post_goes_to_the_next_leader_bit_for_bit(reason: str) -> None:
    """421 before the handler: whatever the method, the same request goes out again under the larger epoch, and not
    before the view shows it."""

    async def main() -> None:
        async with stage() as here:
            old = await here.start("w1", lambda request: _read_and_refuse(request, reason))
            new = await here.start("w2")
            first = await here.lead(old)
            body = os.urandom(65_536)
            asking = asyncio.create_task(here.ask("POST", "/k/a?q=%20", body, X_Custom="kept", Idempotency_Key="i"))
            await old.received(1)
            await here.held(1)
            second = await here.lead(new)
            answer = await asking
            assert answer.status == 200
            assert len(old.requests) == 1
            a, b = old.requests[0], new.requests[0]
            assert (a.epoch, b.epoch) == (first, second)
            assert a.body == b.body == body
            assert [f for f in a.raw_headers if f[0] != "Shardlead-Epoch"] == [
                f for f in b.raw_headers if f[0] != "Shardlead-Epoch"
            ]
            assert here.router.counts.refused[reason] == 1
            assert here.router.counts.resent["refused"] == 1

    run(main)


async def _read_and_refuse(request: Request, reason: str) -> None:
    await request.read_body()
    await request.refuse(reason)


def test_while_a_shard_drains_its_other_requests_wait_without_asking() -> None:
    """After one refusal the rest is held, instead of being refused one by one; order is kept."""

    async def main() -> None:
        async with stage(upstream_connections_max=1) as here:
            old = await here.start("w1", lambda request: _read_and_refuse(request, "draining"))
            new = await here.start("w2")
            await here.lead(old)
            tasks = await ask_in_order(here, 8, "POST")
            assert len(old.requests) == 1
            await here.lead(new, here.shard_of("a"))
            assert await asyncio.gather(*tasks) == [200] * 8
            assert numbers(new) == list(range(8))

    run(main)


def test_a_refusal_names_the_new_leader_before_the_view_does() -> None:
    """Shardlead-Leader with a larger epoch is used at once, and nothing goes out below it from then on."""

    async def main() -> None:
        async with stage() as here:
            new = await here.start("w2")
            old = Worker("w1")
            epoch = 0

            async def refuse(request: Request) -> None:
                await _read(request)
                await request.refuse("stale", epoch=epoch, leader=f"w2 {new.address} {epoch}")

            old = await here.start("w1", refuse)
            epoch = await here.lead(old) + 1_000
            for _ in range(3):
                assert (await here.ask("POST", "/k/a", b"x")).status == 200
            assert len(old.requests) == 1
            assert [request.epoch for request in new.requests] == [epoch] * 3
            assert here.router.desk.gates, "until the view has caught up"

    run(main)


async def _read(request: Request) -> None:
    await request.read_body()


def test_who_waits_for_a_connection_hears_of_a_larger_epoch() -> None:
    """One request is refused by a leader that has a larger epoch by now; another one still waited for that connection.
    It is not sent under the epoch of before, but waits for the view."""

    async def main() -> None:
        async with stage(upstream_connections_max=1) as here:
            go = asyncio.Event()
            larger = 0

            async def script(request: Request) -> None:
                if request.number == 0:
                    await request.read_body()
                    await go.wait()
                    await request.refuse("stale", epoch=larger)
                else:
                    await echo(request)

            worker = await here.start("w1", script)
            larger = await here.lead(worker) + 1  # as after a new epoch that the view has not heard of
            first = asyncio.create_task(here.ask("POST", "/k/a", b"x"))
            await worker.received(1)
            second = asyncio.create_task(here.ask("POST", "/k/a", b"x"))
            pool = next(iter(here.router.desk.pools.values()))
            await here.true(lambda: len(pool.waiting) == 1)
            go.set()
            await here.held(2)
            assert len(worker.requests) == 1
            assert await here.lead(worker) >= larger
            assert [(await each).status for each in (first, second)] == [200, 200]
            assert all(request.epoch >= larger for request in worker.requests[1:])

    run(main)


@pytest.mark.parametrize("is_held_before", [False, True])
def test_a_late_refusal_names_a_leader_of_the_past(is_held_before: bool) -> None:
    """One with a larger epoch has come and gone meanwhile: nobody is asked under the smaller one."""

    async def main() -> None:
        async with stage() as here:
            go = asyncio.Event()
            other = await here.start("w2")

            async def late(request: Request) -> None:
                await go.wait()
                await request.refuse("stale", leader=f"w2 {other.address} {request.epoch + 1}")

            worker = await here.start("w1", late)
            shard = here.shard_of("a")
            await here.lead(worker)
            first = asyncio.create_task(here.ask("GET", "/k/a"))
            await worker.received(1)
            await here.lead(await here.start("w3"), shard)
            await here.write(Delete(here.keyspace.leader(shard)))
            tasks = await ask_in_order(here, 1) if is_held_before else []
            go.set()
            await here.held(1 + is_held_before)
            assert not other.requests
            epoch = await here.lead(other, shard)
            assert (await first).status == 200
            assert [await each for each in tasks] == [200] * is_held_before
            assert {request.epoch for request in other.requests} == {epoch}

    run(main)


def test_a_suspended_leader_is_asked_again_under_the_same_epoch() -> None:
    """503 suspended: one request asks every 250 ms; when it is admitted, all that wait follow."""

    async def main() -> None:
        async with stage() as here:
            is_suspended = True

            async def script(request: Request) -> None:
                await request.read_body()
                if is_suspended:
                    await request.refuse("suspended", epoch=request.epoch)
                else:
                    await request.answer(200)

            worker = await here.start("w1", script)
            epoch = await here.lead(worker)
            tasks = await ask_in_order(here, 5, "POST")
            await worker.received(4)
            is_suspended = False
            assert await asyncio.gather(*tasks) == [200] * 5
            assert {request.epoch for request in worker.requests} == {epoch}
            assert here.router.counts.refused["suspended"] == len(worker.requests) - 5

    run(main)


def test_who_comes_after_all_that_waited_have_left_asks_at_once() -> None:
    """A refusal of long ago costs the next request nothing."""

    async def main() -> None:
        async with stage() as here:
            is_suspended = True

            async def script(request: Request) -> None:
                await request.read_body()
                await (request.refuse("suspended") if is_suspended else request.answer(200))

            worker = await here.start("w1", script)
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("POST", "/k/a"))
            await here.held(1)
            client.leave()
            await here.held(0)
            is_suspended = False
            here.clock.ahead_ns += 10**9
            count = len(worker.requests)
            async with asyncio.timeout(0.2):
                assert (await here.ask("POST")).status == 200
            assert len(worker.requests) == count + 1
            assert not here.router.desk.gates

    run(main)


def test_a_leader_suspended_for_longer_than_the_hold_is_named_so() -> None:
    """The 503 says what the matter is."""

    async def main() -> None:
        async with stage(hold_timeout_s=0.4) as here:
            worker = await here.start("w1", lambda request: request.refuse("suspended"), drain_timeout_s=-0.7)
            await here.lead(worker)
            answer = await here.ask("GET")
            assert (answer.status, answer.problem) == (503, "suspended")

    run(main)


def test_a_leader_that_was_only_slow_to_open_is_asked_again() -> None:
    """A 421 under an epoch that stays is asked about once a second, so that no shard is lost to a misunderstanding."""

    async def main() -> None:
        async with stage() as here:

            async def script(request: Request) -> None:
                await request.read_body()
                if request.number == 0:
                    await request.refuse("unknown")
                else:
                    await request.answer(200)

            worker = await here.start("w1", script)
            await here.lead(worker)
            assert (await here.ask("POST", "/k/a", b"x")).status == 200
            assert len(worker.requests) == 2

    run(main)


def test_an_unanswered_post_is_not_sent_again() -> None:
    """The connection ends after the request was sent: 502 outcome-unknown, once, at once; other requests go on."""

    async def main() -> None:
        async with stage() as here:

            async def closes(request: Request) -> None:
                await request.read_body()
                await request.close()

            worker = await here.start("w1", closes, idempotent=True)
            await here.lead(worker)
            for method in ("POST", "PUT", "DELETE"):
                answer = await here.ask(method, "/k/a", b"x")
                assert (answer.status, answer.problem) == (502, "outcome-unknown")
                assert answer.json["shard"] == here.shard_of("a")
            assert [request.method for request in worker.requests] == ["POST", "PUT", "DELETE"]
            worker.script = echo
            assert (await here.ask("POST", "/k/a", b"x")).status == 200

    run(main)


@pytest.mark.parametrize(
    ("method", "headers", "is_idempotent", "expected"),
    [
        ("GET", {}, False, 200),
        ("HEAD", {}, False, 200),
        ("OPTIONS", {}, False, 200),
        ("POST", {"Idempotency_Key": "1"}, True, 200),
        ("POST", {"Idempotency_Key": "1"}, False, 502),
        ("POST", {}, True, 502),
    ],
)
def test_what_is_harmless_twice_is_sent_again(
    method: str, headers: dict[str, str], is_idempotent: bool, expected: int
) -> None:
    """Safe methods, and Idempotency-Keys where the class removes duplicates."""

    async def main() -> None:
        async with stage() as here:

            async def script(request: Request) -> None:
                if request.number == 0:
                    await request.close()
                else:
                    await echo(request)

            worker = await here.start("w1", script, idempotent=is_idempotent)
            await here.lead(worker)
            answer = await here.ask(method, "/k/a", b"", **headers)
            assert answer.status == expected
            assert len(worker.requests) == (2 if expected == 200 else 1)

    run(main)


def test_a_request_that_kills_its_worker_does_not_walk_the_fleet() -> None:
    """A GET is repeated three times at most."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: request.close())
            await here.lead(worker)
            answer = await here.ask("GET", "/k/a")
            assert (answer.status, answer.problem) == (502, "outcome-unknown")
            assert len(worker.requests) == 4

    run(main)


def test_an_outcome_that_the_worker_itself_does_not_know() -> None:
    """The runtime's own 502 passes to the client, unless processing twice is harmless: then it is sent again."""

    async def main() -> None:
        async with stage() as here:

            async def script(request: Request) -> None:
                await request.read_body()
                if request.number in (0, 1):
                    await request.answer(502, b"own words", Shardlead_Outcome="unknown")
                else:
                    await request.answer(200)

            worker = await here.start("w1", script, idempotent=True)
            await here.lead(worker)
            answer = await here.ask("POST", "/k/a", b"x")
            assert (answer.status, answer.body) == (502, b"own words")
            asking = asyncio.create_task(here.ask("POST", "/k/a", b"x", Idempotency_Key="1"))
            await worker.received(2)
            await here.held(1)
            await here.lead(worker)  # a new epoch
            assert (await asking).status == 200
            assert worker.requests[2].epoch > worker.requests[1].epoch

    run(main)


@pytest.mark.parametrize(("method", "expected"), [("POST", (502, "outcome-unknown")), ("GET", (503, "suspended"))])
def test_what_may_have_been_done_is_not_denied_after_a_hold(method: str, expected: tuple[int, str]) -> None:
    """Sent, broken, sent again under its Idempotency-Key, and then refused until its hold is over: the first sending
    may have been processed, so no 503 says that nothing was done. Of a GET it may."""

    async def main() -> None:
        async with stage(hold_timeout_s=0.4) as here:

            async def script(request: Request) -> None:
                await request.read_body()
                if request.number == 0:
                    await request.close()
                else:
                    await request.refuse("suspended")

            worker = await here.start("w1", script, idempotent=True, drain_timeout_s=-0.7)
            await here.lead(worker)
            answer = await here.ask(method, "/k/a", b"", Idempotency_Key="1")
            assert (answer.status, answer.problem) == expected
            assert answer.json["shard"] == here.shard_of("a")
            assert len(worker.requests) > 1

    run(main)


def test_a_leader_that_cannot_be_reached_is_tried_until_there_is_another() -> None:
    """Nothing was sent, so a POST waits and goes to whoever follows."""

    async def main() -> None:
        async with stage(upstream_connections_max=1) as here:
            dead = await here.start("w1")
            await dead.stop()
            await here.lead(dead)
            tasks = await ask_in_order(here, 3, "POST")
            await here.true(lambda: here.router.counts.connects["failed"] >= 3)
            live = await here.start("w2")
            await here.lead(live)
            assert await asyncio.gather(*tasks) == [200] * 3
            assert numbers(live) == [0, 1, 2]

    run(main)


def test_a_leader_whose_record_has_not_come_is_waited_for() -> None:
    """A leader without an address is no leader to send to."""

    async def main() -> None:
        async with stage() as here:
            worker = Worker("w1")
            await worker.start()
            here.workers["w1"] = worker
            await here.write(Put(here.keyspace.leader(here.shard_of("a")), encode(LeaderRecord("w1", "sid-w1"))))
            tasks = await ask_in_order(here, 1)
            await here.write(Put(here.keyspace.worker("w1"), encode(here.record(worker))))
            assert await tasks[0] == 200

    run(main)


def test_a_planned_move_lets_answers_pass() -> None:
    """The key is replaced, or deleted while the old leader's record stands: the POST under way gets its answer."""

    async def main() -> None:
        async with stage() as here:
            go = asyncio.Event()

            async def slow(request: Request) -> None:
                await request.read_body()
                await go.wait()
                await request.answer(200, b"old")

            old = await here.start("w1", slow)
            new = await here.start("w2")
            await here.lead(old)
            asking = [asyncio.create_task(here.ask("POST", f"/k/{key}", b"x")) for key in "ab"]
            await old.received(2)
            await here.lead(new, here.shard_of("a"))
            await here.write(Delete(here.keyspace.leader(here.shard_of("b"))))
            assert (await here.ask("POST", "/k/a", b"x")).status == 200
            go.set()
            assert [(await task).body for task in asking] == [b"old", b"old"]
            assert len(new.requests) == 1

    run(main)


def test_a_forced_change_ends_what_is_in_flight() -> None:
    """The old leader's session is gone while its connections still stand (a lost machine): a GET goes to the next
    leader, a POST is told that its outcome is unknown, an answer under way is cut."""

    async def main() -> None:
        async with stage() as here:

            async def silent(request: Request) -> None:
                if request.target == "/k/a/stream":
                    await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegun")
                await request.reader.readexactly(1)

            old = await here.start("w1", silent)
            new = await here.start("w2")
            await here.lead(old)
            get = asyncio.create_task(here.ask("GET", "/k/a"))
            post = asyncio.create_task(here.ask("POST", "/k/a"))
            stream = await here.client()
            await stream.send(request_bytes("GET", "/k/a/stream"))
            assert (await stream.head()).status == 200
            await old.received(3)
            await here.gone(old)
            assert (await post).problem == "outcome-unknown"
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await stream.reader.readexactly(100)
            await here.held(1)
            await here.lead(new)
            assert (await get).status == 200

    run(main)


def test_an_answer_that_was_on_its_way_when_the_session_ended_passes() -> None:
    """The store's news may overtake the last answer of a worker that stops in order."""

    async def main() -> None:
        async with stage() as here:
            go = asyncio.Event()

            async def script(request: Request) -> None:
                await request.read_body()
                await go.wait()
                await request.answer(200, b"last")

            worker = await here.start("w1", script)
            await here.lead(worker)
            post = asyncio.create_task(here.ask("POST", "/k/a"))
            await worker.received(1)
            unsubscribe = here.view.subscribe(lambda _: go.set())  # the answer leaves when the router hears
            await here.gone(worker)
            unsubscribe()
            assert (await post).body == b"last"

    run(main)


def test_a_worker_that_restarts_between_two_posts_costs_nothing() -> None:
    """An idle connection that the worker's end has closed is not used for a POST: what is sent into the void would
    count as maybe processed."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            await here.lead(worker)
            for _ in range(20):
                assert (await here.ask("POST", "/k/a", b"x")).status == 200
                for writer in tuple(worker.open):
                    writer.transport.abort()
            assert len(worker.requests) == 20

    run(main)


def test_a_silent_leader_is_a_504() -> None:
    """No answer begins in time: the client is told, and the request is not sent again, GET or not."""

    async def main() -> None:
        async with stage(answer_timeout_s=0.2) as here:

            async def silent(request: Request) -> None:
                await request.reader.readexactly(1)

            worker = await here.start("w1", silent)
            await here.lead(worker)
            answer = await here.ask("GET", "/k/a")
            assert (answer.status, answer.problem) == (504, "timed-out")
            assert len(worker.requests) == 1

    run(main)


def test_epochs_never_go_back_under_constant_change() -> None:
    """Two workers pass the shard to and fro while clients ask: each worker sees growing epochs, every request is
    answered, each POST is executed once."""

    async def main() -> None:
        async with stage() as here:
            shard = here.shard_of("a")
            executed: list[str] = []
            newest = (0, "")
            is_over = False

            async def script(request: Request) -> None:
                await request.read_body()
                me = next(name for name, worker in here.workers.items() if request in worker.requests)
                await here.true(lambda: request.epoch <= newest[0])  # told of a larger epoch than is known here: parked
                if newest != (request.epoch, me):
                    await request.refuse("stale", epoch=newest[0])
                    return
                executed.append(request.headers["n"])
                await request.answer(200)

            pair = [await here.start("w1", script), await here.start("w2", script)]

            async def move() -> None:
                nonlocal newest
                number = 0
                while not is_over:
                    worker = pair[number % 2]
                    number += 1
                    newest = (await here.lead(worker, shard), worker.name)
                    await asyncio.sleep(0.01)

            async def ask(number: int) -> None:
                client = await here.client()
                for count in range(20):
                    answer = await client.ask("POST", "/k/a", b"x", N=f"{number}-{count}")
                    assert answer.status == 200

            mover = asyncio.create_task(move())
            await asyncio.gather(*(ask(number) for number in range(8)))
            is_over = True
            await mover
            assert sorted(executed) == sorted(f"{number}-{count}" for number in range(8) for count in range(20))
            for worker in pair:
                epochs = [request.epoch for request in worker.requests]
                assert epochs == sorted(epochs)

    run(main)


def test_no_cluster_yet_is_said() -> None:
    """Before the view can tell shards, requests get a 503 not-ready."""

    async def main() -> None:
        async with stage() as here:
            assert here.router.is_ready
            await here.write(Delete(here.keyspace.meta))
            await here.true(lambda: not here.router.is_ready)
            answer = await here.ask("GET", "/k/a")
            assert (answer.status, answer.problem) == (503, "not-ready")

    run(main)


def test_stopping_finishes_what_is_under_way() -> None:
    """No new connection, running and held requests are answered with Connection: close, then it is over."""

    async def main() -> None:
        async with stage() as here:
            go = asyncio.Event()

            async def slow(request: Request) -> None:
                await request.read_body()
                await go.wait()
                await request.answer(200, b"done")

            shard = here.shard_of("a")
            worker = await here.start("w1", slow)
            await here.lead(worker, *(each for each in range(16) if each != shard))
            other = next(key for key in "bcdefghij" if here.shard_of(key) != shard)
            running = asyncio.create_task(here.ask("POST", f"/k/{other}", b"x"))
            await worker.received(1)
            held = (await ask_in_order(here, 1))[0]
            idle = await here.client()
            await here.true(lambda: here.router.counts.client_connections == 3)
            address = here.router.address
            here.router.stop()
            await here.true(lambda: not here.router.is_ready)
            host, _, port = address.rpartition(":")
            with pytest.raises(ConnectionError):
                await asyncio.open_connection(host, int(port))
            assert (await idle.ask("GET", "/x")).headers["connection"] == "close", "it crossed with our stopping"
            go.set()
            answer = await running
            assert (answer.body, answer.headers["connection"]) == (b"done", "close")
            await here.lead(worker, shard)
            assert await held == 200

    run(main)


def test_a_taken_port_is_an_error_of_the_system() -> None:
    """Listening where another listens raises OSError."""

    async def main() -> None:
        async with stage() as here:
            from dataclasses import replace

            from shardlead.clock import SystemClock

            port = int(here.router.address.rpartition(":")[2])
            router = Router(replace(here.router.settings, port=port), here.view, clock=SystemClock())
            with pytest.raises(OSError, match=r"in use"):
                await asyncio.wait_for(router.run(), WAIT_S)

    run(main)


def test_who_waits_for_a_connection_follows_the_leader() -> None:
    """All connections to the old leader are in use when the shard moves: those that wait for one go to the new
    leader at once; those whose shard stays wait on, but not for ever."""

    async def main() -> None:
        async with stage(upstream_connections_max=1, hold_timeout_s=1.0) as here:

            async def silent(request: Request) -> None:
                await request.reader.readexactly(1)

            old = await here.start("w1", silent)
            new = await here.start("w2")
            await here.lead(old)
            shard = here.shard_of("a")
            other = next(key for key in "bcdefghij" if here.shard_of(key) != shard)
            stuck = await here.client()
            await stuck.send(request_bytes("POST", "/k/a", b"x"))
            await old.received(1)
            moving = asyncio.create_task(here.ask("POST", "/k/a", b"x"))
            staying = asyncio.create_task(here.ask("POST", f"/k/{other}", b"x"))
            pool = next(iter(here.router.desk.pools.values()))
            await here.true(lambda: len(pool.waiting) == 2)
            await here.lead(new, shard)
            assert (await moving).status == 200
            answer = await staying
            assert (answer.status, answer.problem) == (503, "overloaded")
            assert len(old.requests) == 1

    run(main)


@pytest.mark.parametrize("connections_max", [1, 8])
def test_a_thousand_that_wait_for_a_connection_follow_the_leader(connections_max: int) -> None:
    """One is told of a larger epoch: all that wait behind it are held, and go to the next leader, in their order."""

    async def main() -> None:
        async with stage(upstream_connections_max=connections_max) as here:
            go = asyncio.Event()

            async def script(request: Request) -> None:
                await request.read_body()
                await go.wait()
                await request.refuse("stale", epoch=request.epoch + 1)

            worker = await here.start("w1", script)
            await here.lead(worker)
            clients = [await here.client() for _ in range(1_000)]
            for number, client in enumerate(clients):
                await client.send(request_bytes("POST", f"/k/a/{number}", b"x"))
            await worker.received(connections_max)
            pool = next(iter(here.router.desk.pools.values()))
            await here.true(lambda: len(pool.waiting) == 1_000 - connections_max)
            go.set()
            await here.held(1_000)
            worker.script = echo
            del worker.requests[:]
            await here.lead(worker)
            for client in clients:
                assert (await client.answer()).status == 200
            if connections_max == 1:
                assert [each.target for each in worker.requests] == [f"/k/a/{number}" for number in range(1_000)]

    run(main)


def test_a_leader_that_swallows_connections_does_not_swallow_requests() -> None:
    """Nobody accepts at the leader's address (a lost machine): requests wait, one of them trying, and go on when
    another leads."""

    async def main() -> None:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            host, port = deaf.getsockname()
            fillers = [socket.socket() for _ in range(4)]
            try:
                for filler in fillers:  # a full backlog drops what comes
                    filler.setblocking(False)
                    filler.connect_ex((host, port))
                async with stage(connect_timeout_s=0.3) as here:
                    lost = Worker("w1")
                    lost.address = f"{host}:{port}"
                    await here.write(Put(here.keyspace.worker("w1"), encode(here.record(lost))))
                    await here.lead(lost)
                    tasks = await ask_in_order(here, 5, "POST")
                    await here.true(lambda: here.router.counts.connects["timed-out"] >= 2)
                    assert here.router.counts.connects["timed-out"] <= 8, "one tries for all"
                    await here.lead(await here.start("w2"))
                    assert await asyncio.gather(*tasks) == [200] * 5
            finally:
                for filler in fillers:
                    filler.close()

    run(main)


def test_a_half_sent_next_request_does_not_keep_the_first_alive() -> None:
    """Time-outs of the request in work go on while the head of the next one is incomplete."""

    async def main() -> None:
        async with stage(answer_timeout_s=0.2) as here:

            async def silent(request: Request) -> None:
                await request.reader.readexactly(1)

            await here.lead(await here.start("w1", silent))
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a") + b"GET /k/a HTT")
            assert (await client.answer()).problem == "timed-out"

    run(main)


def test_a_pause_of_the_whole_process_times_nobody_out() -> None:
    """After a stop of the process what came meanwhile lies unread: time that nobody lived does not count."""

    async def main() -> None:
        async with stage(idle_timeout_s=30.0) as here:
            await here.lead(await here.start("w1"))
            client = await here.client()
            assert (await client.ask()).status == 200
            here.clock.ahead_ns += 3_600 * 10**9
            here.router._house_keep()
            here.router._house_keep()
            assert (await client.ask()).status == 200

    run(main)


def test_an_address_that_refuses_connections_is_let_be_until_there_is_news() -> None:
    """Many shards of a dead worker cost a few attempts a second, not one for each request; the first request after
    news of it does not wait for the pause to end."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            await here.lead(worker)
            address = worker.address
            await worker.stop()
            clients = [await here.client() for _ in range(100)]
            for number, client in enumerate(clients):
                await client.send(request_bytes("GET", f"/k/{number}"))
            await here.held(100)
            await asyncio.sleep(1.5)
            attempts = here.router.counts.connects["failed"]
            assert 2 <= attempts <= 40, "16 at once, then one a pause"
            pool = next(iter(here.router.desk.pools.values()))
            await here.true(lambda: pool._is_resting() and pool._failures > 4 and not pool._connecting)
            pool._rests_until_s += 10 * WAIT_S  # so that nobody is answered in time who waits for the pause to end
            again = Worker("w1")
            await again.start(port=int(address.rpartition(":")[2]))
            here.workers["w2"] = again
            await here.lead(again)
            async with asyncio.timeout(WAIT_S):
                for client in clients:
                    assert (await client.answer()).status == 200
            assert not pool._failures

    run(main)
