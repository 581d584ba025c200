"""The host's goals, carried to the store: hand over, resign, re-mint; and what to tell the host of the answer.

Law: protocol.md A.3 (T4, T5, T5s). `core.ownership` sets the goal and the host repeats it until it is decided; here
one try is made, under the facts of this instant.
"""

import logging
from typing import Final, assert_never

from shardlead.cluster.answers import Done, LedBy, Nobody, SessionOver, TargetGone, Undecided
from shardlead.cluster.mail import FleetView, Inbox
from shardlead.cluster.passing import Passing
from shardlead.cluster.session import Session
from shardlead.core import duties
from shardlead.core.model import epoch_of, revision_of
from shardlead.core.ownership import HandOver, Remint, Resign
from shardlead.core.shardmap import Member
from shardlead.metrics import WorkerMetrics
from shardlead.worker.envoy import AskAgain, NotOurs, NotPassed, Passage, PassedOn, StillOurs

log = logging.getLogger("shardlead.goals")

HEIRS_MAX: Final = 3  # so many are offered a shard that is given up, one after the other, should their leases be gone


class Goals:
    """How one session's leaderships are passed on."""

    def __init__(
        self,
        passing: Passing,
        session: Session,
        inbox: Inbox,
        view: FleetView,
        *,
        generation: int,
        metrics: WorkerMetrics,
    ) -> None:
        self._passing = passing
        self._session = session
        self._inbox = inbox
        self._view = view
        self._generation = generation
        self._metrics = metrics

    async def pass_on(self, shard: int, epoch: int, goal: HandOver | Resign | Remint, *, is_clean: bool) -> Passage:
        """One try of T5, T4 or T5s."""
        revision = revision_of(epoch)
        match goal:
            case HandOver(want, want_revision):
                target = self._view.fleet.members.get(want.target)
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
                if isinstance(resigned, LedBy) and resigned.leader.sid == self._session.sid:
                    return StillOurs(epoch_of(self._generation, resigned.revision))
                return _not_ours(resigned)
            case Remint(reason):
                minted = await self._passing.remint(shard, revision)
                if isinstance(minted, Done):
                    self._metrics.remints.labels("resumed").inc()
                    log.info("re-minted", extra={"shard": shard, "reason": reason})
                    return PassedOn(new_epoch=epoch_of(self._generation, minted.revision))
                if isinstance(minted, SessionOver):
                    self._session.lose(minted.reason)
                    return NotOurs(minted.reason)
                return _not_ours(minted)
            case _:
                assert_never(goal)

    def _heirs(self, shard: int) -> tuple[tuple[str, Member], ...]:
        fleet = self._view.fleet
        names = duties.heirs(shard, self._inbox.orders.get(shard), fleet, self._session.name)
        return tuple((name, fleet.members[name]) for name in names[:HEIRS_MAX])


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
