"""The controller: it takes the seat, looks at the whole cluster, plans, and writes assignments.

    candidate ──seat is free──▸ seated ⟲ look, plan, write ──seat or session gone──▸ candidate
                                   └── cancelled ──▸ resigns

What it never does: touch `leaders/`, speak to a worker, or remember a wish. Routing, failover and the first election
go on without it; only evenness waits. While it has no seat it follows one key; the whole cluster only while seated.

Law: design.md "Controller". Every write compares the seat's revision, and the session's guard is asked right before
it is sent. Changes wake it early; at the latest it looks after `interval_s`.
"""

import asyncio
import logging
import random
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.seat import Seated, SeatTaken, SeatUnknown, claim_seat, resign_seat
from shardlead.cluster.session import Session
from shardlead.config import ControllerSettings
from shardlead.controller.picture import Picture
from shardlead.controller.writing import transactions
from shardlead.core.keyspace import Keyspace
from shardlead.core.planner import Hold, Limits, Plan, Reason, Snapshot, plan
from shardlead.core.shares import capacity_of
from shardlead.errors import StoreError
from shardlead.metrics import ControllerMetrics
from shardlead.store.base import Committed, Conflict, Store, TxnResult, Unknown, prefix_end
from shardlead.store.mirror import Change, Mirror

log = logging.getLogger("shardlead.controller")

LOAD_TIMEOUT_S: Final = 10.0
CANDIDATE_JITTER_S: Final = 0.1  # so that not all workers claim a free seat in the same instant
RETRY_S: Final = 0.5
GATHER_S: Final = 0.02  # changes come in bursts: one look for all of them
LOAD_SHARE: Final = 4  # planning takes at most one part in five of the time
THREAD_SHARDS: Final = 500  # from so many shards on planning is left to a thread: it would hold the loop too long
SEEN_TIMEOUT_S: Final = 2.0  # a write that was committed must come back by the watch within this
SILENCE_S: Final = 8.0  # workers tick every 2 s; a watch that tells of nothing for so long is stale
WRITE_NEED_S: Final = 0.5  # what must be left of the session's deadline for a write to be sent
CALM_TXNS_MAX: Final = 8  # transactions of what is not urgent in one round, before looking again
CLAIM_GRACE_S: Final = 0.5  # after a death claims come first: what is not urgent waits so long while they go on
CLAIM_PAUSE_S: Final = 0.1
RESIGN_TIMEOUT_S: Final = 1.0

_CALM: Final = frozenset((Reason.FACT, Reason.SUCCESSORS, Reason.TIDY))
_HOLD_LABELS: Final = {
    Hold.UNREST: "settling",
    Hold.RETURN: "returning",
    Hold.FREEZE: "frozen",
    Hold.BRAKE: "brake",
}


class SeatLost(Exception):  # noqa: N818, RUF100  # an event inside this module, not an error of the tree
    """The seat or the session behind it is gone."""


class Controller:
    """One candidate, on one session. `run()` until cancelled or the session is lost."""

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        session: Session,
        settings: ControllerSettings,
        *,
        clock: Clock,
        rng: random.Random,
        metrics: ControllerMetrics,
    ) -> None:
        self.seat_revision = 0  # our epoch; 0: not seated
        self.last_plan: Plan | None = None
        self._store = store
        self._keyspace = keyspace
        self._session = session
        self._settings = settings
        self._limits = Limits(
            moves_in_flight_max=settings.moves_in_flight_max,
            moves_per_worker_max=settings.moves_per_worker_max,
            settle_s=settings.settle_s,
            first_wait_max_s=settings.first_wait_max_s,
            brake_share=settings.brake_share,
            successors=settings.successors,
        )
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._woken = asyncio.Event()
        self._heard_ns = 0
        self._shunned: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        state = f"seated since {self.seat_revision}" if self.seat_revision else "candidate"
        return f"<Controller {self._session.name} {state}>"

    async def run(self) -> None:
        """Be a candidate, and the controller whenever the seat is ours. Returns when the session is lost; resigns
        when cancelled. Survives every StoreError, and any defect of its own: the worker beside it must live on."""
        try:
            while not self._session.is_lost:
                try:
                    await self._take_seat()
                    await self._hold_seat()
                except* SeatLost as lost:
                    log.info("seat lost", extra={"worker": self._session.name, "reason": str(lost.exceptions[0])})
                except* StoreError as errors:
                    log.warning("controller waits", extra={"reason": str(errors.exceptions[0])})
                except* Exception as defects:
                    log.exception("defect in the controller", extra={"worker": self._session.name}, exc_info=defects)
                    await asyncio.sleep(self._settings.interval_s)
                self._unseat()
                await asyncio.sleep(RETRY_S * self._rng.uniform(0.5, 1.0))
        finally:
            await self._resign()

    # --- the seat ---

    async def _take_seat(self) -> None:
        """Return once the seat is ours. Follows its key, and claims whenever it is free."""
        changed = asyncio.Event()
        seat = self._keyspace.seat
        mirror = Mirror(
            self._store,
            seat,
            seat + b"\0",
            lambda _change: changed.set(),
            clock=self._clock,
            rng=self._rng,
            name="seat",
        )
        following = asyncio.create_task(mirror.run(), name="seat mirror")
        try:
            while True:
                changed.clear()
                is_free = mirror.is_loaded and seat not in mirror.kvs
                mine = mirror.kvs.get(seat)
                if is_free or (mine is not None and mine.lease == self._session.lease):
                    await asyncio.sleep(CANDIDATE_JITTER_S * self._rng.random())
                    if await self._claim():
                        return
                await self._wait(changed, self._settings.interval_s)
                if self._session.is_lost:
                    raise SeatLost("the session is lost")
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _claim(self) -> bool:
        if not self._session.is_valid(WRITE_NEED_S):
            return False
        match await claim_seat(self._store, self._keyspace, self._session):
            case Seated(revision):
                self.seat_revision = revision
                self._metrics.is_seated.set(1)
                log.info("seated", extra={"worker": self._session.name, "epoch": revision})
                return True
            case SeatTaken(worker):
                if not worker and self._session.record is None:  # the seat was free: our guards do not hold
                    self._session.lose("the cluster's meta has changed")
                return False
            case SeatUnknown(reason):
                log.warning("seat not claimed", extra={"worker": self._session.name, "reason": reason})
                return False

    def _unseat(self) -> None:
        self.seat_revision = 0
        self._metrics.is_seated.set(0)

    async def _resign(self) -> None:
        revision = self.seat_revision
        self._unseat()
        if not revision or self._session.is_lost:
            return
        try:
            async with asyncio.timeout(RESIGN_TIMEOUT_S):
                await asyncio.shield(resign_seat(self._store, self._keyspace, revision))
            log.info("resigned the seat", extra={"worker": self._session.name})
        except (StoreError, TimeoutError) as exc:
            log.warning("seat not resigned, it ends with the session", extra={"reason": str(exc)})

    # --- seated ---

    async def _hold_seat(self) -> None:
        """Look, plan and write until the seat or the session is gone (raises SeatLost)."""
        picture = Picture(self._keyspace, self._settings.brake_window_s, self._settings.return_wait_s)

        def on_change(change: Change) -> None:
            now_ns = self._heard_ns = self._clock.now_ns()
            if picture.apply(change, now_ns):
                self._woken.set()

        prefix = self._keyspace.prefix
        mirror = Mirror(
            self._store, prefix, prefix_end(prefix), on_change, clock=self._clock, rng=self._rng, name="cluster"
        )
        async with asyncio.TaskGroup() as group:
            following = group.create_task(mirror.run(), name="cluster mirror")
            try:
                await mirror.wait_loaded(LOAD_TIMEOUT_S)
                while True:
                    await self._round(picture, mirror)
            finally:
                following.cancel()

    async def _round(self, picture: Picture, mirror: Mirror) -> None:
        """One look at the cluster, and what follows from it."""
        self._check_seat(picture, mirror)
        self._woken.clear()
        begin_ns = self._clock.now_ns()
        snapshot = picture.snapshot(begin_ns)
        if snapshot.shards > THREAD_SHARDS:
            planned = await asyncio.to_thread(plan, snapshot, self._limits)
        else:
            planned = plan(snapshot, self._limits)
        took_s = (self._clock.now_ns() - begin_ns) / NS_PER_S
        self.last_plan = planned
        self._measure(snapshot, planned, took_s)
        revision, is_all = await self._write(planned, is_calm=not _is_claiming(snapshot, planned))
        if revision:
            await self._wait_seen(mirror, revision)
        await asyncio.sleep(max(GATHER_S, LOAD_SHARE * took_s))
        if is_all:
            await self._wait(self._woken, self._pause_s(snapshot, planned))
        self._doubt_silence(picture, mirror)

    def _check_seat(self, picture: Picture, mirror: Mirror) -> None:
        if self._session.is_lost:
            raise SeatLost("the session is lost")
        if mirror.revision >= self.seat_revision and picture.seat_revision != self.seat_revision:
            raise SeatLost("another has it, or nobody")

    async def _write(self, planned: Plan, *, is_calm: bool) -> tuple[int, bool]:
        """Send the plan; the last revision written (0: none) and whether all of it was sent."""
        last = calm = 0
        for txn, writes in transactions(planned, self._keyspace, self.seat_revision):
            if writes[0].reason in _CALM:
                calm += 1
                if calm > CALM_TXNS_MAX:
                    return last, False
                if not is_calm:
                    return last, True
            if not self._session.is_valid(WRITE_NEED_S):
                return last, True
            outcome = await self._store.commit(txn)
            match outcome:
                case Committed(revision, results):
                    last = max(last, revision)
                    passed = sum(isinstance(result, TxnResult) and not result.succeeded for result in results)
                    self._metrics.writes.labels("committed").inc()
                    if passed:  # facts have moved on under those shards; the watch tells, and we look again
                        log.debug("wishes overtaken by facts", extra={"shards": passed})
                case Conflict():
                    self._metrics.writes.labels("conflict").inc()
                    raise SeatLost("a write was refused")
                case Unknown(reason):
                    self._metrics.writes.labels("unknown").inc()
                    log.warning("outcome of a write unknown", extra={"reason": reason})
                    return last, True
        begun = [move for move in planned.moves if move.is_new]
        for move in begun:
            self._metrics.moves.labels(move.reason.replace(" ", "-")).inc()
            facts = {"shard": move.shard, "source": move.source, "target": move.target, "reason": str(move.reason)}
            log.debug("move", extra=facts)
        if begun or planned.writes:
            log.info("planned", extra={"moves": len(begun), "writes": len(planned.writes), "revision": last})
        return last, True

    async def _wait_seen(self, mirror: Mirror, revision: int) -> None:
        """Until the mirror shows what we wrote: a look before that would plan it once more."""
        until_ns = self._clock.now_ns() + int(SEEN_TIMEOUT_S * NS_PER_S)
        while mirror.revision < revision:
            left_s = (until_ns - self._clock.now_ns()) / NS_PER_S
            if left_s <= 0:
                mirror.distrust("a write was committed and did not arrive")
                return
            self._woken.clear()
            await self._wait(self._woken, min(left_s, GATHER_S))
        self._woken.set()  # our own wishes changed the picture, perhaps more is due

    def _doubt_silence(self, picture: Picture, mirror: Mirror) -> None:
        now_ns = self._clock.now_ns()
        if picture.fleet.members and now_ns - self._heard_ns > SILENCE_S * NS_PER_S:
            self._heard_ns = now_ns
            mirror.distrust("no tick was heard")

    def _pause_s(self, snapshot: Snapshot, planned: Plan) -> float:
        """How long to wait if nothing changes: until what is held falls due, at most `interval_s`."""
        waits = {held.hold for held in planned.held}
        pause_s = self._settings.interval_s
        limits = self._limits
        if Hold.UNREST in waits:
            pause_s = min(pause_s, max(GATHER_S, limits.stillness_s(snapshot.waited_s) - snapshot.still_for_s))
        if Hold.RETURN in waits:
            pause_s = min(pause_s, max(GATHER_S, snapshot.return_in_s))
        if Hold.COLD_START in waits:
            due_s = min(limits.settle_s - snapshot.still_for_s, limits.first_wait_max_s - snapshot.waited_s)
            pause_s = min(pause_s, max(GATHER_S, due_s))
        return min(pause_s, CLAIM_PAUSE_S) if _is_claiming(snapshot, planned) else pause_s

    async def _wait(self, event: asyncio.Event, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return

    def _measure(self, snapshot: Snapshot, planned: Plan, took_s: float) -> None:
        for name in sorted(snapshot.shunned - self._shunned):
            log.warning("worker gave up several shards, it gets no more for a while", extra={"worker": name})
        self._shunned = snapshot.shunned
        metrics = self._metrics
        metrics.rounds.inc()
        metrics.plan_duration.observe(took_s)
        held = {item.hold: item.count for item in planned.held}
        metrics.moves_in_flight.set(planned.in_flight)
        metrics.moves_wanted.set(sum(count for hold, count in held.items() if hold in (*_HOLD_LABELS, Hold.BOUNDS)))
        for hold, label in _HOLD_LABELS.items():
            metrics.holds.labels(label).set(hold in held)
        counts = dict.fromkeys(planned.shares, 0)
        led = 0
        for shard, fact in snapshot.leaders.items():
            if fact.worker in counts and shard < snapshot.shards:
                counts[fact.worker] += 1
                led += 1
        metrics.leaderless.set(snapshot.shards - led)
        levels = [
            counts[name] / capacity_of(snapshot.fleet.members[name].record.capacity)
            for name in snapshot.fleet.eligible(planned.shares)
        ]
        metrics.spread.set(max(levels) - min(levels) if levels else 0)


def _is_claiming(snapshot: Snapshot, planned: Plan) -> bool:
    """Whether somebody has just gone and successors are claiming: the store is theirs for a moment."""
    return snapshot.still_for_s < CLAIM_GRACE_S and any(move.reason is Reason.NO_LEADER for move in planned.moves)
