"""Settings: one frozen dataclass a section, a unit in every name, one docstring a field.

Law: defaults here, then `config/*.toml`, environment (`SHARDLEAD_<SECTION>_<FIELD>`) and flags, each stronger than the
one before. `check` lists every broken relation at once.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    name: str = "default"
    """The cluster's name: all its records stand under /<name>/ in the store."""
    shards: int = 256
    """How many shards the key space has; fixed when the cluster is created. Ten times the largest fleet is good."""
    hash_tags: bool = False
    """Whether only the part of a key in {braces} is hashed, so that related keys share a shard. Fixed at creation."""
    seed: int = 0
    """Varies the ring between clusters; fixed at creation."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    """etcd's client URLs; all of one cluster. They are used in turn when one fails."""
    try_timeout_s: float = 1.0
    """How long one attempt on one endpoint may take."""
    call_timeout_s: float = 5.0
    """How long a call may take over all attempts."""
    watch_silence_s: float = 10.0
    """A watch that brings nothing (not even the cluster's tick) for so long is taken as broken."""
    username: str = ""
    """etcd user, if its auth is on."""
    password: str = ""
    """That user's password; better given as SHARDLEAD_STORE_PASSWORD."""
    ca_file: str = ""
    """PEM file of the authorities that sign the endpoints' certificates; empty: the system's."""
    cert_file: str = ""
    """PEM file of this client's certificate, if the endpoints ask for one."""
    key_file: str = ""
    """PEM file of that certificate's key."""


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    ttl_s: int = 10
    """Lease time-out in whole seconds: how long a lost machine keeps its shards."""
    renew_interval_s: float = 2.8
    """Mean time between renewals; each is jittered by 10 %."""
    drift: float = 0.01
    """How much faster than the server's this machine's clock may be taken to run slow, as a share (rho)."""
    margin_s: float = 0.5
    """Kept off the end of every lease (delta); at least 5 % of the TTL is used."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    name: str = ""
    """Unique among the living; empty: <hostname>-<pid>."""
    host: str = "127.0.0.1"
    """Address to listen on for requests."""
    port: int = 0
    """Port to listen on for requests; 0: any free one."""
    advertise: str = ""
    """host:port that routers connect to; empty: where it listens."""
    zone: str = ""
    """Failure zone; successors are placed in other zones where possible."""
    capacity: float = 1.0
    """Share of leaderships relative to other workers."""
    drain_timeout_s: float = 10.0
    """How long running requests of a shard may take to end before it is handed over or given up."""
    open_timeout_s: float = 10.0
    """How long the application's open() may take."""
    close_timeout_s: float = 5.0
    """How long the application's close() may take."""
    handle_need_s: float = 0.05
    """How much time must be left on the lease for a request to be admitted or answered."""
    cancel_grace_s: float = 1.0
    """How long cancelled work may take to end before the process of an unfenced class exits."""
    parked_max: int = 256
    """Requests that wait, per worker, for a shard to open or for news of a larger epoch."""
    park_timeout_s: float = 5.0
    """How long a request waits so."""
    shutdown_timeout_s: float = 30.0
    """How long a graceful stop may take in all."""
    linger_s: float = 5.0
    """How long a stopped worker goes on refusing requests while routers still hold connections to it."""
    body_bytes_max: int = 1_073_741_824
    """Largest request body; at least the router's."""
    backoff_s: float = 1.0
    """First pause before a shard whose open() or run() failed is claimed again; doubles up to 60 s."""
    controller: bool = True
    """Whether this worker is a candidate for the controller's seat."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8080
    """Port to listen on; 0: any free one."""
    key_rules: tuple[str, ...] = ("header:X-Shard-Key",)
    """Where a request's key stands, e.g. "path:/orders/{key}/*", "header:X-Shard-Key", "query:customer". Rules that
    find a key must all find the same one."""
    keyless: str = "refuse"
    """What is done with a request without a key: "refuse" (400) or "any" (any worker; it gets no shard)."""
    hold_timeout_s: float = 15.0
    """How long a request waits for its shard to be led; then 503. Must exceed lease TTL to ride out a lost machine."""
    held_per_shard_max: int = 1_000
    """Requests that wait for one shard; more get 503."""
    held_max: int = 10_000
    """Requests that wait in all; more get 503."""
    held_bytes_max: int = 67_108_864
    """Bytes of bodies kept for requests that may have to be sent again; more get 503."""
    idle_timeout_s: float = 60.0
    """A client connection without a request for so long is closed."""
    head_timeout_s: float = 10.0
    """How long a request's head may take to arrive."""
    body_progress_timeout_s: float = 30.0
    """How long a body may stand still, either way."""
    answer_timeout_s: float = 60.0
    """How long a worker may take to begin its answer."""
    connect_timeout_s: float = 1.0
    """How long a connection to a worker may take."""
    head_bytes_max: int = 32_768
    """Largest request head."""
    headers_max: int = 100
    """Most header fields in a request."""
    body_bytes_max: int = 1_073_741_824
    """Largest request body."""
    connections_max: int = 20_000
    """Most client connections."""
    connections_per_peer_max: int = 20_000
    """Most client connections from one address."""
    upstream_connections_max: int = 256
    """Most connections to one worker; requests beyond wait their turn."""
    upstream_idle_timeout_s: float = 30.0
    """An unused connection to a worker is closed after so long; shorter than the worker's own 75 s."""
    shutdown_timeout_s: float = 30.0
    """How long a graceful stop may take."""
    forwarded: str = "append"
    """X-Forwarded-For, -Proto, -Host and Forwarded: "append" to what came, "replace" it, or "off"."""


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    moves_in_flight_max: int = 16
    """Planned moves under way at once, in all."""
    moves_per_worker_max: int = 4
    """Planned moves under way at once, to or from one worker."""
    settle_s: float = 1.0
    """Membership must be still for so long before shards move for evenness."""
    first_wait_max_s: float = 5.0
    """At a first start, how long to wait for membership to be still."""
    brake_share: float = 0.5
    """If more than this share of the fleet vanishes within brake_window_s, nothing moves for evenness."""
    brake_window_s: float = 30.0
    """How long a vanished worker counts for the brake."""
    interval_s: float = 5.0
    """Longest time between two looks; changes wake it at once."""
    successors: int = 2
    """How many successors a shard has."""


@dataclass(frozen=True, slots=True)
class AdminSettings:
    host: str = "127.0.0.1"
    """Address of the admin server (health, metrics, map)."""
    port: int = 0
    """Its port; 0: any free one; -1: no admin server."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: str = "info"
    """debug, info, warning or error."""
    format: str = "text"
    """text for people, json for machines."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All sections; each role reads its own."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    lease: LeaseSettings = field(default_factory=LeaseSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    log: LogSettings = field(default_factory=LogSettings)
