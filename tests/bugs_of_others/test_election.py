"""Rows about elections: who may believe that a claim, a resignation or an old transaction has counted."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.cluster.answers import Claimed, Done, LedBy, Nobody, Undecided
from shardlead.cluster.bootstrap import ensure_shape
from shardlead.config import ClusterSettings, StoreSettings
from shardlead.core.keyspace import SHARD_DIGITS, Keyspace, Place
from shardlead.core.model import Want
from shardlead.core.ownership import Due
from shardlead.errors import WriteUnknown
from shardlead.fencing import EtcdFence
from shardlead.store import gateway
from shardlead.store.base import UNGUARDED, Delete, Put, Txn
from shardlead.store.etcd import EtcdStore
from shardlead.store.transport import Answer
from shardlead.worker.leadership import Leadership
from tests.cluster import stage as stages
from tests.cluster.stage import SHARDS, Actor, Stage
from tests.support.between import Between, Sent, held_for_ever, lost
from tests.support.etcd import EtcdCluster, etcd_server
from tests.worker.scene import SHORT, Player, Scene, Script, check, play

BOUND_S: Final = 30.0
OnStage = Callable[[Callable[[Stage], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["embedded", pytest.param("3.5", marks=pytest.mark.etcd)])
def on_stage(request: pytest.FixtureRequest) -> OnStage:
    return lambda scene: stages.play(request.param, scene)


@asynccontextmanager
async def meddled(actor: Actor) -> AsyncIterator[Between]:
    """From now on the actor's elections go through this."""
    stage = actor.stage
    between = Between(stage.settings)
    async with EtcdStore(stage.settings, clock=stage.clock, rng=random.Random(2), transport=between) as store:
        actor.vote_through(store)
        yield between


async def claimed(actor: Actor, shard: int) -> Claimed:
    answer = (await actor.election.claim([shard], "test"))[shard]
    assert isinstance(answer, Claimed), answer
    return answer


async def stands(stage: Stage, shard: int) -> tuple[int, int]:
    """(mod_revision, lease) of a shard's leader key; zeros for none."""
    kv = await stage.get(stage.keys.leader(shard))
    return (kv.mod_revision, kv.lease) if kv is not None else (0, 0)


async def by_hand(stage: Stage, *ops: Put | Delete) -> None:
    """UNGUARDED: what an administrator may do and nobody else."""
    await stage.store.commit(Txn(UNGUARDED, ops))


async def led_by_one(scene: Scene, *names: str, **settings: Any) -> list[Player]:
    """Workers w1 (which leads shard 0) and others, its successors."""
    players = [await scene.start(name, **settings) for name in ("w1", *names)]
    await scene.assign({0: ("w1", *names)})
    await scene.until_serving("w1", 0)
    return players


def is_write(scene: Scene, sent: Sent, shard: int) -> bool:
    """Whether it claims that shard or gives it up; looks name the leader or the history, and not both."""
    return sent.is_about(scene.keys.leader(shard), scene.keys.history(shard))


# --- claims ----------------------------------------------------------------------------------------------------------


def test_01_a_candidate_whose_session_ended_while_it_waited_does_not_lead() -> None:
    """etcd's `Campaign` returns "you are the leader" when those before it are gone, though its own session's lease has
    ended meanwhile and its key with it: a 12 hours' outage (cagriekin/charts #326, #327). Here the claim itself needs
    the session, and what is served stands in a key on a living lease."""

    async def act(scene: Scene) -> None:
        one, two = await led_by_one(scene, "w2", by={gateway.LEASE_KEYS: held_for_ever})
        lease, session = two.lease, two.worker.session
        assert session is not None
        two.transport.mute(scene.keys.meta, scene.keys.inbox("w2"))  # it does not hear of anything
        await two.transport.meddle(gateway.RENEW, held_for_ever)
        await scene.stage.store.revoke(lease)
        await one.kill()
        assert session.is_valid()  # so it believes
        two.host.feed(0, Due())  # and its turn has come
        await scene.until(lambda: session.is_lost, within_s=2.0)
        assert not scene.said("opening", "w2")
        two.transport.unmute()
        two.transport.by.clear()
        await scene.until(lambda: two.worker.is_ready and two.lease != lease)
        await scene.assign({0: ("w2",)})
        await scene.until_serving("w2", 0)
        kv = scene.kv(scene.keys.leader(0))
        assert kv is not None
        assert kv.lease == two.lease

    play("embedded", act)


@pytest.mark.parametrize("fate", ["answered late", "lost to another", "never answered"])
def test_26_nothing_is_opened_before_its_claim_is_acknowledged(fate: str) -> None:
    """fabric8's kubernetes-client (#7350) calls back "you lead" from what it has observed, before its compare-and-swap
    has succeeded: two leaders. Here the application's object is made when the claim was answered, and not before."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        answered, may_go_on = asyncio.Event(), asyncio.Event()

        async def holds(sent: Sent) -> Answer:
            answer = await one.transport.forward(sent)
            if is_write(scene, sent, 0) and not answered.is_set():
                answered.set()
                await may_go_on.wait()
                if fate == "never answered":
                    raise lost(sent)
            return answer

        if fate == "lost to another":
            other = await scene.stage.actor("w9")
            await claimed(other, 0)
        one.transport.by[gateway.TXN] = holds
        await scene.assign({0: ("w1",)})
        if fate == "lost to another":
            await scene.settle()
            assert scene.leader(0) == "w9"
            assert not scene.said("opening")
            return
        await asyncio.wait_for(answered.wait(), 5)
        await scene.settle()
        assert scene.leader(0) == "w1"  # everybody can see it
        assert not scene.said("opening")
        assert one.epoch(0) == 0
        may_go_on.set()
        await scene.until_serving("w1", 0)

    play("embedded", act)


def test_28_a_key_of_the_session_before_is_not_taken_for_ones_own(on_stage: OnStage) -> None:
    """Curator (CURATOR-653, -696, -537) takes an ephemeral node of its previous session for its own: it leads by a node
    that is about to vanish, beside the next leader. Here a record names the session, not only the worker, and neither
    claim nor proof nor audit of the next session takes it."""

    async def scene(stage: Stage) -> None:
        former = await stage.actor("w1")
        old = await claimed(former, 3)
        await by_hand(stage, Delete(stage.keys.worker("w1")))  # the name is free, and the old lease still lives
        now = await stage.actor("w1")
        answer = (await now.election.claim([3], "test"))[3]
        assert isinstance(answer, LedBy)
        assert answer.leader.sid == former.session.sid != now.session.sid
        proof = await now.leaders.confirm({3: old.revision})
        assert isinstance(proof, dict)
        assert isinstance(proof[3], LedBy)
        assert await now.leaders.audit() == {}
        await stage.store.revoke(former.session.lease)
        assert (await claimed(now, 3)).revision > old.revision

    on_stage(scene)


def test_28_a_check_that_was_under_way_when_its_session_was_replaced_says_nothing_of_the_next() -> None:
    """The same, where the answer to the old session's proof comes when there is a new one already."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_one(scene)
        session, lease, epoch, lead = one.worker.session, one.lease, scene.epoch(0), scene.lead(0)
        assert session is not None
        asked, may_go_on = asyncio.Event(), asyncio.Event()

        async def holds(sent: Sent) -> Answer:
            answer = await one.transport.forward(sent)
            if sent.is_about(scene.keys.worker("w1"), scene.keys.leader(0)) and not asked.is_set():
                asked.set()
                await may_go_on.wait()
            return answer

        one.transport.by[gateway.TXN] = holds
        session.doubt("the test")
        await asyncio.wait_for(asked.wait(), 5)
        session.lose("the test")
        await scene.until(lambda: one.worker.is_ready and one.lease != lease)
        may_go_on.set()
        await scene.settle()
        assert one.epoch(0) != epoch
        assert not lead.is_valid(0.0)
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0)
        assert scene.epoch(0) > epoch

    play("embedded", act)


# --- resignations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["lost on its way", "answer lost", "late"])
def test_21_a_resignation_that_failed_is_not_forgotten(on_stage: OnStage, fate: str) -> None:
    """etcd's `Resign` (#22123, #21128) forgets its key when the deletion fails: the next one returns at once and says
    nothing, and the key blocks the election until its lease ends. Here a failed one is undecided, a repeated one finds
    the key whatever became of the first, and a late first one harms nobody."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        async with meddled(one) as between:
            epoch = (await claimed(one, 3)).revision
            held: list[Sent] = []

            async def fails(sent: Sent) -> Answer:
                if held or not sent.is_about(stage.keys.leader(3)):
                    return await between.forward(sent)
                held.append(sent)
                if fate == "answer lost":
                    await between.forward(sent)
                raise lost(sent)

            between.by[gateway.TXN] = fails

            async def resign() -> object:
                return await one.passing.resign(3, epoch, (), is_clean=True, is_failure=False, why="test")

            assert isinstance(await resign(), Undecided)
            assert bool((await stands(stage, 3))[0]) == (fate != "answer lost")
            assert isinstance(await resign(), Done | Nobody)
            assert await stands(stage, 3) == (0, 0)
            standing = (await claimed(two, 3)).revision, two.session.lease
            if fate == "late":
                await between.forward(held[0])
            assert await stands(stage, 3) == standing

    on_stage(scene)


@pytest.mark.parametrize("fate", ["lost on its way", "answer lost"])
def test_21_a_worker_repeats_a_resignation_until_it_is_decided(fate: str) -> None:
    """The same for a whole worker that gives up one shard and lives on, so that no lease's end removes the key."""

    async def act(scene: Scene) -> None:
        broken = asyncio.Event()

        async def run(_lead: Leadership) -> None:
            await broken.wait()
            if len(scene.said("run")) == 1:
                raise OSError("the test")
            await asyncio.Event().wait()

        (one,) = await led_by_one(scene, script=Script(run=run))
        lease, epoch, failures = one.lease, scene.epoch(0), [0]

        async def fails(sent: Sent) -> Answer:
            if not is_write(scene, sent, 0) or failures[0] == 3:
                return await one.transport.forward(sent)
            failures[0] += 1
            if fate == "answer lost":
                await one.transport.forward(sent)
            raise lost(sent)

        one.transport.by[gateway.TXN] = fails
        broken.set()
        await scene.until(lambda: scene.epoch(0) != epoch, within_s=3.0)  # gone
        await scene.until(lambda: scene.epoch(0) > epoch and scene.is_serving("w1", 0), within_s=5.0)
        assert failures[0] == 3
        assert one.lease == lease

    play("embedded", act)


@pytest.mark.etcd
@pytest.mark.parametrize("deed", ["resign", "hand off", "re-mint", "write"])
def test_22_a_transaction_of_an_earlier_term_of_the_same_worker_fails(deed: str) -> None:
    """tikv/pd compares the leader by its value, which is the same in each term of one member: a transaction of an older
    term passes in a later one. Here each compares the epoch. It was sent in the first term, the shard was lost and won
    again, and then it arrives."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        data = b"/data/"
        async with meddled(one) as between:
            old = (await claimed(one, 3)).revision
            held: list[Sent] = []

            async def holds(sent: Sent) -> Answer:
                if is_holding and sent.is_about(stage.keys.leader(3)):
                    held.append(sent)
                    raise lost(sent)
                return await between.forward(sent)

            is_holding = False
            between.by[gateway.TXN] = holds
            match deed:
                case "resign":
                    is_holding = True
                    await one.passing.resign(3, old, (), is_clean=True, is_failure=False, why="test")
                case "re-mint":
                    is_holding = True
                    await one.passing.remint(3, old)
                case "hand off":
                    holder = (await two.leaders.read([3]))[3]
                    assert isinstance(holder, LedBy)
                    await two.courier.want({3: holder}, 0, "test")
                    kv = await stage.get(stage.keys.want("w1", 3))
                    assert kv is not None
                    want = Want("w2", two.session.sid, two.session.lease, old, "test")
                    target = await two.member()
                    is_holding = True
                    await one.passing.hand_off(3, old, want, kv.mod_revision, target, is_clean=True)
                case _:
                    lead = Leadership(3, old, "w1", one.session)
                    fence = EtcdFence(one.election._store, stage.keys, data)
                    await fence.barrier(lead)
                    is_holding = True
                    with pytest.raises(WriteUnknown):
                        await fence.write(lead, Put(data + b"balance", b"7"))
            is_holding = False
            assert len(held) == 1
            await by_hand(stage, Delete(stage.keys.leader(3)))  # lost,
            standing = (await claimed(one, 3)).revision, one.session.lease  # and won again by the same session
            answer = await between.forward(held[0])
            assert answer.status == 200
            assert "succeeded" not in orjson.loads(answer.body)
            assert await stands(stage, 3) == standing
            assert await stage.get(data + b"balance") is None

    stages.play("3.5", scene)


# --- what a record says of the term before ---------------------------------------------------------------------------


def test_25_a_clean_end_is_the_mark_of_one_term_and_not_of_the_next(on_stage: OnStage) -> None:
    """dynamodb-lock-client left `isReleased` on the record when a released lock was taken over, so that the new owner's
    did not count as held. Here the mark of a clean end goes with the next claim, though that term says no more."""

    async def scene(stage: Stage) -> None:
        one, two, three = [await stage.actor(f"w{number}") for number in (1, 2, 3)]
        first = await claimed(one, 3)
        await one.passing.resign(3, first.revision, (), is_clean=True, is_failure=False, why="stop")
        assert (await claimed(two, 3)).is_clean
        assert isinstance((await three.election.claim([3], "test"))[3], LedBy)  # it counts as held
        await stage.store.revoke(two.session.lease)
        assert not (await claimed(three, 3)).is_clean

    on_stage(scene)


def test_25_who_does_not_wait_gets_a_dead_holders_shard_by_asking_again(on_stage: OnStage) -> None:
    """dynamodb-lock-client's callers that do not wait never get a dead owner's lock, since each try begins to watch it
    anew. Here the store itself ends a lease: the first try after that succeeds."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        await claimed(one, 3)
        for _ in range(5):
            assert isinstance((await two.election.claim([3], "test"))[3], LedBy)
        await stage.store.revoke(one.session.lease)
        await claimed(two, 3)

    on_stage(scene)


NAMES: Final = st.text("abc.-_12", min_size=1, max_size=4).filter(lambda name: name[0] not in ".-_")
SHARD_NUMBERS: Final = st.integers(0, 10**SHARD_DIGITS - 1)
PLACES: Final = st.one_of(
    st.builds(Place, st.sampled_from(["leaders", "history", "pin"]), shard=SHARD_NUMBERS),
    st.builds(Place, st.sampled_from(["workers", "cordon", "drain", "eviction"]), worker=NAMES),
    st.builds(Place, st.sampled_from(["assignments", "offers", "wants"]), worker=NAMES, shard=SHARD_NUMBERS),
)
CLUSTERS: Final = st.text("ab-1", min_size=1, max_size=3).filter(lambda name: name.isalnum())


def key_of(cluster: str, place: Place) -> bytes:
    keys = Keyspace(cluster)
    match place.kind:
        case "leaders":
            return keys.leader(place.shard)
        case "history":
            return keys.history(place.shard)
        case "pin":
            return keys.pin(place.shard)
        case "workers":
            return keys.worker(place.worker)
        case "cordon" | "drain" | "eviction":
            return bytes(getattr(keys, place.kind)(place.worker))
        case kind:
            return bytes(getattr(keys, kind.removesuffix("s"))(place.worker, place.shard))


@given(CLUSTERS, PLACES, CLUSTERS, PLACES)
def test_25_two_places_never_have_one_key(cluster: str, place: Place, other_cluster: str, other: Place) -> None:
    """dynamodb-lock-client joins the parts of a lock's id, so that "ab" + "c" is "a" + "bc": two locks are one. Here
    parts are parted, and numbers have one width: keys are equal only where all parts are."""
    key, other_key = key_of(cluster, place), key_of(other_cluster, other)
    assert (key == other_key) == ((cluster, place) == (other_cluster, other))
    assert Keyspace(cluster).parse(key) == place


# --- a claim that was applied after all ------------------------------------------------------------------------------


STOPPED_S: Final = {"leader": 2.0, "follower": 0.6}
FORGOTTEN_S: Final = 1.0  # a former leader may drop what it had been told, and says so only seconds later


@pytest.fixture(scope="module")
def three_members() -> Iterator[EtcdCluster]:
    with etcd_server("3.5", members=3) as cluster:
        yield cluster


@pytest.mark.etcd
@pytest.mark.parametrize("who", ["leader", "follower"])
def test_35_a_claim_that_was_applied_after_it_was_given_up_is_served_or_freed(
    three_members: EtcdCluster, who: str
) -> None:
    """Seen with a real etcd: a member is stopped with a claim under way, the claim times out, another member says that
    the key is absent, the first goes on, and the key is there, in two of ten tries. Whoever believed the absence leaves
    a shard that everybody takes for led and nobody serves. Here the claim is repeated until it is decided, and what
    stands on a worker's lease unknown to it is found by its audit."""
    leader = three_members.leader()
    frozen = leader if who == "leader" else next(member for member in three_members.members if member is not leader)
    others = tuple(url for url in three_members.endpoints if url != frozen.url)
    cluster = ClusterSettings(name=f"row-35-{who}", shards=SHARDS)
    shards = range(4)

    async def main() -> None:
        built = Stage(frozen.url)
        built.keys = Keyspace(cluster.name)
        built.settings = StoreSettings(endpoints=(frozen.url, *others), try_timeout_s=0.3, call_timeout_s=2.0)
        built.store = EtcdStore(StoreSettings(endpoints=others), clock=built.clock, rng=random.Random(1))
        async with asyncio.timeout(BOUND_S), built.store:
            built.shape = await ensure_shape(built.store, built.keys, cluster)
            async with Scene(built).playing() as scene:
                one = await scene.start("w1", lease=SHORT, cluster=cluster)
                claims: list[Sent] = []
                late: list[asyncio.Task[Answer]] = []
                until_s: list[float] = []
                loop = asyncio.get_running_loop()

                async def stops_the_member(sent: Sent) -> Answer:
                    if not is_write(scene, sent, 0):
                        return await one.transport.forward(sent)
                    claims.append(sent)
                    if len(claims) == 1:
                        frozen.freeze()
                        loop.call_later(STOPPED_S[who], frozen.thaw)
                        goes_there = replace(sent, endpoint=frozen.url, timeout_s=BOUND_S)
                        late.append(asyncio.create_task(one.transport.forward(goes_there)))
                        until_s.append(loop.time() + STOPPED_S[who] + FORGOTTEN_S)
                    if not late[0].done() and loop.time() < until_s[0]:
                        # given up, and nobody else's try decides it before this one does
                        await asyncio.sleep(sent.timeout_s)
                        raise lost(sent)
                    return await one.transport.forward(sent)

                one.transport.by[gateway.TXN] = stops_the_member
                await scene.assign(dict.fromkeys(shards, ("w1",)))
                await scene.until_serving("w1", *shards, within_s=STOPPED_S[who] + SHORT.ttl_s * 1.1 + 5.0)
                if who == "follower":  # a leader that is one no more when it goes on may answer with an error
                    assert "succeeded" in orjson.loads(late[0].result().body), "the trap has not sprung"
                assert len(claims) > 1
                check(scene)

    asyncio.run(main())
