"""The picture of a range, and the mirror that keeps it: only differences come out, whatever went in."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.clock import SystemClock
from shardlead.errors import Compacted, StoreError, StoreUnavailable, WatchCanceled, WatchSilent
from shardlead.store.base import (
    Event,
    Grant,
    KeyValue,
    LeaseKeys,
    Outcome,
    Range,
    RangeResult,
    Store,
    StoreStatus,
    Txn,
    WatchBatch,
)
from shardlead.store.mirror import PAGE_KEYS_MAX, TOMBSTONES_MAX, Change, Mirror, Picture

# --- a history, and what a server may make of it -------------------------------------------------------------------

KEY_COUNT = 4


def _key(number: int) -> bytes:
    return b"k%d" % number


@dataclass
class History:
    """A range's life: at index r - 1 what revision r did. A number deletes (False) or puts (True) each key named."""

    revisions: list[dict[int, bool]] = field(default_factory=list)

    def events(self, start: int, end: int) -> list[list[Event]]:
        """Of each revision in [start, end], in order; deletions of what is not there are no events."""
        found: list[list[Event]] = []
        standing: dict[int, KeyValue] = {}
        for revision, changes in enumerate(self.revisions, 1):
            events = []
            for number, is_put in sorted(changes.items()):
                old = standing.get(number)
                if is_put:
                    created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
                    kv = KeyValue(_key(number), b"v%d" % revision, created, revision, version)
                    standing[number] = kv
                    events.append(Event(False, kv))
                elif old is not None:
                    del standing[number]
                    events.append(Event(True, KeyValue(_key(number), b"", 0, revision, 0)))
            if events and start <= revision <= end:
                found.append(events)
        return found

    def standing(self, revision: int) -> dict[bytes, KeyValue]:
        picture: dict[bytes, KeyValue] = {}
        for events in self.events(1, revision):
            for event in events:
                if event.is_delete:
                    del picture[event.kv.key]
                else:
                    picture[event.kv.key] = event.kv
        return picture


HISTORIES = st.lists(
    st.dictionaries(st.integers(0, KEY_COUNT - 1), st.booleans(), min_size=1, max_size=KEY_COUNT), max_size=25
).map(History)


def _batches(revisions: Sequence[Sequence[Event]], sizes: Sequence[int], header: int) -> list[WatchBatch]:
    """The revisions cut into messages, none of them split; headers run ahead, as they do while a watch catches up."""
    batches = []
    at = 0
    for size in [*sizes, len(revisions)]:
        part = revisions[at : at + size]
        at += size
        if part:
            batches.append(WatchBatch(header, tuple(event for events in part for event in events)))
    return batches


class Follower:
    """A user of changes, which knows nothing else."""

    def __init__(self) -> None:
        self.kvs: dict[bytes, KeyValue] = {}
        self.changes: list[Change] = []

    def take(self, change: Change) -> None:
        """Each put is news, each delete names what stood."""
        for kv in change.deletes:
            assert self.kvs.pop(kv.key) == kv
        for kv in change.puts:
            assert self.kvs.get(kv.key) != kv
            self.kvs[kv.key] = kv
        assert not self.changes or change.revision >= self.changes[-1].revision
        self.changes.append(change)


# --- the picture -------------------------------------------------------------------------------------------------


@given(HISTORIES, st.integers(0, 25), st.lists(st.integers(1, 6), max_size=8))
def test_a_load_and_events_give_the_range(history: History, loaded: int, sizes: list[int]) -> None:
    """At each message's end the picture is the range as it stood at the message's last revision."""
    loaded = min(loaded, len(history.revisions))
    picture, follower = Picture(), Follower()
    follower.take(picture.load(history.standing(loaded).values(), loaded))
    end = len(history.revisions)
    for batch in _batches(history.events(loaded + 1, end), sizes, header=end + 100):
        change = picture.apply(batch)
        assert change is not None
        follower.take(change)
        last = batch.events[-1].kv.mod_revision
        assert picture.revision == last  # never the header's, which runs ahead
        assert picture.kvs == history.standing(last) == follower.kvs
    assert picture.kvs == history.standing(end)


@given(HISTORIES, st.lists(st.tuples(st.integers(1, 25), st.integers(1, 6)), max_size=8))
def test_repeated_and_old_events_change_nothing(history: History, replays: list[tuple[int, int]]) -> None:
    """Duplicates and time travel (etcd before 3.4.25 and 3.5.8): any stretch may come again, at any time."""
    picture, follower = Picture(), Follower()
    follower.take(picture.load((), 0))
    reached = 0
    for start, count in replays:
        end = max(start, min(reached, start)) + count
        start = min(start, reached + 1)  # a stretch may go back, but leaves nothing out
        for batch in _batches(history.events(start, end), (3,), header=end):
            change = picture.apply(batch)
            if change is not None:
                follower.take(change)
        reached = max(reached, min(end, len(history.revisions)))
        assert picture.kvs == history.standing(reached) == follower.kvs


@given(HISTORIES, st.data())
def test_late_events_of_other_keys_are_still_taken(history: History, data: st.DataObject) -> None:
    """Each key's events come in order, but the keys' not in step: in the end all is there and nothing came back."""
    per_key: dict[bytes, list[Event]] = {}
    for events in history.events(1, len(history.revisions)):
        for event in events:
            per_key.setdefault(event.kv.key, []).append(event)
    picture, follower = Picture(), Follower()
    follower.take(picture.load((), 0))
    while per_key:
        key = data.draw(st.sampled_from(sorted(per_key)))
        change = picture.apply(WatchBatch(1000, (per_key[key].pop(0),)))
        if change is not None:
            follower.take(change)
        if not per_key[key]:
            del per_key[key]
    assert picture.kvs == history.standing(len(history.revisions)) == follower.kvs


@given(HISTORIES, st.integers(0, 25), st.integers(0, 25))
def test_a_load_tells_the_exact_difference(history: History, first: int, second: int) -> None:
    """Removals too (a mirror that forgot them kept dead leaders alive); what is the same is not told again."""
    first, second = sorted(min(at, len(history.revisions)) for at in (first, second))
    before, after = history.standing(first), history.standing(second)
    picture = Picture()
    picture.load(before.values(), first)
    change = picture.load(after.values(), second)
    assert change.is_load
    assert {kv.key for kv in change.deletes} == before.keys() - after.keys()
    assert all(before[kv.key] == kv for kv in change.deletes)
    assert {kv.key: kv for kv in change.puts} == {key: kv for key, kv in after.items() if before.get(key) != kv}


def test_a_message_is_one_change() -> None:
    """What happens and is undone within one message is not told; only the way forward is."""
    picture = Picture()
    old = KeyValue(b"old", b"1", 1, 1, 1)
    picture.load((old,), 1)
    change = picture.apply(
        WatchBatch(
            9,
            (
                Event(False, KeyValue(b"brief", b"x", 2, 2, 1)),
                Event(True, KeyValue(b"brief", b"", 0, 3, 0)),
                Event(True, KeyValue(b"old", b"", 0, 4, 0)),
                Event(False, KeyValue(b"old", b"2", 5, 5, 1)),
            ),
        )
    )
    assert change == Change(5, puts=(KeyValue(b"old", b"2", 5, 5, 1),), deletes=())


def test_progress_moves_the_revision_alone() -> None:
    """And never back."""
    picture = Picture()
    picture.load((), 5)
    assert picture.apply(WatchBatch(9, ())) == Change(9, (), ())
    assert picture.apply(WatchBatch(7, ())) is None
    assert picture.revision == 9


def test_old_deletions_are_forgotten_without_harm() -> None:
    """The memory of deletions is bounded; a put older than those forgotten is then known to be old."""
    picture = Picture()
    picture.load((), 1)
    for number in range(TOMBSTONES_MAX + 10):
        revision = 2 + 2 * number
        picture.apply(WatchBatch(1, (Event(False, KeyValue(b"%d" % number, b"", revision, revision, 1)),)))
        picture.apply(WatchBatch(1, (Event(True, KeyValue(b"%d" % number, b"", 0, revision + 1, 0)),)))
    assert len(picture._gone) == TOMBSTONES_MAX
    for number in (0, 9, 10, TOMBSTONES_MAX):
        assert picture.apply(WatchBatch(1, (Event(False, KeyValue(b"%d" % number, b"", 2, 2, 1)),))) is None
    assert picture.kvs == {}


# --- the mirror --------------------------------------------------------------------------------------------------


class ScriptedStore:
    """A store whose reads and watches are given as a list of what happens; for the mirror's reactions alone.

    Each watch is a list of batches, then the error that ends it, or an event to wait for (set: it ends cleanly).
    """

    def __init__(self) -> None:
        self.reads: list[RangeResult | StoreError] = []
        self.watches: list[list[WatchBatch | StoreError | asyncio.Event]] = []
        self.asked: list[Range] = []
        self.started: list[int] = []
        self.rotations: list[str] = []

    async def read(self, op: Range) -> RangeResult:
        self.asked.append(op)
        answer = self.reads.pop(0)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    @asynccontextmanager
    async def watch(
        self, key: bytes, range_end: bytes, start_revision: int
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        self.started.append(start_revision)
        yield self._play(self.watches.pop(0) if self.watches else [asyncio.Event()])

    async def _play(self, script: list[WatchBatch | StoreError | asyncio.Event]) -> AsyncIterator[WatchBatch]:
        for step in script:
            if isinstance(step, StoreError):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
            else:
                yield step

    def rotate(self, reason: str) -> None:
        self.rotations.append(reason)

    async def commit(self, txn: Txn) -> Outcome:
        raise AssertionError("a mirror writes nothing")

    async def grant(self, ttl_s: int) -> Grant:
        raise AssertionError("a mirror has no lease")

    async def renew(self, lease: int) -> int:
        raise AssertionError("a mirror has no lease")

    async def revoke(self, lease: int) -> None:
        raise AssertionError("a mirror has no lease")

    async def lease_keys(self, lease: int) -> LeaseKeys:
        raise AssertionError("a mirror has no lease")

    async def status(self) -> StoreStatus:
        raise AssertionError("a mirror asks for no status")

    async def close(self) -> None:
        raise AssertionError("a mirror does not own its store")


def _kv(key: bytes, revision: int) -> KeyValue:
    return KeyValue(key, b"", revision, revision, 1)


def _put(key: bytes, revision: int) -> WatchBatch:
    return WatchBatch(revision + 50, (Event(False, _kv(key, revision)),))


def _page(revision: int, *kvs: KeyValue, more: bool = False) -> RangeResult:
    return RangeResult(revision, kvs, len(kvs), more)


def _followed(store: ScriptedStore, until: Callable[[Mirror], bool]) -> tuple[Mirror, Follower]:
    """Run a mirror of this store until a change after which `until` holds."""

    async def main() -> tuple[Mirror, Follower]:
        follower, reached = Follower(), asyncio.Event()

        def on_change(change: Change) -> None:
            follower.take(change)
            assert mirror.kvs == follower.kvs  # brought up to date before it is told
            if until(mirror):
                reached.set()

        typed: Store = store
        mirror = Mirror(typed, b"k", b"l", on_change, name="test", clock=SystemClock(), rng=random.Random(1))
        async with asyncio.timeout(10):
            task = asyncio.create_task(mirror.run())
            await reached.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert not mirror.is_connected
        return mirror, follower

    return asyncio.run(main())


def test_a_break_resumes_at_the_last_event() -> None:
    """Not at the header's revision, and without reading again."""
    store = ScriptedStore()
    store.reads = [_page(10, _kv(b"k1", 9))]
    store.watches = [[_put(b"k2", 12), StoreUnavailable("cut")], [_put(b"k3", 13)]]
    _mirror, follower = _followed(store, lambda mirror: mirror.revision == 13)
    assert store.started == [10, 12]
    assert len(store.asked) == 1
    assert follower.kvs.keys() == {b"k1", b"k2", b"k3"}


@pytest.mark.parametrize("error", [WatchCanceled("compacted", 11), WatchCanceled("permission denied"), Compacted(11)])
def test_a_cancel_reads_everything_again(error: StoreError) -> None:
    """With a compaction or without; and only the differences are told."""
    store = ScriptedStore()
    store.reads = [_page(10, _kv(b"k1", 8), _kv(b"k2", 9)), _page(20, _kv(b"k2", 9), _kv(b"k3", 15))]
    store.watches = [[error]]
    _mirror, follower = _followed(store, lambda mirror: mirror.revision == 20)
    assert follower.changes[1] == Change(20, (_kv(b"k3", 15),), (_kv(b"k1", 8),), is_load=True)
    assert store.started[0] == 10


def test_pages_are_pinned_to_one_revision() -> None:
    """The first page's; a compaction in between begins from the first page again."""
    store = ScriptedStore()
    first = _page(10, _kv(b"k1", 8), more=True)
    store.reads = [first, Compacted(0), _page(12, _kv(b"k1", 8), more=True), _page(14, _kv(b"k2", 9))]
    mirror, _follower = _followed(store, lambda mirror: mirror.is_loaded or mirror.revision > 0)
    assert mirror.revision == 12
    pages = [(op.key, op.limit, op.revision) for op in store.asked]
    whole, rest = (b"k", PAGE_KEYS_MAX, 0), (b"k1\0", PAGE_KEYS_MAX)
    assert pages == [whole, (*rest, 10), whole, (*rest, 12)]


def test_a_read_from_the_past_is_not_taken() -> None:
    """The picture never goes back: another endpoint is asked."""
    store = ScriptedStore()
    store.reads = [_page(10), _page(9), _page(11, _kv(b"k1", 11))]
    store.watches = [[WatchCanceled("whatever")]]
    _mirror, follower = _followed(store, lambda mirror: mirror.revision == 11)
    assert [change.revision for change in follower.changes] == [10, 11]
    assert len(store.rotations) == 1


def test_a_distrusted_watch_is_dropped_and_resumed_elsewhere() -> None:
    """It resumes at what it has brought."""
    store = ScriptedStore()
    store.reads = [_page(10)]
    store.watches = [[_put(b"k1", 12), asyncio.Event()], [_put(b"k2", 14)]]

    def until(mirror: Mirror) -> bool:
        if mirror.revision == 12:
            mirror.distrust("a tick that it has not told")
            mirror.distrust("twice is once")
        return mirror.revision == 14

    _followed(store, until)
    assert store.rotations == ["a tick that it has not told"]
    assert store.started == [10, 12]


def test_two_mirrors_of_one_store_leave_an_endpoint_once() -> None:
    """Who leaves one of two endpoints twice is back."""
    store = ScriptedStore()
    store.reads = [_page(10)]
    store.watches = [[_put(b"k1", 12), asyncio.Event()], [_put(b"k2", 14)]]

    def until(mirror: Mirror) -> bool:
        if mirror.revision == 12:
            assert mirror.distrust("the other has left it already", is_rotating=False)
            assert not mirror.distrust("nothing stands")
        return mirror.revision == 14

    _followed(store, until)
    assert store.rotations == []
    assert store.started == [10, 12]


def test_a_clean_end_is_no_end() -> None:
    """A stream that ends with OK is opened again."""
    ended = asyncio.Event()
    ended.set()
    store = ScriptedStore()
    store.reads = [_page(10)]
    store.watches = [[ended], [_put(b"k1", 12)]]
    _followed(store, lambda mirror: mirror.revision == 12)
    assert store.started == [10, 10]


def test_trouble_is_logged_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    """Not once per try; and a quiet range is no trouble."""
    store = ScriptedStore()
    store.reads = [StoreUnavailable("down"), StoreUnavailable("down"), StoreUnavailable("down"), _page(10)]
    store.watches = [[StoreUnavailable("down")], [WatchSilent("quiet")], [_put(b"k1", 12), asyncio.Event()]]
    with caplog.at_level(logging.INFO, "shardlead.store.mirror"):
        _followed(store, lambda mirror: mirror.revision == 12)
    assert [record.getMessage() for record in caplog.records] == ["range not followed", "range followed again"]


def test_a_compaction_is_no_trouble_unless_it_repeats(caplog: pytest.LogCaptureFixture) -> None:
    """A quiet range is compacted from time to time; a load brings it up to date, and no line is written."""
    store = ScriptedStore()
    store.reads = [_page(10), _page(20), _page(30)]
    store.watches = [[WatchCanceled("", 11)], [_put(b"k1", 22), asyncio.Event()]]
    with caplog.at_level(logging.INFO, "shardlead.store.mirror"):
        _followed(store, lambda mirror: mirror.revision == 22)
        assert caplog.records == []
        store.reads = [_page(10), _page(20), _page(30)]
        store.watches = [[WatchCanceled("", 11)], [WatchCanceled("", 21)]]
        _followed(store, lambda mirror: mirror.revision == 30)
    assert [record.getMessage() for record in caplog.records] == ["range not followed"]


def test_waiting_for_the_first_load_is_bounded() -> None:
    """It says so by StoreUnavailable."""

    async def main() -> None:
        mirror = Mirror(
            ScriptedStore(), b"k", b"l", lambda _change: None, name="x", clock=SystemClock(), rng=random.Random(1)
        )
        with pytest.raises(StoreUnavailable, match="x was not read within"):
            await mirror.wait_loaded(0.01)

    asyncio.run(main())
