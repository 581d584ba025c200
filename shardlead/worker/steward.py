"""One session's work for the worker: claims, wants, handoffs, audits, ticks; the host's envoy to the store.

Law: protocol.md A.3, A.7.7 and A.7.8. Events only wake it early; what is due is read off the inbox and the fleet each
time it looks. Whose turn it is stands in `core.duties`; here it is carried out, in batches, and only while the
session is active.
"""

import asyncio
import logging
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, assert_never

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.answers import Claimed, Done, LedBy, Nobody, NotYet, SessionOver, TargetGone, Undecided
from shardlead.cluster.batch import BATCH
from shardlead.cluster.beacon import Beacon, loaded
from shardlead.cluster.courier import Courier
from shardlead.cluster.election import Election
from shardlead.cluster.history import Histories
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.mail import FleetChange, FleetView, Inbox
from shardlead.cluster.passing import Passing
from shardlead.cluster.session import Session
from shardlead.config import WorkerSettings
from shardlead.core import duties, ownership
from shardlead.core.keyspace import Keyspace
from shardlead.core.model import SHARDS_PER_LEASE_MAX, epoch_of, revision_of
from shardlead.core.ownership import HandOver, Remint, Resign
from shardlead.core.shardmap import Member
from shardlead.errors import StoreError, WorkerFull
from shardlead.metrics import WorkerMetrics
from shardlead.store.base import Store
from shardlead.worker.envoy import AskAgain, NotOurs, NotPassed, Passage, PassedOn
from shardlead.worker.host import Host
from shardlead.worker.leadership import Guard

log = logging.getLogger("shardlead.steward")

RANK_JITTER_S: Final = 0.05
CLAIM_PAUSE_S: Final = 0.1
RESIGN_AFTER_S: Final = 0.5  # T8: a stopping worker waits so long for wants
DOUBT_PAUSE_S: Final = 1.0
ASKED_PAUSE_S: Final = 0.02
STILL_MINE_S: Final = 1.0
HEIRS_MAX: Final = 3  # so many are offered a shard that is given up, one after the other, should their leases be gone
FROZEN_PAUSE_S: Final = 2.0  # how often a shard that may not be asked for is looked at again


@dataclass(frozen=True, slots=True)
class _Pursuit:
    """A want that was put, and when to look again."""

    leader: str
    until_ns: int
    is_standing: bool = False
    is_takeover: bool = False


class Steward:
    """Everything a worker does in the store during one session."""

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        session: Session,
        host: Host,
        settings: WorkerSettings,
        *,
        generation: int,
        shards: int,
        clock: Clock,
        rng: random.Random,
        metrics: WorkerMetrics,
    ) -> None:
        self.session = session
        self.inbox = Inbox(store, keyspace, session.name, self._inbox_changed, clock=clock, rng=rng)
        self.view = FleetView(store, keyspace, self._fleet_changed, clock=clock, rng=rng)
        histories = Histories(store, keyspace, clock=clock)
        self._leaders = Leaders(store, keyspace, session)
        self._election = Election(store, keyspace, session, self._leaders, histories, clock=clock)
        self._passing = Passing(store, keyspace, session, self._leaders, histories, clock=clock)
        self._courier = Courier(store, keyspace, session)
        self._host = host
        self._settings = settings
        self._generation = generation
        self._shards = shards
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._woken = asyncio.Event()
        self._due: dict[int, int] = {}  # shard -> when it is this worker's turn to claim it
        self._claims: set[int] = set()  # to be sent with the next batch
        self._claims_woken = asyncio.Event()
        self._pursuits: dict[int, _Pursuit] = {}
        self._takeovers: dict[int, str] = {}  # shard -> the stopping worker it is wanted from
        self._former_ttl_s: dict[int, float] = {}
        self._draining_since_ns = 0
        self._beacon = Beacon(
            self._courier, self.view, (self.inbox.mirror, self.view.mirror), shards=shards, clock=clock, rng=rng
        )
        self._doubts: dict[int, int] = {}  # shard -> our epoch, where somebody spoke of a larger one
        self._lookups: set[int] = set()
        self._asked = asyncio.Event()
        self._is_loaded = False
        host.on_settled = self._settled
        session.on_change = self._session_changed
        session.confirm = self._confirm

    # --- life ---

    async def run(self) -> None:
        """Work until the session is lost. Raises nothing but CancelledError; every task ends with it."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.inbox.mirror.run(), name="inbox"),
                group.create_task(self.view.mirror.run(), name="fleet"),
                group.create_task(self._look_loop(), name="look"),
                group.create_task(self._claim_loop(), name="claim"),
                group.create_task(self._beacon.run(), name="tick"),
                group.create_task(self._audit_loop(), name="audit"),
                group.create_task(self._answer_loop(), name="answer"),
            ]
            await self.session.run()
            for task in tasks:
                task.cancel()

    def drain(self) -> None:
        """The worker stops: its record says `draining`; wants are met, what nobody wants is offered and resigned."""
        self._draining_since_ns = self._clock.now_ns()
        self._beacon.is_offering = False
        queued, self._claims = self._claims, set()
        for shard in queued:
            self._host.feed(shard, ownership.ClaimLost())
        self._wake()

    def _session_changed(self, _state: object) -> None:
        self._metrics.set_session_state("lost" if self.session.is_lost else _state_name(self.session))
        if self.session.is_lost:
            self._host.lose_all("the session is lost")
        elif self.session.is_active:
            self._host.resume()
            self._wake()
            self._claims_woken.set()
        else:
            self._host.suspend()

    # --- looking ---

    def _wake(self) -> None:
        self._woken.set()

    def _inbox_changed(self) -> None:
        eviction = self.inbox.eviction
        if eviction is not None and eviction.record.sid == self.session.sid:
            self.session.lose(f"evicted by {eviction.record.by}: {eviction.record.reason}")
        self._wake()

    def _settled(self, shard: int) -> None:
        """It is served, or nothing of it runs here any more: what had to wait for that may be done now."""
        if self._draining_since_ns or shard in self.inbox.wants or shard in self.inbox.offers:
            self._wake()

    def _fleet_changed(self, change: FleetChange) -> None:
        fleet, me = change.fleet, self.session.name
        mine = fleet.members.get(me)
        if self._is_loaded and (mine is None or mine.record.sid != self.session.sid):
            self.session.lose("the worker's record is gone or another's")
            return
        if fleet.meta_revision and fleet.meta_revision != self.session.meta_revision:
            self.session.lose("the cluster's meta has changed")
            return
        self._beacon.note(fleet)
        for name in change.ended:
            if name != me:
                self._note_end(name)
        for name in change.leaving:
            if name != me:
                self._takeovers.update(dict.fromkeys(duties.takeovers(name, self.inbox.orders, fleet, me), name))
        if not change.is_tick:
            self._wake()

    def _note_end(self, name: str) -> None:
        ranks = duties.claims_after_end(name, self.inbox.orders, self.view.fleet, self.session.name)
        now_ns = self._clock.now_ns()
        for shard, rank in ranks.items():
            delay_s = rank * duties.RANK_STEP_S + (self._rng.uniform(0.0, RANK_JITTER_S) if rank else 0.0)
            self._claim_at(shard, now_ns + int(delay_s * NS_PER_S))

    def _claim_at(self, shard: int, due_ns: int) -> None:
        if shard >= self._shards:
            return  # of another shape of the cluster, or by a wrong hand
        if shard not in self._due or due_ns < self._due[shard]:
            self._due[shard] = due_ns
        self._wake()

    async def _look_loop(self) -> None:
        await loaded(self.inbox.mirror)
        await loaded(self.view.mirror)
        self._is_loaded = True
        if self.session.name not in self.view.fleet.members:
            self.session.doubt("its record was gone before anybody looked")
        now_ns = self._clock.now_ns()
        for shard in duties.own_orders(self.inbox.orders, self.session.name):
            self._claim_at(shard, now_ns)
        while not self.session.is_lost:
            self._woken.clear()
            await asyncio.sleep(0)  # what else is ready goes first: a look never starves the work
            pause_s = STILL_MINE_S
            if self.session.is_active:
                try:
                    pause_s = await self._look()
                except StoreError as exc:
                    log.warning("a look at the inbox was cut short", extra={"reason": str(exc)})
                    pause_s = CLAIM_PAUSE_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def _look(self) -> float:
        """Act on what the inbox and the fleet say; seconds until something falls due by itself."""
        await self._take_offers()
        self._meet_wants()
        if self._draining_since_ns:
            await self._say_draining()
            return self._let_go()
        self._claim_what_is_due()  # before the wants: those shards have a leader
        await self._pursue()
        return self._claim_what_is_due()

    async def _take_offers(self) -> None:
        done: dict[int, int] = {}
        now_ns = self._clock.now_ns()
        for shard, letter in tuple(self.inbox.offers.items()):
            offer, kv = letter.record, letter.kv
            state = self._host.state(shard)
            if offer.sid != self.session.sid or shard >= self._shards:
                continue
            if offer.handoff:
                epoch = epoch_of(self._generation, kv.mod_revision)
                if isinstance(state, ownership.Idle | ownership.Claiming) and state.dead_epoch < epoch:
                    self._metrics.handoffs.labels("in", "moved").inc()
                    must_wait = not self._host.fenced and not offer.clean
                    self._former_ttl_s[shard] = self.session.ttl_s
                    self._host.feed(shard, ownership.Won(epoch, self.session.is_active, must_wait))
                elif not ownership.epoch_led(state) and not isinstance(state, ownership.Idle | ownership.Claiming):
                    continue  # an earlier leadership is still ending here; then it is taken
                done[shard] = kv.mod_revision
            elif led := ownership.epoch_led(state):
                if kv.mod_revision > revision_of(led):
                    self.doubt(shard, led)  # when this was written nobody led the shard, and we believe that we did
                else:
                    done[shard] = kv.mod_revision
            elif not self._draining_since_ns and not isinstance(state, ownership.Claiming):
                self._due.setdefault(shard, now_ns)  # looked at right after this; a back-off is minded there
            self._pursuits.pop(shard, None)
        if done:
            await self._courier.drop_offers(done)

    def _meet_wants(self) -> None:
        fleet = self.view.fleet
        for shard, letter in tuple(self.inbox.wants.items()):
            want = letter.record
            state = self._host.state(shard)
            if not isinstance(state, ownership.Serving) or state.epoch != want.epoch_seen:
                continue
            target = fleet.members.get(want.target)
            if target is None or target.record.sid != want.target_sid or target.record.state != "up":
                continue
            log.info("handing over", extra={"shard": shard, "target": want.target, "reason": want.reason})
            self._host.feed(shard, ownership.Wanted(want, letter.kv.mod_revision))

    def _let_go(self) -> float:
        """T8: what nobody wants after a while is given up, with an offer."""
        waited_s = (self._clock.now_ns() - self._draining_since_ns) / NS_PER_S
        fleet, me = self.view.fleet, self.session.name
        if waited_s < RESIGN_AFTER_S and any(name != me and fleet.is_up(name) for name in fleet.members):
            return RESIGN_AFTER_S - waited_s
        for shard, state in self._host.states():
            if ownership.epoch_led(state) or isinstance(state, ownership.Passing):
                self._host.feed(shard, ownership.GivenUp("the worker stops"))
        return STILL_MINE_S

    def _claim_what_is_due(self) -> float:
        now_ns = self._clock.now_ns()
        next_ns = now_ns + int(STILL_MINE_S * NS_PER_S)
        held = self._host.held_count
        for shard, due_ns in tuple(self._due.items()):
            due_ns = max(due_ns, self._host.backoff_until_ns(shard))
            if due_ns > now_ns:
                next_ns = min(next_ns, due_ns)
                continue
            del self._due[shard]
            if held >= SHARDS_PER_LEASE_MAX:
                log.error("claim refused", extra={"reason": str(WorkerFull(self.session.name, held))})
                continue
            held += 1
            self._host.feed(shard, ownership.Due())
        for pursuit in self._pursuits.values():
            if pursuit.until_ns > now_ns:
                next_ns = min(next_ns, pursuit.until_ns)
        return max(0.001, (next_ns - now_ns) / NS_PER_S)

    async def _say_draining(self) -> None:
        """Compare what our record says with what it should say; `Session.announce` may have failed, or another hand
        may have been there."""
        session = self.session
        mine = self.view.fleet.members.get(session.name)
        if mine is None or session.record is None or mine.record.state == "draining":
            return
        if mine.mod_revision > session.announced_revision or not session.announced_revision:
            await session.announce(replace(session.record, state="draining"))

    async def _pursue(self) -> None:
        """Want what the assignments say, and what a stopping worker still leads."""
        fleet, me, now_ns = self.view.fleet, self.session.name, self._clock.now_ns()
        held = {shard for shard, state in self._host.states() if not isinstance(state, ownership.Idle)}
        takeovers = {shard: name for shard, name in self._takeovers.items() if shard not in held}
        self._takeovers = takeovers
        wanted = duties.wanted(self.inbox.orders, me, self.session.create_revision, held, fleet)
        shards = [
            shard
            for shard in {*wanted, *takeovers}
            if shard < self._shards
            and self._host.backoff_until_ns(shard) <= now_ns
            and (
                shard not in self._pursuits
                or self._pursuits[shard].until_ns <= now_ns
                or (shard in takeovers and not self._pursuits[shard].is_takeover)
            )
        ]
        if not fleet.is_frozen:  # which stops new wants, not those that stand
            await self._give_up_pursuits({*wanted, *takeovers})
        if not shards:
            return
        leaders = await self._leaders.read(shards)
        await self._want(leaders, takeovers, frozenset(wanted))

    async def _give_up_pursuits(self, wanted: Collection[int]) -> None:
        """What is wanted no more is taken back, before its leader meets it against everybody's wish."""
        for shard in [shard for shard in self._pursuits if shard not in wanted]:
            pursuit = self._pursuits.pop(shard)
            if pursuit.is_standing and isinstance(self._host.state(shard), ownership.Idle):
                await self._courier.withdraw(shard, pursuit.leader)

    async def _want(
        self, leaders: dict[int, LedBy | Nobody], takeovers: dict[int, str], wanted: Collection[int]
    ) -> None:
        fleet, me, now_ns = self.view.fleet, self.session.name, self._clock.now_ns()
        ask: dict[int, LedBy] = {}
        for shard, holder in leaders.items():
            match holder:
                case Nobody():
                    self._claim_at(shard, now_ns)
                case LedBy(leader, revision) if leader.sid == self.session.sid:
                    self._adopt(shard, revision)
                case LedBy(leader, revision):
                    is_takeover = shard in takeovers and leader.worker == takeovers[shard]
                    if not is_takeover:
                        self._takeovers.pop(shard, None)
                    if leader.worker and (is_takeover or shard in wanted):
                        ask[shard] = holder
                    else:
                        self._pursuits[shard] = _Pursuit(leader.worker, now_ns + int(FROZEN_PAUSE_S * NS_PER_S))
        self._pursuits = {
            shard: pursuit for shard, pursuit in self._pursuits.items() if pursuit.until_ns > now_ns or shard in ask
        }
        if not ask:
            return
        reason = "its leader stops" if takeovers else "assigned"
        generation_epoch = epoch_of(self._generation, 0)
        standing = await self._courier.want(ask, generation_epoch, reason)
        for shard, holder in ask.items():
            if shard in standing:
                member = fleet.members.get(holder.leader.worker)
                patience_s = (member.record.drain_timeout_s if member else self._settings.drain_timeout_s) + 1.0
            else:
                patience_s = CLAIM_PAUSE_S  # the leader changed under the want: look again
            self._pursuits[shard] = _Pursuit(
                holder.leader.worker, now_ns + int(patience_s * NS_PER_S), shard in standing, shard in takeovers
            )
        log.debug("wanted", extra={"worker": me, "shards": len(standing)})

    # --- claiming ---

    def queue_claim(self, shard: int) -> None:
        """For the host: send T1 for it with the next batch."""
        self._claims.add(shard)
        self._claims_woken.set()

    async def _claim_loop(self) -> None:
        while True:
            await self._claims_woken.wait()  # no time-out: the host sets it, and run() cancels
            self._claims_woken.clear()
            while self._claims and self.session.is_active:
                batch = sorted(self._claims)[:BATCH]
                self._claims.difference_update(batch)
                await self._claim(batch)

    async def _claim(self, batch: list[int]) -> None:
        answers = await self._election.claim(batch, "leaderless")
        if self.session.is_lost:
            return  # and with it what was claimed
        offers: dict[int, int] = {}
        undecided: list[int] = []
        for shard, answer in answers.items():
            match answer:
                case Claimed(revision, is_clean, former_ttl_s):
                    self._metrics.claims.labels("won").inc()
                    self._former_ttl_s[shard] = former_ttl_s
                    must_wait = not self._host.fenced and not is_clean
                    self._won(shard, epoch_of(self._generation, revision), must_wait)
                case LedBy():
                    self._metrics.claims.labels("lost").inc()
                    self._host.feed(shard, ownership.ClaimLost())
                    if shard in self.inbox.offers:
                        offers[shard] = self.inbox.offers[shard].kv.mod_revision
                case NotYet(wait_s):
                    self._host.feed(shard, ownership.ClaimLost())
                    self._claim_at(shard, self._clock.now_ns() + int(wait_s * NS_PER_S))
                case Nobody():
                    self._metrics.claims.labels("conflict").inc()
                    undecided.append(shard)
                case Undecided():
                    self._metrics.claims.labels("unknown").inc()
                    undecided.append(shard)
                case SessionOver(reason):
                    self.session.lose(reason)
                    return
                case _:
                    assert_never(answer)
        if offers:
            try:
                await self._courier.drop_offers(offers)
            except StoreError as exc:
                log.warning("offers not dropped", extra={"reason": str(exc)})
        if undecided:
            await asyncio.sleep(CLAIM_PAUSE_S * self._rng.uniform(0.5, 1.0))
            for shard in undecided:
                if not isinstance(self._host.state(shard), ownership.Claiming):
                    continue
                if self._draining_since_ns:  # should it be applied yet, it ends with the lease
                    self._host.feed(shard, ownership.ClaimLost())
                else:
                    self.queue_claim(shard)

    def _won(self, shard: int, epoch: int, must_wait: bool) -> None:
        state = self._host.state(shard)
        if isinstance(state, ownership.Idle | ownership.Claiming):
            self._host.feed(shard, ownership.Won(epoch, self.session.is_active, must_wait))
        elif 0 < ownership.epoch_led(state) < epoch:  # adopted meanwhile, lost, and claimed by this late answer
            self._host.feed(shard, ownership.Gone("its epoch has changed"))  # the audit adopts the new one

    def _adopt(self, shard: int, revision: int) -> None:
        """A key of ours that the host does not know of: a claim or handoff that was applied late."""
        state = self._host.state(shard)
        epoch = epoch_of(self._generation, revision)
        if isinstance(state, ownership.Idle | ownership.Claiming) and epoch > state.dead_epoch:
            log.info("adopted a late claim", extra={"shard": shard, "epoch": epoch})
            self._metrics.claims.labels("adopted").inc()
            self._former_ttl_s[shard] = self.session.ttl_s
            self._host.feed(shard, ownership.Won(epoch, self.session.is_active, must_wait=not self._host.fenced))

    # --- the host's envoy ---

    @property
    def guard(self) -> Guard:
        """For the host: what a leadership of this session asks."""
        return self.session

    def former_wait_s(self, shard: int) -> float:
        """For the host: TTL + delta of the lease that the former tenure stood on."""
        ttl_s = self._former_ttl_s.get(shard, float(self.session.ttl_s))
        return self.session.terms.foreign_wait_ns(ttl_s) / NS_PER_S

    def doubt(self, shard: int, epoch: int) -> None:
        """For the host: look at the truth, at most once a second (protocol.md A.8)."""
        self._doubts[shard] = epoch
        self._asked.set()

    def look_up(self, shard: int) -> None:
        """For the host: see who leads a shard that others take for ours."""
        self._lookups.add(shard)
        self._asked.set()

    async def _answer_loop(self) -> None:
        """Proofs and look-ups that requests have asked for, in batches; proofs at most once a second.

        Paced, because a caller that speaks of an epoch from the future is never content with an answer.
        """
        doubt_again_ns = 0
        while True:
            await self._asked.wait()  # no time-out: requests set it, and run() cancels
            self._asked.clear()
            try:
                await self._look_up()
            except StoreError as exc:
                log.warning("leaders not looked up", extra={"reason": str(exc)})
            if self._doubts and self._clock.now_ns() >= doubt_again_ns:
                doubt_again_ns = self._clock.now_ns() + int(DOUBT_PAUSE_S * NS_PER_S)
                doubts, self._doubts = self._doubts, {}
                if await self._check(doubts) is False:
                    self.session.lose("the worker's record is not ours any more")
                    return
            await asyncio.sleep(ASKED_PAUSE_S)
            if self._doubts or self._lookups:
                self._asked.set()

    async def _look_up(self) -> None:
        shards = sorted(self._lookups)[:BATCH]
        if not shards:
            return
        revision, leaders = await self._leaders.look_up(shards)
        self._lookups.difference_update(shards)
        known_epoch = epoch_of(self._generation, revision)
        for shard, holder in leaders.items():
            if isinstance(holder, LedBy) and holder.leader.sid == self.session.sid:
                self._adopt(shard, holder.revision)
                continue
            leader = ""
            if isinstance(holder, LedBy) and (member := self.view.fleet.members.get(holder.leader.worker)):
                leader = f"{holder.leader.worker} {member.record.address} {epoch_of(self._generation, holder.revision)}"
            self._host.note_elsewhere(shard, known_epoch, leader)

    async def _check(self, led: dict[int, int]) -> bool | None:
        """T3 for these; what is not ours any more is taken from the host. None if undecided."""
        answers = await self._leaders.confirm({shard: revision_of(epoch) for shard, epoch in led.items()})
        match answers:
            case SessionOver():
                return False
            case Undecided():
                return None
            case dict():
                self._act_on_proof(led, answers)
                return True

    def _act_on_proof(self, led: Mapping[int, int], answers: Mapping[int, Done | LedBy | Nobody]) -> None:
        for shard, answer in answers.items():
            held = ownership.epoch_led(self._host.state(shard))
            if held != led[shard]:
                continue  # it has moved on meanwhile
            match answer:
                case Done():
                    pass
                case LedBy(leader, revision) if leader.sid == self.session.sid:
                    self._host.feed(shard, ownership.Gone("its epoch has changed"))
                    self._adopt(shard, revision)
                case LedBy(leader):
                    self._host.feed(shard, ownership.Gone(f"led by {leader.worker}"))
                case Nobody():
                    self._host.feed(shard, ownership.Gone("its key is gone"))

    async def _confirm(self) -> bool | None:
        """T3 for everything, after a suspension."""
        return await self._check(self._host.led())

    async def pass_on(self, shard: int, epoch: int, goal: HandOver | Resign | Remint, *, is_clean: bool) -> Passage:
        """For the host: T5, T4 or T5s."""
        revision = revision_of(epoch)
        match goal:
            case HandOver(want, want_revision):
                target = self.view.fleet.members.get(want.target)
                if target is None:
                    return NotPassed(f"worker {want.target} is gone")
                answer = await self._passing.hand_off(shard, revision, want, want_revision, target, is_clean=is_clean)
                match answer:
                    case Done(moved):
                        self._metrics.handoffs.labels("out", "moved").inc()
                        new_epoch = epoch_of(self._generation, moved)
                        return PassedOn(leader=f"{want.target} {target.record.address} {new_epoch}")
                    case TargetGone(reason):
                        self._metrics.handoffs.labels("out", "ended").inc()
                        return NotPassed(reason)
                    case rest:
                        return _not_ours(rest)
            case Resign(reason, is_failure):
                heirs = self._heirs(shard)
                resigned = await self._passing.resign(
                    shard, revision, heirs, is_clean=is_clean, is_failure=is_failure, why=reason
                )
                if isinstance(resigned, Done):
                    self._metrics.resigns.labels("failure" if is_failure else "stop").inc()
                    return PassedOn()
                return _not_ours(resigned)
            case Remint(reason):
                minted = await self._passing.remint(shard, revision)
                if isinstance(minted, Done):
                    self._metrics.remints.labels("resumed").inc()
                    log.info("re-minted", extra={"shard": shard, "reason": reason})
                    return PassedOn(new_epoch=epoch_of(self._generation, minted.revision))
                if isinstance(minted, SessionOver):
                    self.session.lose(minted.reason)
                    return NotOurs(minted.reason)
                return _not_ours(minted)
            case _:
                assert_never(goal)

    def _heirs(self, shard: int) -> tuple[tuple[str, Member], ...]:
        fleet = self.view.fleet
        names = duties.heirs(shard, self.inbox.orders.get(shard), fleet, self.session.name)
        return tuple((name, fleet.members[name]) for name in names[:HEIRS_MAX])

    # --- audit ---

    async def _audit_loop(self) -> None:
        """Once every TTL: what stands on our lease, against what the host believes."""
        while True:
            await asyncio.sleep(self.session.ttl_s * self._rng.uniform(0.9, 1.1))
            if not self.session.is_active:
                continue
            before = self._host.led()
            match await self._leaders.audit():
                case SessionOver(reason):
                    self.session.lose(reason)
                    return
                case Undecided(reason):
                    log.warning("audit undecided", extra={"reason": reason})
                case found:
                    for shard, revision in found.items():
                        if shard not in before and shard < self._shards:
                            self._adopt(shard, revision)
                    doubtful = {
                        shard: epoch
                        for shard, epoch in before.items()
                        if found.get(shard) != revision_of(epoch)
                        and ownership.epoch_led(self._host.state(shard)) == epoch
                    }
                    if doubtful and await self._check(doubtful) is False:
                        self.session.lose("the worker's record is not ours any more")
                        return


def _not_ours(answer: LedBy | Nobody | Undecided | Done | TargetGone) -> Passage:
    match answer:
        case Undecided(reason):
            return AskAgain(reason)
        case LedBy(leader):
            return NotOurs(f"led by {leader.worker}")
        case Nobody():
            return NotOurs("its key is gone")
        case Done() | TargetGone():
            raise AssertionError(f"{answer} is not a refusal")


def _state_name(session: Session) -> str:
    return "active" if session.is_active else "suspended"
