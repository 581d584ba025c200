"""Metrics: their names, and the router's plain numbers as Prometheus shows them."""

import re

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from shardlead.metrics import ControllerMetrics, RouterMetrics, StoreMetrics, ViewMetrics, WorkerMetrics, new_registry
from shardlead.router.counts import Counts

UNITS = ("_seconds", "_bytes", "_total", "_info")
COUNTS = re.compile(
    r"_(fresh|revision|shards|workers|leaderships|state|running|parked|held|connections|tunnels|seated|flight|wanted"
    r"|spread|leaderless)$"
)


def test_names_begin_with_shardlead_and_end_with_their_unit() -> None:
    """Counters end with _total, durations with _seconds; what is left counts things and is named for them."""
    registry = CollectorRegistry()
    ViewMetrics(registry)
    WorkerMetrics(registry)
    RouterMetrics(registry, Counts())
    ControllerMetrics(registry)
    StoreMetrics(registry)
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name.startswith("shardlead_")
        assert name.endswith(UNITS) or COUNTS.search(name), name
        assert family.documentation.endswith("."), name


def test_the_routers_plain_numbers_are_shown() -> None:
    """Outcomes as labels; durations as a histogram whose buckets add up."""
    counts = Counts()
    counts.answered = 2
    counts.others["not-led"] += 1
    counts.held = 4
    for seconds in (0.0005, 0.02, 100.0):
        counts.request_durations.add(seconds)
    registry = CollectorRegistry()
    RouterMetrics(registry, counts, lambda: (3, 5))
    lines = generate_latest(registry).decode().splitlines()
    for line in (
        'shardlead_router_requests_total{outcome="answered"} 2.0',
        'shardlead_router_requests_total{outcome="not-led"} 1.0',
        "shardlead_router_requests_held 4.0",
        'shardlead_router_request_duration_seconds_bucket{le="0.001"} 1.0',
        'shardlead_router_request_duration_seconds_bucket{le="0.025"} 2.0',
        'shardlead_router_request_duration_seconds_bucket{le="30"} 2.0',
        'shardlead_router_request_duration_seconds_bucket{le="+Inf"} 3.0',
        "shardlead_router_request_duration_seconds_count 3.0",
        'shardlead_router_upstream_connections{use="busy"} 3.0',
        'shardlead_router_upstream_connections{use="idle"} 5.0',
    ):
        assert line in lines


def test_the_session_state_is_one_of_four() -> None:
    """Exactly one state shows 1."""
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.set_session_state("active")
    metrics.set_session_state("suspended")
    shown = {
        state: registry.get_sample_value("shardlead_session_state", {"state": state})
        for state in ("opening", "active", "suspended", "lost")
    }
    assert shown == {"opening": 0, "active": 0, "suspended": 1, "lost": 0}


def test_two_roles_in_one_process_do_not_meet() -> None:
    """Nothing is registered globally, so the same metrics can be made twice."""
    first, second = new_registry("worker", "1"), new_registry("worker", "1")
    WorkerMetrics(first).sessions.inc()
    WorkerMetrics(second)
    assert first.get_sample_value("shardlead_sessions_total") == 1
    assert second.get_sample_value("shardlead_sessions_total") == 0
    with pytest.raises(ValueError, match="Duplicated"):
        WorkerMetrics(second)
