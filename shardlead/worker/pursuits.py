"""One session's pursuits: the wants it puts for shards that others lead, and for how long each is worth it.

Law: protocol.md A.3 "Wants". What to want stands in `core.duties`: what the assignments say, and what a stopping
worker still leads. A want that is wanted no more is taken back; one that nobody meets is put again.
"""

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.answers import LedBy, Nobody
from shardlead.cluster.courier import Courier
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.mail import FleetView, Inbox
from shardlead.cluster.session import Session
from shardlead.core import duties, ownership
from shardlead.core.model import epoch_of
from shardlead.worker.claims import CLAIM_PAUSE_S, Claims
from shardlead.worker.host import Host

log = logging.getLogger("shardlead.pursuits")

FROZEN_PAUSE_S: Final = 2.0  # how often a shard that may not be asked for is looked at again


@dataclass(frozen=True, slots=True)
class _Pursuit:
    """A want that was put, and when to look again."""

    leader: str
    until_ns: int
    is_standing: bool = False
    is_takeover: bool = False


class Pursuits:
    """What one session wants of others."""

    def __init__(
        self,
        leaders: Leaders,
        courier: Courier,
        session: Session,
        inbox: Inbox,
        view: FleetView,
        host: Host,
        claims: Claims,
        *,
        generation: int,
        shards: int,
        drain_timeout_s: float,
        clock: Clock,
    ) -> None:
        self._leaders = leaders
        self._courier = courier
        self._session = session
        self._inbox = inbox
        self._view = view
        self._host = host
        self._claims = claims
        self._generation = generation
        self._shards = shards
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._by_shard: dict[int, _Pursuit] = {}
        self._takeovers: dict[int, str] = {}  # shard -> the stopping worker it is wanted from

    def take_over(self, shards: Iterable[int], leader: str) -> None:
        """`leader` stops: want these of it, for as long as it leads them."""
        self._takeovers.update(dict.fromkeys(shards, leader))

    def end(self, shard: int) -> None:
        """It has been decided."""
        self._by_shard.pop(shard, None)

    def due_s(self) -> float:
        """Seconds until the next is to be looked at again."""
        now_ns = self._clock.now_ns()
        later = [pursuit.until_ns - now_ns for pursuit in self._by_shard.values() if pursuit.until_ns > now_ns]
        return min(later) / NS_PER_S if later else math.inf

    async def pursue(self) -> None:
        """Want what the assignments say, and what a stopping worker still leads. Raises StoreError."""
        fleet, me, now_ns = self._view.fleet, self._session.name, self._clock.now_ns()
        held = {shard for shard, state in self._host.states() if not isinstance(state, ownership.Idle)}
        takeovers = {shard: name for shard, name in self._takeovers.items() if shard not in held}
        self._takeovers = takeovers
        wanted = duties.wanted(self._inbox.orders, me, self._session.create_revision, held, fleet)
        shards = [
            shard
            for shard in {*wanted, *takeovers}
            if shard < self._shards
            and max(self._host.backoff_until_ns(shard), self._claims.braked_until_ns(shard)) <= now_ns
            and (
                shard not in self._by_shard
                or self._by_shard[shard].until_ns <= now_ns
                or (shard in takeovers and not self._by_shard[shard].is_takeover)
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
        for shard in [shard for shard in self._by_shard if shard not in wanted]:
            pursuit = self._by_shard.pop(shard)
            if pursuit.is_standing and isinstance(self._host.state(shard), ownership.Idle):
                await self._courier.withdraw(shard, pursuit.leader)

    async def _want(
        self, leaders: dict[int, LedBy | Nobody], takeovers: dict[int, str], wanted: Collection[int]
    ) -> None:
        fleet, me, now_ns = self._view.fleet, self._session.name, self._clock.now_ns()
        ask: dict[int, LedBy] = {}
        for shard, holder in leaders.items():
            match holder:
                case Nobody():
                    self._claims.claim_at(shard, now_ns)
                    self._by_shard[shard] = _Pursuit("", now_ns + int(CLAIM_PAUSE_S * NS_PER_S))
                case LedBy(leader, revision) if leader.sid == self._session.sid:
                    self._claims.adopt(shard, revision)
                case LedBy(leader, revision) if not leader.worker:
                    self._by_shard[shard] = _Pursuit("", now_ns + int(FROZEN_PAUSE_S * NS_PER_S))
                    if await self._claims.clear(shard, revision):
                        self._claims.claim_at(shard, now_ns)
                case LedBy(leader):
                    is_takeover = shard in takeovers and leader.worker == takeovers[shard]
                    if not is_takeover:
                        self._takeovers.pop(shard, None)
                    if is_takeover or shard in wanted:
                        ask[shard] = holder
                    else:
                        self._by_shard[shard] = _Pursuit(leader.worker, now_ns + int(FROZEN_PAUSE_S * NS_PER_S))
        self._by_shard = {
            shard: pursuit for shard, pursuit in self._by_shard.items() if pursuit.until_ns > now_ns or shard in ask
        }
        if not ask:
            return
        reason = "its leader stops" if takeovers else "assigned"
        generation_epoch = epoch_of(self._generation, 0)
        standing = await self._courier.want(ask, generation_epoch, reason)
        for shard, holder in ask.items():
            if shard in standing:
                member = fleet.members.get(holder.leader.worker)
                patience_s = (member.record.drain_timeout_s if member else self._drain_timeout_s) + 1.0
            else:
                patience_s = CLAIM_PAUSE_S  # the leader changed under the want: look again
            self._by_shard[shard] = _Pursuit(
                holder.leader.worker, now_ns + int(patience_s * NS_PER_S), shard in standing, shard in takeovers
            )
        log.debug("wanted", extra={"worker": me, "shards": len(standing)})
