"""shardlead: one leader per shard by lease, requests routed to it by key, and epochs to fence with.

    from shardlead import Leadership            what an application's object is given
    from shardlead import Worker, EtcdStore     a worker in one's own process
    from shardlead.fencing import ...           storage that refuses old epochs
    from shardlead.testing import ...           a cluster for tests of one's own
    from shardlead import verify                what audit logs prove
    from shardlead import NotLeading, Fenced    and all other errors, one tree: see shardlead.errors

What is heavy is imported when it is first asked for, so that `shardlead --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from shardlead.errors import (
    ClusterError,
    CommandError,
    ConfigError,
    EpochRegressed,
    Fenced,
    LeadershipError,
    LeadershipLost,
    NotLeading,
    ResourceUnavailable,
    ShardleadError,
    StoreError,
    WriteUnknown,
)

if TYPE_CHECKING:  # what `__getattr__` finds at run time, as type checkers and editors see it
    from shardlead.audit import verify
    from shardlead.clock import Clock, SystemClock
    from shardlead.config import Settings
    from shardlead.store.etcd import EtcdStore
    from shardlead.worker.application import Application
    from shardlead.worker.leadership import Leadership
    from shardlead.worker.runtime import Worker

__all__ = [
    "Application",
    "Clock",
    "ClusterError",
    "CommandError",
    "ConfigError",
    "EpochRegressed",
    "EtcdStore",
    "Fenced",
    "Leadership",
    "LeadershipError",
    "LeadershipLost",
    "NotLeading",
    "ResourceUnavailable",
    "Settings",
    "ShardleadError",
    "StoreError",
    "SystemClock",
    "Worker",
    "WriteUnknown",
    "verify",
]

_HOMES = {
    "Application": "shardlead.worker.application",
    "Clock": "shardlead.clock",
    "EtcdStore": "shardlead.store.etcd",
    "Leadership": "shardlead.worker.leadership",
    "Settings": "shardlead.config",
    "SystemClock": "shardlead.clock",
    "Worker": "shardlead.worker.runtime",
    "verify": "shardlead.audit",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shardlead' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
