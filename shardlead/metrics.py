"""Every metric, once: its name, its labels, its buckets. One class a role, each made with the registry it belongs to.

Law: names begin with `shardlead_` and end with the unit; counters end with `_total`. No globals: two roles in one
process have a registry each. Label values come from small closed sets written beside the metric; a key, a shard or a
worker's name is never a label, so the number of series does not grow with the cluster.
What only has to be right when somebody looks (seconds left, the view's age) is read by a function at that moment:
`metrics.lease_remaining.set_function(...)`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

REQUEST_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STEP_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

SESSION_STATES: Final = ("opening", "active", "suspended", "lost")


def new_registry(role: str, version: str) -> CollectorRegistry:
    """A registry with the process's own figures (CPU, memory, open files) and who it is."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    Info("shardlead_build", "Role and version of this process.", registry=registry).info(
        {"role": role, "version": version}
    )
    return registry


class ViewMetrics:
    """A process's picture of the cluster. Every role that has a view has these."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.age = Gauge(
            "shardlead_view_age_seconds",
            "Time since the view last heard the cluster's tick; grows while the store is silent.",
            registry=registry,
        )
        self.is_fresh = Gauge("shardlead_view_fresh", "1 while the view is believed to be current.", registry=registry)
        self.revision = Gauge("shardlead_view_revision", "Store revision the view stands at.", registry=registry)
        self.led_shards = Gauge("shardlead_view_led_shards", "Shards that have a leader.", registry=registry)
        self.shards = Gauge("shardlead_view_shards", "Shards of the cluster.", registry=registry)
        self.workers = Gauge("shardlead_view_workers", "Living workers.", registry=registry)
        self.leader_changes = Counter(
            "shardlead_view_leader_changes_total", "Leaderships that began, ended or moved.", registry=registry
        )
        self.resets = Counter(
            "shardlead_view_resets_total", "Times the view was loaded anew instead of resumed.", registry=registry
        )


class WorkerMetrics:
    """A worker's session, its leaderships and its requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.leaderships = Gauge("shardlead_worker_leaderships", "Shards led here now.", registry=registry)
        self.shards = Gauge(
            "shardlead_worker_shards",
            "Shards concerned here, by state: claiming, waiting, opening, serving, draining, stopping, closing, "
            "passing, paused.",
            ["state"],
            registry=registry,
        )
        self.session_state = Gauge(
            "shardlead_session_state",
            "1 for the session's state: opening, active, suspended or lost.",
            ["state"],
            registry=registry,
        )
        self.lease_remaining = Gauge(
            "shardlead_lease_remaining_seconds",
            "Time until this worker's own deadline; negative once it has passed.",
            registry=registry,
        )
        self.sessions = Counter("shardlead_sessions_total", "Sessions opened.", registry=registry)
        self.sessions_lost = Counter(
            "shardlead_sessions_lost_total",
            "Sessions lost: expired, evicted, replaced, unconfirmed.",
            ["reason"],
            registry=registry,
        )
        self.claims = Counter(
            "shardlead_claims_total",
            "Claims by result: won, lost, conflict, unknown or adopted.",
            ["result"],
            registry=registry,
        )
        self.remints = Counter(
            "shardlead_remints_total", "Leaderships given a new epoch in place.", ["reason"], registry=registry
        )
        self.resigns = Counter("shardlead_resigns_total", "Leaderships given up.", ["reason"], registry=registry)
        self.handoffs = Counter(
            "shardlead_handoffs_total",
            "Handoffs by direction (in, out) and result: moved, conflict, unknown or ended.",
            ["direction", "result"],
            registry=registry,
        )
        self.handoff_duration = Histogram(
            "shardlead_handoff_duration_seconds",
            "From the begin of a shard's draining here until its leadership had moved.",
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self.leadership_losses = Counter(
            "shardlead_leadership_losses_total",
            "Leaderships that ended without being given up.",
            registry=registry,
        )
        self.application_duration = Histogram(
            "shardlead_application_duration_seconds",
            "How long a shard was opening (open), draining (drain) and closing (close).",
            ["step"],
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self.application_failures = Counter(
            "shardlead_application_failures_total",
            "Failures of the application's open, run, handle, close or healthy.",
            ["step"],
            registry=registry,
        )
        self.requests = Counter(
            "shardlead_worker_requests_total",
            "Requests by outcome: answered, application-error, stale, draining, unknown, suspended, outcome-unknown, "
            "cancelled, bad-request.",
            ["outcome"],
            registry=registry,
        )
        self.request_duration = Histogram(
            "shardlead_worker_request_duration_seconds",
            "From admission to the end of the answer.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.requests_running = Gauge(
            "shardlead_worker_requests_running", "Requests being handled now.", registry=registry
        )
        self.requests_parked = Gauge(
            "shardlead_worker_requests_parked", "Requests that wait for a shard to open.", registry=registry
        )

    def set_session_state(self, state: str) -> None:
        """Show `state` (one of SESSION_STATES) as the session's."""
        for each in SESSION_STATES:
            self.session_state.labels(each).set(each == state)


class Durations(Protocol):
    """How long something took, as plain numbers: a count for each bucket, one more beyond the last, and the sum."""

    @property
    def buckets_s(self) -> Sequence[float]: ...
    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def sum_s(self) -> float: ...


class RouterCounts(Protocol):
    """A router's figures as its request path keeps them: plain numbers, read when somebody looks."""

    @property
    def answered(self) -> int: ...
    @property
    def others(self) -> Mapping[str, int]: ...
    @property
    def resent(self) -> Mapping[str, int]: ...
    @property
    def refused(self) -> Mapping[str, int]: ...
    @property
    def connects(self) -> Mapping[str, int]: ...
    @property
    def held(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...
    @property
    def client_connections(self) -> int: ...
    @property
    def access_log_dropped(self) -> int: ...
    @property
    def tunnels(self) -> int: ...
    @property
    def request_durations(self) -> Durations: ...
    @property
    def hold_durations(self) -> Durations: ...


class RouterMetrics(Collector):
    """A router's requests, from both sides. (A prometheus child costs a microsecond or two a touch, and a request
    touches several, so the router counts in plain numbers and this reads them.)"""

    def __init__(
        self,
        registry: CollectorRegistry,
        counts: RouterCounts,
        upstream_connections: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """`upstream_connections` gives how many connections to workers are busy and idle."""
        self._counts = counts
        self._upstream_connections = upstream_connections
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield _counter(
            "shardlead_router_requests",
            "Requests by outcome: answered, bad-request, not-led, overloaded, not-ready, outcome-unknown, "
            "upstream-failed, too-large, timed-out, client-gone.",
            "outcome",
            {"answered": counts.answered, **counts.others},
        )
        yield _counter(
            "shardlead_router_resent", "Requests sent again: refused, unsent, safe or idempotent.", "why", counts.resent
        )
        yield _counter(
            "shardlead_router_refused",
            "Refusals by workers: stale, draining, unknown or suspended.",
            "reason",
            counts.refused,
        )
        yield _counter(
            "shardlead_router_upstream_connects",
            "Connections to workers made: connected, failed or timed-out.",
            "result",
            counts.connects,
        )
        yield _histogram(
            "shardlead_router_request_duration_seconds",
            "From a request's head to the end of its answer, time on hold included.",
            counts.request_durations,
        )
        yield _histogram(
            "shardlead_router_hold_duration_seconds", "How long held requests waited.", counts.hold_durations
        )
        yield GaugeMetricFamily(
            "shardlead_router_requests_held", "Requests that wait for their shard's leader.", counts.held
        )
        yield GaugeMetricFamily(
            "shardlead_router_held_bytes", "Bytes of bodies kept to be sent again.", counts.kept_bytes
        )
        yield GaugeMetricFamily(
            "shardlead_router_client_connections", "Client connections open now.", counts.client_connections
        )
        yield GaugeMetricFamily("shardlead_router_tunnels", "Upgraded connections open now.", counts.tunnels)
        yield CounterMetricFamily(
            "shardlead_router_access_log_dropped",
            "Lines of the access log that were dropped because it could not be written fast enough.",
            counts.access_log_dropped,
        )
        upstream = GaugeMetricFamily(
            "shardlead_router_upstream_connections",
            "Connections to workers open now, by use: busy or idle.",
            labels=["use"],
        )
        for use, number in zip(("busy", "idle"), self._upstream_connections(), strict=True):
            upstream.add_metric([use], number)
        yield upstream


class RouterGroupMetrics:
    """Several router processes that share a port, as their parent sees them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.processes = Gauge("shardlead_router_processes", "Router processes that serve now.", registry=registry)
        self.restarts = Counter(
            "shardlead_router_process_restarts_total",
            "Router processes that ended by themselves and were started again.",
            registry=registry,
        )


def _counter(name: str, text: str, label: str, numbers: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, number in numbers.items():
        family.add_metric([value], number)
    return family


def _histogram(name: str, text: str, durations: Durations) -> Metric:
    family = HistogramMetricFamily(name, text)
    bounds = [*(f"{bound:g}" for bound in durations.buckets_s), "+Inf"]
    family.add_metric([], list(zip(bounds, accumulate(durations.counts), strict=True)), durations.sum_s)
    return family


class ControllerMetrics:
    """What the controller sees and does. Only the holder of the seat moves these."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.is_seated = Gauge("shardlead_controller_seated", "1 while this process has the seat.", registry=registry)
        self.rounds = Counter("shardlead_controller_rounds_total", "Looks at the cluster.", registry=registry)
        self.plan_duration = Histogram(
            "shardlead_controller_plan_duration_seconds",
            "How long planning one round took.",
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self.moves = Counter(
            "shardlead_controller_moves_total",
            "Moves ordered, by reason (leaderless, draining, pin, evenness, ...).",
            ["reason"],
            registry=registry,
        )
        self.moves_in_flight = Gauge(
            "shardlead_controller_moves_in_flight", "Moves ordered and not yet done.", registry=registry
        )
        self.moves_wanted = Gauge(
            "shardlead_controller_moves_wanted", "Moves of the last plan, beyond those in flight.", registry=registry
        )
        self.spread = Gauge(
            "shardlead_controller_spread",
            "Most minus fewest leaderships of eligible workers, each divided by its capacity.",
            registry=registry,
        )
        self.leaderless = Gauge("shardlead_controller_leaderless", "Shards without a leader.", registry=registry)
        self.holds = Gauge(
            "shardlead_controller_held",
            "1 while evenness moves are held, by reason: settling, returning, frozen, brake.",
            ["reason"],
            registry=registry,
        )
        self.writes = Counter(
            "shardlead_controller_writes_total",
            "Writes by result: committed, conflict or unknown.",
            ["result"],
            registry=registry,
        )


class StoreMetrics:
    """What a process asks of the store, and how the store answers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.calls = Counter(
            "shardlead_store_calls_total",
            "Calls by kind (read, commit, grant, renew, revoke, lease-keys, status) and result: ok, unavailable, "
            "rejected, gone (the lease), unknown or cancelled.",
            ["call", "result"],
            registry=registry,
        )
        self.call_duration = Histogram(
            "shardlead_store_call_duration_seconds",
            "How long a call took over all its attempts.",
            ["call"],
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self.rotations = Counter("shardlead_store_rotations_total", "Changes to the next endpoint.", registry=registry)
        self.watch_breaks = Counter(
            "shardlead_store_watch_breaks_total", "Watches that ended, broke or fell silent.", registry=registry
        )
