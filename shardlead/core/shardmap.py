"""The picture that routers, clients and workers hold of a cluster: shape, slot table, living workers, leaders.

What it never does: watch, wait or decide. It is an immutable value; `apply` gives the next one and says what became
different. A change costs in proportion to the change: leaders stand in chunks of 256, of which one is copied.

Law: the map shows facts only (`leaders/`, `workers/`, `meta`, `ring`), never assignments. Applying changes one by
one gives the same map as building it from the last state.

A leader's address is taken from the worker record of the *same session*. A `leaders/` record whose sid is not that
of the living session of this name (its session has ended and the deletion is on its way, or the worker record has
not arrived yet) has the address "": nobody who can be reached leads under that epoch. The living namesake is a
different session, perhaps on a different host; it would only refuse, and a caller that waits for news does better.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final
from zlib import crc32

from shardlead.core.keyspace import RECORD_OF, Keyspace, Place, decode
from shardlead.core.model import SHARDS_MAX, LeaderRecord, Meta, Record, WorkerRecord, epoch_of
from shardlead.core.ring import SlotTable, decode_table, hash_tag
from shardlead.errors import RingError

_CHUNK_BITS: Final = 8
_CHUNK: Final = 1 << _CHUNK_BITS
_LOW: Final = _CHUNK - 1


@dataclass(frozen=True, slots=True)
class Fact:
    """One key-value of the store, understood. `value` is None if it could not be read (counts as absent), bytes for
    `ring`."""

    place: Place
    value: Record | bytes | None
    lease: int = 0
    create_revision: int = 0
    mod_revision: int = 0


def read_fact(
    keyspace: Keyspace, key: bytes, value: bytes, lease: int, create_revision: int, mod_revision: int
) -> Fact | None:
    """The fact that a stored key-value tells; None for a key that is not one of ours. Raises KeyspaceError if the
    key is ours and the value cannot be read."""
    place = keyspace.parse(key)
    if place is None:
        return None
    kind = RECORD_OF.get(place.kind)
    read = value if kind is None else decode(kind, key, value)
    return Fact(place, read, lease, create_revision, mod_revision)


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads a shard, and since which revision. `address` is "" while its session is not known to live."""

    worker: str
    sid: str
    epoch: int
    address: str
    revision: int


@dataclass(frozen=True, slots=True)
class Member:
    """A living worker: its record, the lease it stands on, and when it was created and last changed."""

    record: WorkerRecord
    lease: int
    create_revision: int
    mod_revision: int


@dataclass(frozen=True, slots=True)
class LeaderChange:
    """A shard's leader before and after; None: nobody. Address and epoch count as part of the leader."""

    shard: int
    before: Leader | None
    after: Leader | None


@dataclass(frozen=True, slots=True)
class WorkerChange:
    """A worker's record before and after; None: no living session of that name."""

    name: str
    before: Member | None
    after: Member | None

    @property
    def is_other_session(self) -> bool:
        """Whether the session or its address changed, rather than the rest of the record."""
        if self.before is None or self.after is None:
            return True
        before, after = self.before.record, self.after.record
        return (before.sid, before.address) != (after.sid, after.address)


@dataclass(frozen=True, slots=True)
class Delta:
    """What became different in one step; in order of shard and name.

    `workers_gone` names the sessions that have ended (also when the same name lives on with a new one).
    `is_reset`: shape, table or generation changed, so whatever was derived from the old map is void.
    """

    leaders: tuple[LeaderChange, ...] = ()
    workers_gone: tuple[tuple[str, str], ...] = ()
    workers_changed: tuple[WorkerChange, ...] = ()
    is_reset: bool = False

    def __bool__(self) -> bool:
        return bool(self.leaders or self.workers_gone or self.workers_changed or self.is_reset)


_Chunk = tuple[Leader | None, ...]
_NO_SLOTS: Final["array[int]"] = array("H")
_EMPTY_CHUNK: Final[_Chunk] = (None,) * _CHUNK
_EMPTY_CHUNKS: Final[tuple[_Chunk, ...]] = (_EMPTY_CHUNK,) * (SHARDS_MAX >> _CHUNK_BITS)


@dataclass(frozen=True, slots=True, repr=False)
class ShardMap:
    """The cluster at one revision. Begin with `ShardMap()` and `apply`.

    `fault` says why a stored table cannot be used, if it cannot. `led` counts the leaderships of each worker name
    that has any. Records of shards beyond `meta.shards` are kept but never routed to.
    """

    meta: Meta | None = None
    table: SlotTable = ()
    revision: int = 0
    workers: Mapping[str, Member] = field(default_factory=lambda: MappingProxyType({}))
    led: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    fault: str = ""
    _ring: bytes | None = None
    _chunks: tuple[_Chunk, ...] = _EMPTY_CHUNKS
    _mask: int = 0
    _slots: "array[int]" = field(default_factory=lambda: _NO_SLOTS)  # two bytes a slot, which fits into a cache
    _hash_tags: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether keys can be looked up: meta and a table that fits it have arrived."""
        return bool(self.table)

    def route(self, key: bytes | str) -> tuple[int, int, Leader | None]:
        """Slot, shard and leader of a key; None while nobody leads it. Raises RingError before `is_ready`. This is the
        request path: one crc32, three indexes, no copy, and no tuple with names, which takes as long as all of that."""
        if key.__class__ is str:
            key = key.encode()
        if self._hash_tags:
            key = hash_tag(key)  # type: ignore[arg-type]  # as above
        slot = crc32(key) & self._mask  # type: ignore[arg-type]  # as above
        try:
            shard = self._slots[slot]
        except IndexError:
            raise RingError(self.fault or "the slot table has not been loaded yet") from None
        return slot, shard, self._chunks[shard >> 8][shard & 255]

    def shard_of(self, key: bytes | str) -> int:
        """The shard of a key. Raises RingError before `is_ready`."""
        return self.route(key)[1]

    def leader(self, shard: int) -> Leader | None:
        """Who leads the shard; None if nobody does, or there is no such shard."""
        return self._chunks[shard >> _CHUNK_BITS][shard & _LOW] if 0 <= shard < SHARDS_MAX else None

    def leaders(self) -> Iterator[tuple[int, Leader]]:
        """All leaderships, in order of shard."""
        for number, chunk in enumerate(self._chunks):
            if chunk is not _EMPTY_CHUNK:
                for low, leader in enumerate(chunk):
                    if leader is not None:
                        yield (number << _CHUNK_BITS) | low, leader

    def shards_of(self, worker: str) -> tuple[int, ...]:
        """The shards that `leaders/` says this worker leads, in order."""
        if worker not in self.led:
            return ()
        return tuple(shard for shard, leader in self.leaders() if leader.worker == worker)

    def apply(self, puts: Iterable[Fact], deletes: Iterable[Place], revision: int) -> tuple["ShardMap", Delta]:
        """The map after one step of the store, and what became different. Facts of other kinds are passed over."""
        meta, ring = self.meta, self._ring
        members: dict[str, Member | None] = {}
        leads: dict[int, tuple[LeaderRecord, int] | None] = {}
        for place in deletes:
            match place.kind:
                case "leaders" if place.shard < SHARDS_MAX:
                    leads[place.shard] = None
                case "workers":
                    members[place.worker] = None
                case "meta":
                    meta = None
                case "ring":
                    ring = None
                case _:
                    pass
        for fact in puts:
            match fact.place.kind, fact.value:
                case "leaders", LeaderRecord() as record if fact.place.shard < SHARDS_MAX:
                    leads[fact.place.shard] = (record, fact.mod_revision)
                case "leaders", None if fact.place.shard < SHARDS_MAX:
                    leads[fact.place.shard] = None
                case "workers", WorkerRecord() as worker:
                    members[fact.place.worker] = Member(worker, fact.lease, fact.create_revision, fact.mod_revision)
                case "workers", None:
                    members[fact.place.worker] = None
                case "meta", (Meta() | None) as value:
                    meta = value
                case "ring", (bytes() | None) as value:
                    ring = value
                case _:
                    pass

        workers, workers_changed = _change_workers(self.workers, members)
        generation = 0 if meta is None else meta.generation
        is_regenerated = generation != (0 if self.meta is None else self.meta.generation)

        def lead(worker: str, sid: str, revision: int) -> Leader:
            member = workers.get(worker)
            address = member.record.address if member is not None and member.record.sid == sid else ""
            return Leader(worker, sid, epoch_of(generation, revision), address, revision)

        # Which leaders may read differently: those put or deleted, and those whose worker's session or whose
        # generation changed. The second is rare: a session's leaders go in the same revision as its record.
        targets: dict[int, Leader | None] = {}
        restated = {change.name for change in workers_changed if change.name in self.led and change.is_other_session}
        if restated or is_regenerated:
            for shard, leader in self.leaders():
                if is_regenerated or leader.worker in restated:
                    targets[shard] = lead(leader.worker, leader.sid, leader.revision)
        for shard, put in leads.items():
            targets[shard] = None if put is None else lead(put[0].worker, put[0].sid, put[1])
        leaders_changed = tuple(
            LeaderChange(shard, self.leader(shard), targets[shard])
            for shard in sorted(targets)
            if self.leader(shard) != targets[shard]
        )
        led, chunks = _change_leaders(self.led, self._chunks, leaders_changed)
        is_reset = meta != self.meta or ring != self._ring
        step = replace(
            _reshape(self, meta, ring) if is_reset else self,
            revision=max(self.revision, revision),
            workers=workers,
            led=led,
            _chunks=chunks,
        )
        gone = tuple(
            (change.name, change.before.record.sid)
            for change in workers_changed
            if change.before is not None
            and (change.after is None or change.after.record.sid != change.before.record.sid)
        )
        return step, Delta(leaders_changed, gone, workers_changed, is_reset)

    def __repr__(self) -> str:
        shape = f"{self.meta.shards} shards" if self.meta is not None else "no meta"
        fault = f", fault: {self.fault}" if self.fault else ""
        led = sum(self.led.values())
        return f"<ShardMap at {self.revision}: {shape}, {led} led, {len(self.workers)} workers{fault}>"


def _reshape(map_: ShardMap, meta: Meta | None, ring: bytes | None) -> ShardMap:
    """The map with another shape; without a table, and saying why, if the stored one cannot be used."""
    table: SlotTable = ()
    fault = ""
    if meta is not None and ring is not None:
        try:
            table = decode_table(ring, meta)
        except RingError as exc:
            fault = str(exc)
    mask = len(table) - 1 if table else 0
    hash_tags = meta is not None and meta.hash_tags
    return replace(
        map_,
        meta=meta,
        table=table,
        fault=fault,
        _ring=ring,
        _mask=mask,
        _slots=array("H", table) if table else _NO_SLOTS,
        _hash_tags=hash_tags,
    )


def _change_workers(
    workers: Mapping[str, Member], members: Mapping[str, Member | None]
) -> tuple[Mapping[str, Member], tuple[WorkerChange, ...]]:
    changes = tuple(
        WorkerChange(name, workers.get(name), members[name])
        for name in sorted(members)
        if workers.get(name) != members[name]
    )
    if not changes:
        return workers, ()
    after = dict(workers)
    for change in changes:
        if change.after is None:
            del after[change.name]
        else:
            after[change.name] = change.after
    return MappingProxyType(after), changes


def _change_leaders(
    led: Mapping[str, int], chunks: tuple[_Chunk, ...], changes: Iterable[LeaderChange]
) -> tuple[Mapping[str, int], tuple[_Chunk, ...]]:
    counts = dict(led)
    copies: dict[int, list[Leader | None]] = {}
    for change in changes:
        number = change.shard >> _CHUNK_BITS
        if number not in copies:
            copies[number] = list(chunks[number])
        copies[number][change.shard & _LOW] = change.after
        if change.before is not None:
            counts[change.before.worker] -= 1
            if not counts[change.before.worker]:
                del counts[change.before.worker]
        if change.after is not None:
            counts[change.after.worker] = counts.get(change.after.worker, 0) + 1
    if not copies:
        return led, chunks
    return MappingProxyType(counts), tuple(
        tuple(copies[number]) if number in copies else chunk for number, chunk in enumerate(chunks)
    )
