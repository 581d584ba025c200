"""Over real sockets: whatever comes from a client, a worker or the store, the router serves the next request."""

import asyncio
import contextlib
from functools import partial
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.support import Request, Stage, run, stage
from tests.router.test_fuzz_wire import ANSWER_PIECES, ANSWERS, GOOD, LAST, PIECES
from tests.support.fuzz import bent_bytes, cut, examples

BATCH: Final = 30  # examples a scene: each may wait out a hold of a second
STREAMS: Final = st.lists(st.sampled_from(GOOD), max_size=2).flatmap(
    lambda some: st.sampled_from((*GOOD, *LAST)).flatmap(lambda last: bent_bytes(b"".join((*some, last)), PIECES))
)


def _drawn(strategy: st.SearchStrategy[list[bytes]], count: int) -> list[list[bytes]]:
    """So many examples (times 20 under --long), for a scene that is expensive to set up."""
    found: list[list[bytes]] = []

    @examples(count)
    @given(strategy)
    def draw(pieces: list[bytes]) -> None:
        found.append(pieces)

    draw()
    return found


async def _is_quiet(here: Stage) -> None:
    """Nothing of what was sent is left: no client, no held request, no busy connection, no kept byte."""
    counts, desk = here.router.counts, here.router.desk
    await here.true(lambda: counts.client_connections == 0 and counts.held == 0 and counts.kept_bytes == 0)
    await here.true(lambda: not any(pool.busy or pool.waiting for pool in desk.pools.values()))


def test_bent_requests_leave_nothing_behind() -> None:
    """No exception reaches the loop, and beside them and after them others are served."""
    streams = _drawn(STREAMS.flatmap(lambda stream: cut(stream, 3)), 60)

    async def main(batch: list[list[bytes]]) -> None:
        async with stage(keyless="any", body_bytes_max=1_000) as here:
            await here.lead(await here.start("w1"))
            bent = [await here.client() for _ in batch]
            for client, pieces in zip(bent, batch, strict=True):
                for piece in pieces:
                    with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop's way to say that it is closed
                        await client.send(piece)
                        await asyncio.sleep(0)
            assert (await here.ask("POST", "/k/a", b"hello")).json["body"] == 5
            for client in bent:
                client.leave()
            await _drop(here)
            await _is_quiet(here)

    for at in range(0, len(streams), BATCH):
        run(partial(main, streams[at : at + BATCH]))


async def _drop(here: Stage) -> None:
    for client in here.clients:
        client.leave()
    here.clients.clear()
    await here.true(lambda: here.router.counts.client_connections == 0)


def test_bent_answers_leave_nothing_behind() -> None:
    """A worker that answers nonsense costs its own requests their answers, and nobody else's."""
    answers = _drawn(
        st.sampled_from(ANSWERS).flatmap(lambda answer: bent_bytes(answer, ANSWER_PIECES)).flatmap(lambda a: cut(a, 3)),
        60,
    )
    script: list[list[bytes]] = []

    async def bent(request: Request) -> None:
        if request.target == "/k/good":
            await request.answer(200, b"good")
            return
        for piece in script.pop():
            await request.send(piece)
            await asyncio.sleep(0)
        await request.close()

    async def main(batch: list[list[bytes]]) -> None:
        async with stage(hold_timeout_s=0.2) as here:
            await here.lead(await here.start("w1", bent, drain_timeout_s=0.0))
            for pieces in batch:
                script[:] = [pieces] * 50  # a read that is refused or lost is sent again
                client = await here.client()
                with contextlib.suppress(ConnectionError):
                    await client.send(
                        b"POST /k/a HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    )
                with contextlib.suppress(ConnectionError):
                    async with asyncio.timeout(5):
                        await client.reader.read()
                await _drop(here)
                await here.lead(here.workers["w1"])  # a larger epoch opens whatever gate a bent refusal has closed
            assert (await here.ask("GET", "/k/good")).status == 200
            await _drop(here)
            await _is_quiet(here)

    for at in range(0, len(answers), BATCH):
        run(partial(main, answers[at : at + BATCH]))


ODD_ADDRESSES: Final = (
    "10.0.0.1",
    "127.0.0.1:99999",
    "127.0.0.1:²",
    "127.0.0.1:" + "1" * 5_000,
    "a" * 64 + ".example:80",
    "..:80",
    "ü:80",
    ":80",
    "127.0.0.1:0",
    "[::1",
    "\0:80",
)


def test_a_worker_whose_address_is_none_costs_its_own_shards_only() -> None:
    """Records say what they like: each request gets a 503, and the router goes on."""

    async def main() -> None:
        async with stage(hold_timeout_s=0.2) as here:
            await here.lead(await here.start("w0"))
            keys = {here.shard_of(key): key for key in map(str, range(200))}
            for shard, address in enumerate(ODD_ADDRESSES, 1):
                odd = await here.start(f"w{shard}", address=address, drain_timeout_s=0.0)
                await here.lead(odd, shard)
            asked = [here.ask("GET", f"/k/{keys[shard]}") for shard in range(1, len(ODD_ADDRESSES) + 1)]
            assert {answer.problem for answer in await asyncio.gather(*asked)} == {"upstream-failed"}
            assert (await here.ask("GET", f"/k/{keys[0]}")).status == 200

    run(main)


@pytest.mark.parametrize(
    "hint", [b"w9 127.0.0.1:99999 %d", b"w9 \xb2:\xb2 %d", b"w9 h:1 " + b"9" * 5_000, b"w9 h:1 \xb2"]
)
def test_a_leader_that_a_refusal_names_may_be_none(hint: bytes) -> None:
    """A hint that cannot be used is no reason to fail: with news of a leader the request is served."""

    async def main() -> None:
        async with stage() as here:
            asked = 0

            async def refuses(request: Request) -> None:
                nonlocal asked
                asked += 1
                leader = (hint % (request.epoch + 1) if b"%" in hint else hint) if asked == 1 else b""
                if asked == 1:
                    line = b"HTTP/1.1 421 No\r\nShardlead-Refused: stale\r\nShardlead-Leader: %b\r\n" % leader
                    await request.send(line + b"Content-Length: 0\r\n\r\n")
                else:
                    await request.answer(200, b"good")

            worker = await here.start("w1", refuses)
            await here.lead(worker)
            client = await here.client()
            await client.send(b"GET /k/a HTTP/1.1\r\nHost: t\r\n\r\n")
            await worker.received(1)
            await here.lead(worker)
            await here.lead(worker)
            assert (await client.answer()).status == 200

    run(main)


@pytest.mark.parametrize("drain_s", [1e300, -1e300, 1e12])
def test_a_drain_of_any_length_is_borne(drain_s: float) -> None:
    """A record that says that its drain takes for ever does not fail the request that is held for it."""

    async def main() -> None:
        async with stage(hold_timeout_s=0.2) as here:
            good = await here.start("w1")
            odd = await here.start("w2", address="127.0.0.1:1", drain_timeout_s=drain_s)
            await here.lead(odd)
            client = await here.client()
            await client.send(b"GET /k/a HTTP/1.1\r\nHost: t\r\n\r\n")
            await here.true(lambda: here.router.counts.connects["failed"] > 0)
            await here.lead(good)
            assert (await client.answer()).status in (200, 503)

    run(main)
