"""What the host believes, against what the store says: proofs on demand, look-ups for requests, and the audit.

Law: protocol.md A.3 (T3), A.7.8 and A.8. What is not ours any more is taken from the host, what is ours without its
knowing is adopted; a session whose record is not ours is lost. Nothing is believed on a caller's word.
"""

import asyncio
import logging
import random
from collections.abc import Mapping
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.answers import Done, LedBy, Nobody, SessionOver, Undecided
from shardlead.cluster.batch import BATCH
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.mail import FleetView
from shardlead.cluster.session import Session
from shardlead.core import ownership
from shardlead.core.model import epoch_of, revision_of
from shardlead.errors import StoreError
from shardlead.worker.claims import Claims
from shardlead.worker.host import Host

log = logging.getLogger("shardlead.proofs")

DOUBT_PAUSE_S: Final = 1.0
ASKED_PAUSE_S: Final = 0.02


class Proofs:
    """What one session has proved, and what it was asked to."""

    def __init__(
        self,
        leaders: Leaders,
        session: Session,
        view: FleetView,
        host: Host,
        claims: Claims,
        *,
        generation: int,
        shards: int,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._leaders = leaders
        self._session = session
        self._view = view
        self._host = host
        self._claims = claims
        self._generation = generation
        self._shards = shards
        self._clock = clock
        self._rng = rng
        self._doubts: dict[int, int] = {}  # shard -> our epoch, where somebody spoke of a larger one
        self._lookups: set[int] = set()
        self._asked = asyncio.Event()

    # --- on demand ---

    def doubt(self, shard: int, epoch: int) -> None:
        """Look at the truth, at most once a second (protocol.md A.8)."""
        self._doubts[shard] = epoch
        self._asked.set()

    def look_up(self, shard: int) -> None:
        """See who leads a shard that others take for ours."""
        self._lookups.add(shard)
        self._asked.set()

    async def answer(self) -> None:
        """Proofs and look-ups that requests have asked for, in batches; proofs at most once a second.

        Paced, because a caller that speaks of an epoch from the future is never content with an answer.
        """
        doubt_again_ns = 0
        while True:
            await self._asked.wait()  # no time-out: requests set it, and the steward cancels
            self._asked.clear()
            try:
                await self._look_up()
            except StoreError as exc:
                log.warning("leaders not looked up", extra={"reason": str(exc)})
            if self._doubts and self._clock.now_ns() >= doubt_again_ns:
                doubt_again_ns = self._clock.now_ns() + int(DOUBT_PAUSE_S * NS_PER_S)
                doubts, self._doubts = self._doubts, {}
                if await self._check(doubts) is False:
                    self._session.lose("the worker's record is not ours any more")
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
            if isinstance(holder, LedBy) and holder.leader.sid == self._session.sid:
                self._claims.adopt(shard, holder.revision)
                continue
            leader = ""
            if isinstance(holder, LedBy) and (member := self._view.fleet.members.get(holder.leader.worker)):
                leader = f"{holder.leader.worker} {member.record.address} {epoch_of(self._generation, holder.revision)}"
            self._host.note_elsewhere(shard, known_epoch, leader)

    # --- T3 ---

    async def confirm(self) -> bool | None:
        """T3 for everything, after a suspension."""
        return await self._check(self._host.led())

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
                case LedBy(leader, revision) if leader.sid == self._session.sid:
                    self._host.feed(shard, ownership.Gone("its epoch has changed"))
                    self._claims.adopt(shard, revision)
                case LedBy(leader):
                    self._host.feed(shard, ownership.Gone(f"led by {leader.worker}"))
                case Nobody():
                    self._host.feed(shard, ownership.Gone("its key is gone"))

    # --- audit ---

    async def audit(self) -> None:
        """Once every TTL: what stands on our lease, against what the host believes."""
        while True:
            await asyncio.sleep(self._session.ttl_s * self._rng.uniform(0.9, 1.1))
            if not self._session.is_active:
                continue
            before = self._host.led()
            match await self._leaders.audit():
                case SessionOver(reason):
                    self._session.lose(reason)
                    return
                case Undecided(reason):
                    log.warning("audit undecided", extra={"reason": reason})
                case found:
                    for shard, revision in found.items():
                        if shard not in before and shard < self._shards:
                            self._claims.adopt(shard, revision)
                    doubtful = {
                        shard: epoch
                        for shard, epoch in before.items()
                        if found.get(shard) != revision_of(epoch)
                        and ownership.epoch_led(self._host.state(shard)) == epoch
                    }
                    if doubtful and await self._check(doubtful) is False:
                        self._session.lose("the worker's record is not ours any more")
                        return
