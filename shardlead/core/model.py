"""The nouns of shardlead: what stands in the store and what the other modules of `core` reason about.

Law: plain frozen values. A record keeps in `extra` the fields it does not know, so that an older build that rewrites
a newer build's record loses nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import msgspec

PROTOCOL: Final = 1
SHARDS_MAX: Final = 32_768  # 16 slots each, two bytes a slot: the table still fits one etcd request (1 MiB of 1.5)
GENERATION_MAX: Final = 31  # keeps an epoch below 2**53: exact in JSON, in JavaScript and in a signed 64-bit column
REVISION_BITS: Final = 48
REVISION_MASK: Final = (1 << REVISION_BITS) - 1
SHARDS_PER_LEASE_MAX: Final = 5_000  # protocol.md A.1: a revoke stalls etcd in proportion to the lease's keys

WorkerState = Literal["up", "draining"]


def epoch_of(generation: int, revision: int) -> int:
    """The epoch of a leadership: the operator's generation above the leader key's mod_revision (48 bits)."""
    return (generation << REVISION_BITS) | revision


def revision_of(epoch: int) -> int:
    """The mod_revision inside an epoch; what transactions compare."""
    return epoch & REVISION_MASK


def generation_of(epoch: int) -> int:
    """The operator's generation inside an epoch."""
    return epoch >> REVISION_BITS


@dataclass(frozen=True, slots=True)
class Record:
    """Base of every stored value: unknown fields survive a rewrite."""

    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False)


@dataclass(frozen=True, slots=True)
class Meta(Record):
    """What the cluster is; written once. `generation` alone changes, by `shardlead generation raise`.

    The bounds hold for what is read: a planner would count through any number of shards."""

    cluster: str
    shards: Annotated[int, msgspec.Meta(ge=1, le=SHARDS_MAX)]
    slot_count: int
    seed: int
    ring_crc: int
    generation: Annotated[int, msgspec.Meta(ge=0, le=GENERATION_MAX)] = 0
    protocol: int = PROTOCOL
    hash_tags: bool = False


@dataclass(frozen=True, slots=True)
class WorkerRecord(Record):
    """A living worker's session, on its lease: `workers/<name>`."""

    sid: str
    address: str  # "host:port" that serves requests
    pid: int = 0
    zone: str = ""
    capacity: float = 1.0
    version: str = ""
    state: WorkerState = "up"
    drain_timeout_s: float = 10.0
    idempotent: bool = False
    fenced: bool = True
    admin: str = ""  # "host:port" of its admin server, empty if it has none


@dataclass(frozen=True, slots=True)
class LeaderRecord(Record):
    """The fact: who leads. `leaders/<shard>`; its mod_revision is the epoch. Also the controller's `seat`."""

    worker: str
    sid: str


@dataclass(frozen=True, slots=True)
class PastLeader:
    """One earlier leadership in a shard's history."""

    worker: str
    epoch: int
    since: float


@dataclass(frozen=True, slots=True)
class History(Record):
    """What is remembered of a shard: `history/<shard>`, rewritten by each claim and handoff.

    `clean` tells how the tenure *before* the present one ended: its object was closed and its work had ended.
    `short_tenures` counts tenures in a row that ended in failure soon after they began (`duties.short_tenures`).
    """

    worker: str
    sid: str
    since: float  # wall seconds, for people
    reason: str
    clean: bool = False
    short_tenures: int = 0
    ended: bool = False  # written by resign: the tenure of `worker` is over and nobody has followed yet
    previous: tuple[PastLeader, ...] = ()
    tick: int = 0  # the cluster's, as the writer knew it: how long ago it was, whatever wall clocks say
    ttl_s: float = 0.0
    """Of the lease that carries this tenure, or of one before it that is longer and did not end cleanly: what an
    unfenced successor waits is counted from it. 0: not known."""


PREVIOUS_MAX: Final = 8
TICK_S: Final = 2.0
"""The cluster's tick is renewed by whoever sees that it is older than this or a bit more (protocol.md A.7.7)."""


@dataclass(frozen=True, slots=True)
class Assignment(Record):
    """The wish: `order[0]` is to lead, the others follow in this order. One copy in each concerned worker's inbox."""

    order: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Eviction(Record):
    """An order to give up the session `sid`."""

    sid: str
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Offer(Record):
    """To the session `sid`: a leaderless shard to claim, or (`handoff`) "it is yours now".

    With `handoff` the offer was written in the transaction that moved the leadership, so the offer's own
    mod_revision is the leader key's and thereby the epoch.
    """

    sid: str
    by: str
    reason: str
    handoff: bool = False
    clean: bool = True  # with `handoff`: the former leader had closed its object and all its work had ended
    ttl_s: float = 0.0  # with `handoff`: of the leases whose work may go on, if it is not clean; 0: not known


@dataclass(frozen=True, slots=True)
class Want(Record):
    """A warm target asks the leader for a shard; it dies with the target's lease."""

    target: str
    target_sid: str
    target_lease: int
    epoch_seen: int
    reason: str = ""
    ttl_s: float = 0.0  # of the target's lease; 0: not known


@dataclass(frozen=True, slots=True)
class Wish(Record):
    """What an operator asked for: `wishes/freeze`, `wishes/cordon/<worker>`, `wishes/drain/<worker>`,
    `wishes/pin/<shard>` (then `worker` names the leader-to-be)."""

    by: str
    reason: str = ""
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Tick(Record):
    """The freshness beacon."""

    n: int
