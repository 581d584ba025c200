"""The picture: facts as the planner wants them, and what is noted of time."""

from shardlead.clock import NS_PER_S
from shardlead.controller.picture import SHUN_S, Picture
from shardlead.core.keyspace import Keyspace, encode
from shardlead.core.model import (
    Assignment,
    History,
    LeaderRecord,
    Meta,
    Offer,
    PastLeader,
    Record,
    Tick,
    Wish,
    WorkerRecord,
)
from shardlead.core.planner import Copy, Led, Snapshot
from shardlead.store.base import KeyValue
from shardlead.store.mirror import Change

KEYS = Keyspace("test")


class Store:
    """Feeds a picture by hand; the time is in seconds."""

    def __init__(self) -> None:
        self.picture = Picture(KEYS, brake_window_s=30.0, return_wait_s=10.0)
        self.now_s = 1_000.0
        self.revision = 0
        self.kvs: dict[bytes, KeyValue] = {}

    def put(self, key: bytes, record: Record | bytes) -> bool:
        return self.change({key: record}, ())

    def delete(self, *keys: bytes) -> bool:
        return self.change({}, keys)

    def change(self, puts: dict[bytes, Record | bytes], deletes: tuple[bytes, ...]) -> bool:
        self.revision += 1
        written = []
        for key, record in puts.items():
            value = record if isinstance(record, bytes) else encode(record)
            created = self.kvs[key].create_revision if key in self.kvs else self.revision
            self.kvs[key] = KeyValue(key, value, created, self.revision, 1, 7)
            written.append(self.kvs[key])
        gone = tuple(self.kvs.pop(key) for key in deletes)
        return self.picture.apply(Change(self.revision, tuple(written), gone), int(self.now_s * NS_PER_S))

    def join(self, name: str, sid: str = "", state: str = "up") -> None:
        self.put(KEYS.worker(name), WorkerRecord(sid or f"sid-{name}", f"{name}:80", state=state))  # type: ignore[arg-type]  # as the test says

    def snapshot(self) -> Snapshot:
        return self.picture.snapshot(int(self.now_s * NS_PER_S))


def lead(name: str, sid: str = "") -> LeaderRecord:
    return LeaderRecord(name, sid or f"sid-{name}")


def test_facts_and_wishes_become_a_snapshot() -> None:
    """Everything that the planner looks at, from key-values in any order."""
    store = Store()
    store.put(KEYS.leader(3), lead("a"))
    store.put(KEYS.assignment("a", 3), Assignment(("a", "b"), "x"))
    store.put(KEYS.assignment("b", 3), Assignment(("a", "b"), "x"))
    store.put(
        KEYS.history(3), History("a", "sid-a", 0.0, "x", previous=(PastLeader("b", 9, 0.0), PastLeader("c", 4, 0.0)))
    )
    store.put(KEYS.history(4), History("a", "sid-a", 0.0, "x", short_tenures=2))
    store.join("a")
    store.put(KEYS.meta, Meta("test", 8, 16_384, 0, 5))
    store.put(KEYS.pin(5), Wish("me", worker="a"))
    store.put(KEYS.freeze, Wish("me"))
    snapshot = store.snapshot()

    assert snapshot.shards == 8
    assert snapshot.leaders == {3: Led("a", 1)}
    assert snapshot.copies == {3: {"a": Copy(("a", "b"), 2), "b": Copy(("a", "b"), 3)}}
    assert snapshot.known == {3, 4}
    assert snapshot.troubled == {4}
    assert snapshot.previous == {3: PastLeader("b", 9, 0.0)}
    assert snapshot.fleet.pins == {5: "a"}
    assert snapshot.fleet.is_frozen
    assert set(snapshot.fleet.members) == {"a"}


def test_what_is_deleted_is_gone() -> None:
    """Leaders, copies, histories, wishes and workers."""
    store = Store()
    store.join("a")
    store.change(
        {
            KEYS.leader(3): lead("a"),
            KEYS.assignment("a", 3): Assignment(("a",), "x"),
            KEYS.history(3): History("a", "sid-a", 0.0, "x"),
            KEYS.drain("a"): Wish("me"),
        },
        (),
    )
    store.delete(*store.kvs)
    snapshot = store.snapshot()

    assert not snapshot.leaders
    assert not snapshot.copies
    assert not snapshot.previous
    assert not snapshot.known
    assert not snapshot.fleet.drained
    assert not snapshot.fleet.members


def test_a_leader_whose_session_does_not_live_is_nobody() -> None:
    """Its revision still counts for guards; a namesake's session is another one."""
    store = Store()
    store.put(KEYS.leader(3), lead("a"))
    assert store.snapshot().leaders == {3: Led("", 1)}
    store.join("a", sid="another")
    assert store.snapshot().leaders == {3: Led("", 1)}
    store.join("a")
    assert store.snapshot().leaders == {3: Led("a", 1)}


def test_garbage_is_absent() -> None:
    """A damaged record takes away the one that stood there before."""
    store = Store()
    store.join("a")
    store.put(KEYS.leader(3), lead("a"))
    store.put(KEYS.leader(3), b"garbage")
    store.put(KEYS.worker("a"), b"garbage")
    store.put(KEYS.prefix + b"novelty", b"?")
    snapshot = store.snapshot()

    assert snapshot.leaders == {}
    assert snapshot.fleet.members == {}


def test_only_what_the_planner_sees_wakes_it() -> None:
    """Ticks, offers and histories do not; facts, wishes and assignments do."""
    store = Store()
    store.join("a")

    assert not store.put(KEYS.tick, Tick(1))
    assert not store.put(KEYS.offer("a", 3), Offer("sid-a", "b", "x"))
    assert not store.put(KEYS.history(3), History("a", "sid-a", 0.0, "x"))
    assert store.put(KEYS.leader(3), lead("a"))
    assert store.put(KEYS.freeze, Wish("me"))
    assert store.put(KEYS.assignment("a", 3), Assignment(("a",), "x"))


def test_a_snapshot_does_not_change_any_more() -> None:
    """It may be planned from in a thread while the picture goes on."""
    store = Store()
    store.join("a")
    store.put(KEYS.leader(3), lead("a"))
    store.put(KEYS.assignment("a", 3), Assignment(("a",), "x"))
    snapshot = store.snapshot()
    store.put(KEYS.leader(4), lead("a"))
    store.put(KEYS.assignment("b", 3), Assignment(("a", "b"), "x"))
    store.delete(KEYS.worker("a"))

    assert snapshot.leaders == {3: Led("a", 2)}
    assert set(snapshot.copies[3]) == {"a"}
    assert set(snapshot.fleet.members) == {"a"}


def test_membership_is_still_while_sessions_and_states_are() -> None:
    """Joining, stopping and leaving start the clock again; leaderships and renewed records do not."""
    store = Store()
    store.join("a")
    store.now_s += 5
    store.put(KEYS.leader(3), lead("a"))
    store.join("a")
    assert store.snapshot().still_for_s == 5
    store.join("a", state="draining")
    assert store.snapshot().still_for_s == 0


def test_who_vanishes_counts_for_the_brake_for_a_while() -> None:
    """Only sessions that ended without having said so, and only for the window."""
    store = Store()
    store.join("a")
    store.join("b")
    store.join("b", state="draining")
    store.delete(KEYS.worker("a"))
    store.delete(KEYS.worker("b"))

    assert store.snapshot().departed == {"a"}
    store.now_s += 31
    assert store.snapshot().departed == frozenset()


def test_a_cold_start_is_counted_from_its_first_sight() -> None:
    """While most shards have no leader and somebody lives; each cold start anew."""
    store = Store()
    store.put(KEYS.meta, Meta("test", 2, 16_384, 0, 5))
    assert store.snapshot().waited_s > 1e6
    store.now_s += 100
    store.join("a")
    assert store.snapshot().waited_s == 0
    store.now_s += 3
    store.put(KEYS.leader(0), lead("a"))
    assert store.snapshot().waited_s == 3
    store.now_s += 10
    store.delete(KEYS.leader(0))
    assert store.snapshot().waited_s == 0


def test_who_gives_up_several_shards_is_shunned_for_a_while() -> None:
    """One shard may be a bad shard; two different ones are a bad worker, until it has had time or a new session."""
    store = Store()
    store.join("a")
    for shard in (3, 3, 4):
        assert store.snapshot().shunned == frozenset()
        store.put(KEYS.leader(shard), lead("a"))
        store.delete(KEYS.leader(shard))
    assert store.snapshot().shunned == {"a"}
    store.now_s += 2 * SHUN_S + 1
    assert store.snapshot().shunned == frozenset()

    store.put(KEYS.leader(5), lead("a"))
    store.delete(KEYS.leader(5))
    assert store.snapshot().shunned == {"a"}
    store.delete(KEYS.worker("a"))
    store.join("a", sid="new")
    assert store.snapshot().shunned == frozenset()


def test_whoever_hands_over_stops_or_dies_is_not_shunned() -> None:
    """A leader key that is replaced in place, or goes with its session, is no failure."""
    store = Store()
    store.join("a")
    store.join("b")
    for shard in range(4):
        store.put(KEYS.leader(shard), lead("a"))
    for shard in range(3):
        store.put(KEYS.leader(shard), lead("b"))
    assert store.snapshot().shunned == frozenset()
    store.delete(*(KEYS.leader(shard) for shard in range(3)), KEYS.worker("b"))
    assert store.snapshot().shunned == frozenset()
    store.join("a", state="draining")
    store.delete(KEYS.leader(3))
    assert store.snapshot().shunned == frozenset()


# --- who stops is expected back ---


def stop(store: Store, name: str) -> None:
    """As a worker does that is told to."""
    store.join(name, state="draining")
    store.delete(KEYS.worker(name))


def test_who_stops_is_expected_back_for_a_while() -> None:
    """From the moment it says so; counted anew from when it is gone; until it is back under any session."""
    store = Store()
    store.join("a")
    store.join("b")
    assert store.snapshot().return_in_s == 0
    store.join("b", state="draining")
    assert store.snapshot().return_in_s == 10
    store.now_s += 4
    assert store.snapshot().return_in_s == 6
    store.delete(KEYS.worker("b"))
    assert store.snapshot().return_in_s == 10
    store.now_s += 9
    assert store.snapshot().return_in_s == 1
    store.join("b", "another")
    assert store.snapshot().return_in_s == 0


def test_who_does_not_come_back_is_not_waited_for_longer() -> None:
    """Nor is one that takes ever so long to stop."""
    store = Store()
    for name in ("a", "b", "c"):
        store.join(name)
    stop(store, "a")
    store.join("b", state="draining")
    store.now_s += 10
    assert store.snapshot().return_in_s == 0


def test_another_worker_in_its_place_is_as_good() -> None:
    """Fleets whose workers get new names with each start: one that comes, one less to expect."""
    store = Store()
    for name in ("a", "b"):
        store.join(name)
    stop(store, "a")
    store.now_s += 1
    stop(store, "b")
    store.join("c")
    assert store.snapshot().return_in_s == 10
    store.join("d")
    assert store.snapshot().return_in_s == 0


def test_who_dies_or_was_drained_by_an_operator_is_not_expected() -> None:
    """A death is the brake's business; whoever was emptied first is to go for good."""
    store = Store()
    for name in ("a", "b"):
        store.join(name)
    store.delete(KEYS.worker("a"))
    assert store.snapshot().return_in_s == 0
    store.put(KEYS.drain("b"), Wish("me"))
    stop(store, "b")
    assert store.snapshot().return_in_s == 0


def test_a_new_controller_knows_who_has_just_left() -> None:
    """The one that stops may hold the seat itself; the next reads from the histories whose shards have just changed
    hands. One that left long ago, by the cluster's ticks, is not expected."""
    before = Store()
    before.join("a")
    before.put(KEYS.tick, Tick(100))
    before.put(KEYS.history(3), History("a", "sid-a", 0.0, "x", previous=(PastLeader("gone", 9, 0.0),), tick=99))
    before.put(KEYS.history(4), History("a", "sid-a", 0.0, "x", previous=(PastLeader("long-gone", 9, 0.0),), tick=94))
    load = Change(before.revision, tuple(before.kvs.values()), (), is_load=True)

    store = Store()
    store.picture.apply(load, int(store.now_s * NS_PER_S))
    assert store.snapshot().return_in_s == 10
    store.join("long-gone")
    store.now_s += 1
    store.picture.apply(load, int(store.now_s * NS_PER_S))
    assert store.snapshot().return_in_s == 0, "another has come; a later load of the same tells nothing new"
