"""A store that counts what is asked of it, around any other.

Law: it changes nothing: answers and errors pass as they are. Only what was decided counts as `ok`; `unknown` is a
write whose outcome is not known.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

from shardlead.clock import NS_PER_S, Clock
from shardlead.errors import LeaseGone, StoreRejected, StoreUnavailable, WatchCanceled
from shardlead.metrics import StoreMetrics
from shardlead.store.base import (
    Grant,
    LeaseKeys,
    Outcome,
    Range,
    RangeResult,
    Store,
    StoreStatus,
    Txn,
    Unknown,
    WatchBatch,
)

T = TypeVar("T")


class MeteredStore:
    """`store`, counted in `metrics`. Closing it closes `store`."""

    def __init__(self, store: Store, metrics: StoreMetrics, *, clock: Clock) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock

    def __repr__(self) -> str:
        return f"<MeteredStore {self._store!r}>"

    async def read(self, op: Range) -> RangeResult:
        return await self._counted("read", self._store.read(op))

    async def commit(self, txn: Txn) -> Outcome:
        return await self._counted("commit", self._store.commit(txn))

    async def grant(self, ttl_s: int) -> Grant:
        return await self._counted("grant", self._store.grant(ttl_s))

    async def renew(self, lease: int) -> int:
        return await self._counted("renew", self._store.renew(lease))

    async def revoke(self, lease: int) -> None:
        await self._counted("revoke", self._store.revoke(lease))

    async def lease_keys(self, lease: int) -> LeaseKeys:
        return await self._counted("lease-keys", self._store.lease_keys(lease))

    async def status(self) -> StoreStatus:
        return await self._counted("status", self._store.status())

    def watch(
        self, key: bytes, range_end: bytes, start_revision: int
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        return self._watched(lambda: self._store.watch(key, range_end, start_revision))

    def rotate(self, reason: str) -> None:
        self._metrics.rotations.inc()
        self._store.rotate(reason)

    async def close(self) -> None:
        await self._store.close()

    @asynccontextmanager
    async def _watched(
        self, opened: Callable[[], AbstractAsyncContextManager[AsyncIterator[WatchBatch]]]
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        try:
            async with opened() as batches:
                yield batches
        except (StoreUnavailable, WatchCanceled):
            self._metrics.watch_breaks.inc()
            raise

    async def _counted(self, call: str, answer: Awaitable[T]) -> T:
        began_ns = self._clock.now_ns()
        result = "rejected"
        try:
            value = await answer
            result = "unknown" if isinstance(value, Unknown) else "ok"
        except StoreUnavailable:
            result = "unavailable"
            raise
        except LeaseGone:
            result = "gone"
            raise
        except StoreRejected:
            raise
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        else:
            return value
        finally:
            self._metrics.calls.labels(call, result).inc()
            self._metrics.call_duration.labels(call).observe((self._clock.now_ns() - began_ns) / NS_PER_S)
