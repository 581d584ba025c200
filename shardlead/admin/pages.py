"""What the admin server shows of a map and its changes, as plain values for JSON.

Law: pure; shows facts only, as the view of this one process has them at one revision.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from shardlead.core.shardmap import Delta, ShardMap


def map_page(shard_map: ShardMap, *, role: str, name: str, age_s: float, is_fresh: bool) -> dict[str, Any]:
    """`/v1/map`: the cluster's shape, its living workers in order of name, and every leadership in order of shard."""
    meta = shard_map.meta
    return {
        "role": role,
        "name": name,
        "cluster": None if meta is None else meta.cluster,
        "revision": shard_map.revision,
        "is_fresh": is_fresh,
        "age_s": round(age_s, 3) if age_s != float("inf") else None,
        "shards": 0 if meta is None else meta.shards,
        "slot_count": 0 if meta is None else meta.slot_count,
        "generation": 0 if meta is None else meta.generation,
        "workers": [
            {
                "name": worker,
                "sid": member.record.sid,
                "pid": member.record.pid,
                "address": member.record.address,
                "admin": member.record.admin,
                "state": member.record.state,
                "zone": member.record.zone,
                "capacity": member.record.capacity,
                "version": member.record.version,
                "shards": shard_map.led.get(worker, 0),
            }
            for worker, member in sorted(shard_map.workers.items())
        ],
        "leaders": [
            {"shard": shard, "worker": leader.worker, "epoch": leader.epoch, "address": leader.address}
            for shard, leader in shard_map.leaders()
        ],
    }


def event_lines(delta: Delta, revision: int, wall_s: float) -> Iterator[Mapping[str, Any]]:
    """`/v1/events`: one object for each leadership and each membership that became different. A change of address
    alone is none."""
    at = round(wall_s, 3)
    for worker in delta.workers_changed:
        before = None if worker.before is None else worker.before.record
        after = None if worker.after is None else worker.after.record
        is_same = before is not None and after is not None and (before.sid, before.state) == (after.sid, after.state)
        if not is_same:
            state = "gone" if after is None else after.state
            yield {"t": at, "event": "worker", "worker": worker.name, "state": state, "revision": revision}
    for change in delta.leaders:
        if change.before is not None and change.after is not None and change.before.epoch == change.after.epoch:
            continue
        yield {
            "t": at,
            "event": "leader",
            "shard": change.shard,
            "worker": None if change.after is None else change.after.worker,
            "epoch": None if change.after is None else change.after.epoch,
            "previous": None if change.before is None else change.before.worker,
            "revision": revision,
        }
