"""What is remembered of each shard's leaderships: who led it, since when, and how the last tenure ended.

Law: protocol.md A.2. A history is written in the same transaction as the leadership it tells of, by whoever sends
that; here it is read, kept, and the next one is composed. Reading decides nothing: of a history that cannot be read
nothing is known, how the last tenure ended least of all, and the guard on its revision still holds.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from shardlead.clock import Clock
from shardlead.cluster.batch import read_many
from shardlead.core.keyspace import Keyspace, decode
from shardlead.core.model import PREVIOUS_MAX, History, PastLeader
from shardlead.errors import KeyspaceError
from shardlead.store.base import Store

log = logging.getLogger("shardlead.history")


class Histories:
    """The histories of one session's shards."""

    def __init__(self, store: Store, keyspace: Keyspace, *, tick: Callable[[], int], clock: Clock) -> None:
        """`tick`: the cluster's tick as it is known now."""
        self._store = store
        self._keys = keyspace
        self._tick = tick
        self._clock = clock
        self._kept: dict[int, History] = {}

    async def last(self, shard: int) -> History | None:
        """What is remembered of a shard that we lead. Raises StoreError."""
        kept = self._kept.get(shard)  # written by our own claim, and by nobody else since
        return kept if kept is not None else (await self.read((shard,)))[shard][0]

    def keep(self, shard: int, history: History) -> None:
        """Our own claim has written it."""
        self._kept[shard] = history

    def forget(self, shard: int) -> None:
        """We lead it no more."""
        self._kept.pop(shard, None)

    async def read(self, shards: Sequence[int]) -> dict[int, tuple[History | None, int]]:
        """Of these shards (at most BATCH), each with its revision, which is 0 if there is none. Raises StoreError."""
        results = await read_many(self._store, [self._keys.history(shard) for shard in shards])
        found: dict[int, tuple[History | None, int]] = {}
        for shard, result in zip(shards, results, strict=True):
            if not result.kvs:
                found[shard] = (None, 0)
                continue
            kv = result.kvs[0]
            try:
                found[shard] = (decode(History, kv.key, kv.value), kv.mod_revision)
            except KeyspaceError as exc:
                log.warning("history ignored", extra={"shard": shard, "reason": exc.reason})
                found[shard] = (None, kv.mod_revision)
        return found

    @property
    def tick(self) -> int:
        """The cluster's tick as it is known now."""
        return self._tick()

    def ticks_since(self, history: History) -> int:
        """How many times the cluster has ticked since that was written."""
        return self.tick - history.tick

    def next(
        self,
        former: tuple[History | None, int],
        reason: str,
        worker: str,
        sid: str,
        ttl_s: float,
        *,
        short_tenures: int = 0,
        is_clean: bool | None = None,
    ) -> History:
        """What is remembered from now on: the present tenure and how the former ones ended. `is_clean`: how the last
        of them did, where the former record does not say it yet. `ttl_s` is of the lease of the present tenure."""
        before, revision = former
        now_s = self._clock.wall_s()
        if before is None:
            if is_clean is None:
                is_clean = not revision  # else there is one, which cannot be read
            return History(worker, sid, now_s, reason, clean=is_clean, tick=self.tick, ttl_s=ttl_s)
        if is_clean is None:
            is_clean = before.ended and before.clean
        past = PastLeader(before.worker, revision, before.since)
        return replace(
            before,
            worker=worker,
            sid=sid,
            since=now_s,
            reason=reason,
            clean=is_clean,
            short_tenures=short_tenures,
            ended=False,
            tick=self.tick,
            ttl_s=ttl_s if is_clean else max(ttl_s, before.ttl_s),  # whoever follows may come before our wait is over
            previous=(past, *before.previous)[:PREVIOUS_MAX],
        )
