"""What a load test found: the JSON's shape, field by field.

Law: fields are added, never renamed; `as_json` writes all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson


@dataclass(frozen=True)
class Latency:
    """From the moment a request was due until it ended, in ms; failed requests count until they failed."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class ShardLoad:
    """One shard's part. `throughput_rps` is of good answers, over the whole load."""

    shard: int
    requests: int
    throughput_rps: float
    p99_ms: float
    failed: int = 0
    leader: str = ""
    """Who led it at the end."""


@dataclass(frozen=True)
class Move:
    """A shard passed from one worker to another. `leadership` says how `pause_ms` is measured."""

    shard: int
    source: str
    target: str
    pause_ms: float
    at_s: float = 0.0
    leaderless_ms: float = 0.0
    longest_wait_ms: float = 0.0
    requests: int = 0
    """How many requests of the shard were under way around it."""
    is_handoff: bool = True
    """In one transaction; else it was without a leader in between."""


@dataclass(frozen=True)
class Verify:
    """What `shardlead verify` said of the workers' audit logs."""

    leaderships: int
    requests: int
    violations: int
    text: str = ""
    """What it printed, if it found something."""


@dataclass(frozen=True)
class Seen:
    """What the answers themselves prove, compared in the generators; no logs needed."""

    leaderships: int
    violations: Sequence[str]


@dataclass(frozen=True)
class Mark:
    """Something that was done to the cluster."""

    at_s: float
    text: str
    is_fault: bool = True


@dataclass(frozen=True)
class Quantiles:
    """Of moves' pauses, or of failovers."""

    count: int
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        """Nearest rank; all 0 for no values."""
        if not values:
            return cls(0, 0.0, 0.0, 0.0)
        ranked = sorted(values)
        count = len(ranked)
        return cls(count, ranked[(count - 1) // 2], ranked[min(count - 1, -(-99 * count // 100) - 1)], ranked[-1])


@dataclass(frozen=True)
class Generators:
    """Whether the generators kept to the schedule: if not, the machine was too small for the load."""

    processes: int
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float
    cpu_s: float
    is_late: bool


@dataclass(frozen=True)
class Verdict:
    """One promise, and whether it was kept."""

    promise: str
    is_kept: bool
    found: str


@dataclass(frozen=True)
class Point:
    """One second of the load, by when requests were due."""

    at_s: float
    sent: int
    failed: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Result:
    """Everything. Times are seconds since the load began."""

    scenario: str
    rate_rps: float
    """Asked for; the mean where it was stepped."""
    sent: int
    ok: int
    failed: int
    latency_ms: Latency
    per_shard: Sequence[ShardLoad]
    moves: Sequence[Move]
    failover_ms: Sequence[float]
    verify: Verify | None
    """None where there were no audit logs: `verify_note` says why."""
    verify_note: str
    seen: Seen
    is_kept: bool
    promises: Sequence[Verdict]
    started: str
    duration_s: float
    rates_rps: Sequence[float]
    throughput_rps: float
    pause_ms: Quantiles
    """Of the moves that a request met."""
    failover: Quantiles
    failures: Mapping[str, int]
    """How often each reason came."""
    failure_examples: Sequence[str]
    marks: Sequence[Mark]
    generators: Generators
    seconds: Sequence[Point]
    settings: Mapping[str, object]
    machine: Mapping[str, object]
    command: str = ""
    warnings: Sequence[str] = field(default=())


def as_json(result: Result) -> bytes:
    """The result as JSON, indented, with a newline."""
    return orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def write_json(result: Result, path: Path) -> None:
    """Write it. Raises OSError."""
    path.write_bytes(as_json(result))
