"""What a run was asked for, checked: one dataclass, and the command line that fills it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest import through_client

DURATION_MIN_S: Final = 3.0
DURATION_MAX_S: Final = 3_600.0
REQUESTS_MAX: Final = 20_000_000
"""Each is kept with 17 bytes until the report is made."""
RATE_PER_GENERATOR: Final = {"router": 2_000.0, "client": 700.0}
"""A request costs a generator about 100 µs of CPU through a router, and four times that in the smart client."""
PAYLOAD_BYTES_MAX: Final = 16 * 1_048_576
APPLICATIONS: Final = {"memory": "loadtest.app:memory", "sqlite": "shardlead.demo:Counter"}


@dataclass(frozen=True)
class Options:
    """One run."""

    scenario: str
    rates: tuple[float, ...] = (1000.0,)
    duration_s: float = 30.0
    shards: int = 64
    workers: int = 3
    routers: int = 1
    generators: int = 0
    """0: as many as RATE_PER_GENERATOR says."""
    store: str = "embedded"
    url: str = ""
    cluster: str = "default"
    app: str = "memory"
    path: str = "/counters/{key}"
    keys: str = "uniform"
    key_count: int = 10_000
    payload_bytes: tuple[int, ...] = (0,)
    posts: float = 0.5
    idempotent: float = 0.0
    through: str = "router"
    ttl_s: int = 0
    """0: the scenario's own."""
    timeout_s: float = 20.0
    connections_max: int = 2_000
    seed: int = 1
    do: str = ""
    audit: bool = True
    settings: tuple[tuple[str, str], ...] = ()
    report: Path | None = None
    json: Path | None = None

    @property
    def generator_count(self) -> int:
        return self.generators or max(1, math.ceil(max(self.rates) / RATE_PER_GENERATOR[self.through]))

    @property
    def step_s(self) -> float:
        """How long each rate lasts."""
        return self.duration_s / len(self.rates)

    @property
    def mean_rate(self) -> float:
        return sum(self.rates) / len(self.rates)

    @property
    def application(self) -> str:
        """As MODULE:NAME."""
        return APPLICATIONS.get(self.app, self.app)

    @property
    def is_own(self) -> bool:
        """Whether the cluster is started here."""
        return not self.url


def problems(options: Options) -> list[str]:
    """Everything that is wrong with the options together, in words; [] if nothing is."""
    wrong = []
    if options.duration_s * options.mean_rate > REQUESTS_MAX:
        count = options.duration_s * options.mean_rate
        wrong.append(f"--rate times --duration is {count:,.0f} requests; at most {REQUESTS_MAX:,}")
    if options.path.count("{key}") != 1 or not options.path.startswith("/"):
        wrong.append(f"--path {options.path!r}: must begin with / and have {{key}} in it once")
    if options.url and not options.store.startswith("http"):
        wrong.append("--url takes a running cluster, whose shards are read from its store: give --store URL, too")
    if not options.url and options.do:
        wrong.append("--do is for a running cluster (--url); one that is started here has its faults made by itself")
    if options.through == "client" and not through_client.is_there():
        wrong.append("--through client: this build has no smart client")
    if options.generator_count > options.mean_rate * options.duration_s:
        wrong.append("more generators than requests")
    return wrong
