"""The client's spelling and the server's are one: what one end writes the other reads as the same."""

import random

from hypothesis import given
from hypothesis import strategies as st

from shardlead.errors import StoreRejected
from shardlead.store import answers, gateway, requests
from shardlead.store.base import (
    Committed,
    Compare,
    Conflict,
    Delete,
    Event,
    KeyValue,
    LeaseKeys,
    Op,
    Put,
    Range,
    Target,
    Txn,
)
from shardlead.store.model import Model

keys = st.binary(min_size=1, max_size=4)
ends = st.just(b"") | keys
numbers = st.integers(0, 2**63 - 1)
relations = st.sampled_from(["EQUAL", "NOT_EQUAL", "GREATER", "LESS"])
compares = st.builds(
    Compare, keys, st.sampled_from([Target.VERSION, Target.CREATE, Target.MOD, Target.LEASE]), numbers, relations, ends
) | st.builds(Compare, keys, st.just(Target.VALUE), st.binary(max_size=4), relations, ends)
ranges = st.builds(Range, keys, ends, numbers, numbers, st.booleans(), st.booleans())
ops = ranges | st.builds(Put, keys, st.binary(max_size=8), numbers) | st.builds(Delete, keys, ends)


def _branch(op: st.SearchStrategy[Op]) -> st.SearchStrategy[tuple[Op, ...]]:
    return st.lists(op, max_size=3).map(tuple)


def _txn(op: st.SearchStrategy[Op]) -> st.SearchStrategy[Txn]:
    return st.builds(Txn, st.lists(compares, max_size=2).map(tuple), _branch(op), _branch(op))


txns = _txn(ops | _txn(ops | _txn(ops)))


@given(txns)
def test_a_transaction_arrives_as_it_was_sent(txn: Txn) -> None:
    """Zeros, empty bytes and large numbers included."""
    assert requests.parse_txn(requests.parse_object(gateway.txn_body(txn))) == txn


@given(ranges)
def test_a_read_arrives_as_it_was_sent(op: Range) -> None:
    """With each of its options."""
    assert requests.parse_range(requests.parse_object(gateway.range_body(op))) == op


@given(keys, ends, st.integers(1, 2**63 - 1))
def test_a_watch_arrives_as_it_was_sent(key: bytes, end: bytes, start: int) -> None:
    """It asks for progress."""
    asked = requests.parse_watch(requests.parse_object(gateway.watch_body(key, end, start)))
    assert asked == requests.Watch(key, end, start, watch_id=0, has_progress=True)


small = st.sampled_from([b"a", b"b", b"c"])
few = st.builds(Put, small, st.sampled_from([b"", b"v"]), st.sampled_from([0, 7])) | st.builds(
    Delete, small, st.sampled_from([b"", b"c"])
)
reads = st.builds(Range, small, st.just(b"d"), st.sampled_from([0, 1]), st.just(0), st.booleans(), st.booleans())
live = _txn(few | reads | _txn(few | reads))


@given(st.lists(live, max_size=8))
def test_an_outcome_arrives_as_it_was_decided(story: list[Txn]) -> None:
    """Whatever the model answers, the client reads as the same results, nested ones too."""
    model = Model(rng=random.Random(1))
    model.grant(60, 0, 7)
    for txn in story:
        try:
            result = model.txn(txn)
        except StoreRejected:
            continue
        header = {"cluster_id": "1", "member_id": "2", "revision": str(result.revision)}
        outcome = gateway.txn_outcome(answers.encode_txn(result, header))
        assert outcome == (Committed if result.succeeded else Conflict)(result.revision, result.results)


key_values = st.builds(
    KeyValue,
    keys,
    st.binary(max_size=4),
    st.integers(1, 2**62),
    st.integers(1, 2**62),
    st.integers(1, 2**62),
    st.integers(0, 2**62),
)
events = st.builds(Event, st.just(False), key_values) | st.builds(
    Event, st.just(True), st.builds(KeyValue, keys, st.just(b""), st.just(0), st.integers(1, 2**62), st.just(0))
)


@given(st.lists(events, max_size=4))
def test_events_arrive_as_they_happened(happened: list[Event]) -> None:
    """Deletions show a key and a revision only."""
    raw = {"header": {"revision": "9"}, "events": [answers.encode_event(event) for event in happened]}
    assert gateway.watch_message(raw).batch.events == tuple(happened)


@given(st.integers(1, 2**62), st.integers(0, 10**9), st.integers(1, 10**9), st.lists(keys, max_size=3))
def test_a_lease_arrives_as_it_is(lease: int, left_s: int, granted_s: int, held: list[bytes]) -> None:
    """A living one; of one that is gone the client hears None, and a renewal without a TTL is 0."""
    known = LeaseKeys(lease, left_s, granted_s, tuple(held))
    assert gateway.lease_keys(answers.encode_time_to_live(lease, known, {}, with_keys=True), lease) == known
    assert gateway.lease_keys(answers.encode_time_to_live(lease, None, {}, with_keys=True), lease) is None
    assert gateway.renewed_ttl_s(answers.encode_lease(lease, granted_s, {})) == granted_s
    assert gateway.renewed_ttl_s(answers.encode_lease(lease, 0, {})) == 0
