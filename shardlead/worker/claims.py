"""One session's claims: when each shard's turn comes, T1 in batches, and what becomes of their answers.

Law: protocol.md A.3. Whose turn it is stands in `core.duties`; here it is waited for and carried out, only while the
session is active. A claim that is undecided is sent again until it is; one that was applied late is adopted, never
dropped.
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Mapping
from typing import Final, assert_never

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.answers import Claimed, LedBy, Nobody, NotYet, SessionOver, Undecided
from shardlead.cluster.batch import BATCH
from shardlead.cluster.courier import Courier
from shardlead.cluster.election import Election
from shardlead.cluster.mail import Inbox
from shardlead.cluster.session import Session
from shardlead.core import duties, ownership
from shardlead.core.model import SHARDS_PER_LEASE_MAX, epoch_of
from shardlead.errors import StoreError, WorkerFull
from shardlead.metrics import WorkerMetrics
from shardlead.worker.host import Host

log = logging.getLogger("shardlead.claims")

RANK_JITTER_S: Final = 0.05
CLAIM_PAUSE_S: Final = 0.1


class Claims:
    """What one session claims. `wake` is called when something falls due earlier than was said."""

    def __init__(
        self,
        election: Election,
        courier: Courier,
        session: Session,
        inbox: Inbox,
        host: Host,
        wake: Callable[[], None],
        *,
        generation: int,
        shards: int,
        clock: Clock,
        rng: random.Random,
        metrics: WorkerMetrics,
    ) -> None:
        self._election = election
        self._courier = courier
        self._session = session
        self._inbox = inbox
        self._host = host
        self._wake = wake
        self._generation = generation
        self._shards = shards
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._due: dict[int, int] = {}  # shard -> when it is this worker's turn to claim it
        self._braked: dict[int, int] = {}  # shard -> until when nobody may claim it, for its leaders fail
        self._queued: set[int] = set()  # to be sent with the next batch
        self._woken = asyncio.Event()
        self._former_ttl_s: dict[int, float] = {}
        self._is_draining = False

    # --- whose turn it is ---

    def after_end(self, ranks: Mapping[int, int]) -> None:
        """A session is over: claim these shards, each after those before us in its order (shard -> our rank)."""
        now_ns = self._clock.now_ns()
        for shard, rank in ranks.items():
            delay_s = rank * duties.RANK_STEP_S + (self._rng.uniform(0.0, RANK_JITTER_S) if rank else 0.0)
            self.claim_at(shard, now_ns + int(delay_s * NS_PER_S))

    def claim_at(self, shard: int, due_ns: int) -> None:
        """Claim it then, or earlier if that was said before."""
        if shard >= self._shards:
            return  # of another shape of the cluster, or by a wrong hand
        if shard not in self._due or due_ns < self._due[shard]:
            self._due[shard] = due_ns
        self._wake()

    def claim_next(self, shard: int) -> None:
        """Claim it with the next `begin_due`, unless a time was said before; a back-off is minded there."""
        self._due.setdefault(shard, self._clock.now_ns())

    def braked_until_ns(self, shard: int) -> int:
        """Until when its last leaders' failures keep us from claiming it; 0 for long ago."""
        return self._braked.get(shard, 0)

    def begin_due(self) -> float:
        """Begin to claim what is due; seconds until the next is."""
        now_ns = self._clock.now_ns()
        next_s = math.inf
        held = self._host.held_count
        for shard, due_ns in tuple(self._due.items()):
            due_ns = max(due_ns, self._host.backoff_until_ns(shard), self._braked.get(shard, 0))
            if due_ns > now_ns:
                next_s = min(next_s, (due_ns - now_ns) / NS_PER_S)
                continue
            del self._due[shard]
            self._braked.pop(shard, None)
            if held >= SHARDS_PER_LEASE_MAX:
                log.error("claim refused", extra={"reason": str(WorkerFull(self._session.name, held))})
                continue
            held += 1
            self._host.feed(shard, ownership.Due())
        return next_s

    # --- T1 ---

    def queue(self, shard: int) -> None:
        """Send T1 for it with the next batch."""
        self._queued.add(shard)
        self._woken.set()

    def resume(self) -> None:
        """The session is active again: send what is queued."""
        self._woken.set()

    def drain(self) -> None:
        """The worker stops: nothing more is claimed."""
        self._is_draining = True
        queued, self._queued = self._queued, set()
        for shard in queued:
            self._host.feed(shard, ownership.ClaimLost())

    async def run(self) -> None:
        """Send what is queued, for ever."""
        while True:
            await self._woken.wait()  # no time-out: the host sets it, and the steward cancels
            self._woken.clear()
            while self._queued and self._session.is_active:
                batch = sorted(self._queued)[:BATCH]
                self._queued.difference_update(batch)
                await self._claim(batch)

    async def _claim(self, batch: list[int]) -> None:
        answers = await self._election.claim(batch, "leaderless")
        if self._session.is_lost:
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
                    if shard in self._inbox.offers:
                        offers[shard] = self._inbox.offers[shard].kv.mod_revision
                case NotYet(wait_s):
                    self._host.feed(shard, ownership.ClaimLost())
                    self._braked[shard] = self._clock.now_ns() + int(wait_s * NS_PER_S)
                    self.claim_at(shard, self._braked[shard])
                case Nobody():
                    self._metrics.claims.labels("conflict").inc()
                    undecided.append(shard)
                case Undecided():
                    self._metrics.claims.labels("unknown").inc()
                    undecided.append(shard)
                case SessionOver(reason):
                    self._session.lose(reason)
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
                if self._is_draining:  # should it be applied yet, it ends with the lease
                    self._host.feed(shard, ownership.ClaimLost())
                else:
                    self.queue(shard)

    # --- what is won ---

    def receive(self, shard: int, epoch: int, *, is_clean: bool, former_ttl_s: float) -> None:
        """A handoff has given it to us. `is_clean`: all work of its former leader had ended; if not, it stood on a
        lease of `former_ttl_s` at most.

        One that was adopted before its offer came waits for nothing any more if the offer, which is of this very
        epoch, says so."""
        self._former_ttl_s[shard] = former_ttl_s
        if self._host.state(shard) == ownership.Waiting(epoch):
            if is_clean:
                self._host.feed(shard, ownership.WaitOver(self._session.is_active))
            return
        must_wait = not self._host.fenced and not is_clean
        self._host.feed(shard, ownership.Won(epoch, self._session.is_active, must_wait))

    def adopt(self, shard: int, revision: int) -> None:
        """A key of ours that the host does not know of: a claim or handoff that was applied late."""
        state = self._host.state(shard)
        epoch = epoch_of(self._generation, revision)
        if isinstance(state, ownership.Idle | ownership.Claiming) and epoch > state.dead_epoch:
            log.info("adopted a late claim", extra={"shard": shard, "epoch": epoch})
            self._metrics.claims.labels("adopted").inc()
            self._former_ttl_s[shard] = self._election.former_ttl_s(shard)
            self._host.feed(shard, ownership.Won(epoch, self._session.is_active, must_wait=not self._host.fenced))

    async def clear(self, shard: int, revision: int) -> bool:
        """Take away a leader record that names nobody and stands on nobody's lease; whether it is gone."""
        is_gone = await self._election.clear(shard, revision)
        if is_gone:
            log.warning("unreadable leader record deleted, it stood on no lease", extra={"shard": shard})
        return is_gone

    def former_wait_s(self, shard: int) -> float:
        """TTL + delta of the lease that the former tenure stood on; ours, if it was our own."""
        ttl_s = max(self._former_ttl_s.get(shard, 0.0), float(self._session.ttl_s))
        return self._session.terms.foreign_wait_ns(ttl_s) / NS_PER_S

    def _won(self, shard: int, epoch: int, must_wait: bool) -> None:
        state = self._host.state(shard)
        if isinstance(state, ownership.Idle | ownership.Claiming):
            self._host.feed(shard, ownership.Won(epoch, self._session.is_active, must_wait))
        elif 0 < ownership.epoch_led(state) < epoch:  # adopted meanwhile, lost, and claimed by this late answer
            self._host.feed(shard, ownership.Gone("its epoch has changed"))  # the audit adopts the new one
