"""The desk: takes each request to its leader by way of `cluster.traffic`, and owns the pools of connections.

What it never does: parse or write HTTP, or decide what a request does next.

Law: an arriving request whose shard has a leader and no gate is sent at once; all others are `Traffic`'s.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.traffic import NOT_READY, Traffic
from shardlead.cluster.view import View
from shardlead.config import RouterSettings
from shardlead.core.contract import SAFE_METHODS
from shardlead.core.routing import Happened
from shardlead.core.shardmap import Delta, Leader
from shardlead.errors import RingError
from shardlead.router.access import AccessLog
from shardlead.router.counts import Counts
from shardlead.router.exchange import TUNNEL, Exchange
from shardlead.router.pool import Pool, Pools
from shardlead.router.problems import HttpDate
from shardlead.router.upstream import Upstream
from shardlead.tls import WorkerTls

log = logging.getLogger("shardlead.router")

_SAFE: Final = frozenset(method.encode() for method in SAFE_METHODS)


class Dispatch:
    """Made by `server.Router`; `tasks` is the parent of all connecting."""

    def __init__(
        self,
        settings: RouterSettings,
        view: View,
        *,
        counts: Counts,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        access: AccessLog | None = None,
        tls: WorkerTls | None = None,
    ) -> None:
        self.counts = counts
        self.id_prefix = secrets.token_hex(8).encode() + b"-"
        self.date = HttpDate(clock)
        self.pools = Pools(settings, counts=counts, tasks=tasks, tls=tls)
        self._access = access
        self._traffic: Traffic[Exchange] = Traffic(settings, view, self._send, tally=counts, clock=clock)
        self.gates = self._traffic.gates
        self._settings = settings
        self._view = view
        self._clock = clock
        self._tunnels: dict[int, dict[Exchange, None]] = {}  # the inner ones are sets that keep their order
        self._keyless = 0
        self._unsubscribe: Callable[[], None] = view.subscribe(self._on_delta)

    def close(self) -> None:
        """End all connections and take no more news."""
        self._unsubscribe()
        self._traffic.close()
        self.pools.close()

    # --- `exchange.Desk`

    def submit(self, exchange: Exchange) -> None:
        seen = self._view.map
        try:
            if exchange.key is None:
                self._keyless += 1  # the shards take turns
                shard = seen.shard_of(b"%d" % self._keyless)
                leader = seen.leader(shard)
            else:
                _, shard, leader = seen.route(exchange.key)
        except RingError:
            exchange.fail(NOT_READY)
            return
        exchange.shard = shard
        if leader is not None and leader.address and shard not in self.gates:
            self._send(exchange, leader)
        else:
            self._traffic.happened(exchange, Happened.ARRIVED)

    def take_at_once(self, key: bytes, *, is_safe: bool, size: int) -> tuple[Upstream, Pool, Leader, int] | None:
        """For an ordinary request with a body of so many bytes, which count as kept from now on: an idle connection to
        the leader of the key's shard, and that leader and shard. None: something about it is not ordinary."""
        try:
            _, shard, leader = self._view.map.route(key)
        except RingError:
            return None
        if leader is None or not leader.address or shard in self.gates:
            return None
        pool = self.pools.find((leader.worker, leader.address))
        if pool is None or (size and not self.keep(size)):
            return None
        connection = pool.take_idle(must_be_alive=not is_safe)
        if connection is None:
            self.counts.kept_bytes -= size
            return None
        return connection, pool, leader, shard

    def answered_at_once(self, since_ns: int, size: int) -> None:
        """An ordinary request of `take_at_once` has been answered."""
        counts = self.counts
        counts.answered += 1
        counts.kept_bytes -= size
        counts.request_durations.add((self._clock.now_ns() - since_ns) / NS_PER_S)

    def happened(self, exchange: Exchange, what: Happened) -> None:
        self._traffic.happened(exchange, what)

    def turned_down(self, exchange: Exchange, what: Happened, epoch: int, leader: bytes) -> None:
        self._traffic.turned_down(exchange, what, epoch, leader.decode("latin-1"))

    def accepted(self, exchange: Exchange) -> None:
        if self.gates:
            self._traffic.accepted(exchange)

    def is_current(self, exchange: Exchange) -> bool:
        return self._traffic.is_current(exchange)

    def withdraw(self, exchange: Exchange) -> None:
        self._traffic.withdraw(exchange)
        if exchange.pool is not None:
            exchange.pool.withdraw(exchange)

    def keep(self, size: int) -> bool:
        if size > 0 and self.counts.kept_bytes + size > self._settings.held_bytes_max:
            return False
        self.counts.kept_bytes += size
        return True

    def ended(self, exchange: Exchange, outcome: str) -> None:
        counts = self.counts
        if outcome == "answered":
            counts.answered += 1
        else:
            counts.others[outcome] += 1
        if self.gates:
            self._traffic.ended(exchange)
        if self._tunnels:
            tunnels = self._tunnels.get(exchange.shard)
            if tunnels is not None and exchange in tunnels:
                counts.tunnels -= 1
                del tunnels[exchange]
                if not tunnels:
                    del self._tunnels[exchange.shard]
        now = self._clock.now_ns()
        counts.request_durations.add((now - exchange.since_ns) / NS_PER_S)
        if self._access is not None:
            self._access.add(exchange, outcome, now)

    def tunnelled(self, exchange: Exchange) -> bool:
        """It has become a tunnel, which closes when its shard moves; False: it has moved meanwhile."""
        self.counts.tunnels += 1
        self._tunnels.setdefault(exchange.shard, {})[exchange] = None
        return not _has_moved(exchange, self._traffic.leader(exchange.shard))

    # --- carrying out

    def _send(self, exchange: Exchange, leader: Leader) -> None:
        pool = self.pools.to(leader.worker, leader.address)
        must_be_alive = exchange.repeats > 0 or exchange.head.method not in _SAFE
        exchange.send(leader, pool, must_be_alive=must_be_alive)

    # --- news

    def _on_delta(self, delta: Delta) -> None:
        touched: dict[str, None] = {}  # a set that keeps its order
        for change in delta.leaders:
            if change.after is not None:
                self.pools.news_of(change.after.worker)  # before anything is sent: the first try after news is at once
        for member in delta.workers_changed:
            self.pools.news_of(member.name)
        self._traffic.heed(delta)
        for change in delta.leaders:
            if change.before is not None:
                touched[change.before.worker] = None
            if change.after is not None:
                touched[change.after.worker] = None
            for exchange in tuple(self._tunnels.get(change.shard, ())):
                if exchange.state == TUNNEL and _has_moved(exchange, change.after):
                    exchange.close_tunnel()
        for name, sid in delta.workers_gone:
            self.pools.session_ended(name, sid)
        touched.update((change.name, None) for change in delta.workers_changed)
        for name in touched:
            for pool in self.pools.of(name):
                for taker in tuple(pool.waiting):  # no use in waiting for a connection to a leader of the past
                    if isinstance(taker, Exchange) and not self.is_current(taker) and taker.take_back():
                        self._traffic.happened(taker, Happened.UNSENT)
            self.pools.heed(self._view.map, name)

    def sweep_pools(self, now_s: float) -> None:
        """Called about once a second, with the router's time."""
        self.pools.sweep(self._view.map, now_s)


def _has_moved(exchange: Exchange, leader: Leader | None) -> bool:
    return exchange.leader is not None and (leader is None or leader.epoch > exchange.leader.epoch)
