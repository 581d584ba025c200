"""What the store's word on leadership can be: the answers to the transactions of A.3, as plain values.

Law: protocol.md A.3. Each says only what is proved. `Undecided` means: ask again, do not assume. What is done with an
answer is decided by whoever asked.
"""

from dataclasses import dataclass

from shardlead.core.model import LeaderRecord


@dataclass(frozen=True, slots=True)
class Claimed:
    """Ours under `revision`. `is_clean`: the former tenure closed its object and its work had ended; if not,
    `former_ttl_s` is at least what its lease could still allow."""

    revision: int
    is_clean: bool
    former_ttl_s: float
    short_tenures: int


@dataclass(frozen=True, slots=True)
class LedBy:
    """Another session leads it."""

    leader: LeaderRecord
    revision: int


@dataclass(frozen=True, slots=True)
class Nobody:
    """Nobody leads it (any more)."""


@dataclass(frozen=True, slots=True)
class NotYet:
    """Nobody leads it, and nobody should for `wait_s` more seconds: its last tenures were all short."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class Undecided:
    """The store gave no answer that decides."""

    reason: str


@dataclass(frozen=True, slots=True)
class SessionOver:
    """The transaction was refused because our record is gone, evicted, or the cluster changed its shape."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Applied, under this revision."""

    revision: int


@dataclass(frozen=True, slots=True)
class TargetGone:
    """The leadership is still ours; the target of the handoff is gone or wants it no more."""

    reason: str


ClaimAnswer = Claimed | LedBy | Nobody | NotYet | Undecided | SessionOver
PassAnswer = Done | LedBy | Nobody | Undecided
HandOffAnswer = PassAnswer | TargetGone
