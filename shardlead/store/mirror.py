"""A followed range of the store: load, watch, resume, load again; whatever happens, its users see only changes.

Law: protocol.md A.7. Pages of the load are pinned to one revision. A resume starts *at* the last applied event, never
at a header's revision, and never after that event: a store that was compacted meanwhile then says so. A message is
applied whole; per key the larger mod_revision stays. A load replaces the picture including removals, and is handed on
as the difference. Nothing is safe because a mirror was quiet.

`Picture` decides and awaits nothing; `Mirror` awaits and decides nothing but when to try again.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.errors import Compacted, StoreError, StoreUnavailable, WatchCanceled, WatchSilent
from shardlead.store.base import KeyValue, Range, Store, WatchBatch

_log = logging.getLogger("shardlead.store.mirror")

PAGE_KEYS_MAX: Final = 5_000
PAUSE_MIN_S: Final = 0.05  # after a failure; doubled with each further one, jittered
PAUSE_MAX_S: Final = 2.0
TOMBSTONES_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Change:
    """What became different in one step, applied at once. `puts` hold the new key-values, `deletes` the key-values
    that stood before. `is_load` marks the difference made by a full read."""

    revision: int
    puts: tuple[KeyValue, ...]
    deletes: tuple[KeyValue, ...]
    is_load: bool = False


class Picture:
    """A range as known from loads and events. Pure; of events that are repeated, late or from the past (etcd before
    3.4.25 and 3.5.8, #15271) it takes those that are news of their key, and no others.

    `revision` is the last applied one, for the next watch to begin at; it never goes back.
    """

    __slots__ = ("_floor", "_gone", "kvs", "revision")

    def __init__(self) -> None:
        self.kvs: dict[bytes, KeyValue] = {}
        self.revision = 0
        self._floor = 0  # of keys that are in neither dict, everything up to here is known
        self._gone: dict[bytes, int] = {}  # deletions since, oldest first, so that an old put does not bring a key back

    def load(self, kvs: Iterable[KeyValue], revision: int) -> Change:
        """Take a full read at `revision` (which must not be below what was applied) and tell the difference."""
        assert revision >= self.revision, f"a load at {revision} behind {self.revision}"
        before, after = self.kvs, {kv.key: kv for kv in kvs}
        self.kvs = after
        self.revision = self._floor = revision
        self._gone.clear()
        puts = tuple(kv for key, kv in after.items() if before.get(key) != kv)
        deletes = tuple(kv for key, kv in before.items() if key not in after)
        return Change(revision, puts, deletes, is_load=True)

    def apply(self, batch: WatchBatch) -> Change | None:
        """Take one message whole. None if it brought nothing new, not even a larger revision."""
        before: dict[bytes, KeyValue | None] = {}  # of each key touched, what stood
        revision = self.revision
        for event in batch.events:
            kv = event.kv
            if kv.mod_revision <= self._known(kv.key):
                continue
            before.setdefault(kv.key, self.kvs.get(kv.key))
            if event.is_delete:
                self.kvs.pop(kv.key, None)
                self._gone.pop(kv.key, None)
                self._gone[kv.key] = kv.mod_revision
            else:
                self._gone.pop(kv.key, None)
                self.kvs[kv.key] = kv
            revision = max(revision, kv.mod_revision)
        if not batch.events:
            revision = max(revision, batch.revision)  # a progress message; one with events says nothing (A.7.4)
        is_further = revision > self.revision
        self.revision = revision
        self._forget_old_deletions()
        puts = tuple(self.kvs[key] for key in before if key in self.kvs)
        deletes = tuple(kv for key, kv in before.items() if kv is not None and key not in self.kvs)
        if not (puts or deletes or is_further):
            return None
        return Change(revision, puts, deletes)

    def _known(self, key: bytes) -> int:
        """The last revision of this key that we know of."""
        kv = self.kvs.get(key)
        return max(self._floor, kv.mod_revision if kv is not None else self._gone.get(key, 0))

    def _forget_old_deletions(self) -> None:
        while len(self._gone) > TOMBSTONES_MAX:
            key = next(iter(self._gone))
            self._floor = max(self._floor, self._gone.pop(key))


class Mirror:
    """One range, kept current by `run()`.

    `on_change` is called synchronously, in order, right after `kvs` was brought up to date; it must not raise and
    must not await. `revision` is the last *applied* revision and never goes back.
    """

    def __init__(
        self,
        store: Store,
        key: bytes,
        range_end: bytes,
        on_change: Callable[[Change], None],
        *,
        name: str,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._store = store
        self._key = key
        self._range_end = range_end
        self._on_change = on_change
        self._name = name
        self._clock = clock
        self._rng = rng
        self._picture = Picture()
        self._needs_load = True
        self._loaded = asyncio.Event()
        self._watch_bound: asyncio.Timeout | None = None  # while a watch stands; `distrust` lets it run out
        self._failures = 0  # in a row
        self._trouble_since_ns: int | None = None

    def __repr__(self) -> str:
        state = "following" if self.is_connected else "loaded" if self.is_loaded else "empty"
        return f"<Mirror {self._name!r} {state}, {len(self._picture.kvs)} keys at revision {self.revision}>"

    @property
    def kvs(self) -> Mapping[bytes, KeyValue]:
        """The picture at `revision`. A view: take a copy to keep it."""
        return MappingProxyType(self._picture.kvs)

    @property
    def revision(self) -> int:
        return self._picture.revision

    @property
    def is_loaded(self) -> bool:
        return self._loaded.is_set()

    @property
    def is_connected(self) -> bool:
        """Whether a watch stands right now (it may still be silently stale)."""
        return self._watch_bound is not None

    async def wait_loaded(self, timeout_s: float) -> None:
        """Return once the first load was applied; raises StoreUnavailable after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._loaded.wait()
        except TimeoutError:
            raise StoreUnavailable(f"{self._name} was not read within {timeout_s:g} s") from None

    def distrust(self, reason: str, *, is_rotating: bool = True) -> bool:
        """Somebody knows better than this watch: drop it, take another endpoint, resume. Without a watch there is
        nothing to distrust: one is being sought already. Whether there was one.

        `is_rotating`: False if the endpoint was left already, for another mirror of the same store: with two endpoints,
        who leaves twice is back."""
        bound, self._watch_bound = self._watch_bound, None
        if bound is None:
            return False
        _log.warning("watch distrusted", extra={"range": self._name, "reason": reason})
        if is_rotating:
            self._store.rotate(reason)
        bound.reschedule(0.0)
        return True

    async def run(self) -> None:
        """Follow the range until cancelled; survives every StoreError with bounded, jittered pauses."""
        while True:
            try:
                if self._needs_load:
                    await self._load()
                await self._follow()
            except WatchSilent as exc:  # a quiet range, most of the time: opening it again costs two requests
                _log.debug("watch silent", extra={"range": self._name, "reason": str(exc)})
                self._fared_well()
                continue  # the silence was pause enough
            except (WatchCanceled, Compacted) as exc:
                self._needs_load = True
                if isinstance(exc, WatchCanceled) and exc.compact_revision and not self._failures:
                    # a compaction while we were away, or while the range was quiet: nobody's trouble if a load follows
                    _log.debug("range compacted", extra={"range": self._name, "reason": str(exc)})
                    self._failures = 1
                    continue
                self._fared_badly(exc)
            except StoreError as exc:
                self._fared_badly(exc)
            pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** min(self._failures, 10))
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))

    async def _load(self) -> None:
        page = await self._store.read(Range(self._key, self._range_end, limit=PAGE_KEYS_MAX))
        revision = page.revision
        if revision < self._picture.revision:
            self._store.rotate("a read behind the watch")
            raise StoreUnavailable(f"read at revision {revision}, behind {self._picture.revision}")
        kvs = list(page.kvs)
        while page.more:
            if not page.kvs:
                raise StoreUnavailable("an empty page that says there is more")
            after = page.kvs[-1].key + b"\0"
            page = await self._store.read(Range(after, self._range_end, limit=PAGE_KEYS_MAX, revision=revision))
            kvs += page.kvs
        change = self._picture.load(kvs, revision)
        self._needs_load = False
        self._on_change(change)
        self._loaded.set()

    async def _follow(self) -> None:
        """Apply what the watch brings, until it ends; which is always an error, or a distrust.

        It begins at the revision that is known, not after it. A deletion right after it is gone from the store once
        that was compacted at just this deletion's revision, and etcd before 3.4.36 and 3.5.18 then opens a watch from
        there without a word (#19179); from one revision earlier every etcd says that it was compacted, and we load.
        """
        async with self._store.watch(self._key, self._range_end, self._picture.revision) as batches:
            try:
                async with asyncio.timeout(None) as self._watch_bound:
                    async for batch in batches:
                        change = self._picture.apply(batch)
                        if change is not None or not batch.events:  # what was known already tells of no good watch
                            self._fared_well()
                        if change is not None:
                            self._on_change(change)
            except TimeoutError:
                return  # distrusted
            finally:
                self._watch_bound = None
        raise StoreUnavailable("the watch ended")

    def _fared_well(self) -> None:
        self._failures = 0
        if self._trouble_since_ns is not None:
            after_s = (self._clock.now_ns() - self._trouble_since_ns) / NS_PER_S
            self._trouble_since_ns = None
            _log.info("range followed again", extra={"range": self._name, "after_s": round(after_s, 3)})

    def _fared_badly(self, exc: StoreError) -> None:
        self._failures += 1
        if self._trouble_since_ns is None:  # one line per trouble, not per try
            self._trouble_since_ns = self._clock.now_ns()
            _log.warning("range not followed", extra={"range": self._name, "reason": str(exc)})
