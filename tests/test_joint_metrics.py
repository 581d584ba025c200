"""One page of metrics for several processes."""

from shardlead.cli.joint_metrics import joined, lasting, read_page, write_page

ONE = """\
# HELP shardlead_router_requests_total Requests.
# TYPE shardlead_router_requests_total counter
shardlead_router_requests_total{outcome="answered"} 5
# HELP shardlead_view_age_seconds Age.
# TYPE shardlead_view_age_seconds gauge
shardlead_view_age_seconds 3
# HELP shardlead_view_fresh Fresh.
# TYPE shardlead_view_fresh gauge
shardlead_view_fresh 1
# HELP shardlead_router_tunnels Tunnels.
# TYPE shardlead_router_tunnels gauge
shardlead_router_tunnels 2
# HELP d How long.
# TYPE d histogram
d_bucket{le="1"} 1
d_bucket{le="+Inf"} 2
d_count 2
d_sum 3.5
"""
OTHER = """\
# HELP shardlead_router_requests_total Requests.
# TYPE shardlead_router_requests_total counter
shardlead_router_requests_total{outcome="answered"} 7
shardlead_router_requests_total{outcome="not-led"} 1
# HELP shardlead_view_age_seconds Age.
# TYPE shardlead_view_age_seconds gauge
shardlead_view_age_seconds 0.5
# HELP shardlead_view_fresh Fresh.
# TYPE shardlead_view_fresh gauge
shardlead_view_fresh 0
"""


def _values(page: bytes) -> dict[str, float]:
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in page.decode().splitlines() if line[0] != "#")
    }


def test_counts_are_summed_and_the_worst_view_is_shown() -> None:
    """By label; and what a process saw that has ended stays in what only grows, and in nothing else."""
    both = _values(write_page(joined([read_page(ONE), read_page(OTHER)])))
    assert both == {
        'shardlead_router_requests_total{outcome="answered"}': 12,
        'shardlead_router_requests_total{outcome="not-led"}': 1,
        "shardlead_view_age_seconds": 3,
        "shardlead_view_fresh": 0,
        "shardlead_router_tunnels": 2,
        'd_bucket{le="1"}': 1,
        'd_bucket{le="+Inf"}': 2,
        "d_count": 2,
        "d_sum": 3.5,
    }
    left = _values(write_page(joined([lasting(read_page(ONE)), read_page(OTHER)])))
    assert left['shardlead_router_requests_total{outcome="answered"}'] == 12
    assert "shardlead_router_tunnels" not in left
    assert left["shardlead_view_age_seconds"] == 0.5
    assert left["d_count"] == 2
