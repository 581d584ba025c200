"""Who is there and what operators wish: the part of the cluster that every worker knows, and who is eligible.

Law: protocol.md A.3 "Who claims". Eligible: living, `up`, not cordoned; if nobody is, cordoned workers count too,
then those that an operator drains. A worker that is stopping (`draining`) never counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from shardlead.core.model import Meta
from shardlead.core.shardmap import Fact, Member

NO_MEMBERS: Mapping[str, Member] = {}
NO_PINS: Mapping[int, str] = {}


@dataclass(frozen=True, slots=True)
class Fleet:
    """The living workers and the operators' wishes at one revision."""

    members: Mapping[str, Member] = field(default_factory=dict)
    cordoned: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()  # by an operator's wish
    is_frozen: bool = False
    frozen_why: str = ""  # what the operator wrote; "" if nothing
    pins: Mapping[int, str] = field(default_factory=dict)
    meta: Meta | None = None
    meta_revision: int = 0
    seat_worker: str = ""  # who holds the controller's seat, "" for nobody
    tick: int = 0
    tick_revision: int = 0

    def is_up(self, name: str) -> bool:
        """Living and not on its way out."""
        member = self.members.get(name)
        return member is not None and member.record.state == "up"

    def eligible(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that may be given a shard now, in the same order; see the module's law."""
        living = [name for name in names if self.is_up(name)]
        for barred in (self.cordoned | self.drained, self.drained, frozenset[str]()):
            chosen = tuple(name for name in living if name not in barred)
            if chosen:
                return chosen
        return ()

    def ranked(self, shard: int) -> tuple[str, ...]:
        """All eligible workers in the shard's rendezvous order: the same everywhere, spread over the shards."""
        return tuple(sorted(self.eligible(sorted(self.members)), key=lambda name: _weight(shard, name), reverse=True))


def fleet_of(facts: Iterable[Fact]) -> Fleet:
    """The fleet that these facts of [meta .. workers~) tell; others are passed over."""
    members: dict[str, Member] = {}
    cordoned: set[str] = set()
    drained: set[str] = set()
    pins: dict[int, str] = {}
    is_frozen = False
    frozen_why = ""
    meta: Meta | None = None
    meta_revision = tick = tick_revision = 0
    seat_worker = ""
    for fact in facts:
        match fact.place.kind:
            case "workers":
                members[fact.place.worker] = Member(
                    fact.value,  # type: ignore[arg-type]  # RECORD_OF says what stands at each kind of place
                    fact.lease,
                    fact.create_revision,
                    fact.mod_revision,
                )
            case "cordon":
                cordoned.add(fact.place.worker)
            case "drain":
                drained.add(fact.place.worker)
            case "freeze":
                is_frozen = True
                frozen_why = fact.value.reason  # type: ignore[union-attr]  # a Wish, by RECORD_OF
            case "pin":
                pins[fact.place.shard] = fact.value.worker  # type: ignore[union-attr]  # a Wish, by RECORD_OF
            case "meta":
                assert isinstance(fact.value, Meta)
                meta, meta_revision = fact.value, fact.mod_revision
            case "seat":
                seat_worker = fact.value.worker  # type: ignore[union-attr]  # a LeaderRecord, by RECORD_OF
            case "tick":
                tick, tick_revision = fact.value.n, fact.mod_revision  # type: ignore[union-attr]  # a Tick
            case _:
                pass
    return Fleet(
        members=members,
        cordoned=frozenset(cordoned),
        drained=frozenset(drained),
        is_frozen=is_frozen,
        frozen_why=frozen_why,
        pins=pins,
        meta=meta,
        meta_revision=meta_revision,
        seat_worker=seat_worker,
        tick=tick,
        tick_revision=tick_revision,
    )


def _weight(shard: int, name: str) -> bytes:
    return blake2b(b"%d/%s" % (shard, name.encode()), digest_size=8).digest()
