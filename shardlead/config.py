"""Settings: one frozen dataclass a section, a unit in every name, one docstring a field, the bounds in its type.

Law: defaults stand here and nowhere else; `shardlead.loading` lays files, environment and flags over them. `check`
lists every broken relation between fields at once, with the numbers. Nothing here reads a file or the environment.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from shardlead.core.keyspace import CLUSTER_NAME_RULE, WORKER_NAME_RULE, is_cluster_name, is_worker_name
from shardlead.core.model import SHARDS_MAX
from shardlead.core.routing import KeyRules
from shardlead.errors import Problem

WORKER_IDLE_TIMEOUT_S: Final = 75.0  # after how long a worker closes an unused connection; a router must do it earlier
TICK_PERIOD_S: Final = 2.0  # protocol.md A.7: the cluster's beacon


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must fulfil beyond its type; stands in the field's annotation."""

    allowed: str
    holds: Callable[[Any], bool]


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port of "host:port" or "[v6]:port"; None if it is not one."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or not 0 < int(port) <= 65_535:
        return None
    if host.startswith("[") and host.endswith("]"):
        return (host[1:-1], int(port)) if ":" in host else None
    return (host, int(port)) if _is_host(host) and ":" not in host else None


def _is_host(host: str) -> bool:
    return bool(host) and host.isascii() and host.isprintable() and not set(host) & set(" /@?#[]")


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    has_more = parts.path not in ("", "/") or parts.query or parts.fragment or parts.username or parts.password
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not has_more


def _are_endpoints(urls: Sequence[str]) -> bool:
    schemes = {url.partition(":")[0] for url in urls}
    return bool(urls) and all(map(_is_endpoint, urls)) and len(set(urls)) == len(urls) and len(schemes) == 1


def _is_key_rule(rule: str) -> bool:
    kind, _, rest = rule.partition(":")
    match kind:
        case "path":
            return rest.startswith("/") and rest.count("{key}") == 1
        case "header" | "query":
            return bool(rest) and rest.isascii() and rest.isprintable() and " " not in rest
        case _:
            return False


def _are_key_rules(rules: Sequence[str]) -> bool:
    try:
        KeyRules.parse(rules)
    except ValueError:
        return False
    return bool(rules) and all(map(_is_key_rule, rules))


CLUSTER_NAME: Final = Rule(CLUSTER_NAME_RULE, is_cluster_name)
WORKER_NAME: Final = Rule(f"empty, or {WORKER_NAME_RULE}", lambda name: not name or is_worker_name(name))
HOST: Final = Rule("an IP address or a host name, without port", _is_host)
ADVERTISE: Final = Rule(
    'empty, or "host:port" with a port from 1 to 65535', lambda address: not address or bool(split_address(address))
)
ENDPOINTS: Final = Rule(
    'one or more different "http://host:port", or all "https://host:port", without path, user or query', _are_endpoints
)
OUTPUT: Final = Rule('empty, "-", or a file that can be written', lambda path: "\0" not in path)
FILE: Final = Rule("empty, or a file that can be read", lambda path: "\0" not in path)
KEY_RULES: Final = Rule(
    'one or more of "path:/template/{key}/*" (with one {key}), "header:<name>", "query:<name>"',
    _are_key_rules,
)

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=86_400)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Bytes = Annotated[int, Meta(ge=1, le=2**40)]


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    name: Annotated[str, CLUSTER_NAME] = "default"
    """The cluster's name: all its records stand under /<name>/ in the store."""
    shards: Annotated[int, Meta(ge=1, le=SHARDS_MAX)] = 256
    """How many shards the key space has; fixed when the cluster is created. Ten times the largest fleet is good."""
    hash_tags: bool = False
    """Whether only the part of a key in {braces} is hashed, so that related keys share a shard. Fixed at creation."""
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    """Varies the ring between clusters; fixed at creation."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    endpoints: Annotated[tuple[str, ...], ENDPOINTS] = ("http://127.0.0.1:2379",)
    """etcd's client URLs; all of one cluster. They are used in turn when one fails."""
    try_timeout_s: Seconds = 1.0
    """How long one attempt on one endpoint may take."""
    call_timeout_s: Seconds = 5.0
    """How long a call may take over all attempts."""
    watch_silence_s: Seconds = 10.0
    """A watch that brings nothing (not even the cluster's tick) for so long is taken as broken."""
    username: str = ""
    """etcd user, if its auth is on."""
    password: str = ""
    """That user's password; better given as SHARDLEAD_STORE_PASSWORD."""
    ca_file: Annotated[str, FILE] = ""
    """PEM file of the authorities that sign the endpoints' certificates; empty: the system's."""
    cert_file: Annotated[str, FILE] = ""
    """PEM file of this client's certificate, if the endpoints ask for one."""
    key_file: Annotated[str, FILE] = ""
    """PEM file of that certificate's key."""


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    ttl_s: Annotated[int, Meta(ge=2, le=3_600)] = 10
    """Lease time-out in whole seconds: how long a lost machine keeps its shards."""
    renew_interval_s: Seconds = 2.8
    """Mean time between renewals; each is jittered by 10 %."""
    drift: Annotated[float, Meta(ge=0, le=0.2)] = 0.01
    """How much faster than the server's this machine's clock may be taken to run slow, as a share (rho)."""
    margin_s: Annotated[float, Meta(ge=0, le=60)] = 0.5
    """Kept off the end of every lease (delta); at least 5 % of the TTL is used."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    name: Annotated[str, WORKER_NAME] = ""
    """Unique among the living; empty: <hostname>-<pid>."""
    host: Annotated[str, HOST] = "127.0.0.1"
    """Address to listen on for requests."""
    port: Port = 0
    """Port to listen on for requests; 0: any free one."""
    advertise: Annotated[str, ADVERTISE] = ""
    """host:port that routers connect to; empty: where it listens."""
    zone: str = ""
    """Failure zone; successors are placed in other zones where possible."""
    capacity: Annotated[float, Meta(gt=0, le=1_000)] = 1.0
    """Share of leaderships relative to other workers."""
    drain_timeout_s: Seconds = 10.0
    """How long running requests of a shard may take to end before it is handed over or given up."""
    open_timeout_s: Seconds = 10.0
    """How long the application's open() may take."""
    close_timeout_s: Seconds = 5.0
    """How long the application's close() may take."""
    handle_need_s: SecondsOrNone = 0.05
    """How much time must be left on the lease for a request to be admitted or answered."""
    cancel_grace_s: Seconds = 1.0
    """How long cancelled work may take to end before the process of an unfenced class exits."""
    parked_max: Count = 256
    """Requests that wait, per worker, for a shard to open or for news of a larger epoch."""
    park_timeout_s: Seconds = 5.0
    """How long a request waits so."""
    shutdown_timeout_s: Seconds = 30.0
    """How long a graceful stop may take in all."""
    linger_s: SecondsOrNone = 5.0
    """How long a stopped worker goes on refusing requests while routers still hold connections to it."""
    body_bytes_max: Bytes = 1_073_741_824
    """Largest request body; at least the router's."""
    backoff_s: Seconds = 1.0
    """First pause before a shard whose open() or run() failed is claimed again; doubles up to 60 s."""
    controller: bool = True
    """Whether this worker is a candidate for the controller's seat."""
    audit_dir: str = ""
    """Folder for audit logs, which `shardlead verify` checks: a new file for each process; empty: none is written."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    host: Annotated[str, HOST] = "127.0.0.1"
    """Address to listen on."""
    port: Port = 8080
    """Port to listen on; 0: any free one."""
    key_rules: Annotated[tuple[str, ...], KEY_RULES] = ("header:X-Shard-Key",)
    """Where a request's key stands, e.g. "path:/orders/{key}/*", "header:X-Shard-Key", "query:customer". Rules that
    find a key must all find the same one."""
    keyless: Literal["refuse", "any"] = "refuse"
    """What is done with a request without a key: "refuse" (400) or "any" (any shard's leader; they take turns)."""
    hold_timeout_s: SecondsOrNone = 15.0
    """How long a request waits for its shard to be led; then 503. Must exceed lease TTL to ride out a lost machine."""
    held_per_shard_max: Count = 1_000
    """Requests that wait for one shard; more get 503."""
    held_max: Count = 10_000
    """Requests that wait in all; more get 503."""
    held_bytes_max: Bytes = 67_108_864
    """Bytes of bodies kept for requests that may have to be sent again; more get 503."""
    idle_timeout_s: Seconds = 60.0
    """A client connection without a request for so long is closed."""
    head_timeout_s: Seconds = 10.0
    """How long a request's head may take to arrive."""
    body_progress_timeout_s: Seconds = 30.0
    """How long a body may stand still, either way."""
    body_rate_min: Annotated[int, Meta(ge=0, le=10**9)] = 100
    """Bytes a second at which a body must move on average over body_progress_timeout_s, either way; 0: any."""
    half_closed_timeout_s: SecondsOrNone = 5.0
    """How long a client that has closed its sending half is answered: it may be waiting, or gone; 0: not."""
    tunnel_idle_timeout_s: Seconds = 3_600.0
    """A tunnel (WebSocket) in which nothing moves for so long is closed."""
    answer_timeout_s: Seconds = 60.0
    """How long a worker may take to begin its answer."""
    connect_timeout_s: Seconds = 1.0
    """How long a connection to a worker may take."""
    head_bytes_max: Annotated[int, Meta(ge=1_024, le=1_048_576)] = 32_768
    """Largest request head."""
    headers_max: Count = 100
    """Most header fields in a request."""
    body_bytes_max: Bytes = 1_073_741_824
    """Largest request body."""
    connections_max: Count = 20_000
    """Most client connections."""
    connections_per_peer_max: Count = 20_000
    """Most client connections from one address."""
    upstream_connections_max: Count = 256
    """Most connections to one worker; requests beyond wait their turn."""
    upstream_idle_timeout_s: Seconds = 30.0
    """An unused connection to a worker is closed after so long; shorter than the worker's own 75 s."""
    shutdown_timeout_s: Seconds = 30.0
    """How long a graceful stop may take."""
    forwarded: Literal["append", "replace", "off"] = "append"
    """X-Forwarded-For, -Proto, -Host and Forwarded: "append" to what came, "replace" it, or "off"."""
    access_log: Annotated[str, OUTPUT] = ""
    """Where a JSON line for each request goes: a file, "-" (standard output), or empty: nowhere."""
    tls_cert_file: Annotated[str, FILE] = ""
    """PEM file of the certificate (and its chain) shown to clients; empty: plain HTTP."""
    tls_key_file: Annotated[str, FILE] = ""
    """PEM file of that certificate's key, without a password."""
    processes: Annotated[int, Meta(ge=1, le=256)] = 1
    """Processes that share the port; limits hold for each of them."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    ca_file: Annotated[str, FILE] = ""
    """PEM file of the fleet's own authority. With the three set, workers speak TLS, to whoever has a certificate of
    it; routers and clients show theirs, and accept only workers that have one."""
    cert_file: Annotated[str, FILE] = ""
    """PEM file of this process's certificate (and its chain)."""
    key_file: Annotated[str, FILE] = ""
    """PEM file of that certificate's key, without a password."""
    worker_name: str = ""
    """The name that a worker's certificate must carry; empty: any certificate of the authority is good."""


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    moves_in_flight_max: Count = 16
    """Planned moves under way at once, in all."""
    moves_per_worker_max: Count = 4
    """Planned moves under way at once, to or from one worker."""
    settle_s: SecondsOrNone = 1.0
    """Membership must be still for so long before shards move for evenness."""
    return_wait_s: SecondsOrNone = 10.0
    """A worker that was stopped is expected back for so long, or another in its place: nothing moves for evenness."""
    first_wait_max_s: SecondsOrNone = 5.0
    """At a first start, how long to wait for membership to be still."""
    brake_share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """If more than this share of the fleet vanishes within brake_window_s, nothing moves for evenness."""
    brake_window_s: SecondsOrNone = 30.0
    """How long a vanished worker counts for the brake."""
    interval_s: Seconds = 5.0
    """Longest time between two looks; changes wake it at once."""
    successors: Annotated[int, Meta(ge=0, le=8)] = 2
    """How many successors a shard has."""


@dataclass(frozen=True, slots=True)
class AdminSettings:
    host: Annotated[str, HOST] = "127.0.0.1"
    """Address of the admin server (health, metrics, map)."""
    port: Annotated[int, Meta(ge=-1, le=65_535)] = 0
    """Its port; 0: any free one; -1: no admin server."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: Literal["debug", "info", "warning", "error"] = "info"
    """debug, info, warning or error."""
    format: Literal["text", "json"] = "text"
    """text for people, json for machines."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All sections; each role reads its own."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    lease: LeaseSettings = field(default_factory=LeaseSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    log: LogSettings = field(default_factory=LogSettings)


SECTIONS: Final[Mapping[str, type]] = {
    "cluster": ClusterSettings,
    "store": StoreSettings,
    "lease": LeaseSettings,
    "worker": WorkerSettings,
    "router": RouterSettings,
    "tls": TlsSettings,
    "controller": ControllerSettings,
    "admin": AdminSettings,
    "log": LogSettings,
}


def delta_s(lease: LeaseSettings) -> float:
    """What is kept off the end of every lease (protocol.md A.4)."""
    return max(lease.margin_s, 0.05 * lease.ttl_s)


def check(settings: Settings, sources: Mapping[str, str] | None = None) -> list[Problem]:
    """Every relation between fields that does not hold. A problem is laid to the first of its fields that somebody
    set (`sources`: field to where), for that is what has to be changed."""
    said = sources or {}
    problems = []
    for relation in _relations(settings):
        if not relation.holds:
            name = next((name for name in relation.fields if name in said), relation.fields[0])
            section, _, item = name.partition(".")
            value = getattr(getattr(settings, section), item)
            problems.append(Problem(said.get(name, "default"), name, value, relation.allowed))
    return problems


@dataclass(frozen=True, slots=True)
class _Relation:
    fields: tuple[str, ...]
    holds: bool
    allowed: str


def _relations(settings: Settings) -> list[_Relation]:
    store, lease, worker, router = settings.store, settings.lease, settings.worker, settings.router
    controller, tls = settings.controller, settings.tls
    delta = delta_s(lease)
    slack = lease.ttl_s * (1 - lease.drift) - delta - lease.renew_interval_s
    stop = worker.drain_timeout_s + worker.close_timeout_s + worker.linger_s
    return [
        _Relation(
            ("lease.ttl_s", "lease.renew_interval_s", "lease.margin_s", "store.try_timeout_s", "lease.drift"),
            slack >= 2 * store.try_timeout_s,
            "two attempts to renew must fit before the deadline: ttl_s * (1 - drift) - max(margin_s, 5 % of ttl_s) - "
            f"renew_interval_s >= 2 * store.try_timeout_s, but {lease.ttl_s} * {1 - lease.drift:g} - {delta:g} - "
            f"{lease.renew_interval_s:g} = {slack:g} < {2 * store.try_timeout_s:g}",
        ),
        _Relation(
            ("worker.handle_need_s", "lease.ttl_s"),
            worker.handle_need_s < slack or slack < 2 * store.try_timeout_s,  # then that is what is wrong
            f"worker.handle_need_s ({worker.handle_need_s:g}) must be less than what is left of a lease between two "
            f"renewals, {slack:g} s",
        ),
        _Relation(
            ("store.try_timeout_s", "store.call_timeout_s"),
            store.try_timeout_s <= store.call_timeout_s,
            f"store.try_timeout_s ({store.try_timeout_s:g}) is at most store.call_timeout_s ({store.call_timeout_s:g})",
        ),
        _Relation(
            ("store.watch_silence_s",),
            store.watch_silence_s > 2 * TICK_PERIOD_S,
            f"must be more than two of the cluster's ticks, {2 * TICK_PERIOD_S:g} s, or quiet watches are broken off",
        ),
        _Relation(
            ("store.cert_file", "store.key_file"),
            bool(store.cert_file) == bool(store.key_file),
            "store.cert_file and store.key_file are given both or neither",
        ),
        _Relation(
            ("store.ca_file", "store.cert_file", "store.endpoints"),
            not (store.ca_file or store.cert_file) or store.endpoints[0].startswith("https:"),
            f"certificates need https:// endpoints, store.endpoints says {store.endpoints[0]}",
        ),
        _Relation(
            ("store.password", "store.username"),
            bool(store.username) == bool(store.password),
            "store.username and store.password are given both or neither",
        ),
        _Relation(
            ("worker.shutdown_timeout_s", "worker.drain_timeout_s", "worker.close_timeout_s", "worker.linger_s"),
            stop <= worker.shutdown_timeout_s,
            "a stop takes up to worker.drain_timeout_s + close_timeout_s + linger_s, "
            f"{worker.drain_timeout_s:g} + {worker.close_timeout_s:g} + {worker.linger_s:g} = {stop:g}, "
            f"which must fit into worker.shutdown_timeout_s ({worker.shutdown_timeout_s:g})",
        ),
        _Relation(
            ("router.body_bytes_max", "worker.body_bytes_max"),
            router.body_bytes_max <= worker.body_bytes_max,
            f"router.body_bytes_max ({router.body_bytes_max}) is at most worker.body_bytes_max "
            f"({worker.body_bytes_max}), or workers refuse what routers let pass",
        ),
        _Relation(
            ("router.hold_timeout_s", "lease.ttl_s"),
            router.hold_timeout_s > lease.ttl_s,
            f"router.hold_timeout_s ({router.hold_timeout_s:g}) must exceed lease.ttl_s ({lease.ttl_s}), or requests "
            "fail whenever a machine is lost",
        ),
        _Relation(
            ("router.upstream_idle_timeout_s",),
            router.upstream_idle_timeout_s < WORKER_IDLE_TIMEOUT_S,
            f"must be less than the {WORKER_IDLE_TIMEOUT_S:g} s after which a worker closes an unused connection",
        ),
        _Relation(
            ("router.held_per_shard_max", "router.held_max"),
            router.held_per_shard_max <= router.held_max,
            f"router.held_per_shard_max ({router.held_per_shard_max}) is at most router.held_max ({router.held_max})",
        ),
        _Relation(
            ("router.connections_per_peer_max", "router.connections_max"),
            router.connections_per_peer_max <= router.connections_max,
            f"router.connections_per_peer_max ({router.connections_per_peer_max}) is at most router.connections_max "
            f"({router.connections_max})",
        ),
        _Relation(
            ("router.tls_cert_file", "router.tls_key_file"),
            bool(router.tls_cert_file) == bool(router.tls_key_file),
            "router.tls_cert_file and router.tls_key_file are given both or neither",
        ),
        _Relation(
            ("tls.ca_file", "tls.cert_file", "tls.key_file"),
            bool(tls.ca_file) == bool(tls.cert_file) == bool(tls.key_file),
            "tls.ca_file, tls.cert_file and tls.key_file are given all or none: on the inner hop both sides have one",
        ),
        _Relation(
            ("tls.worker_name", "tls.ca_file"),
            bool(tls.ca_file) or not tls.worker_name,
            "a name can be asked of workers' certificates only if there are any: see tls.ca_file",
        ),
        _Relation(
            ("controller.moves_per_worker_max", "controller.moves_in_flight_max"),
            controller.moves_per_worker_max <= controller.moves_in_flight_max,
            f"controller.moves_per_worker_max ({controller.moves_per_worker_max}) is at most "
            f"controller.moves_in_flight_max ({controller.moves_in_flight_max})",
        ),
    ]
