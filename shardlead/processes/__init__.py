"""Real processes on this machine: shardlead's roles, their store; started, watched, signalled, ended.

The floor under `testing` and `dev`. It knows command lines and what the processes print, and nothing of what they do
inside: it imports no role, no cluster and no store.

Law: whatever was started here is gone when the block is left, however it is left; if this process is killed itself,
the watchdog ends them. A signal goes only to a process that is known to be ours still, never to a recycled pid.
"""

from shardlead.processes.commands import (
    DATA_VARIABLE,
    LOOPBACK,
    embedded_command,
    etcd_command,
    find_etcd,
    free_port,
    is_port_free,
    lease_settings,
    settings_flags,
    shardlead_command,
    wheel_etcd,
)
from shardlead.processes.look import (
    ClusterMap,
    Member,
    is_admin_ready,
    is_etcd_leader,
    parse_map,
    read_key,
    read_map,
    stream_events,
    wait_etcd,
)
from shardlead.processes.process import (
    Process,
    Processes,
    Ready,
    WorkerProcess,
    ready_role,
    ready_store,
)

__all__ = [
    "DATA_VARIABLE",
    "LOOPBACK",
    "ClusterMap",
    "Member",
    "Process",
    "Processes",
    "Ready",
    "WorkerProcess",
    "embedded_command",
    "etcd_command",
    "find_etcd",
    "free_port",
    "is_admin_ready",
    "is_etcd_leader",
    "is_port_free",
    "lease_settings",
    "parse_map",
    "read_key",
    "read_map",
    "ready_role",
    "ready_store",
    "settings_flags",
    "shardlead_command",
    "stream_events",
    "wait_etcd",
    "wheel_etcd",
]
