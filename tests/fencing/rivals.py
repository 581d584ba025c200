"""What the fencing tests share: leaderships that end when told to, and fences with one part left out.

The crippled fences are there for the ablation tests: with them the same interleaving must do harm, or the test of the
whole fence would prove nothing.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from shardlead.errors import Fenced
from shardlead.fencing import Fence, Lead, Transaction
from shardlead.worker.leadership import Leadership

T = TypeVar("T")

SCHEMA: Final = ("CREATE TABLE IF NOT EXISTS accounts (shard INTEGER PRIMARY KEY, balance INTEGER NOT NULL)",)


@dataclass
class Session:
    """A lease that is good until it is not."""

    is_good: bool = True

    def is_valid(self, need_s: float) -> bool:
        return self.is_good


def lead_of(
    shard: int, epoch: int, session: Session | None = None, on_unknown: Callable[[str], object] | None = None
) -> Leadership:
    return Leadership(shard, epoch, f"worker-{epoch}", session or Session(), on_unknown=on_unknown)


def balance_of(tx: Transaction, shard: int) -> int:
    row = tx.execute("SELECT balance FROM accounts WHERE shard = ?", (shard,)).fetchone()
    return int(row[0]) if row else 0


def set_balance(tx: Transaction, shard: int, balance: int) -> int:
    tx.execute("INSERT OR REPLACE INTO accounts (shard, balance) VALUES (?, ?)", (shard, balance))
    return balance


class FencedSql(Fence, Protocol):
    """As much of SqliteFence as the interleavings use."""

    async def read(self, work: Callable[[Transaction], T]) -> T: ...

    async def write(self, lead: Lead, work: Callable[[Transaction], T]) -> T: ...


class _Crippled:
    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        for statement in ("CREATE TABLE IF NOT EXISTS shard_fence (shard INTEGER PRIMARY KEY, epoch INTEGER)", *SCHEMA):
            self._db.execute(statement)

    def close(self) -> None:
        self._db.close()

    async def read(self, work: Callable[[Transaction], T]) -> T:
        return work(Transaction(self._db))

    def _registered(self, lead: Lead) -> int:
        row = self._db.execute("SELECT epoch FROM shard_fence WHERE shard = ?", (lead.shard,)).fetchone()
        return int(row[0]) if row else 0

    def _register(self, lead: Lead) -> None:
        self._db.execute("INSERT OR REPLACE INTO shard_fence (shard, epoch) VALUES (?, ?)", (lead.shard, lead.epoch))


class WithoutBarrier(_Crippled):
    """The token check alone: each write is compared with the largest epoch that has *written* so far."""

    async def barrier(self, lead: Lead) -> None:
        pass

    async def write(self, lead: Lead, work: Callable[[Transaction], T]) -> T:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if self._registered(lead) > lead.epoch:
                raise Fenced(lead.shard, lead.epoch, self._registered(lead))
            self._register(lead)
            return work(Transaction(self._db))


class WithoutLock(_Crippled):
    """Barrier and comparison, but the comparison is not in the write's own transaction. `between` runs in the gap."""

    async def barrier(self, lead: Lead) -> None:
        self._register(lead)

    def compare(self, lead: Lead) -> None:
        if self._registered(lead) != lead.epoch:
            raise Fenced(lead.shard, lead.epoch, self._registered(lead))

    async def write(self, lead: Lead, work: Callable[[Transaction], T]) -> T:
        self.compare(lead)
        return self.apply(work)

    def apply(self, work: Callable[[Transaction], T]) -> T:
        return work(Transaction(self._db))
