"""The shard map: one picture whatever the order of news, changed in proportion to the change."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlead.core.keyspace import Keyspace, Place, encode
from shardlead.core.model import LeaderRecord, Meta, Tick, Wish, WorkerRecord, epoch_of
from shardlead.core.ring import build_table, encode_table, slot_of, table_crc
from shardlead.core.shardmap import Delta, Fact, Leader, LeaderChange, Member, ShardMap, WorkerChange, read_fact
from shardlead.errors import KeyspaceError, RingError

SHARDS = 300  # more than one chunk
TABLE = build_table(SHARDS, 16_384)
META = Meta("test", SHARDS, 16_384, 0, table_crc(TABLE))
SHAPE = (Fact(Place("meta"), META, mod_revision=1), Fact(Place("ring"), encode_table(TABLE), mod_revision=1))


def worker(name: str, revision: int, *, sid: str = "", address: str = "", state: str = "up") -> Fact:
    record = WorkerRecord(sid or f"sid-{name}", address or f"{name}:80", state=state)  # type: ignore[arg-type]  # the test says "up" or "draining"
    return Fact(Place("workers", worker=name), record, 7, revision, revision)


def leads(name: str, shard: int, revision: int, *, sid: str = "") -> Fact:
    return Fact(Place("leaders", shard=shard), LeaderRecord(name, sid or f"sid-{name}"), 7, revision, revision)


def map_of(*facts: Fact, revision: int = 100) -> ShardMap:
    return ShardMap().apply((*SHAPE, *facts), (), revision)[0]


# --- lookups ---------------------------------------------------------------------------------------------------


def test_a_key_leads_to_its_slot_shard_and_leader() -> None:
    """One lookup tells slot, shard, leader, epoch and address."""
    slot = slot_of(b"alice", 16_384)
    shard = TABLE[slot]
    seen = map_of(worker("a", 5), leads("a", shard, 9))

    leader = Leader("a", "sid-a", 9, "a:80", 9)
    assert (slot, shard, leader) == seen.route(b"alice")
    assert seen.route("alice") == seen.route(b"alice")
    assert shard == seen.shard_of("alice")
    assert leader == seen.leader(shard)


def test_a_text_key_is_its_utf8() -> None:
    """str and bytes name the same key."""
    seen = map_of()

    assert seen.route("größe") == seen.route("größe".encode())


def test_a_shard_without_leader_has_none() -> None:
    """Nobody leads, or there is no such shard: None, never an error."""
    seen = map_of()

    assert seen.route(b"alice")[2] is None
    assert seen.leader(-1) is None
    assert seen.leader(10**6) is None


def test_hash_tags_follow_meta() -> None:
    """Keys with one tag share a slot where the cluster says so, and only there."""
    plain = map_of()
    tagged, _ = plain.apply((Fact(Place("meta"), replace(META, hash_tags=True)),), (), 101)

    assert tagged.route(b"{u}.cart")[0] == tagged.route(b"u")[0]
    assert plain.route(b"{u}.cart")[0] != plain.route(b"u")[0]


def test_before_shape_and_table_nothing_is_routed() -> None:
    """Without meta, ring, or with a damaged ring, a lookup is refused with the reason."""
    cases = {
        "not been loaded": ShardMap(),
        "not been loaded ": ShardMap().apply(SHAPE[:1], (), 5)[0],
        "not been loaded  ": ShardMap().apply(SHAPE[1:], (), 5)[0],
        "checksum": ShardMap().apply((SHAPE[0], Fact(Place("ring"), bytes(2 * 16_384))), (), 5)[0],
        "bytes": ShardMap().apply((SHAPE[0], Fact(Place("ring"), b"xx")), (), 5)[0],
    }
    for reason, seen in cases.items():
        assert not seen.is_ready
        with pytest.raises(RingError, match=reason.strip()):
            seen.route(b"alice")


def test_a_repaired_table_is_used() -> None:
    """A fault is gone as soon as the stored table fits."""
    broken = ShardMap().apply((SHAPE[0], Fact(Place("ring"), b"xx")), (), 5)[0]
    mended, delta = broken.apply((SHAPE[1],), (), 6)

    assert mended.is_ready
    assert mended.fault == ""
    assert delta.is_reset


# --- sessions --------------------------------------------------------------------------------------------------


def test_the_workers_record_may_come_before_after_or_never() -> None:
    """A leader has its session's address as soon as both are known, and "" while one is missing."""
    never = map_of(leads("a", 3, 9))
    after, delta = never.apply((worker("a", 10),), (), 10)
    before = map_of(worker("a", 10), leads("a", 3, 9))

    assert never.leader(3) == Leader("a", "sid-a", 9, "", 9)
    assert after.leader(3) == before.leader(3) == Leader("a", "sid-a", 9, "a:80", 9)
    assert delta.leaders == (LeaderChange(3, never.leader(3), after.leader(3)),)


def test_a_namesakes_address_is_not_the_leaders() -> None:
    """The living session of that name is another one: nobody who can be reached leads."""
    seen = map_of(worker("a", 10, sid="new", address="elsewhere:80"), leads("a", 3, 9, sid="old"))

    leader = seen.leader(3)
    assert leader is not None
    assert leader.address == ""


def test_a_session_that_ends_takes_its_leaderships_along() -> None:
    """Record and leaderships go in one revision: the delta tells the end of each, and who is gone."""
    seen = map_of(worker("a", 10), worker("b", 10), leads("a", 3, 11), leads("a", 290, 11), leads("b", 4, 12))
    gone = [Place("workers", worker="a"), Place("leaders", shard=290), Place("leaders", shard=3)]
    after, delta = seen.apply((), gone, 20)

    assert delta == Delta(
        leaders=(LeaderChange(3, seen.leader(3), None), LeaderChange(290, seen.leader(290), None)),
        workers_gone=(("a", "sid-a"),),
        workers_changed=(WorkerChange("a", seen.workers["a"], None),),
    )
    assert after.led == {"b": 1}
    assert list(after.leaders()) == [(4, seen.leader(4))]


def test_a_record_that_goes_before_its_leaderships_takes_their_address() -> None:
    """Should they ever come apart, the leaders stay named and lose their address."""
    seen = map_of(worker("a", 10), leads("a", 3, 11))
    after, delta = seen.apply((), (Place("workers", worker="a"),), 20)

    assert after.leader(3) == Leader("a", "sid-a", 11, "", 11)
    assert delta.workers_gone == (("a", "sid-a"),)


def test_a_name_that_comes_back_is_another_session() -> None:
    """Deleted and created in one step, as after a resync: the old session is reported gone."""
    seen = map_of(worker("a", 10))
    _, delta = seen.apply((worker("a", 20, sid="sid-2"),), (Place("workers", worker="a"),), 20)

    assert delta.workers_gone == (("a", "sid-a"),)


def test_a_draining_worker_keeps_its_leaderships_as_they_are() -> None:
    """A change of state alone touches no leader."""
    seen = map_of(worker("a", 10), leads("a", 3, 11))
    after, delta = seen.apply((worker("a", 12, state="draining"),), (), 12)

    assert delta.leaders == ()
    assert delta.workers_gone == ()
    assert [change.name for change in delta.workers_changed] == ["a"]
    assert after.leader(3) is seen.leader(3)


def test_a_raised_generation_raises_every_epoch() -> None:
    """The generation is the epoch's high part; all epochs change with it."""
    seen = map_of(worker("a", 10), leads("a", 3, 11))
    after, delta = seen.apply((Fact(Place("meta"), replace(META, generation=2)),), (), 12)

    leader = after.leader(3)
    assert leader is not None
    assert leader.epoch == epoch_of(2, 11)
    assert delta.is_reset
    assert [change.shard for change in delta.leaders] == [3]


# --- steps -----------------------------------------------------------------------------------------------------


def test_no_news_is_no_delta() -> None:
    """The same facts again change nothing but the revision; facts of other kinds are passed over."""
    seen = map_of(worker("a", 10), leads("a", 3, 11))
    after, delta = seen.apply(
        (
            worker("a", 10),
            leads("a", 3, 11),
            Fact(Place("tick"), Tick(4)),
            Fact(Place("freeze"), Wish("me")),
            Fact(Place("leaders", shard=999_999), LeaderRecord("a", "sid-a")),
        ),
        (Place("leaders", shard=17), Place("workers", worker="zed"), Place("drain", worker="a")),
        130,
    )

    assert not delta
    assert replace(seen, revision=130) == after


def test_the_revision_never_goes_back() -> None:
    """A step that claims an older revision does not lower the map's."""
    assert map_of(revision=100).apply((), (), 50)[0].revision == 100


def test_one_change_copies_one_chunk() -> None:
    """The 256 shards around it are copied; all others are shared with the map before."""
    seen = map_of(worker("a", 10), leads("a", 3, 11), leads("a", 299, 11))
    after, _ = seen.apply((leads("a", 2, 20),), (), 20)

    assert after._chunks[1] is seen._chunks[1]
    assert after._chunks[0] is not seen._chunks[0]
    assert after.workers is seen.workers
    assert after.table is seen.table


def test_an_unreadable_record_counts_as_absent() -> None:
    """Garbage in place of a leader or worker is a shard without leader, a worker without record."""
    seen = map_of(worker("a", 10), leads("a", 3, 11))
    after, delta = seen.apply((Fact(Place("leaders", shard=3), None), Fact(Place("workers", worker="a"), None)), (), 20)

    assert after.leader(3) is None
    assert not after.workers
    assert delta.workers_gone == (("a", "sid-a"),)


def test_the_map_shows_itself_to_an_operator() -> None:
    """The repr tells revision, shape, who is there and what is wrong."""
    assert repr(map_of(worker("a", 10), leads("a", 3, 11))) == "<ShardMap at 100: 300 shards, 1 led, 1 workers>"
    assert repr(ShardMap()) == "<ShardMap at 0: no meta, 0 led, 0 workers>"


def test_stored_key_values_become_facts() -> None:
    """A key of ours is read, a foreign key is None, garbage at a place of ours is a KeyspaceError."""
    keyspace = Keyspace("test")
    record = LeaderRecord("a", "sid-a")

    assert read_fact(keyspace, keyspace.leader(3), encode(record), 7, 8, 9) == Fact(
        Place("leaders", shard=3), record, 7, 8, 9
    )
    assert read_fact(keyspace, keyspace.ring, b"\x00\x01", 0, 1, 1) == Fact(Place("ring"), b"\x00\x01", 0, 1, 1)
    assert read_fact(keyspace, b"/test/leaders/x", b"{}", 0, 1, 1) is None
    with pytest.raises(KeyspaceError):
        read_fact(keyspace, keyspace.leader(3), b"garbage", 7, 8, 9)


# --- any order of news -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    puts: tuple[Fact, ...]
    deletes: tuple[Place, ...]


NAMES = st.sampled_from("abc")
SIDS = st.sampled_from(("s1", "s2"))
PLACES = st.one_of(
    st.builds(lambda shard: Place("leaders", shard=shard), st.sampled_from((0, 1, 255, 256, 299, 5_000))),
    st.builds(lambda name: Place("workers", worker=name), NAMES),
    st.just(Place("meta")),
    st.just(Place("ring")),
)


@st.composite
def facts(draw: st.DrawFn) -> Fact:
    place = draw(PLACES)
    revision = draw(st.integers(1, 50))
    match place.kind:
        case "leaders":
            value: object = draw(st.none() | st.builds(LeaderRecord, NAMES, SIDS))
        case "workers":
            value = draw(
                st.none() | st.builds(WorkerRecord, SIDS, st.sampled_from(("x:1", "x:2")), zone=st.sampled_from("zy"))
            )
        case "meta":
            value = draw(
                st.none() | st.builds(lambda generation: replace(META, generation=generation), st.integers(0, 2))
            )
        case _:
            value = draw(st.sampled_from((None, b"broken", SHAPE[1].value)))
    return Fact(place, value, 7, revision, revision)  # type: ignore[arg-type]  # `value` is what stands at such a place


@st.composite
def steps(draw: st.DrawFn) -> Step:
    puts = draw(st.lists(facts(), max_size=4, unique_by=lambda fact: fact.place))
    deletes = draw(st.lists(PLACES, max_size=3, unique=True))
    return Step(tuple(puts), tuple(deletes))


@settings(max_examples=300, deadline=None)
@given(st.lists(steps(), max_size=12))
def test_steps_give_the_map_of_the_last_state(news: list[Step]) -> None:
    """Applying any sequence of changes equals building from scratch, and each delta is exactly the difference."""
    seen = ShardMap()
    state: dict[Place, Fact] = {}
    for revision, step in enumerate(news, start=1):
        after, delta = seen.apply(step.puts, step.deletes, revision)
        for place in step.deletes:
            state.pop(place, None)
        state.update({fact.place: fact for fact in step.puts})

        assert after == ShardMap().apply(state.values(), (), revision)[0]
        assert [(change.shard, change.before, change.after) for change in delta.leaders] == [
            (shard, seen.leader(shard), after.leader(shard))
            for shard in range(6_000)
            if seen.leader(shard) != after.leader(shard)
        ]
        assert [(change.name, change.before, change.after) for change in delta.workers_changed] == [
            (name, seen.workers.get(name), after.workers.get(name))
            for name in "abc"
            if seen.workers.get(name) != after.workers.get(name)
        ]
        assert set(delta.workers_gone) == sessions(seen.workers) - sessions(after.workers)
        assert after.led == {
            name: count for name in "abc" if (count := sum(lead.worker == name for _, lead in after.leaders()))
        }
        assert all(len(after.shards_of(name)) == after.led.get(name, 0) for name in "abc")
        seen = after


def sessions(workers: Mapping[str, Member]) -> set[tuple[str, str]]:
    return {(name, member.record.sid) for name, member in workers.items()}
