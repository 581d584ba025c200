"""shardlead: one leader per shard by lease, requests routed to it by key, and epochs to fence with.

    from shardlead import Leadership            what an application's object is given
    from shardlead import hosted, lead_of       an aiohttp application of one's own as a worker
    from shardlead import Worker, EtcdStore     a worker in one's own process
    from shardlead import Client                requests straight to each key's leader, without a router
    from shardlead.fencing import ...           storage that refuses old epochs
    from shardlead.testing import ...           a cluster for tests of one's own
    from shardlead import verify                what audit logs prove
    from shardlead import NotLeading, Fenced    and all other errors, one tree: see shardlead.errors

All is imported when it is first asked for, so that `shardlead --help` answers at once and Ctrl-C is heard in time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `__getattr__` finds at run time, as type checkers and editors see it
    from shardlead.audit import verify
    from shardlead.client import Client
    from shardlead.clock import Clock, SystemClock
    from shardlead.config import Settings
    from shardlead.errors import (
        AnswerBroken,
        ClusterError,
        CommandError,
        ConfigError,
        EpochRegressed,
        Fenced,
        LeadershipError,
        LeadershipLost,
        NotLeading,
        OutcomeUnknown,
        RequestError,
        RequestFailed,
        ResourceUnavailable,
        ShardleadError,
        StoreError,
        Unserved,
        WriteUnknown,
    )
    from shardlead.store.etcd import EtcdStore
    from shardlead.worker.application import Application
    from shardlead.worker.hosting import hosted, lead_of
    from shardlead.worker.leadership import Leadership
    from shardlead.worker.runtime import Worker

__all__ = [
    "AnswerBroken",
    "Application",
    "Client",
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
    "OutcomeUnknown",
    "RequestError",
    "RequestFailed",
    "ResourceUnavailable",
    "Settings",
    "ShardleadError",
    "StoreError",
    "SystemClock",
    "Unserved",
    "Worker",
    "WriteUnknown",
    "hosted",
    "lead_of",
    "verify",
]

_HOMES = {
    "AnswerBroken": "shardlead.errors",
    "Application": "shardlead.worker.application",
    "Client": "shardlead.client",
    "Clock": "shardlead.clock",
    "ClusterError": "shardlead.errors",
    "CommandError": "shardlead.errors",
    "ConfigError": "shardlead.errors",
    "EpochRegressed": "shardlead.errors",
    "EtcdStore": "shardlead.store.etcd",
    "Fenced": "shardlead.errors",
    "Leadership": "shardlead.worker.leadership",
    "LeadershipError": "shardlead.errors",
    "LeadershipLost": "shardlead.errors",
    "NotLeading": "shardlead.errors",
    "OutcomeUnknown": "shardlead.errors",
    "RequestError": "shardlead.errors",
    "RequestFailed": "shardlead.errors",
    "ResourceUnavailable": "shardlead.errors",
    "Settings": "shardlead.config",
    "ShardleadError": "shardlead.errors",
    "StoreError": "shardlead.errors",
    "SystemClock": "shardlead.clock",
    "Unserved": "shardlead.errors",
    "Worker": "shardlead.worker.runtime",
    "WriteUnknown": "shardlead.errors",
    "hosted": "shardlead.worker.hosting",
    "lead_of": "shardlead.worker.hosting",
    "verify": "shardlead.audit",
}


def __getattr__(name: str) -> object:
    if name == "errors":  # `except shardlead.errors.Fenced` needs no import of its own
        return import_module("shardlead.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shardlead' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
