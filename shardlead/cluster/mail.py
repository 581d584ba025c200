"""What a worker reads of the cluster: its own inbox, and the fleet. Two watches, whatever the number of shards.

Law: protocol.md A.2. Foreign or damaged records are logged once and passed over; they never stop anybody.
"""

import logging
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from shardlead.clock import Clock
from shardlead.core.duties import Order
from shardlead.core.fleet import Fleet, fleet_of
from shardlead.core.keyspace import Keyspace
from shardlead.core.model import Assignment, Eviction, Offer, Want
from shardlead.core.shardmap import Fact, read_fact
from shardlead.errors import KeyspaceError
from shardlead.store.base import KeyValue, Store, prefix_end
from shardlead.store.mirror import Change, Mirror

log = logging.getLogger("shardlead.mail")

LOGGED_MAX: Final = 1_000  # damaged keys remembered as already logged


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Letter(Generic[T]):
    """A record in the inbox, and where it stands."""

    record: T
    kv: KeyValue


class Facts:
    """Key-values to facts, each damaged or foreign one logged once."""

    def __init__(self, keyspace: Keyspace) -> None:
        self._keyspace = keyspace
        self._logged: set[tuple[bytes, int]] = set()

    def read(self, kv: KeyValue) -> Fact | None:
        reason = "not a key of this version of shardlead"
        try:
            fact = read_fact(self._keyspace, kv.key, kv.value, kv.lease, kv.create_revision, kv.mod_revision)
        except KeyspaceError as exc:
            fact, reason = None, exc.reason
        seen = (kv.key, kv.mod_revision)
        if fact is None and seen not in self._logged and len(self._logged) < LOGGED_MAX:
            self._logged.add(seen)
            log.warning("record ignored", extra={"key": kv.key.decode("utf-8", "backslashreplace"), "reason": reason})
        return fact


class Inbox:
    """The worker's own records, kept current: assignments, offers, wants, eviction.

    `on_change` is told the shards whose orders are new."""

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        me: str,
        on_change: Callable[[Collection[int]], None],
        *,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.orders: dict[int, Order] = {}
        self.offers: dict[int, Letter[Offer]] = {}
        self.wants: dict[int, Letter[Want]] = {}
        self.eviction: Letter[Eviction] | None = None
        self._facts = Facts(keyspace)
        self._keyspace = keyspace
        self._on_change = on_change
        start = keyspace.inbox(me)
        self.mirror = Mirror(store, start, prefix_end(start), self._apply, clock=clock, rng=rng, name="inbox")

    def _apply(self, change: Change) -> None:
        for kv in change.deletes:
            self._forget(kv.key)
        ordered: list[int] = []
        for kv in change.puts:
            self._put(kv, ordered)
        self._on_change(ordered)

    def _put(self, kv: KeyValue, ordered: list[int]) -> None:
        fact = self._facts.read(kv)
        if fact is None:
            self._forget(kv.key)
            return
        shard = fact.place.shard
        match fact.value:
            case Assignment() as assignment:
                self.orders[shard] = Order(assignment, kv.mod_revision)
                ordered.append(shard)
            case Offer() as offer:
                self.offers[shard] = Letter(offer, kv)
            case Want() as want:
                self.wants[shard] = Letter(want, kv)
            case Eviction() as eviction:
                self.eviction = Letter(eviction, kv)
            case _:
                pass

    def _forget(self, key: bytes) -> None:
        place = self._keyspace.parse(key)
        if place is None:
            return
        match place.kind:
            case "assignments":
                self.orders.pop(place.shard, None)
            case "offers":
                self.offers.pop(place.shard, None)
            case "wants":
                self.wants.pop(place.shard, None)
            case "eviction":
                self.eviction = None
            case _:
                pass


@dataclass(frozen=True, slots=True)
class FleetChange:
    """The fleet after a change; `ended` names the workers whose session is over (their name may live again),
    `leaving` those that have just begun to stop."""

    fleet: Fleet
    ended: tuple[str, ...]
    leaving: tuple[str, ...]
    is_tick: bool


class FleetView:
    """[meta .. workers~), kept current: everything a worker knows of the others."""

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        on_change: Callable[[FleetChange], None],
        *,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.fleet = Fleet()
        self._facts_by_key: dict[bytes, Fact] = {}
        self._facts = Facts(keyspace)
        self._keyspace = keyspace
        self._on_change = on_change
        self.mirror = Mirror(
            store, keyspace.meta, prefix_end(keyspace.workers), self._apply, clock=clock, rng=rng, name="fleet"
        )

    def _apply(self, change: Change) -> None:
        before = self.fleet
        tick_key = self._keyspace.tick
        for kv in change.deletes:
            self._facts_by_key.pop(kv.key, None)
        for kv in change.puts:
            fact = self._facts.read(kv)
            if fact is None:
                self._facts_by_key.pop(kv.key, None)
            else:
                self._facts_by_key[kv.key] = fact
        self.fleet = fleet_of(self._facts_by_key.values())
        ended: list[str] = []
        leaving: list[str] = []
        for name, member in before.members.items():
            now = self.fleet.members.get(name)
            if now is None or now.record.sid != member.record.sid:
                ended.append(name)
        for name, member in self.fleet.members.items():
            known = before.members.get(name)
            was_up = known is not None and known.record.sid == member.record.sid and known.record.state == "up"
            if member.record.state != "up" and (was_up or known is None):
                leaving.append(name)
        is_tick = all(kv.key == tick_key for kv in (*change.puts, *change.deletes))
        self._on_change(FleetChange(self.fleet, tuple(ended), tuple(leaving), is_tick))
