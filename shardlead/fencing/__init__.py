"""Storage that refuses a leader who has been replaced: adapters for SQLite and etcd.

    async with SqliteFence("orders.sqlite3", schema=["CREATE TABLE IF NOT EXISTS ..."]) as fence:
        await fence.barrier(lead)                                       # in open(), before anything is read
        rows = await fence.read(lambda tx: tx.execute("SELECT ...").fetchall())
        await fence.write(lead, lambda tx: tx.execute("UPDATE ..."))    # raises Fenced if somebody leads in our place

Law: protocol.md A.4, fence-then-read. The barrier registers the new epoch at the resource *before* state is read;
every write compares its own epoch with the registered one, for equality, in the same atomic step as it writes. A
check without the barrier lets an old leader's late write land between the new leader's read and its first write. A
check outside of the write's own transaction lets it land between check and write.

What no adapter here does: it never asks the clock who leads (the lease only stops a leader early and cheaply), it
never retries a write whose outcome is unknown, and it never lowers a registered epoch.

Other resources follow the same two steps. PostgreSQL: the same fence row, locked by `SELECT .. FOR SHARE`. An object
store with conditional puts protects one object, so the shard's state must be that object (a manifest): the barrier
is a conditional put of the manifest with the new epoch in it, and each write is conditional on the version that this
leader itself wrote last.
"""

from shardlead.fencing.base import Fence, Lead
from shardlead.fencing.etcd import EtcdFence
from shardlead.fencing.sqlite import SqliteFence, Transaction

__all__ = ["EtcdFence", "Fence", "Lead", "SqliteFence", "Transaction"]
