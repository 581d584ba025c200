"""One session's work for the worker: it looks at the inbox and the fleet, and sees to it that what is due is done.

Law: protocol.md A.3, A.7.7 and A.7.8. Events only wake it early; what is due is read off the inbox and the fleet each
time it looks. Whose turn it is stands in `core.duties`; claims, pursuits, proofs and goals carry it out, in batches,
and only while the session is active. For the host, it is the envoy to the store.
"""

import asyncio
import logging
import random
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from shardlead.clock import NS_PER_S, Clock
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
from shardlead.core.model import epoch_of, revision_of
from shardlead.core.ownership import HandOver, Remint, Resign
from shardlead.errors import StoreError
from shardlead.metrics import WorkerMetrics
from shardlead.store.base import Store
from shardlead.worker.claims import CLAIM_PAUSE_S, Claims
from shardlead.worker.envoy import Passage
from shardlead.worker.goals import Goals
from shardlead.worker.host import Host
from shardlead.worker.leadership import Guard
from shardlead.worker.proofs import Proofs
from shardlead.worker.pursuits import Pursuits

log = logging.getLogger("shardlead.steward")

PAUSE_MIN_S: Final = 0.001
RESIGN_AFTER_S: Final = 0.5  # T8: a stopping worker waits so long for wants, and longer where the store is slow
RESIGN_AFTER_MAX_S: Final = 3.0
WANT_TRIPS: Final = 4  # of a want: our record's event, a look at the leaders, the want, its event
STILL_MINE_S: Final = 1.0
HANDED_NS: Final = 50_000_000  # a shard whose work takes longer to end keeps no others waiting
PLACED_AFTER_NS: Final = 100_000_000  # the controller's transactions follow each other faster
PLACED_LOOK_S: Final = 0.02


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
        inbox = Inbox(store, keyspace, session.name, self._inbox_changed, clock=clock, rng=rng)
        view = FleetView(store, keyspace, self._fleet_changed, clock=clock, rng=rng)
        courier = Courier(store, keyspace, session)
        histories = Histories(store, keyspace, tick=lambda: view.fleet.tick, clock=clock)
        leaders = Leaders(store, keyspace, session)
        election = Election(store, keyspace, session, leaders, histories, clock=clock)
        passing = Passing(store, keyspace, session, leaders, histories, clock=clock)
        self.session = session
        self.inbox = inbox
        self.view = view
        self._courier = courier
        self._host = host
        self._generation = generation
        self._shards = shards
        self._clock = clock
        self._metrics = metrics
        self._claims = claims = Claims(
            election,
            courier,
            session,
            inbox,
            host,
            self._wake,
            generation=generation,
            shards=shards,
            clock=clock,
            rng=rng,
            metrics=metrics,
        )
        self._pursuits = Pursuits(
            leaders,
            courier,
            session,
            inbox,
            view,
            host,
            claims,
            generation=generation,
            shards=shards,
            drain_timeout_s=settings.drain_timeout_s,
            clock=clock,
        )
        self._proofs = Proofs(
            leaders, session, view, host, claims, generation=generation, shards=shards, clock=clock, rng=rng
        )
        self._goals = Goals(passing, session, inbox, view, generation=generation, metrics=metrics)
        self._beacon = Beacon(courier, view, (inbox.mirror, view.mirror), shards=shards, clock=clock, rng=rng)
        self._woken = asyncio.Event()
        self._draining_since_ns = 0
        self._patience_s = RESIGN_AFTER_S
        self._handing: dict[int, int] = {}  # shards whose want is being met, and since when
        self._handed_ns = 0  # when the last one's turn came
        self._is_loaded = False
        self._ordered_ns = 0  # when orders came that are newer than the session
        self._unread: set[int] = set()  # shards whose orders have not been held against the fleet yet
        host.on_settled = self._settled
        session.on_change = self._session_changed
        session.confirm = self._proofs.confirm

    # --- life ---

    async def run(self) -> None:
        """Work until the session is lost. Raises nothing but CancelledError; every task ends with it."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.inbox.mirror.run(), name="inbox"),
                group.create_task(self.view.mirror.run(), name="fleet"),
                group.create_task(self._look_loop(), name="look"),
                group.create_task(self._claims.run(), name="claim"),
                group.create_task(self._beacon.run(), name="tick"),
                group.create_task(self._proofs.audit(), name="audit"),
                group.create_task(self._proofs.answer(), name="answer"),
            ]
            await self.session.run()
            for task in tasks:
                task.cancel()

    def drain(self, store_s: float = 0.0) -> None:
        """The worker stops: its record says `draining`; wants are met, what nobody wants is offered and resigned.

        `store_s` is what one transaction takes now: a want comes after a few of them."""
        self._draining_since_ns = self._clock.now_ns()
        self._patience_s = min(RESIGN_AFTER_MAX_S, RESIGN_AFTER_S + WANT_TRIPS * store_s)
        self._beacon.is_offering = False
        self._claims.drain()
        self._wake()

    def _session_changed(self, _state: object) -> None:
        self._metrics.set_session_state("lost" if self.session.is_lost else _state_name(self.session))
        if self.session.is_lost:
            self._host.lose_all("the session is lost")
        elif self.session.is_active:
            self._host.resume()
            self._wake()
            self._claims.resume()
        else:
            self._host.suspend()

    # --- looking ---

    def _wake(self) -> None:
        self._woken.set()

    async def wait_placed(self) -> None:
        """Returns once the controller reckons with this session: orders written since it began name it, and no more
        came for a moment. At once where there is nobody to succeed: nothing is led yet, or nobody else is there. Has no
        bound of its own: nothing is ordered of who is cordoned, nor while no controller lives. Raises StoreError."""
        if await self._courier.leaders_count() == 0:
            return
        while not self._is_placed():  # noqa: ASYNC110  # time alone makes it true
            await asyncio.sleep(PLACED_LOOK_S)

    def _is_placed(self) -> bool:
        fleet = self.view.fleet
        if self._is_loaded and not any(fleet.is_up(name) for name in fleet.members if name != self.session.name):
            return True
        return 0 < self._ordered_ns < self._clock.now_ns() - PLACED_AFTER_NS

    def _inbox_changed(self, ordered: Collection[int]) -> None:
        eviction = self.inbox.eviction
        if eviction is not None and eviction.record.sid == self.session.sid:
            self.session.lose(f"evicted by {eviction.record.by}: {eviction.record.reason}")
        self._unread.update(ordered)
        self._read_orders()
        self._wake()

    def _read_orders(self) -> None:
        """Hold new orders against the fleet: what they are for may have happened before they were read."""
        if not self._unread or not self.view.mirror.is_loaded:
            return
        fleet, me = self.view.fleet, self.session.name
        orders = {shard: order for shard in sorted(self._unread) if (order := self.inbox.orders.get(shard)) is not None}
        for name, member in fleet.members.items():
            if member.record.state != "up" and name != me:
                self._pursuits.take_over(duties.takeovers(name, orders, fleet, me), name)
        since = self.session.create_revision  # what was ordered before is nobody's news; `own_orders` are tried once
        known = self.view.mirror.revision
        news = {shard: order for shard, order in orders.items() if order.mod_revision > since}
        if news:
            self._ordered_ns = self._clock.now_ns()
        self._claims.after_end(duties.claims_after_news(news, fleet, known, me))
        self._unread = {shard for shard, order in news.items() if order.mod_revision > known}
        self._wake()

    def _settled(self, shard: int) -> None:
        """It is served, or nothing of it runs here any more: what had to wait for that may be done now."""
        if self._draining_since_ns or self.inbox.wants or shard in self.inbox.offers:
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
        self._read_orders()
        for name in change.ended:
            if name != me:
                self._claims.after_end(duties.claims_after_end(name, self.inbox.orders, fleet, me))
        for name in change.leaving:
            if name != me:
                self._pursuits.take_over(duties.takeovers(name, self.inbox.orders, fleet, me), name)
        if not change.is_tick:
            self._wake()

    async def _look_loop(self) -> None:
        await loaded(self.inbox.mirror)
        await loaded(self.view.mirror)
        self._is_loaded = True
        if self.session.name not in self.view.fleet.members:
            self.session.doubt("its record was gone before anybody looked")
        now_ns = self._clock.now_ns()
        for shard in duties.own_orders(self.inbox.orders, self.session.name):
            self._claims.claim_at(shard, now_ns)
        self._read_orders()
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
        wants_s = self._meet_wants()
        if self._draining_since_ns:
            await self._say_draining()
            return max(PAUSE_MIN_S, min(wants_s, self._let_go()))
        self._claims.begin_due()  # before the wants: those shards have a leader
        await self._pursuits.pursue()
        pursuits_s = self._pursuits.due_s()
        claims_s = self._claims.begin_due()
        return max(PAUSE_MIN_S, min(wants_s, pursuits_s, claims_s, STILL_MINE_S))

    async def _take_offers(self) -> None:
        done: dict[int, int] = {}
        for shard, letter in tuple(self.inbox.offers.items()):
            offer, kv = letter.record, letter.kv
            state = self._host.state(shard)
            if offer.sid != self.session.sid or shard >= self._shards:
                continue
            if offer.handoff:
                epoch = epoch_of(self._generation, kv.mod_revision)
                if isinstance(state, ownership.Idle | ownership.Claiming) and state.dead_epoch < epoch:
                    self._metrics.handoffs.labels("in", "moved").inc()
                    self._claims.receive(shard, epoch, is_clean=offer.clean, former_ttl_s=offer.ttl_s)
                elif state == ownership.Waiting(epoch):  # a request's look-up was faster than the offer
                    self._claims.receive(shard, epoch, is_clean=offer.clean, former_ttl_s=offer.ttl_s)
                elif not ownership.epoch_led(state) and not isinstance(state, ownership.Idle | ownership.Claiming):
                    continue  # an earlier leadership is still ending here; then it is taken
                done[shard] = kv.mod_revision
            elif led := ownership.epoch_led(state):
                if kv.mod_revision > revision_of(led):
                    # when this was written nobody led the shard, and we believe that we did
                    self._proofs.doubt(shard, led)
                else:
                    done[shard] = kv.mod_revision
            elif not self._draining_since_ns and not isinstance(state, ownership.Claiming):
                self._claims.claim_next(shard)  # looked at right after this
            self._pursuits.end(shard)
        if done:
            await self._courier.drop_offers(done)

    def _meet_wants(self) -> float:
        """Hand over what is wanted, a few at a time; seconds until the next may be, whatever becomes of these."""
        fleet, now_ns = self.view.fleet, self._clock.now_ns()
        self._handing = {
            shard: since_ns
            for shard, since_ns in self._handing.items()
            if now_ns - since_ns < HANDED_NS and ownership.is_ending(self._host.state(shard))
        }
        at_once = duties.handed_at_once(len(self.inbox.wants))
        for shard, letter in tuple(self.inbox.wants.items()):
            want = letter.record
            state = self._host.state(shard)
            if not isinstance(state, ownership.Serving) or state.epoch != want.epoch_seen:
                continue
            target = fleet.members.get(want.target)
            if target is None or target.record.sid != want.target_sid or target.record.state != "up":
                continue
            if len(self._handing) >= at_once:
                return (min(self._handing.values()) + HANDED_NS - now_ns) / NS_PER_S
            log.info("handing over", extra={"shard": shard, "target": want.target, "reason": want.reason})
            self._handing[shard] = self._handed_ns = now_ns
            self._host.feed(shard, ownership.Wanted(want, letter.kv.mod_revision))
        return STILL_MINE_S

    def _let_go(self) -> float:
        """T8: what nobody wants for a while is given up, with an offer."""
        waited_s = (self._clock.now_ns() - max(self._draining_since_ns, self._handed_ns)) / NS_PER_S
        fleet, me = self.view.fleet, self.session.name
        if waited_s < self._patience_s and any(name != me and fleet.is_up(name) for name in fleet.members):
            return max(PAUSE_MIN_S, self._patience_s - waited_s)
        for shard, state in self._host.states():
            if ownership.epoch_led(state) or isinstance(state, ownership.Passing):
                self._host.feed(shard, ownership.GivenUp("the worker stops"))
        return STILL_MINE_S

    async def _say_draining(self) -> None:
        """Compare what our record says with what it should say; `Session.announce` may have failed, or another hand
        may have been there."""
        session = self.session
        mine = self.view.fleet.members.get(session.name)
        if mine is None or session.record is None or mine.record.state == "draining":
            return
        if mine.mod_revision > session.announced_revision or not session.announced_revision:
            await session.announce(replace(session.record, state="draining"))

    # --- the host's envoy ---

    @property
    def guard(self) -> Guard:
        """For the host: what a leadership of this session asks."""
        return self.session

    def queue_claim(self, shard: int) -> None:
        """For the host: send T1 for it with the next batch."""
        self._claims.queue(shard)

    def former_wait_s(self, shard: int) -> float:
        """For the host: TTL + delta of the lease that the former tenure stood on."""
        return self._claims.former_wait_s(shard)

    def doubt(self, shard: int, epoch: int) -> None:
        """For the host: look at the truth, at most once a second (protocol.md A.8)."""
        self._proofs.doubt(shard, epoch)

    def look_up(self, shard: int) -> None:
        """For the host: see who leads a shard that others take for ours."""
        self._proofs.look_up(shard)

    async def pass_on(self, shard: int, epoch: int, goal: HandOver | Resign | Remint, *, is_clean: bool) -> Passage:
        """For the host: one try of T5, T4 or T5s."""
        return await self._goals.pass_on(shard, epoch, goal, is_clean=is_clean)


def _state_name(session: Session) -> str:
    return "active" if session.is_active else "suspended"
