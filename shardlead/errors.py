"""Every exception of shardlead, in one tree.

    ShardleadError
    ├── ConfigError            settings that are wrong, unknown or contradict each other
    ├── KeyspaceError          a record under our prefix that we cannot read
    ├── RingError              a slot table that cannot be made or was damaged
    ├── StoreError
    │   ├── StoreUnavailable   no endpoint answered in time, or the store said "not now"
    │   │   └── WatchSilent    a watch brought nothing for longer than the settings allow
    │   ├── StoreRejected      the store understood and refused
    │   │   ├── Compacted      the revision asked for is gone
    │   │   └── StoreReplaced  another cluster answers than the one that answered before
    │   ├── LeaseGone          the lease does not exist (any more)
    │   └── WatchCanceled      the store ended a watch; load again
    ├── ClusterError
    │   ├── ClusterMissing     nobody has created this cluster yet
    │   ├── MetaMismatch       the cluster was created with another shape than the settings name
    │   ├── NameTaken          a living worker has this name
    │   └── WorkerFull         more shards than one lease can carry
    ├── LeadershipError
    │   ├── NotLeading         this worker does not lead that shard under that epoch
    │   ├── LeadershipLost     it did, and its lease or epoch has ended
    │   ├── Fenced             the resource has registered a newer epoch
    │   ├── EpochRegressed     the resource knows an epoch from the store's future: a restore without `generation raise`
    │   └── WriteUnknown       the resource did not say whether a fenced write was applied
    ├── ResourceUnavailable    the fenced resource did not answer in time; nothing was written
    ├── RequestError           a request whose key or framing cannot be used
    ├── RequestFailed          what the smart client raises in place of an answer
    │   ├── Unserved           surely not processed: nobody led in time, or a bound was met
    │   ├── OutcomeUnknown     sent, and it may have been processed
    │   └── AnswerBroken       the answer had begun and cannot be made whole
    ├── CommandError           an operator's command that cannot be carried out
    ├── AuditError             an audit log that cannot be read, or is none
    └── ProcessFailed          a process that was started for tests or `shardlead dev` did not do its part

Each class says with `is_retryable` whether the same call may succeed later without anybody changing anything.
The text of an error says what happened, to which shard or worker, and what to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

_WRAPPED_MAX: Final = 100  # errors that `weightiest` looks at


class ShardleadError(Exception):
    """Base of all errors that shardlead raises on purpose."""

    is_retryable: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the settings: where it was said, what was said, what is allowed."""

    source: str  # a file's path, an environment variable's name, a flag, or "default"
    field: str  # dotted, as in the TOML files: "lease.ttl_s"
    value: object
    allowed: str

    def __str__(self) -> str:
        return f"{self.source}: {self.field} = {self.value!r}: {self.allowed}"


class ConfigError(ShardleadError):
    """Settings that cannot be used; all problems are listed at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class KeyspaceError(ShardleadError):
    """A key or value under our prefix that is not ours or not readable. It is logged once and ignored."""

    def __init__(self, key: bytes, reason: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__(f"{key.decode('utf-8', 'backslashreplace')}: {reason}")


class RingError(ShardleadError):
    """A slot table that cannot be made (too few slots for a shard) or whose checksum does not fit."""


class StoreError(ShardleadError):
    """The store did not do what was asked."""


class StoreUnavailable(StoreError):
    """No endpoint answered in time, or the answer was "not now". For a write this is never said: see `Unknown`."""

    is_retryable = True

    def __init__(self, reason: str, *, endpoint: str = "") -> None:
        self.reason = reason
        self.endpoint = endpoint
        super().__init__(f"store at {endpoint}: {reason}" if endpoint else f"store: {reason}")


class WatchSilent(StoreUnavailable):
    """A watch brought nothing for longer than the settings allow: broken, or its range is quiet. Open it again."""


class StoreRejected(StoreError):
    """The store understood the request and refused it; sending it again will not help."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code  # gRPC status code
        self.message = message
        super().__init__(f"store refused (code {code}): {message}")


class Compacted(StoreRejected):
    """The revision asked for is no longer kept. Load again from the present. `compact_revision` is 0 where the store
    does not say up to where."""

    def __init__(self, compact_revision: int) -> None:
        self.compact_revision = compact_revision
        super().__init__(
            11, f"revision compacted up to {compact_revision}" if compact_revision else "revision compacted"
        )


class StoreReplaced(StoreRejected):
    """Another cluster answers than the one that answered before; what we know of leases and epochs is not its own."""

    def __init__(self, cluster_id: int, found: int) -> None:
        self.cluster_id, self.found = cluster_id, found
        super().__init__(
            9,
            f"cluster {found:x} answers where cluster {cluster_id:x} did before: the store was replaced, "
            f"or the endpoints belong to different clusters",
        )


class LeaseGone(StoreError):
    """The lease has expired, was revoked, or never existed."""

    def __init__(self, lease: int) -> None:
        self.lease = lease
        super().__init__(f"lease {lease:x} does not exist any more")


class WatchCanceled(StoreError):
    """The store ended a watch. A positive `compact_revision` means events were lost: load again."""

    is_retryable = True

    def __init__(self, reason: str, compact_revision: int = 0) -> None:
        self.reason = reason
        self.compact_revision = compact_revision
        super().__init__(f"watch canceled by the store: {reason or 'no reason given'}")


class ClusterError(ShardleadError):
    """The cluster as a whole does not let us in."""


class ClusterMissing(ClusterError):
    """Nobody has created this cluster yet. `shardlead init`, `shardlead dev` or a first worker does."""

    is_retryable = True

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        super().__init__(f"cluster {cluster!r} does not exist yet: start a worker or run `shardlead init`")


class MetaMismatch(ClusterError):
    """The cluster in the store and the settings here differ in a field that was named explicitly."""

    def __init__(self, cluster: str, field: str, stored: object, wanted: object) -> None:
        self.cluster, self.field, self.stored, self.wanted = cluster, field, stored, wanted
        super().__init__(
            f"cluster {cluster!r} was created with {field} = {stored!r}, the settings here say {wanted!r}: "
            f"change the setting, or use another cluster name"
        )


class NameTaken(ClusterError):
    """A living worker has this name; names are unique among the living."""

    def __init__(self, worker: str, address: str, pid: int) -> None:
        self.worker, self.address, self.pid = worker, address, pid
        super().__init__(
            f"worker name {worker!r} is taken by a living worker at {address} (pid {pid}): "
            f"stop that one, or start this one with another --name"
        )


class WorkerFull(ClusterError):
    """One lease carries at most `shards_max` shards; add workers."""

    def __init__(self, worker: str, shards_max: int) -> None:
        self.worker, self.shards_max = worker, shards_max
        super().__init__(f"worker {worker!r} leads {shards_max} shards, the most one lease carries: add workers")


class LeadershipError(ShardleadError):
    """A leadership is not what the caller took it for."""

    def __init__(self, shard: int, epoch: int, message: str) -> None:
        self.shard, self.epoch = shard, epoch
        super().__init__(message)


class NotLeading(LeadershipError):
    """This worker does not lead that shard under that epoch; `leader` names who does, if known."""

    is_retryable = True

    def __init__(self, shard: int, epoch: int, *, reason: str, leader: str = "") -> None:
        self.reason, self.leader = reason, leader
        where = f"; it is led by {leader}" if leader else ""
        super().__init__(shard, epoch, f"shard {shard} is not led here under epoch {epoch} ({reason}){where}")


class LeadershipLost(LeadershipError):
    """The leadership has ended or its lease could end at any moment: stop working on this shard."""

    def __init__(self, shard: int, epoch: int, reason: str) -> None:
        self.reason = reason
        super().__init__(shard, epoch, f"leadership of shard {shard} under epoch {epoch} is over: {reason}")


class Fenced(LeadershipError):
    """The resource has registered another epoch for this shard; nothing was written."""

    def __init__(self, shard: int, epoch: int, registered: int | None) -> None:
        self.registered = registered
        by = "no epoch is registered there" if registered is None else f"epoch {registered} is registered there"
        super().__init__(shard, epoch, f"write of shard {shard} under epoch {epoch} refused: {by}")


class EpochRegressed(LeadershipError):
    """At the barrier the resource already knew a *higher* epoch: the store's revisions went back."""

    def __init__(self, shard: int, epoch: int, registered: int) -> None:
        self.registered = registered
        super().__init__(
            shard,
            epoch,
            f"shard {shard}: the resource has registered epoch {registered}, above the new epoch {epoch}. "
            f"Either a newer leader exists already, or the store was restored from a backup: "
            f"then stop all workers and run `shardlead generation raise`",
        )


class WriteUnknown(LeadershipError):
    """The resource did not say whether a fenced write was applied. It may be, but only while no newer leader's
    barrier was: read back, or give the leadership a new epoch and load again."""

    def __init__(self, shard: int, epoch: int, reason: str) -> None:
        self.reason = reason
        super().__init__(shard, epoch, f"write of shard {shard} under epoch {epoch} has an unknown outcome: {reason}")


def weightiest(error: BaseException | None) -> LeadershipError | None:
    """What an error that left the application says of its leadership, however it was wrapped: in a group, as the cause
    of another error, or as what was being handled when that one was raised. WriteUnknown before Fenced before
    LeadershipLost; None: none of them."""
    found: list[LeadershipError] = []
    seen: set[int] = set()
    errors = [error]
    while errors and len(seen) < _WRAPPED_MAX:
        error = errors.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, WriteUnknown | Fenced | LeadershipLost):
            found.append(error)
        if isinstance(error, BaseExceptionGroup):
            errors += error.exceptions
        errors += (error.__cause__, error.__context__)
    for kind in (WriteUnknown, Fenced, LeadershipLost):
        for each in found:
            if isinstance(each, kind):
                return each
    return None


class ResourceUnavailable(ShardleadError):
    """The fenced resource did not answer in time or cannot be used; nothing was written."""

    is_retryable = True

    def __init__(self, resource: str, reason: str) -> None:
        self.resource, self.reason = resource, reason
        super().__init__(f"{resource}: {reason}; nothing was written")


class RequestError(ShardleadError):
    """A request that cannot be routed as it stands. `kind` is stable; it ends the problem's `type`."""

    def __init__(self, kind: str, detail: str, *, status: int = 400) -> None:
        self.kind, self.detail, self.status = kind, detail, status
        super().__init__(f"{kind}: {detail}")


class RequestFailed(ShardleadError):
    """A request of the smart client that got no whole answer. `kind` is stable, as in `RequestError`; `shard` is -1
    while it is not known."""

    def __init__(self, kind: str, detail: str, *, shard: int) -> None:
        self.kind, self.detail, self.shard = kind, detail, shard
        super().__init__(f"{kind}, shard {shard}: {detail}" if shard >= 0 else f"{kind}: {detail}")


class Unserved(RequestFailed):
    """It was surely not processed: nobody led its shard for as long as it might wait, or a bound was met. The same
    request may be made again."""

    is_retryable = True


class OutcomeUnknown(RequestFailed):
    """It was sent, and it may have been processed: look before it is repeated. (With an Idempotency-Key to a class
    that says `idempotent`, it was sent again already where that could help, and may be once more.)"""


class AnswerBroken(RequestFailed):
    """The answer's head had come (so the request was handled), and its body broke off."""

    def __init__(self, shard: int, detail: str) -> None:
        super().__init__("answer-broken", detail, shard=shard)


class CommandError(ShardleadError):
    """An operator's command that cannot be carried out; the text says why and what to do."""


class AuditError(ShardleadError):
    """An audit log that cannot be verified: not there, not readable, or with a line that is none of ours."""

    def __init__(self, where: str, reason: str) -> None:
        self.where, self.reason = where, reason  # a file, or file:line
        super().__init__(f"{where}: {reason}")


class ProcessFailed(ShardleadError):
    """A process that `shardlead dev` or a test started did not do its part. `output` is the end of what it printed,
    `code` its exit code if it has ended."""

    def __init__(self, process: str, reason: str, output: str, code: int | None = None) -> None:
        self.process, self.reason, self.output, self.code = process, reason, output, code
        super().__init__(f"{process} {reason}" + (f"; it said:\n{output}" if output else ""))
