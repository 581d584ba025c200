"""The model's own truths: time, history, and that a refusal has no effect. What it answers is compared with etcd in
test_differential."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.clock import NS_PER_S
from shardlead.errors import Compacted, StoreRejected
from shardlead.store.base import Delete, Event, KeyValue, Put, Range, Txn, absent
from shardlead.store.model import MIN_TTL_S, Model

S = NS_PER_S


def new_model(*, expiry_lag_ns: int = 0, history_events_max: int = 1_000, revision: int = 1) -> Model:
    return Model(
        rng=random.Random(1), expiry_lag_ns=expiry_lag_ns, history_events_max=history_events_max, revision=revision
    )


def present(model: Model) -> dict[bytes, KeyValue]:
    """All keys as they stand now."""
    return {kv.key: kv for kv in model.range(Range(b"\0", b"\0")).kvs}


# --- time --------------------------------------------------------------------------------------------------------


def test_a_lease_ends_at_its_time_and_not_a_nanosecond_before() -> None:
    """Granted at 10 s for 5 s: it ends at 15 s."""
    model = new_model()
    grant = model.grant(5, 10 * S)
    model.put(Put(b"k", b"v", grant.lease))
    assert model.next_expiry_ns() == 15 * S
    assert model.expire(15 * S - 1) == ()
    assert model.expire(15 * S) == (grant.lease,)
    assert (present(model), model.leases, model.next_expiry_ns()) == ({}, (), None)


def test_a_lagging_server_ends_a_lease_later() -> None:
    """By `expiry_lag_ns`; but once the time is over a renewal finds nothing, as with etcd, and ends it."""
    model = new_model(expiry_lag_ns=S // 2)
    grant = model.grant(5, 0)
    model.put(Put(b"k", b"v", grant.lease))
    assert model.next_expiry_ns() == 5 * S + S // 2
    assert model.expire(5 * S + S // 2 - 1) == ()
    found = model.time_to_live(grant.lease, 5 * S + 1)
    assert found is not None
    assert (found.ttl_s, found.keys) == (0, (b"k",))
    assert model.renew(grant.lease, 5 * S) == 0
    assert present(model) == {}


def test_a_renewal_counts_from_now_on() -> None:
    """Not from the end that was: renewing early gives no credit."""
    model = new_model()
    grant = model.grant(5, 0)
    assert model.renew(grant.lease, 1 * S) == 5
    assert model.expire(6 * S - 1) == ()
    found = model.time_to_live(grant.lease, 1 * S)
    assert found is not None
    assert (found.ttl_s, found.granted_ttl_s) == (5, 5)
    found = model.time_to_live(grant.lease, 1 * S + 1)
    assert found is not None
    assert found.ttl_s == 4
    assert model.expire(6 * S) == (grant.lease,)


def test_each_lease_ends_in_a_revision_of_its_own() -> None:
    """The longest overdue first; one without keys uses no revision."""
    model = new_model()
    for lease, ttl_s in ((1, 9), (2, 4), (3, 6)):
        model.grant(ttl_s, 0, lease)
    model.put(Put(b"a", b"", 1))
    model.put(Put(b"b", b"", 2))
    before = model.revision
    assert model.expire(100 * S) == (2, 3, 1)
    batch, _ = model.events_since(before + 1, b"\0", b"\0")
    assert [(event.kv.key, event.kv.mod_revision - before) for event in batch.events] == [(b"b", 1), (b"a", 2)]


def test_grants_have_limits() -> None:
    """The smallest TTL is raised to the server's, one that is too large or an id in use is refused."""
    model = new_model()
    assert model.grant(0, 0).ttl_s == MIN_TTL_S
    assert model.grant(9_000_000_000, 0, 7).ttl_s == 9_000_000_000
    with pytest.raises(StoreRejected):
        model.grant(9_000_000_001, 0)
    with pytest.raises(StoreRejected):
        model.grant(5, 0, 7)
    assert len(model.leases) == 2


steps = st.lists(
    st.tuples(st.integers(1, 3 * S), st.sampled_from(["renew", "expire", "put", "detach", "ask"])), max_size=40
)


@given(ttl_s=st.integers(1, 5), lag_ns=st.integers(0, S), story=steps)
def test_whatever_happens_a_lease_lives_as_long_as_was_said(
    ttl_s: int, lag_ns: int, story: Sequence[tuple[int, str]]
) -> None:
    """It is there until the last acknowledged renewal plus its TTL, it is gone once that and the lag are over and
    somebody has looked, and what was gone is never acknowledged again."""
    model = new_model(expiry_lag_ns=lag_ns)
    now_ns = 0
    grant = model.grant(ttl_s, now_ns)
    model.put(Put(b"k", b"v", grant.lease))
    end_ns = grant.ttl_s * S
    is_gone = False
    for passed_ns, act in story:
        now_ns += passed_ns
        match act:
            case "renew":
                answered = model.renew(grant.lease, now_ns)
                assert (answered > 0) == (not is_gone and now_ns < end_ns)
                if answered:
                    end_ns = now_ns + answered * S
                else:
                    is_gone = True
            case "expire":
                model.expire(now_ns)
                is_gone = is_gone or now_ns >= end_ns + lag_ns
            case "put" if not is_gone:
                model.put(Put(b"k", b"v", grant.lease))
            case "detach":
                model.put(Put(b"other", b"v"))
            case _:
                found = model.time_to_live(grant.lease, now_ns)
                assert (found is None) == is_gone
        assert (b"k" in present(model)) == (not is_gone)


# --- history -----------------------------------------------------------------------------------------------------

keys = st.sampled_from([b"a", b"a/1", b"b", b"c"])
puts = st.builds(Put, keys, st.sampled_from([b"1", b"2"]), st.sampled_from([0, 0, 1, 2]))
deletes = st.builds(Delete, keys, st.sampled_from([b"", b"", b"b", b"\0"]))
ranges = st.builds(Range, keys, st.just(b""), revision=st.sampled_from([0, 0, 0, 3, 99]))
guards = st.lists(st.builds(absent, keys), max_size=1).map(tuple)
flat = st.lists(puts | deletes | ranges, max_size=3).map(tuple)
txns = st.builds(Txn, guards, flat, flat)
nested = st.builds(Txn, guards, st.lists(puts | deletes | txns, max_size=3).map(tuple), flat)
stories = st.lists(nested, max_size=15)


def told(story: Sequence[Txn], model: Model) -> None:
    """Do what can be done of a story; leases 1 and 2 exist at first, 1 ends in the middle."""
    model.grant(100, 0, 1)
    model.grant(100, 0, 2)
    for number, txn in enumerate(story):
        if number == len(story) // 2:
            model.revoke(1)
        try:
            model.txn(txn)
        except StoreRejected:
            continue


@given(stories)
def test_events_lead_from_each_revision_to_the_present(story: Sequence[Txn]) -> None:
    """Snapshot at R plus the events after R is the present: what a mirror lives by."""
    model = new_model()
    told(story, model)
    for revision in range(1, model.revision + 1):
        mirror = {kv.key: kv for kv in model.range(Range(b"\0", b"\0", revision=revision)).kvs}
        batch, following = model.events_since(revision + 1, b"\0", b"\0")
        for event in batch.events:
            if event.is_delete:
                assert mirror.pop(event.kv.key, None) is not None
            else:
                mirror[event.kv.key] = event.kv
        assert mirror == present(model)
        assert following == model.revision + 1


@given(stories, nested)
def test_what_is_refused_has_no_effect(story: Sequence[Txn], last: Txn) -> None:
    """Neither on keys nor on revisions nor on leases; and a twin is independent of what it was copied from."""
    model = new_model()
    told(story, model)
    twin = model.copy()
    before = (present(twin), twin.revision, twin.leases, twin.time_to_live(2, 0), twin.size_bytes)
    try:
        model.txn(last)
    except StoreRejected:
        assert (present(model), model.revision, model.leases, model.time_to_live(2, 0), model.size_bytes) == before
    assert (present(twin), twin.revision, twin.leases, twin.time_to_live(2, 0), twin.size_bytes) == before


@given(stories, st.data())
def test_compaction_forgets_only_the_past(story: Sequence[Txn], data: st.DataObject) -> None:
    """Every revision from the compacted one on reads as before; the ones below are refused; what is kept is counted
    right."""
    model = new_model()
    told(story, model)
    if model.revision < 3:
        return
    at = data.draw(st.integers(2, model.revision))
    before = {r: model.range(Range(b"\0", b"\0", revision=r)).kvs for r in range(1, model.revision + 1)}
    events, _ = model.events_since(at, b"\0", b"\0")
    model.compact(at)
    for revision, kvs in before.items():
        if revision >= at:
            assert model.range(Range(b"\0", b"\0", revision=revision)).kvs == kvs
        else:
            with pytest.raises(Compacted):
                model.range(Range(b"\0", b"\0", revision=revision))
    assert model.events_since(at, b"\0", b"\0")[0] == events
    with pytest.raises(Compacted):
        model.events_since(at - 1, b"\0", b"\0")
    if at < model.revision:
        model.compact(model.revision)
    assert model.size_bytes == sum(len(kv.key) + len(kv.value) for kv in present(model).values())


def test_history_is_bounded() -> None:
    """Beyond its bound the older half is compacted; the present stays whole, and a deleted key leaves nothing."""
    model = new_model(history_events_max=100)
    model.put(Put(b"old", b"v"))
    for number in range(1_000):
        model.put(Put(b"k%d" % (number % 7), b"v"))
        model.put(Put(b"gone%d" % number, b"v"))
        model.delete(Delete(b"gone%d" % number))
    assert set(present(model)) == {b"old", *(b"k%d" % n for n in range(7))}
    assert model.revision - model.compacted <= 101
    assert model.size_bytes < 1_500
    with pytest.raises(Compacted):
        model.events_since(model.compacted - 1, b"k0")
    batch, _ = model.events_since(model.compacted, b"k0")
    assert batch.events


def test_a_large_value_that_is_written_often_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """History is bounded in bytes, too."""
    monkeypatch.setattr("shardlead.store.model.HISTORY_BYTES_MAX", 10_000)
    model = new_model()
    for _ in range(100):
        model.put(Put(b"k", b"x" * 1_000))
    assert model.size_bytes <= 12_000


def test_a_store_that_starts_above_one_has_no_past() -> None:
    """After a restart of the embedded store: whoever resumes a watch from before is told that events are lost."""
    model = new_model(revision=1_000)
    with pytest.raises(Compacted):
        model.events_since(999, b"k")
    with pytest.raises(Compacted):
        model.range(Range(b"k", revision=999))
    assert model.put(Put(b"k", b"v")).revision == 1_001
    batch, following = model.events_since(1_001, b"k")
    assert batch.events == (Event(is_delete=False, kv=KeyValue(b"k", b"v", 1_001, 1_001, 1)),)
    assert following == 1_002


def test_a_watch_message_has_a_thousand_revisions_at_most_and_splits_none() -> None:
    """While it catches up, its header runs ahead of its events, as etcd's does."""
    model = new_model(history_events_max=10_000)
    for number in range(1_500):
        model.txn(Txn((), (Put(b"a", b"%d" % number), Put(b"b", b""))))
    first, following = model.events_since(2, b"a", b"c")
    second, end = model.events_since(following, b"a", b"c")
    assert (len(first.events), len(second.events)) == (2_000, 1_000)
    assert first.revision == model.revision > first.events[-1].kv.mod_revision
    assert (following, end) == (1_002, model.revision + 1)
    assert model.events_since(end + 5, b"a", b"c") == (type(first)(model.revision, ()), end + 5)


def test_a_watch_message_is_bounded_in_bytes() -> None:
    """It ends with the revision that passes the bound; nothing is left out."""
    model = new_model()
    for _ in range(20):
        model.txn(Txn((), (Put(b"a", b"x" * 500_000), Put(b"b", b"x" * 500_000))))
    following, told = 2, 0
    while following <= model.revision:
        batch, following = model.events_since(following, b"a", b"c")
        assert len(batch.events) == 10
        told += len(batch.events)
    assert told == 40
