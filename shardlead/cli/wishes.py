"""Writing what operators wish, and watching it come true.

Law: wishes stand under `wishes/` and nowhere else; no command writes `leaders/` or an assignment. Each write is
guarded by the cluster's meta and, where it names a worker, by that worker's record, so that a wish is about what the
operator saw. An outcome that is not known is said to be so.
"""

import asyncio
import getpass
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from shardlead.cli.options import find_cluster
from shardlead.cli.snapshot import Look, read_look, require_shard, require_worker, run_on
from shardlead.cluster import bootstrap
from shardlead.core.keyspace import Keyspace, encode
from shardlead.core.model import Wish
from shardlead.errors import CommandError
from shardlead.loading import Loaded
from shardlead.store.base import Committed, Compare, Conflict, Delete, Op, Put, Range, Store, Txn, Unknown, modified_at

MOVE_LEASE_S: Final = 600  # nobody renews it: a move's pin ends by itself
LOOK_PAUSE_S: Final = 0.2

Target = Mapping[str, Any]


def init(loaded: Loaded) -> str:
    """Create the cluster, or find it as wished. Raises MetaMismatch, CommandError."""

    async def action(loaded: Loaded, store: Store, keyspace: Keyspace) -> str:
        before = await bootstrap.read_shape(store, keyspace)
        explicit = {name.partition(".")[2] for name in loaded.explicit if name.startswith("cluster.")}
        shape = await bootstrap.ensure_shape(store, keyspace, loaded.settings.cluster, explicit)
        what = "exists already" if before is not None else "created"
        return f"cluster {keyspace.cluster!r} {what}: {shape.meta.shards} shards, {shape.meta.slot_count} slots"

    return run_on(loaded, action)


def move(target: Target, shard: int, worker: str, wait_s: float, *, is_for_good: bool = False) -> str:
    """Pin a shard to a worker, for MOVE_LEASE_S or for good, and wait until it leads."""

    async def action(loaded: Loaded, store: Store, keyspace: Keyspace) -> str:
        look = await read_look(loaded, store, keyspace)
        require_shard(look, shard)
        require_worker(look, worker)
        before = look.map.leader(shard)
        lease = 0 if is_for_good else (await store.grant(MOVE_LEASE_S)).lease
        record = _wish("move" if lease else "pin", worker=worker)
        await _write(store, look, worker, Put(keyspace.pin(shard), encode(record), lease))

        def is_done(seen: Look) -> bool:
            leader = seen.map.leader(shard)
            return leader is not None and leader.worker == worker

        after, is_moved = await _watched(loaded, store, keyspace, is_done, wait_s)
        leader = after.map.leader(shard)
        was = "" if before is None or before.worker == worker else f", moved from {before.worker}"
        if is_moved and leader is not None:
            return f"shard {shard} is led by {worker} under epoch {leader.epoch}{was}"
        now = "nobody leads it" if leader is None else f"{leader.worker} leads it"
        stands = "until unpin" if is_for_good else f"for {MOVE_LEASE_S} s"
        if not wait_s:
            return f"shard {shard} is to be led by {worker}; {now}. The order stands {stands}"
        raise CommandError(f"shard {shard}: after {wait_s:g} s {now}. The order stands {stands}{_why(after, worker)}")

    return _on(target, action)


def unpin(target: Target, shard: int) -> str:
    """Take a pin away."""

    async def action(loaded: Loaded, store: Store, keyspace: Keyspace) -> str:
        look = await read_look(loaded, store, keyspace)
        require_shard(look, shard)
        if shard not in look.fleet.pins:
            return f"shard {shard} is not pinned"
        await _write(store, look, "", Delete(keyspace.pin(shard)))
        return f"shard {shard} is no longer pinned to {look.fleet.pins[shard]}"

    return _on(target, action)


def drain(target: Target, worker: str, wait_s: float, *, is_undone: bool = False) -> str:
    """Wish a worker empty, and wait until it is."""

    async def action(loaded: Loaded, store: Store, keyspace: Keyspace) -> str:
        look = await read_look(loaded, store, keyspace)
        if is_undone:
            if worker not in look.fleet.drained:
                return f"worker {worker!r} is not being drained"
            await _write(store, look, "", Delete(keyspace.drain(worker)))
            return f"worker {worker!r} may lead again"
        require_worker(look, worker)
        had = look.map.led.get(worker, 0)
        await _write(store, look, worker, Put(keyspace.drain(worker), encode(_wish("drain"))))
        after, is_empty = await _watched(loaded, store, keyspace, lambda seen: not seen.map.led.get(worker), wait_s)
        left = after.map.led.get(worker, 0)
        if is_empty:
            return f"worker {worker!r} is drained: it led {had} shards and leads none"
        if not wait_s:
            return f"worker {worker!r} is to be drained; it leads {left} shards"
        raise CommandError(
            f"worker {worker!r} still leads {left} of {had} shards after {wait_s:g} s. The wish stands until "
            f"`shardlead drain --undo {worker}`{_why(after)}"
        )

    return _on(target, action)


def cordon(target: Target, worker: str, *, is_undone: bool = False) -> str:
    """Wish that a worker gets nothing new, or take that back."""

    async def action(loaded: Loaded, store: Store, keyspace: Keyspace) -> str:
        look = await read_look(loaded, store, keyspace)
        if is_undone:
            if worker not in look.fleet.cordoned:
                return f"worker {worker!r} is not cordoned"
            await _write(store, look, "", Delete(keyspace.cordon(worker)))
            return f"worker {worker!r} is no longer cordoned"
        require_worker(look, worker)
        await _write(store, look, worker, Put(keyspace.cordon(worker), encode(_wish("cordon"))))
        return f"worker {worker!r} is cordoned: it keeps its {look.map.led.get(worker, 0)} shards and gets no new ones"

    return _on(target, action)


def freeze(target: Target, reason: str, *, is_undone: bool = False) -> str:
    """Wish that nothing moves for evenness, or take that back."""

    async def action(loaded: Loaded, store: Store, keyspace: Keyspace) -> str:
        look = await read_look(loaded, store, keyspace)
        if is_undone:
            if not look.fleet.is_frozen:
                return f"cluster {look.cluster!r} is not frozen"
            await _write(store, look, "", Delete(keyspace.freeze))
            return f"cluster {look.cluster!r} is no longer frozen"
        await _write(store, look, "", Put(keyspace.freeze, encode(_wish(reason))))
        return f"cluster {look.cluster!r} is frozen: no moves for evenness until `shardlead unfreeze`"

    return _on(target, action)


def raise_generation(target: Target) -> str:
    """One more in every epoch to come."""

    async def action(_loaded: Loaded, store: Store, keyspace: Keyspace) -> str:
        meta = await bootstrap.raise_generation(store, keyspace)
        return f"cluster {keyspace.cluster!r}: generation is now {meta.generation}; workers may be started"

    return _on(target, action)


# --- how


def _on(target: Target, action: Callable[[Loaded, Store, Keyspace], Awaitable[str]]) -> str:
    return run_on(find_cluster(**target), action)


def _wish(reason: str, *, worker: str = "") -> Wish:
    return Wish(by=f"{getpass.getuser()}@{socket.gethostname()}", reason=reason, worker=worker)


async def _write(store: Store, look: Look, worker: str, *ops: Op) -> None:
    """Write if the cluster, and the worker if one is named, are as they were seen. Raises CommandError."""
    keyspace = Keyspace(look.cluster)
    guards: list[Compare] = [modified_at(keyspace.meta, look.fleet.meta_revision)]
    reads: list[Op] = [Range(keyspace.meta)]
    if worker:
        guards.append(modified_at(keyspace.worker(worker), look.map.workers[worker].mod_revision))
        reads.append(Range(keyspace.worker(worker)))
    match await store.commit(Txn(tuple(guards), ops, tuple(reads))):
        case Committed():
            return
        case Conflict():
            changed = f"worker {worker!r} or the cluster" if worker else "the cluster"
            raise CommandError(f"{changed} changed in this moment; nothing was written: try again")
        case Unknown(reason):
            raise CommandError(f"it is not known whether this was written ({reason}): look at `shardlead status`")


async def _watched(
    loaded: Loaded, store: Store, keyspace: Keyspace, is_done: Callable[[Look], bool], wait_s: float
) -> tuple[Look, bool]:
    """The last look, and whether it showed what was waited for."""
    look = await read_look(loaded, store, keyspace, has_orders=False)
    try:
        async with asyncio.timeout(wait_s):
            while not is_done(look):
                await asyncio.sleep(LOOK_PAUSE_S)
                look = await read_look(loaded, store, keyspace, has_orders=False)
    except TimeoutError:
        return look, False
    return look, True


def _why(look: Look, worker: str = "") -> str:
    """What an operator should look at first."""
    said = []
    if not look.fleet.seat_worker:
        said.append("no controller is seated")
    if worker and worker not in look.map.workers:
        said.append(f"worker {worker!r} has gone")
    if len(look.map.workers) < 2:
        said.append("there is no other worker")
    return f" ({'; '.join(said)})" if said else ""
