"""Many small things in one transaction: how many, and how single keys are read together.

Law: protocol.md A.3. It knows neither what the keys mean nor what is done with their values.
"""

from collections.abc import Sequence
from typing import Final

from shardlead.store.base import Range, RangeResult, Store, Txn, Unknown

BATCH: Final = 64  # shards in one transaction; 126 would fit (protocol.md A.3), 64 keeps each under a few ms


async def read_many(store: Store, keys: Sequence[bytes]) -> list[RangeResult]:
    """Single keys, in one transaction of reads (at most BATCH). Raises StoreError."""
    if not keys:
        return []
    outcome = await store.commit(Txn((), tuple(Range(key) for key in keys)))
    if isinstance(outcome, Unknown):  # nothing was to be written, so nothing is in doubt: read one by one
        return [await store.read(Range(key)) for key in keys]
    return [result for result in outcome.results if isinstance(result, RangeResult)]
