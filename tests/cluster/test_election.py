"""T1, T3, T4, T5, T5s and the audit, on the embedded store and on a real etcd."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shardlead.cluster.answers import Claimed, Done, LedBy, Nobody, NotYet, SessionOver, TargetGone
from shardlead.cluster.batch import BATCH
from shardlead.config import LeaseSettings
from shardlead.core import duties
from shardlead.core.keyspace import decode, encode
from shardlead.core.model import Eviction, History, Offer, Want
from shardlead.store.base import UNGUARDED, Delete, Outcome, Put, Txn
from shardlead.store.etcd import EtcdStore
from tests.cluster.stage import LEASE, Actor, Stage, play

Play = Callable[[Callable[[Stage], Coroutine[Any, Any, None]]], None]
LONG = LeaseSettings(ttl_s=9, renew_interval_s=0.5, margin_s=0.5)


@pytest.fixture(params=["embedded", pytest.param("3.5", marks=pytest.mark.etcd)])
def on_stage(request: pytest.FixtureRequest) -> Play:
    return lambda scene: play(request.param, scene)


async def claimed(actor: Actor, shard: int) -> Claimed:
    answer = (await actor.election.claim([shard], "test"))[shard]
    assert isinstance(answer, Claimed)
    return answer


async def want_of(target: Actor, owner: Actor, shard: int) -> tuple[Want, int]:
    """`target` wants a shard; the want as it stands in the owner's inbox."""
    leaders = await target.leaders.read([shard])
    holder = leaders[shard]
    assert isinstance(holder, LedBy)
    assert await target.courier.want({shard: holder}, 0, "test") == {shard}
    key = target.stage.keys.want(owner.session.name, shard)
    kv = await target.stage.get(key)
    assert kv is not None
    return decode(Want, key, kv.value), kv.mod_revision


def test_a_claim_gives_each_shard_one_leader_whose_epoch_is_the_keys_revision(on_stage: Play) -> None:
    """The second claimant is told who leads; a repeated claim of the first is success with the same epoch."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        answers = await one.election.claim(range(SHARD_COUNT), "test")
        revisions = {answer.revision for answer in answers.values() if isinstance(answer, Claimed)}
        assert len(revisions) == 1  # one transaction, one revision
        kv = await stage.get(stage.keys.leader(3))
        assert kv is not None
        assert {kv.mod_revision} == revisions
        assert kv.lease == one.session.lease
        lost = await two.election.claim([3], "test")
        assert isinstance(lost[3], LedBy)
        assert lost[3].leader.worker == "w1"
        again = await one.election.claim([3], "test")
        assert isinstance(again[3], Claimed)
        assert again[3].revision == kv.mod_revision

    on_stage(scene)


SHARD_COUNT = BATCH


class Meanwhile(EtcdStore):
    """A store whose answer to the next nested transaction comes after something else has happened."""

    then: Callable[[], Coroutine[Any, Any, None]] | None = None

    async def commit(self, txn: Txn) -> Outcome:
        outcome = await super().commit(txn)
        if self.then is not None and any(isinstance(op, Txn) for op in txn.success):
            then, self.then = self.then, None
            await then()
        return outcome


def test_a_claim_is_answered_though_the_shard_was_given_up_meanwhile(on_stage: Play) -> None:
    """An earlier try of it was found, served and resigned before the answer to a later try came."""

    async def scene(stage: Stage) -> None:
        one = await stage.actor("w1")
        async with Meanwhile(stage.settings, clock=stage.clock, rng=stage.rng) as store:
            one.vote_through(store)
            first = await claimed(one, 3)

            async def resign() -> None:
                done = await one.passing.resign(3, first.revision, (), is_clean=True, is_failure=False, why="test")
                assert isinstance(done, Done)

            store.then = resign
            late = await claimed(one, 3)
            assert late.revision == first.revision

    on_stage(scene)


@pytest.mark.parametrize("obstacle", ["evicted", "record gone", "meta changed"])
def test_a_session_that_is_over_claims_nothing(on_stage: Play, obstacle: str) -> None:
    """An eviction, a missing record or another meta: the claim is refused whole, and the session is over."""

    async def scene(stage: Stage) -> None:
        one = await stage.actor("w1")
        match obstacle:
            case "evicted":
                order = Eviction(sid=one.session.sid, by="test", reason="test")
                write: Put | Delete = Put(stage.keys.eviction("w1"), encode(order))
            case "record gone":
                write = Delete(stage.keys.worker("w1"))
            case _:
                write = Put(stage.keys.meta, encode(stage.shape.meta))
        await stage.store.commit(Txn(UNGUARDED, (write,)))  # the test's own hand, as an operator's
        answers = await one.election.claim([3], "test")
        assert isinstance(answers[3], SessionOver)
        assert await stage.get(stage.keys.leader(3)) is None

    on_stage(scene)


def test_a_handoff_moves_leader_epoch_and_offer_in_one_revision(on_stage: Play) -> None:
    """The new leader reads its epoch off its offer; the old one's end does not touch it (protocol A.2, A.3 T5)."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        epoch = (await claimed(one, 3)).revision
        want, want_revision = await want_of(two, one, 3)
        assert want.epoch_seen == epoch
        answer = await one.passing.hand_off(3, epoch, want, want_revision, await two.member(), is_clean=True)
        assert isinstance(answer, Done)
        leader, offer = await stage.get(stage.keys.leader(3)), await stage.get(stage.keys.offer("w2", 3))
        assert leader is not None
        assert offer is not None
        assert leader.mod_revision == offer.mod_revision == answer.revision > epoch
        assert decode(Offer, offer.key, offer.value).handoff
        assert await stage.get(stage.keys.want("w1", 3)) is None
        repeated = await one.passing.hand_off(3, epoch, want, want_revision, await two.member(), is_clean=True)
        assert repeated == answer  # an outcome that was unknown is found out by asking again
        await one.session.close()
        assert await stage.get(stage.keys.leader(3)) == leader

    on_stage(scene)


@pytest.mark.parametrize("fate", ["died", "withdrew", "stopping"])
def test_a_handoff_whose_target_is_gone_leaves_the_shard_with_its_leader(on_stage: Play, fate: str) -> None:
    """Nothing is applied; T5s then gives the old leader a new epoch in place."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        epoch = (await claimed(one, 3)).revision
        want, want_revision = await want_of(two, one, 3)
        target = await two.member()
        match fate:
            case "died":
                await two.session.close()
            case "withdrew":
                await two.courier.withdraw(3, "w1")
            case _:
                assert two.session.record is not None
                record = target.record.__class__(sid=target.record.sid, address="x:1", state="draining")
                assert await two.session.announce(record)
                target = await two.member()
        answer = await one.passing.hand_off(3, epoch, want, want_revision, target, is_clean=True)
        assert isinstance(answer, TargetGone)
        minted = await one.passing.remint(3, epoch)
        assert isinstance(minted, Done)
        assert minted.revision > epoch
        assert await one.passing.remint(3, epoch) == minted  # found out by asking again
        late = await one.passing.hand_off(3, epoch, want, want_revision, target, is_clean=True)
        assert isinstance(late, LedBy | TargetGone)  # exactly one of T5 and T5s applies
        holder = (await one.leaders.read([3]))[3]
        assert isinstance(holder, LedBy)
        assert (holder.leader.worker, holder.revision) == ("w1", minted.revision)

    on_stage(scene)


def test_a_target_that_rewrote_its_record_still_gets_the_shard(on_stage: Play) -> None:
    """A conflict on the target's mod_revision alone is read again and sent again."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        epoch = (await claimed(one, 3)).revision
        want, want_revision = await want_of(two, one, 3)
        seen = await two.member()
        assert two.session.record is not None
        assert await two.session.announce(two.session.record)
        answer = await one.passing.hand_off(3, epoch, want, want_revision, seen, is_clean=True)
        assert isinstance(answer, Done)

    on_stage(scene)


def test_resigning_offers_the_shard_and_remembers_how_it_ended(on_stage: Play) -> None:
    """The heir finds an offer on its own lease; with a dead heir the shard is resigned all the same."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        epoch = (await claimed(one, 3)).revision
        heir = ("w2", await two.member())
        done = await one.passing.resign(3, epoch, (heir,), is_clean=True, is_failure=False, why="stop")
        assert isinstance(done, Done)
        offer = await stage.get(stage.keys.offer("w2", 3))
        assert offer is not None
        assert offer.lease == two.session.lease
        next_tenure = await claimed(two, 3)
        assert next_tenure.is_clean
        assert await stage.get(stage.keys.offer("w2", 3)) is None  # the claim took it away
        await one.session.close()
        gone = ("w1", (await two.member()).__class__(heir[1].record, one.session.lease, 0, 0))
        assert isinstance(
            await two.passing.resign(3, next_tenure.revision, (gone,), is_clean=False, is_failure=False, why="stop"),
            Done,
        )
        assert await stage.get(stage.keys.leader(3)) is None
        three = await stage.actor("w3")
        assert not (await claimed(three, 3)).is_clean  # as its last leader said

    on_stage(scene)


def test_a_tenure_that_ended_with_its_lease_did_not_end_cleanly(on_stage: Play) -> None:
    """Nobody wrote that the object was closed: an unfenced successor must wait, and for how long is known."""

    async def scene(stage: Stage) -> None:
        one = await stage.actor("w1")
        assert (await claimed(one, 3)).is_clean  # nobody led it before
        await one.session.close()
        two = await stage.actor("w2")
        tenure = await claimed(two, 3)
        assert not tenure.is_clean
        assert tenure.former_ttl_s == one.session.ttl_s

    on_stage(scene)


def test_a_past_that_cannot_be_read_did_not_end_cleanly(on_stage: Play) -> None:
    """There was a tenure, and nobody knows how it ended; a shard without a past has nothing to wait for."""

    async def scene(stage: Stage) -> None:
        one = await stage.actor("w1")
        await stage.store.commit(Txn(UNGUARDED, (Put(stage.keys.history(3), b"{garbage"),)))
        tenure = await claimed(one, 3)
        assert not tenure.is_clean
        assert tenure.former_ttl_s == one.session.ttl_s
        assert not (await claimed(one, 3)).is_clean  # nor is it when the claim is repeated
        assert (await claimed(one, 4)).is_clean

    on_stage(scene)


def test_a_longer_lease_is_waited_for_whoever_leads_in_between(on_stage: Play) -> None:
    """A tenure that was broken off while it waited has not made the wait of the next one shorter; a clean end has."""

    async def scene(stage: Stage) -> None:
        one, two, three = await stage.actor("w1", LONG), await stage.actor("w2"), await stage.actor("w3")
        assert one.session.ttl_s > two.session.ttl_s
        await claimed(one, 3)
        await one.session.close()
        assert (await claimed(two, 3)).former_ttl_s == one.session.ttl_s
        assert (await claimed(two, 3)).former_ttl_s == one.session.ttl_s  # asked again
        await two.session.close()
        tenure = await claimed(three, 3)
        assert tenure.former_ttl_s == one.session.ttl_s
        await three.passing.resign(3, tenure.revision, (), is_clean=True, is_failure=False, why="stop")
        four = await stage.actor("w4")
        assert (await claimed(four, 3)).is_clean
        await four.session.close()
        five = await stage.actor("w5")
        assert (await claimed(five, 3)).former_ttl_s == four.session.ttl_s

    on_stage(scene)


@pytest.mark.parametrize("is_clean", [True, False])
@pytest.mark.parametrize("is_longer", [True, False])
def test_after_a_handoff_the_targets_lease_is_waited_for(on_stage: Play, is_longer: bool, is_clean: bool) -> None:
    """Its tenure stands on its lease; what an unclean handoff left behind, on the giver's, which the offer tells of."""

    async def scene(stage: Stage) -> None:
        one = await stage.actor("w1", LEASE if is_longer else LONG)
        two = await stage.actor("w2", LONG if is_longer else LEASE)
        epoch = (await claimed(one, 3)).revision
        want, want_revision = await want_of(two, one, 3)
        member = await two.member()
        done = await one.passing.hand_off(3, epoch, want, want_revision, member, is_clean=is_clean)
        assert isinstance(done, Done)
        key = stage.keys.offer("w2", 3)
        kv = await stage.get(key)
        assert kv is not None
        assert decode(Offer, key, kv.value).ttl_s == one.session.ttl_s
        await two.session.close()
        three = await stage.actor("w3")
        left = two.session.ttl_s if is_clean else LONG.ttl_s
        assert (await claimed(three, 3)).former_ttl_s == left

    on_stage(scene)


def test_a_newer_epoch_of_ones_own_is_told_before_it_is_given_up(on_stage: Play) -> None:
    """A re-mint was applied and nobody heard of it: the resignation of the old epoch ends nothing, as who sees the
    key still could take the new one for a leadership."""

    async def scene(stage: Stage) -> None:
        one = await stage.actor("w1")
        old = (await claimed(one, 3)).revision
        minted = await one.passing.remint(3, old)
        assert isinstance(minted, Done)
        answer = await one.passing.resign(3, old, (), is_clean=True, is_failure=False, why="stop")
        assert isinstance(answer, LedBy)
        assert (answer.leader.sid, answer.revision) == (one.session.sid, minted.revision)
        assert await stage.get(stage.keys.leader(3)) is not None
        answer = await one.passing.resign(3, minted.revision, (), is_clean=True, is_failure=False, why="stop")
        assert isinstance(answer, Done)
        assert await stage.get(stage.keys.leader(3)) is None

    on_stage(scene)


def test_the_past_is_kept_in_order_and_bounded(on_stage: Play) -> None:
    """history/ names the last eight tenures, newest first."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        actors = [one, two] * 6
        for actor in actors:
            revision = (await claimed(actor, 3)).revision
            await actor.passing.resign(3, revision, (), is_clean=True, is_failure=False, why="next")
        history = (await one.histories.read((3,)))[3][0]
        assert history is not None
        assert history.ended
        assert [past.worker for past in history.previous] == ["w1", "w2"] * 4
        epochs = [past.epoch for past in history.previous]
        assert epochs == sorted(epochs, reverse=True)

    on_stage(scene)


def test_a_poisoned_shard_is_left_alone_for_longer_and_longer(on_stage: Play) -> None:
    """After the third failure in a row nobody claims it at once."""

    async def scene(stage: Stage) -> None:
        actors = [await stage.actor(f"w{number}") for number in range(4)]
        for actor in actors[:3]:
            revision = (await claimed(actor, 3)).revision
            await actor.passing.resign(3, revision, (), is_clean=True, is_failure=True, why="boom")
        answer = (await actors[3].election.claim([3], "test"))[3]
        assert isinstance(answer, NotYet)
        assert 0 < answer.wait_s <= 1.0

    on_stage(scene)


def test_a_tenure_put_off_by_a_brake_that_ends_at_once_is_short_all_the_same(on_stage: Play) -> None:
    """What lies between two claims is mostly the brake. It makes no leader's life longer; only what lasted is forgiven.
    Wall clocks play no part."""

    async def scene(stage: Stage) -> None:
        for number in range(6):
            victim = await stage.actor(f"w{number}")
            answer = (await victim.election.claim([3], "test"))[3]
            brake_s = duties.brake_s(number)
            if brake_s:
                assert isinstance(answer, NotYet)
                assert brake_s - 0.5 < answer.wait_s <= brake_s
                stage.tick += 31
                stage.clock.jump(brake_s)
                claim = await claimed(victim, 3)
            else:
                assert isinstance(answer, Claimed)
                claim = answer
            assert claim.short_tenures == number
            await stage.store.revoke(victim.session.lease)
        stage.tick += 31
        assert (await claimed(await stage.actor("w7"), 3)).short_tenures == 0

    on_stage(scene)


def test_a_proof_tells_what_is_ours_and_what_is_not(on_stage: Play) -> None:
    """T3: Done for what stands, Nobody for a key that was deleted, SessionOver when the record is gone."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        led = {shard: (await claimed(one, shard)).revision for shard in (3, 4)}
        taken = (await claimed(two, 5)).revision
        await stage.store.commit(Txn(UNGUARDED, (Delete(stage.keys.leader(4)),)))  # an administrator's mistake
        answers = await one.leaders.confirm({**led, 5: taken})
        assert isinstance(answers, dict)
        assert answers[3] == Done(led[3])
        assert answers[4] == Nobody()
        assert isinstance(answers[5], LedBy)
        assert await one.leaders.confirm({}) == {}
        await stage.store.revoke(one.session.lease)
        assert isinstance(await one.leaders.confirm(led), SessionOver)

    on_stage(scene)


def test_an_audit_finds_what_stands_on_the_lease(on_stage: Play) -> None:
    """Also a claim that nobody here knows of any more; not the shards of others."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        led = {shard: (await claimed(one, shard)).revision for shard in (3, 4)}
        await claimed(two, 5)
        assert await one.leaders.audit() == led
        await stage.store.revoke(one.session.lease)
        assert isinstance(await one.leaders.audit(), SessionOver)

    on_stage(scene)


def test_a_want_replaces_one_of_a_target_that_is_wanted_no_more(on_stage: Play) -> None:
    """The assignment has changed: the newer target's want stands in the leader's inbox."""

    async def scene(stage: Stage) -> None:
        one, two, three = await stage.actor("w1"), await stage.actor("w2"), await stage.actor("w3")
        await claimed(one, 3)
        await want_of(two, one, 3)
        want, _ = await want_of(three, one, 3)
        assert want.target == "w3"
        again, revision = await want_of(three, one, 3)
        assert (again, (await want_of(three, one, 3))[1]) == (want, revision)  # asked twice, written once

    on_stage(scene)


def test_history_records_round_trip() -> None:
    """What is written is what is read, unknown fields of a newer build included."""
    history = History(worker="w1", sid="s", since=1.5, reason="r", extra={"future": [1, 2]})
    assert decode(History, b"k", encode(history)) == history
