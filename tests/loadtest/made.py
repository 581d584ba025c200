"""Runs that never happened, for what is made of one: samples, events and marks that a seed draws."""

import random
from typing import Any

from loadtest.generators import Harvest
from loadtest.histogram import record
from loadtest.leadership import Story
from loadtest.options import Options
from loadtest.reckon import Run, reckon
from loadtest.result import Mark, Verify
from loadtest.run import Outcome
from loadtest.samples import OK, POST
from loadtest.scenarios import SCENARIOS

ZERO_S = 1_700_000_000.0


def leader(at_s: float, shard: int, worker: str | None, revision: int) -> dict[str, Any]:
    """A line of /v1/events."""
    return {"t": ZERO_S + at_s, "event": "leader", "shard": shard, "worker": worker, "revision": revision}


def made(*, scenario: str = "scale-out", shards: int = 64, rate: float = 500.0, duration_s: float = 20.0) -> Outcome:
    """A run of `scenario` on three workers: at half time a fourth takes every fourth shard, and at three quarters one
    of the others is lost for a third of a second."""
    rng = random.Random(7)
    harvest = Harvest()
    half, lost = duration_s / 2, duration_s * 0.75
    begin = {shard: f"w{shard % 3 + 1}" for shard in range(shards)}
    events = [leader(half + 0.01 * (shard % 60), shard, "w4", 10) for shard in range(0, shards, 4)]
    gone = [shard for shard in range(shards) if shard % 4 and begin[shard] == "w2"]
    events += [leader(lost, shard, None, 11) for shard in gone]
    events += [leader(lost + 0.2, shard, f"w{1 + 2 * (shard % 2)}", 12) for shard in gone]
    is_gone = set(gone)
    for number in range(int(rate * duration_s)):
        due_s = number / rate
        shard = rng.randrange(shards)
        latency_ms = rng.lognormvariate(0.3, 0.6)
        if shard % 4 == 0 and half < due_s < half + 0.8:
            latency_ms += rng.uniform(2, 30)
        is_failed = False
        if shard in is_gone and lost < due_s < lost + 0.25:
            latency_ms += 1000 * (lost + 0.25 - due_s)
            is_failed = rng.random() < 0.2
        flags = POST * (number % 2) | (0 if is_failed else OK)
        if is_failed:
            harvest.reasons["POST: 502 outcome-unknown"] += 1
        harvest.samples.add(int(due_s * 1e6), int(latency_ms * 1000), shard, flags)
        record(harvest.lags, rng.randrange(20, 900))
        harvest.sent += 1
    harvest.leaderships.update({(shard, 1): worker for shard, worker in begin.items()})
    harvest.examples.append("POST key-1 <script>alert(1)</script>")
    harvest.cpu_s = 1.25
    story = Story(begin, sorted(events, key=lambda event: event["t"]), ZERO_S)
    run = Run(
        options=Options(scenario, rates=(rate,), duration_s=duration_s, shards=shards),
        harvest=harvest,
        story=story,
        shards=shards,
        marks=[Mark(half - 2, "one worker more starts", is_fault=False), Mark(lost, "SIGKILL to w2")],
        losses=[(lost - 0.005, "w2")],
        ended_s=duration_s,
        verify=Verify(len(begin), harvest.sent, 0),
        verify_note="",
        promises=SCENARIOS[scenario].promises(5),
        started="2024-01-01T00:00:00+00:00",
        settings={"workers": 3, "shards": shards, "store": "embedded", "through": "router"},
        machine={"cpu": "made up", "cores": 2},
        command="python -m loadtest scale-out",
    )
    return Outcome(reckon(run), harvest.samples, story, shards)
