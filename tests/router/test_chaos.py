"""Everything at once, by seed: moves, deaths, refusals, broken connections, clients that leave."""

import asyncio
import random
from collections import Counter

import pytest

from tests.router.support import Request, Stage, Worker, request_bytes, run, stage

SECONDS = 1.0
CLIENTS = 12


class World:
    """Which worker may serve what, and what was executed."""

    def __init__(self, here: Stage, rng: random.Random) -> None:
        self.here = here
        self.rng = rng
        self.leads: dict[int, tuple[str, int]] = {}  # as the workers know it
        self.executed: Counter[str] = Counter()
        self.number = 0
        self.is_over = False
        self.is_calm = False

    async def start(self) -> Worker:
        self.number += 1
        name = f"w{self.number}"

        async def script(request: Request) -> None:
            await self.serve(name, request)

        return await self.here.start(name, script, idempotent=True, drain_timeout_s=1.0)

    async def serve(self, name: str, request: Request) -> None:
        if self.leads.get(request.shard) != (name, request.epoch):
            await asyncio.sleep(0.002)  # parked: the store's news may reach routers first
        chance = 1.0 if self.is_calm else self.rng.random()
        known = self.leads.get(request.shard, ("", 0))
        is_leading = known == (name, request.epoch)
        if not is_leading or chance < 0.05:
            reason = "suspended" if is_leading else self.rng.choice(["stale", "draining", "unknown", "suspended"])
            leader = ""
            if known[1] > request.epoch and known[0] in self.here.workers and self.rng.random() < 0.5:
                leader = f"{known[0]} {self.here.workers[known[0]].address} {known[1]}"
            if not request.expects_continue:
                await request.read_body()
            await request.refuse(reason, epoch=max(known[1], request.epoch) if leader else 0, leader=leader)
            if request.expects_continue:
                await request.close()
            return
        body = await request.read_body()
        assert len(body) == int(request.headers["x-size"])
        assert body == _body(len(body))
        if chance < 0.10:
            await request.close()  # before the handler, but who can know
            return
        self.executed[request.headers["x-id"]] += 1
        if chance < 0.15:
            await request.close()
        elif chance < 0.18:
            await request.answer(502, b"?", Shardlead_Outcome="unknown")
        elif chance < 0.25:
            await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await asyncio.sleep(0)
            await request.send(b"0\r\n\r\n")
        elif chance < 0.28:
            await asyncio.sleep(0.05)
            await request.answer(200, b"hello")
        else:
            await request.answer(200, b"hello")

    async def move(self) -> None:
        """Shards move, one or all of a worker's; workers come and go, in order or not."""
        here, rng = self.here, self.rng
        while not self.is_over:
            await asyncio.sleep(rng.uniform(0.0, 0.03))
            alive = [worker for worker in here.workers.values() if worker.name in here.view.map.workers]
            chance = rng.random()
            if chance < 0.1 or len(alive) < 2:
                await self.start()
            elif chance < 0.2 and len(alive) > 2:
                victim = rng.choice(alive)
                if rng.random() < 0.5:
                    await victim.stop()  # a crash: connections end, then the session does
                for shard in here.view.map.shards_of(victim.name):
                    self.leads.pop(shard, None)
                await here.gone(victim)
                await victim.stop()
            else:
                target = rng.choice(alive)
                shards = rng.sample(range(16), rng.randrange(1, 8))
                for shard in shards:
                    self.leads.pop(shard, None)  # draining
                epoch = await here.lead(target, *shards)
                self.leads |= dict.fromkeys(shards, (target.name, epoch))
            idle = [shard for shard in range(16) if here.view.map.leader(shard) is None]
            alive = [worker for worker in here.workers.values() if worker.name in here.view.map.workers]
            if idle and alive and rng.random() < 0.7:
                target = rng.choice(alive)
                epoch = await here.lead(target, *idle)
                self.leads |= dict.fromkeys(idle, (target.name, epoch))

    async def settle(self) -> None:
        """One worker leads all."""
        worker = await self.start()
        epoch = await self.here.lead(worker)
        self.leads = dict.fromkeys(range(16), (worker.name, epoch))


def _body(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


async def _use(world: World, name: str, rng: random.Random) -> None:
    """One client: requests of all kinds, and what their answers promise."""
    client = await world.here.client()
    count = 0
    while not world.is_over:
        count += 1
        number = f"{name}-{count}"
        method = rng.choice(["GET", "POST", "POST", "PUT"])
        size = 0 if method == "GET" else rng.choice([0, 10, 5_000, 65_536, 65_537, 400_000])
        headers = {"X_Id": number, "X_Size": str(size)}
        is_idempotent = method == "POST" and rng.random() < 0.3
        if is_idempotent:
            headers["Idempotency_Key"] = number
        data = request_bytes(method, f"/k/{rng.randrange(40)}", _body(size), **headers)
        sending = asyncio.create_task(client.send(data))
        if rng.random() < 0.05:
            await asyncio.sleep(rng.uniform(0, 0.02))
            client.leave()
            await asyncio.gather(sending, return_exceptions=True)
            client = await world.here.client()
            continue
        answer = await client.answer()
        await asyncio.gather(sending, return_exceptions=True)
        executed = world.executed[number]
        if answer.status == 200:
            assert answer.body == b"hello"
            assert executed >= 1
        elif answer.status == 503:
            assert method == "GET" or is_idempotent or executed == 0, f"{number} was told it was not processed"
        else:
            assert answer.status == 502
            assert answer.body == b"?" or answer.problem == "outcome-unknown"
        if method != "GET" and not is_idempotent:
            assert executed <= 1, f"{number} was executed {executed} times"
        if answer.headers.get("connection") == "close":
            client.leave()
            client = await world.here.client()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_answers_keep_their_word(seed: int, is_long: bool) -> None:
    """200: executed; exactly once unless twice is harmless. 503: not executed. 502: at most once. Afterwards nothing
    is left: no held request, no kept byte, no gate, no busy connection."""

    async def main(seed: int) -> None:
        rng = random.Random(seed)
        async with stage(hold_timeout_s=2.0) as here:
            world = World(here, rng)
            await world.settle()
            async with asyncio.TaskGroup() as tasks:
                for number in range(CLIENTS):
                    tasks.create_task(_use(world, str(number), random.Random(rng.random())))
                mover = tasks.create_task(world.move())
                await asyncio.sleep(SECONDS)
                world.is_over = True
                await mover
                await world.settle()
            counts, desk = here.router.counts, here.router.desk
            assert counts.answered > 0
            for client in here.clients:
                client.leave()
            await here.true(lambda: counts.client_connections == 0)
            await here.true(lambda: counts.held == 0 and counts.kept_bytes == 0)
            world.is_calm = True
            for key in range(40):
                assert (await here.ask("GET", f"/k/{key}", X_Size="0", X_Id="end")).status == 200
            await here.true(lambda: not desk.gates)
            await here.true(lambda: not any(pool.busy or pool.waiting for pool in desk.pools.values()))

    for each in range(seed, 40, 2) if is_long else (seed,):
        run(lambda each=each: main(each))  # type: ignore[misc]  # bound in this round
