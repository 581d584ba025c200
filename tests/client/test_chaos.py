"""Everything at once, by seed, to the smart client: the router's world of moves, deaths, refusals and broken
connections, with callers that lose patience."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shardlead.errors import AnswerBroken, OutcomeUnknown, Unserved
from tests.client.support import ClientStage, client_stage
from tests.router.support import run
from tests.router.test_chaos import CLIENTS, SECONDS, World, _body


async def _streamed(data: bytes, rng: random.Random) -> AsyncIterator[bytes]:
    while data:
        size = rng.choice([1, 1_000, 30_000])
        yield data[:size]
        data = data[size:]
        if rng.random() < 0.1:
            await asyncio.sleep(0)


async def _use(world: World, here: ClientStage, name: str, rng: random.Random) -> None:
    """One caller: requests of all kinds, and what their ends promise."""
    count = 0
    while not world.is_over:
        count += 1
        number = f"{name}-{count}"
        method = rng.choice(["GET", "POST", "POST", "PUT"])
        size = 0 if method == "GET" else rng.choice([0, 10, 5_000, 65_536, 65_537, 400_000])
        headers = {"X-Id": number, "X-Size": str(size)}
        is_idempotent = method == "POST" and rng.random() < 0.3
        if is_idempotent:
            headers["Idempotency-Key"] = number
        data: Any = None if method == "GET" else _body(size)
        if data and rng.random() < 0.3:
            data = _streamed(data, rng)
        key = str(rng.randrange(40))
        patience_s = rng.uniform(0, 0.02) if rng.random() < 0.05 else 20.0
        try:
            async with (
                asyncio.timeout(patience_s),
                here.direct.request(method, f"/k/{key}", key=key, data=data, headers=headers) as answer,
            ):
                if rng.random() < 0.9:
                    assert await answer.read() == b"hello"
                assert answer.status == 200
            assert world.executed[number] >= 1
        except TimeoutError:
            assert patience_s < 1
        except Unserved:
            assert method == "GET" or is_idempotent or not world.executed[number], f"{number} was processed after all"
        except AnswerBroken:
            assert world.executed[number] >= 1
        except OutcomeUnknown:
            pass
        if method != "GET" and not is_idempotent:
            assert world.executed[number] <= 1, f"{number} was executed {world.executed[number]} times"


@pytest.mark.parametrize("is_uvloop", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_every_end_keeps_its_word(seed: int, is_uvloop: bool, is_long: bool) -> None:
    """An answer: executed; exactly once unless twice is harmless. Unserved: not executed. OutcomeUnknown: at most
    once. Afterwards nothing is left: no call, no held request, no gate, no place taken, no task of ours."""

    async def main(seed: int) -> None:
        rng = random.Random(seed)
        async with client_stage(hold_timeout_s=2.0, upstream_connections_max=8) as here:
            world = World(here, rng)
            await world.settle()
            tasks_before = len(asyncio.all_tasks())
            async with asyncio.TaskGroup() as tasks:
                for number in range(CLIENTS):
                    tasks.create_task(_use(world, here, str(number), random.Random(rng.random())))
                mover = tasks.create_task(world.move())
                await asyncio.sleep(SECONDS)
                world.is_over = True
                await mover
                await world.settle()
            client = here.direct
            assert client._number > CLIENTS
            assert client.counts.refused
            assert client.counts.resent
            assert not client._calls
            assert client.counts.held == 0
            world.is_calm = True
            for key in range(40):
                assert (await here.ask("GET", f"/k/{key}", X_Size="0", X_Id="end")).status == 200
            await here.true(lambda: not client._traffic.gates)
            assert client._pools is not None
            assert not any(pool.busy or pool.waiting for pool in client._pools.values())
            for worker in here.workers.values():  # their connections have tasks, too
                await worker.stop()
            await here.true(lambda: len(asyncio.all_tasks()) <= tasks_before)

    for each in range(seed, 40, 2) if is_long else (seed,):
        run(lambda each=each: main(each), is_uvloop=is_uvloop)  # type: ignore[misc]  # bound in this round
