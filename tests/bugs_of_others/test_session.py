"""Rows about leases and their deadlines: who believes for how long that it leads."""

import ast
import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.session import Session
from shardlead.config import LeaseSettings, StoreSettings
from shardlead.core.keyspace import Keyspace
from shardlead.core.lease import Active, Lost, State, Suspended
from shardlead.errors import LeadershipLost
from shardlead.store import gateway
from shardlead.store.base import Delete
from shardlead.store.etcd import EtcdStore
from shardlead.store.transport import Answer, Channel, Stream, TransportError
from shardlead.virtual import VirtualLoop
from shardlead.worker.leadership import Leadership
from tests.cluster.stage import LEASE, SteppedClock
from tests.simulation.world import Setup, World
from tests.store.fake_gateway import FakeGateway, Reply, Request, Script, header
from tests.support.between import Sent, held_for_ever
from tests.worker import scene as scenes
from tests.worker.scene import SHORT, Player, Scene, play

SHARDLEAD: Final = Path(__file__).parents[2] / "shardlead"
BOUND_S: Final = 20.0
OFTEN: Final = replace(LEASE, renew_interval_s=0.05)


def session_on(store: EtcdStore, clock: Clock, *, ttl_s: int = 5, lease: LeaseSettings = LEASE) -> Session:
    """A session whose lease 7 was granted this instant."""
    return Session(
        store,
        Keyspace("test"),
        lease,
        clock=clock,
        rng=random.Random(1),
        name="w1",
        sid="7-1",
        lease=7,
        ttl_s=ttl_s,
        sent_ns=clock.now_ns(),
    )


@asynccontextmanager
async def running(session: Session) -> AsyncIterator["asyncio.Queue[State]"]:
    """Its life, and the states that it goes through."""
    states: asyncio.Queue[State] = asyncio.Queue()
    session.on_change = states.put_nowait
    task = asyncio.create_task(session.run())
    try:
        async with asyncio.timeout(BOUND_S):
            yield states
    finally:
        task.cancel()
        await asyncio.wait({task})


def renewed(ttl_s: int) -> dict[str, Any]:
    """How a gateway answers a renewal; it leaves a zero out."""
    ttl = {"TTL": str(ttl_s)} if ttl_s else {}
    return {"result": {"header": header(3), "ID": "7", **ttl}}


def store_at(url: str, clock: Clock) -> EtcdStore:
    own = StoreSettings(endpoints=(url,), try_timeout_s=0.2)
    return EtcdStore(own, clock=clock, rng=random.Random(1))


def with_renewals(script: Script, body: Callable[[FakeGateway, Session], Coroutine[Any, Any, None]]) -> None:
    """A session that asks often for renewals, on a store that answers them by that script."""

    async def main() -> None:
        clock = SteppedClock()
        async with FakeGateway() as server, store_at(server.url, clock) as store, asyncio.timeout(BOUND_S):
            server.on(gateway.RENEW, script)
            await body(server, session_on(store, clock, lease=OFTEN))

    asyncio.run(main())


# --- what an acknowledgement is worth --------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_s", [2.0, 60.0], ids=["for less than the TTL", "for longer"])
def test_02_an_acknowledgement_that_was_read_after_a_freeze_counts_from_before_its_request(frozen_s: float) -> None:
    """etcd's Go client, KCL, etcd3-py count the deadline from an acknowledgement's receipt: one that waited in the
    socket while the process stood still brings a dead lease to life. Here it is as old as its request."""

    async def main() -> None:
        clock = SteppedClock()

        async def renewals(_request: Request, reply: Reply) -> None:
            if len(server.asked(gateway.RENEW)) == 1:
                clock.jump(frozen_s)  # nothing ran, and the answer lies in the socket
                await reply.json(renewed(5))
            else:
                await reply.until_closed()

        async with FakeGateway() as server, store_at(server.url, clock) as store:
            server.on(gateway.RENEW, renewals)
            session = session_on(store, clock, lease=OFTEN)
            async with running(session) as states:
                assert session.is_valid()
                await server.has_been_asked(gateway.RENEW, 2)  # so the first answer has been read and applied
                if frozen_s > 5.0:
                    assert not session.is_valid()
                    assert isinstance(await states.get(), Suspended)
                    assert states.empty()
                else:
                    assert session.is_valid()
                    assert session.remaining_s() < 5.0 - frozen_s

    asyncio.run(main())


class HandClock:
    """A clock that goes by hand."""

    def __init__(self) -> None:
        self.at_ns = 1_000 * NS_PER_S

    def now_ns(self) -> int:
        return self.at_ns

    def wall_s(self) -> float:
        return self.at_ns / NS_PER_S


def test_03_the_guard_is_false_at_the_deadline_to_the_nanosecond_and_needs_no_timer() -> None:
    """etcd's Go client tells of a lost lease when a reaper comes by, once a second, by a closed channel. Here no task
    has to run: whoever asks compares with the clock."""
    clock = HandClock()
    store = EtcdStore(StoreSettings(), clock=clock, rng=random.Random(1))
    session = session_on(store, clock)
    lead = Leadership(0, 1, "w1", session)
    deadline_ns = clock.at_ns + int(5 * 0.99 * NS_PER_S) - NS_PER_S // 2
    clock.at_ns = deadline_ns - 1
    assert session.is_valid()
    assert lead.is_valid(0.0)
    assert not lead.is_valid(need_s=0.05)
    clock.at_ns = deadline_ns
    assert not session.is_valid()
    assert not lead.is_valid(0.0)
    with pytest.raises(LeadershipLost):
        lead.check(0.0)


@pytest.mark.parametrize("ttl", [{}, {"TTL": "0"}, {"TTL": "-1"}])
def test_15_a_renewal_that_is_answered_without_a_ttl_is_the_end_at_once(ttl: Mapping[str, str]) -> None:
    """etcd3-py (#96) takes any answer for success; etcd's gateway leaves a TTL of zero out, which says that the lease
    is gone. Here the session is lost with that answer, long before its deadline."""

    async def renewals(_request: Request, reply: Reply) -> None:
        await reply.json({"result": {"header": header(3), "ID": "7", **ttl}})

    async def body(server: FakeGateway, session: Session) -> None:
        async with running(session) as states:
            assert isinstance(await states.get(), Lost)
            assert not session.is_valid()
            assert len(server.asked(gateway.RENEW)) == 1

    with_renewals(renewals, body)


async def _nothing(_request: Request, reply: Reply) -> None:
    await reply.until_closed()


async def _cut(_request: Request, reply: Reply) -> None:
    reply.abort()


def _says(raw: object, status: int = 200) -> Script:
    async def script(_request: Request, reply: Reply) -> None:
        await reply.json(raw, status)

    return script


NO_ACKNOWLEDGEMENTS: Final[Mapping[str, Script]] = {
    "503": _says({}, 503),
    "no leader": _says({"error": "etcdserver: no leader", "code": 14}, 503),
    "timed out": _says({"error": "context deadline exceeded", "code": 2}, 500),
    "unauthenticated": _says({"error": "etcdserver: invalid auth token", "code": 16}, 401),
    "permission denied": _says({"error": "etcdserver: permission denied", "code": 7}, 403),
    "error in the stream": _says({"error": {"grpc_code": 14, "message": "etcdserver: no leader"}}),
    "no object": _says([]),
    "no result": _says({}),
    "of another lease": _says({"result": {"header": header(3), "ID": "8", "TTL": "5"}}),
    "of no lease": _says({"result": {"header": header(3), "TTL": "5"}}),
    "the end of another lease": _says({"result": {"header": header(3), "ID": "8"}}),
    "a TTL that is no number": _says({"result": {"header": header(3), "ID": "7", "TTL": "many"}}),
    "silence": _nothing,
    "cut": _cut,
}


@pytest.mark.parametrize("name", NO_ACKNOWLEDGEMENTS)
def test_24_nothing_but_an_acknowledgement_moves_the_deadline(name: str) -> None:
    """dynamodb-lock-client (`holdLockOnServiceUnavailable`) prolongs a lease by itself where the service does not
    answer. Here no answer but the store's own, with a TTL, moves the deadline; none of the others ends the session
    either."""

    async def body(server: FakeGateway, session: Session) -> None:
        before = session.state
        async with running(session):
            await server.has_been_asked(gateway.RENEW, 3)
            assert session.state is before

    with_renewals(NO_ACKNOWLEDGEMENTS[name], body)


def test_24_only_an_answer_of_the_store_can_make_a_session_active() -> None:
    """By type: `Active`, the only state with a deadline, is made in `core.lease` alone, from a grant, an acknowledged
    renewal or a confirmed one."""
    makers = set()
    for path in sorted(SHARDLEAD.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if Active.__name__ not in text:
            continue
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
                if any(getattr(called, "id", getattr(called, "attr", "")) == Active.__name__ for called in calls):
                    makers.add(f"{path.relative_to(SHARDLEAD).as_posix()}:{function.name}")
    assert makers == {"core/lease.py:opened", "core/lease.py:renewed", "core/lease.py:confirmed"}


# --- any TTL, any failure, at any step ------------------------------------------------------------------------------

Step = int | str  # the TTL that is granted anew, or how the try fails
LIVED_S: Final = 8.0
TURNS_MAX: Final = 3_000


class Scripted:
    """A `Transport` in virtual time whose renewals go by a list; when it is at its end, they go well."""

    def __init__(self, steps: Sequence[Step], ttl_s: int, clock: Clock) -> None:
        self.steps = list(steps)
        self.until_ns = 0  # what the best acknowledgement so far allows, and the grant
        self.is_refused = False
        self._ttl_s = ttl_s
        self._clock = clock

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        assert path == gateway.RENEW
        step = self.steps.pop(0) if self.steps else self._ttl_s
        began_ns = self._clock.now_ns()
        await asyncio.sleep(0.001)
        if isinstance(step, int):
            self.is_refused = self.is_refused or step == 0
            self.until_ns = max(self.until_ns, began_ns + step * NS_PER_S)
            return Answer(200, orjson.dumps(renewed(step)))
        match step:
            case "error":
                return Answer(503, b'{"error": "etcdserver: no leader", "code": 14}')
            case "cut":
                raise TransportError("cut", is_sent=True)
            case _:
                await asyncio.sleep(timeout_s)
                raise TransportError("no answer", is_sent=True)

    async def stream(
        self, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Stream:
        raise AssertionError("a session watches nothing")

    async def close(self) -> None:
        pass


STEPS: Final = st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["error", "cut", "silence"])), max_size=8)


@settings(max_examples=60)
@given(granted=st.integers(0, 3), steps=STEPS, seed=st.integers(0, 99))
def test_14_any_small_ttl_and_a_failure_at_any_step_end_the_belief_and_spin_nothing(
    granted: int, steps: list[Step], seed: int
) -> None:
    """FISCO-BCOS (#5265, FIB-173, FIB-176) keeps its leadership after a failed renewal, and its timers underflow with a
    TTL of 0 or 1. Here the guard is never true later than what was acknowledged allows, an answer without a TTL ends
    the session for good, and no TTL makes a loop that does not wait."""
    loop = VirtualLoop(seed)
    machine = loop.machine("w1", offset_s=1_000.0)
    transport = Scripted(steps, granted, machine.clock)
    transport.until_ns = machine.now_ns() + granted * NS_PER_S
    own = StoreSettings(try_timeout_s=0.4)
    store = EtcdStore(own, clock=machine.clock, rng=random.Random(seed), transport=transport)

    async def life() -> None:
        session = session_on(store, machine.clock, ttl_s=granted, lease=SHORT)
        async with running(session):
            until_ns = machine.now_ns() + int(LIVED_S * NS_PER_S)
            while machine.now_ns() < until_ns:
                if session.is_valid():
                    assert not transport.is_refused
                    assert machine.now_ns() < transport.until_ns
                await asyncio.sleep(0.02)
            assert session.is_lost == transport.is_refused

    try:
        loop.run_until_complete(machine.spawn(life()))
        assert loop.errors == []
        assert loop.steps < TURNS_MAX
    finally:
        loop.abandon()


# --- a worker that should stop, or cannot ---------------------------------------------------------------------------


async def leading(scene: Scene, *shards: int, **settings: Any) -> Player:
    """Worker w1, leading these shards."""
    one = await scene.start("w1", **settings)
    await scene.assign(dict.fromkeys(shards, ("w1",)))
    await scene.until_serving("w1", *shards)
    return one


async def until_replaced(scene: Scene, player: Player, lease: int, within_s: float) -> None:
    """Until that worker has given up the session of that lease and has another one."""
    await scene.until(lambda: player.worker.session is not None and player.lease != lease, within_s)


async def always_renewed(player: Player) -> None:
    """From now on this worker hears that its lease was renewed, whatever its store says."""

    async def acknowledged(sent: Sent) -> Answer:
        lease = orjson.loads(sent.body)["ID"]
        raw = {"result": {"header": {"revision": "1"}, "ID": lease, "TTL": "60"}}
        return Answer(200, orjson.dumps(raw))

    await player.transport.meddle(gateway.RENEW, acknowledged)


def deafen(scene: Scene, player: Player) -> None:
    """From now on this worker's watches tell nothing."""
    player.transport.mute(scene.keys.meta, scene.keys.inbox(player.name))


@pytest.mark.parametrize("told_by", ["watch", "audit"])
def test_05_keys_that_are_gone_while_their_lease_is_still_renewed_are_missed_within_a_ttl(told_by: str) -> None:
    """etcd (#14758, #21389) deletes a revoked lease's keys before the lease, and acknowledges renewals in between. Here
    the watch tells it in milliseconds, and if that says nothing, the audit within one TTL."""

    async def act(scene: Scene) -> None:
        one = await leading(scene, 0, 1, lease=SHORT if told_by == "audit" else scenes.LEASE)
        lead, lease = scene.lead(0), one.lease
        if told_by == "audit":
            deafen(scene, one)
        await scene.write(Delete(scene.keys.worker("w1")), Delete(scene.keys.leader(0)), Delete(scene.keys.leader(1)))
        within_s = 2.0 if told_by == "watch" else SHORT.ttl_s * 1.1 + 1.0
        await scene.until(lambda: not lead.is_valid(0.0), within_s)
        one.transport.unmute()
        await until_replaced(scene, one, lease, within_s=3.0)

    play("embedded", act)


def test_06_a_renewal_of_a_revoked_lease_that_succeeds_is_found_out_by_the_next_proof() -> None:
    """etcd before 3.4.38, 3.5.23 and 3.6.5 (#20590) renews leases that were revoked. Here a doubt is settled by a
    transaction that needs the lease itself, and the session is lost, whatever renewals say."""

    async def act(scene: Scene) -> None:
        one = await leading(scene, 0, by={gateway.LEASE_KEYS: held_for_ever})  # no audit tells it
        lead, lease, session = scene.lead(0), one.lease, one.worker.session
        assert session is not None
        deafen(scene, one)
        await always_renewed(one)
        await scene.stage.store.revoke(lease)
        assert lead.is_valid()
        session.doubt("the test")
        assert not lead.is_valid()
        await scene.until(lambda: session.is_lost, within_s=3.0)
        one.transport.unmute()
        one.transport.by.clear()
        await until_replaced(scene, one, lease, within_s=3.0)
        assert not lead.is_valid()

    play("embedded", act)


def test_23_a_worker_whose_loop_hangs_loses_its_shards_to_the_others() -> None:
    """tikv/pd (#10671, #11106) and lavinmq (#2151) renew from a healthy path while the work hangs, and nobody takes
    over for 48 minutes. Here renewals run on the loop that does the work: what hangs is replaced after its lease."""
    world = World(1, Setup(clients=0))

    async def story() -> None:
        await world.begin()
        victim = world.workers["w1"]
        led = [shard for shard in range(world.shards) if leader_of(world, shard) == "w1"]
        assert led
        victim.pause()
        until_ns = world.loop.true_ns() + (world.setup.ttl_s + 3) * NS_PER_S
        while any(leader_of(world, shard) in ("", "w1") for shard in led):
            assert world.loop.true_ns() < until_ns, "nobody has taken over"
            await asyncio.sleep(0.1)
        assert await world.until_whole(3.0)
        victim.resume()
        assert await world.until_whole(5.0)

    try:
        world.loop.run_until_complete(story())
    finally:
        world.abandon()
    assert world.witness.violations == []


def leader_of(world: World, shard: int) -> str:
    kv = world.etcd.get(world.keyspace.leader(shard))
    return str(orjson.loads(kv.value)["worker"]) if kv is not None else ""


def test_27_a_renewal_that_hangs_does_not_put_off_the_end_of_the_work() -> None:
    """Kubernetes' client-go (#23731, #65094) waits for a hanging renewal beyond the lease's end, and stops nothing.
    Here the work is cancelled when the deadline comes, and that is before anybody else can lead."""

    async def act(scene: Scene) -> None:
        one = await leading(scene, 0, lease=SHORT)
        await scene.start("w2", lease=SHORT)
        await scene.assign({0: ("w1", "w2")})
        lead, session = scene.lead(0), one.worker.session
        assert session is not None

        async def request() -> None:
            async with one.request(0):
                await asyncio.Event().wait()

        await one.transport.meddle(gateway.RENEW, held_for_ever)
        work = asyncio.create_task(request())
        await asyncio.sleep(session.remaining_s())  # there is nothing else to wait for: nothing happens before
        assert not lead.is_valid(0.0)
        await asyncio.wait({work}, timeout=5.0)
        assert isinstance(work.exception(), LeadershipLost)
        assert scene.leader(0) == "w1"
        del one.transport.by[gateway.RENEW]
        await scene.until_serving("w2", 0)

    play("embedded", act)


def test_29_a_leaders_own_work_is_interrupted_when_its_session_is_lost() -> None:
    """kazoo (`election.run`) and libkv (#156) let the leader's function run on when the session is gone, and the lock
    says that it is held. Here `run()` is cancelled in milliseconds and the guard is false by then."""

    async def act(scene: Scene) -> None:
        guards: list[bool] = []

        async def run(lead: Leadership) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                guards.append(lead.is_valid(0.0))

        one = await leading(scene, 0, script=scenes.Script(run=run))
        await scene.until(lambda: scene.said("run"))
        await scene.stage.store.revoke(one.lease)
        await scene.until(lambda: scene.said("ran"), within_s=2.0)
        assert guards == [False]

    play("embedded", act)
