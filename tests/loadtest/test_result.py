"""The result, its judgement and its JSON."""

import orjson
import pytest

from loadtest.result import Quantiles, as_json
from tests.loadtest.made import made


def test_the_json_has_the_fields_that_are_promised() -> None:
    """Every name that others read, with its type, and figures that agree with each other."""
    found = orjson.loads(as_json(made().result))
    assert found["scenario"] == "scale-out"
    assert found["rate_rps"] == 500
    assert found["sent"] == found["ok"] + found["failed"] == 10_000
    assert set(found["latency_ms"]) == {"p50", "p90", "p99", "p999", "max"}
    latencies = [found["latency_ms"][name] for name in ("p50", "p90", "p99", "p999", "max")]
    assert latencies == sorted(latencies)
    assert len(found["per_shard"]) == 64
    assert {"shard", "requests", "throughput_rps", "p99_ms"} <= set(found["per_shard"][0])
    assert sum(row["requests"] for row in found["per_shard"]) == found["sent"]
    assert len(found["moves"]) == 32
    assert {"shard", "source", "target", "pause_ms"} <= set(found["moves"][0])
    assert len(found["failover_ms"]) == 16
    assert all(isinstance(value, float) for value in found["failover_ms"])
    assert {"leaderships", "requests", "violations"} <= set(found["verify"])
    assert found["machine"]


def test_a_broken_promise_is_said_with_its_reason() -> None:
    """Requests failed in a scenario that promises none: it is not kept, and the verdict says what failed."""
    result = made().result
    assert result.failed > 0
    assert not result.is_kept
    broken = next(verdict for verdict in result.promises if not verdict.is_kept)
    assert f"{result.failed} x POST: 502 outcome-unknown" in broken.found


def test_the_same_failures_may_be_allowed_by_another_scenario() -> None:
    """A crash may leave POSTs whose outcome nobody knows; `kill-leader` promises no more, and its failover is quick."""
    result = made(scenario="kill-leader").result
    assert result.failed > 0
    assert result.is_kept, result.promises
    assert 195 <= result.failover.p50 <= 260


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Quantiles(0, 0.0, 0.0, 0.0)),
        ([5.0], Quantiles(1, 5.0, 5.0, 5.0)),
        ([float(value) for value in range(1, 101)], Quantiles(100, 50.0, 99.0, 100.0)),
    ],
)
def test_quantiles_are_values_that_were_measured(values: list[float], expected: Quantiles) -> None:
    """Nearest rank: of a hundred values p99 is the 99th."""
    assert Quantiles.of(values[::-1]) == expected
