"""A process's picture of the cluster: one watch over [leaders/ .. workers~), understood as a `ShardMap`.

What it never does: write (the tick is written by workers, protocol.md A.7.7) or decide. A record that cannot be read
is logged once and counts as absent.

Law: the map never goes back, and every subscriber sees every change once, in order, after `map` was brought up to
date. A view may be behind, silently: `is_fresh` tells whether the cluster's tick has been heard lately, and when it
has not, the view asks the store whether it is the watch that sleeps or the cluster that is quiet.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.core.keyspace import Keyspace, Place
from shardlead.core.model import TICK_S
from shardlead.core.shardmap import Delta, Fact, ShardMap, read_fact
from shardlead.errors import ClusterMissing, KeyspaceError, StoreError
from shardlead.store.base import KeyValue, Range, Store, prefix_end
from shardlead.store.mirror import Change, Mirror

log = logging.getLogger("shardlead.view")

ON_ITS_WAY_S: Final = 0.5  # how long the watch may take to tell what a read has told
SILENT_PERIODS: Final = 3  # without a tick: then the store is asked
BAD_KEYS_MAX: Final = 10_000  # remembered so as to be logged once; beyond it, foreign records go unlogged


class View:
    """Follow it with `run()`; read `map` at any time."""

    def __init__(self, store: Store, keyspace: Keyspace, *, clock: Clock, rng: random.Random) -> None:
        self.keyspace = keyspace
        self.map = ShardMap()
        self.tick_revision = 0
        self._store = store
        self._clock = clock
        self._rng = rng
        self._callbacks: dict[object, Callable[[Delta], None]] = {}
        self._ready = asyncio.Event()
        self._heard_ns: int | None = None
        self._is_store_silent = False
        self._bad: set[bytes] = set()
        self._range = (keyspace.leaders, prefix_end(keyspace.workers))
        self._mirror = Mirror(
            store, keyspace.leaders, prefix_end(keyspace.workers), self._on_change, name="view", clock=clock, rng=rng
        )

    def __repr__(self) -> str:
        return f"<View of {self.keyspace.cluster!r}: {self.map!r}, age {self.age_s:.1f} s>"

    # --- reading

    @property
    def is_ready(self) -> bool:
        """Whether keys can be looked up."""
        return self.map.is_ready

    @property
    def is_loaded(self) -> bool:
        """Whether the store has been read, even if no cluster was found there."""
        return self._mirror.is_loaded

    @property
    def is_connected(self) -> bool:
        """Whether a watch stands right now; it may still be silently stale."""
        return self._mirror.is_connected

    @property
    def age_s(self) -> float:
        """Seconds since the cluster was last known to be as shown; infinite before the first load."""
        return float("inf") if self._heard_ns is None else (self._clock.now_ns() - self._heard_ns) / NS_PER_S

    @property
    def is_fresh(self) -> bool:
        """Whether the tick was heard (or the store asked) within three periods. Not a promise that nothing changed."""
        return self.age_s <= SILENT_PERIODS * TICK_S

    def subscribe(self, callback: Callable[[Delta], None]) -> Callable[[], None]:
        """Call `callback` with every later change, synchronously and in order; it must not raise. Returns what ends
        the subscription."""
        token = object()
        self._callbacks[token] = callback
        return lambda: self._callbacks.pop(token, None) and None

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once keys can be looked up. Raises StoreUnavailable if the store could not be read in `timeout_s`,
        ClusterMissing if it could and nobody has created the cluster."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            await self._mirror.wait_loaded(0.001)
            raise ClusterMissing(self.keyspace.cluster) from None

    # --- following

    async def run(self) -> None:
        """Follow the store until cancelled. Survives every StoreError."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._mirror.run(), name="view mirror")
            tasks.create_task(self._doubt(), name="view freshness")

    async def _doubt(self) -> None:
        """When no tick was heard for three periods, find out who sleeps."""
        while True:
            await asyncio.sleep(TICK_S * self._rng.uniform(0.4, 0.6))
            if self._mirror.is_loaded and not self.is_fresh:
                await self._ask()

    async def _ask(self) -> None:
        """Ask the store for the tick and for how many records there are. What the watch did not tell although it had
        time to was lost on its way; if it told all, nobody ticks, because no worker lives."""
        try:
            tick = await self._store.read(Range(self.keyspace.tick))
            count = await self._store.read(Range(self._range[0], self._range[1], count_only=True))
        except StoreError as exc:
            if not self._is_store_silent:
                self._is_store_silent = True
                log.warning("no tick heard, and the store does not answer", extra={"reason": str(exc)})
            return
        self._is_store_silent = False
        stored = tick.kvs[0].mod_revision if tick.kvs else 0
        await asyncio.sleep(ON_ITS_WAY_S)
        if self.is_fresh:
            return
        if stored > self.tick_revision or (count.count != len(self._mirror.kvs) and self.map.revision < count.revision):
            self._mirror.distrust("the store knows what the watch has not told")
        elif self._mirror.is_connected:
            self._heard_ns = self._clock.now_ns()

    def _on_change(self, change: Change) -> None:
        puts = [fact for fact in map(self._read, change.puts) if fact is not None]
        deletes: list[Place] = [
            place for place in (self.keyspace.parse(kv.key) for kv in change.deletes) if place is not None
        ]
        before = self.map
        self.map, delta = before.apply(puts, deletes, change.revision)
        for fact in puts:
            if fact.place.kind == "tick":
                self.tick_revision = max(self.tick_revision, fact.mod_revision)
                self._heard_ns = self._clock.now_ns()
        if change.is_load:
            self._heard_ns = self._clock.now_ns()
        if self.map.fault and self.map.fault != before.fault:
            log.error("the stored slot table cannot be used", extra={"reason": self.map.fault})
        if self.map.is_ready:
            self._ready.set()
        else:
            self._ready.clear()
        if delta:
            for callback in tuple(self._callbacks.values()):
                try:
                    callback(delta)
                except Exception:  # one listener's fault must not blind the others, nor end the watch
                    log.exception("a listener failed on a change")

    def _read(self, kv: KeyValue) -> Fact | None:
        try:
            fact = read_fact(self.keyspace, kv.key, kv.value, kv.lease, kv.create_revision, kv.mod_revision)
        except KeyspaceError as exc:
            self._log_bad(kv, exc.reason)
            place = self.keyspace.parse(kv.key)
            return None if place is None else Fact(place, None, kv.lease, kv.create_revision, kv.mod_revision)
        if fact is None:
            self._log_bad(kv, "not a key of ours")
        return fact

    def _log_bad(self, kv: KeyValue, reason: str) -> None:
        if kv.key not in self._bad and len(self._bad) < BAD_KEYS_MAX:
            self._bad.add(kv.key)
            log.warning("record ignored", extra={"key": kv.key.decode("utf-8", "backslashreplace"), "reason": reason})
