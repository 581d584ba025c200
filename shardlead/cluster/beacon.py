"""The freshness beacon of the cluster, and the search for shards that nobody leads.

Law: protocol.md A.7.7 and A.3 "Orphans". Whoever sees a tick that is too old writes the next one; exactly one worker
wins, and looks whether every shard has a leader. A tick that was written and does not arrive proves that a watch is
stale, whatever the connection looks like.
"""

import asyncio
import logging
import random
from collections.abc import Collection, Iterable
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.answers import Undecided
from shardlead.cluster.courier import Courier, Ticked, TickLost
from shardlead.cluster.mail import FleetView
from shardlead.core import duties
from shardlead.core.fleet import Fleet
from shardlead.core.model import TICK_S
from shardlead.errors import StoreError
from shardlead.store.mirror import Mirror

log = logging.getLogger("shardlead.beacon")

LOAD_TIMEOUT_S: Final = 10.0
TICK_SEEN_S: Final = 1.0  # a tick that was written must come back by the watch within this
TICK_LOOK_S: Final = 0.02
RETRY_S: Final = 0.1
ORPHAN_AUDIT_S: Final = 60.0  # shards without a leader are looked for so often even if their number is right
YOUNG_S: Final = 30.0  # a session that began less than this ago may be part of a fleet's first start


class Beacon:
    """Ticks and orphans, for one session."""

    def __init__(
        self,
        courier: Courier,
        view: FleetView,
        mirrors: Collection[Mirror],
        *,
        shards: int,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.is_offering = True
        self._courier = courier
        self._view = view
        self._mirrors = mirrors
        self._shards = shards
        self._clock = clock
        self._rng = rng
        self._born_ns = self._tick_at_ns = clock.now_ns()
        self._tick_revision = 0
        self._orphan_audit_at_ns = 0
        self._is_failing = False

    def note(self, fleet: Fleet) -> None:
        """The watch has brought this fleet."""
        if fleet.tick_revision != self._tick_revision:
            self._tick_revision = fleet.tick_revision
            self._tick_at_ns = self._clock.now_ns()

    async def run(self) -> None:
        """Renew the cluster's tick when it is old; the winner looks for orphans."""
        await loaded(self._view.mirror)
        while True:
            age_s = (self._clock.now_ns() - self._tick_at_ns) / NS_PER_S
            due_s = TICK_S * self._rng.uniform(1.0, 1.2)
            if age_s < due_s:
                await asyncio.sleep(due_s - age_s)
                continue
            seen_revision, n = self._tick_revision, self._view.fleet.tick
            match await self._courier.tick(seen_revision, n + 1):
                case Ticked(revision):
                    self._is_failing = False
                    if await self._sees_tick(seen_revision) and self.is_offering:
                        await self._look_for_orphans(revision, seen_revision)
                case TickLost():
                    self._is_failing = False
                    await self._sees_tick(seen_revision)
                case Undecided(reason):
                    if not self._is_failing:
                        self._is_failing = True
                        log.warning("tick not written, trying on", extra={"reason": reason})
                    await asyncio.sleep(RETRY_S)

    async def _sees_tick(self, seen_revision: int) -> bool:
        """Whether the watch brings a tick newer than `seen_revision`; if not, the watch is stale and is dropped."""
        until_ns = self._clock.now_ns() + int(TICK_SEEN_S * NS_PER_S)
        while self._tick_revision == seen_revision:
            if self._clock.now_ns() >= until_ns:
                reason = "a tick was written and did not arrive"
                has_rotated = False
                for mirror in self._mirrors:
                    has_rotated = mirror.distrust(reason, is_rotating=not has_rotated) or has_rotated
                self._tick_at_ns = self._clock.now_ns()
                return False
            await asyncio.sleep(0.02)
        return True

    async def _look_for_orphans(self, tick_revision: int, tick_revision_before: int) -> None:
        """Shards that nobody leads, at this tick and at the one before, are offered in rendezvous order."""
        now_ns = self._clock.now_ns()
        try:
            if await self._courier.leaders_count() >= self._shards and now_ns < self._orphan_audit_at_ns:
                return
            self._orphan_audit_at_ns = now_ns + int(ORPHAN_AUDIT_S * NS_PER_S)
            missing = set(range(self._shards)) - await self._courier.led_shards(tick_revision)
            if not missing or not tick_revision_before:
                return
            missing_before = missing - await self._courier.led_shards(tick_revision_before)
            alone = duties.orphans(sorted(missing), missing_before)
            if alone and not self._is_for_controller():
                await self._offer(alone, tick_revision)
        except StoreError as exc:
            log.warning("orphans not looked for", extra={"reason": str(exc)})

    def _is_for_controller(self) -> bool:
        """While this session is young and a controller has its seat, that places what is alone, and evenly; offers in
        between would only have to be moved again."""
        is_young = self._clock.now_ns() - self._born_ns < YOUNG_S * NS_PER_S
        return is_young and bool(self._view.fleet.seat_worker)

    async def _offer(self, shards: Iterable[int], tick_revision: int) -> None:
        """Offer each to one worker; while it stays alone, the next tick's turn goes to the next in order."""
        fleet = self._view.fleet
        shares: dict[str, list[int]] = {}
        for shard in shards:
            ranked = fleet.ranked(shard)
            if not ranked:
                return
            shares.setdefault(ranked[fleet.tick % len(ranked)], []).append(shard)
            await asyncio.sleep(0)  # ranking costs by the number of workers, and there may be thousands of shards
        offered = 0
        for name, share in shares.items():
            offered += await self._courier.offer(share, name, fleet.members[name], tick_revision, "orphan")
        if offered:
            log.info("offered shards that nobody leads", extra={"shards": offered})


async def loaded(mirror: Mirror) -> None:
    """Until the mirror has its first picture. No time-out: a store that is away keeps us waiting, and the session,
    which does not wait for it, ends us."""
    while True:
        try:
            await mirror.wait_loaded(LOAD_TIMEOUT_S)
        except StoreError as exc:
            log.warning("still waiting for a first picture", extra={"reason": str(exc)})
        else:
            return
