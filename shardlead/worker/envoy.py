"""What the host asks of whoever speaks to the store for it, and what it hears back of a shard that is passed on.

Law: protocol.md A.3. An envoy is there for one session only; the host outlives it.
"""

from dataclasses import dataclass
from typing import Protocol

from shardlead.core.ownership import HandOver, Remint, Resign
from shardlead.worker.leadership import Guard


@dataclass(frozen=True, slots=True)
class PassedOn:
    """The transaction was applied. `new_epoch` for a re-mint; `leader` for a handoff, as in the header."""

    new_epoch: int = 0
    leader: str = ""


@dataclass(frozen=True, slots=True)
class NotPassed:
    """A handoff whose target is gone: the shard is still ours."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotOurs:
    """The leadership is another's, or nobody's."""

    reason: str


@dataclass(frozen=True, slots=True)
class StillOurs:
    """Under this newer epoch, by a re-mint that was applied late; nothing was sent to end that one."""

    epoch: int


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Undecided."""

    reason: str


Passage = PassedOn | NotPassed | NotOurs | StillOurs | AskAgain


class Envoy(Protocol):
    """Speaks to the store for one session."""

    @property
    def guard(self) -> Guard: ...

    def queue_claim(self, shard: int) -> None:
        """Claim it with the next batch; answers with Won or ClaimLost."""
        ...

    def former_wait_s(self, shard: int) -> float:
        """TTL + delta of the former leader's lease."""
        ...

    def doubt(self, shard: int, epoch: int) -> None:
        """Somebody spoke of a larger epoch than ours: look whether the shard is still ours."""
        ...

    def look_up(self, shard: int) -> None:
        """Somebody takes us for its leader and we know nothing of it: look who is, and tell `note_elsewhere`."""
        ...

    async def pass_on(self, shard: int, epoch: int, goal: HandOver | Resign | Remint, *, is_clean: bool) -> Passage: ...
