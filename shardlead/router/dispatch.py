"""The desk: finds each request's leader, holds it, sends it again, as `core.routing` says.

What it never does: parse or write HTTP. It owns the gates (`hold`) and the pools of connections (`upstream`).

Law: the rules are `routing.LAW`; here they are only given their facts and carried out. The one short cut is an
arriving request whose shard has a leader and no gate: it is sent at once, which is what the law says too.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.view import View
from shardlead.config import RouterSettings
from shardlead.core.contract import SAFE_METHODS, Problem
from shardlead.core.routing import (
    NOT_LED,
    Answer,
    AskAgain,
    Cut,
    Facts,
    Happened,
    Hold,
    PassOn,
    Send,
    Step,
    is_harmless_twice,
    next_step,
)
from shardlead.core.shardmap import Delta, Leader
from shardlead.errors import RingError
from shardlead.router.access import AccessLog
from shardlead.router.counts import Counts
from shardlead.router.exchange import TUNNEL, WAITING, Exchange
from shardlead.router.hold import Gate
from shardlead.router.pool import Pool, Pools
from shardlead.router.problems import HttpDate
from shardlead.router.upstream import Upstream
from shardlead.tls import WorkerTls

log = logging.getLogger("shardlead.router")

SWEEP_S: Final = 0.05  # how exactly waiting requests are woken by time; news of leaders wakes them at once
DRAIN_SLACK_S: Final = 1.0
DRAIN_MAX_S: Final = 86_400.0  # as in the settings; a worker's record may say anything

_NOT_READY: Final = Answer(Problem.NOT_READY, 503, "this router has no picture of the cluster yet", 1)
_TOO_MANY: Final = Answer(Problem.OVERLOADED, 503, "too many requests wait for this shard's leader", 1)
_SAFE: Final = frozenset(method.encode() for method in SAFE_METHODS)
_RESENT_WHY: Final = {
    Happened.UNSENT: "unsent",
    Happened.NOT_OPENED: "unsent",
    Happened.STALE: "refused",
    Happened.DRAINING: "refused",
    Happened.UNKNOWN: "refused",
    Happened.SUSPENDED: "refused",
}
_NOT_THE_EPOCHS_FAULT: Final = frozenset({Happened.ARRIVED, Happened.PAUSED, Happened.UNSENT})


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
        self.gates: dict[int, Gate[Exchange]] = {}
        self._access = access
        self._settings = settings
        self._view = view
        self._clock = clock
        self._tunnels: dict[int, dict[Exchange, None]] = {}  # the inner ones are sets that keep their order
        self._keyless = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._unsubscribe: Callable[[], None] = view.subscribe(self._on_delta)

    def close(self) -> None:
        """End all connections and take no more news."""
        self._unsubscribe()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
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
            exchange.fail(_NOT_READY)
            return
        exchange.shard = shard
        if leader is not None and leader.address and shard not in self.gates:
            self._send(exchange, leader)
        else:
            self._go_on(exchange, Happened.ARRIVED)

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
        self._go_on(exchange, what)

    def turned_down(self, exchange: Exchange, what: Happened, epoch: int, leader: bytes) -> None:
        self.counts.refused[what.value] += 1
        if exchange.leader is not None:
            gate = self._gate(exchange.shard)
            gate.floor = max(gate.floor, epoch, exchange.leader.epoch)
            hint = _read_hint(leader)
            if hint is not None and hint.epoch > max(gate.floor - 1, exchange.leader.epoch):
                gate.floor = hint.epoch
                seen = self._view.map.leader(exchange.shard)
                if seen is None or seen.epoch < hint.epoch:
                    gate.hint = hint
        self._go_on(exchange, what)

    def accepted(self, exchange: Exchange) -> None:
        gate = self.gates.get(exchange.shard)
        if gate is not None and gate.probe is exchange:
            self._open(gate)

    def is_current(self, exchange: Exchange) -> bool:
        return self._leader(exchange.shard) is exchange.leader

    def withdraw(self, exchange: Exchange) -> None:
        gate = self.gates.get(exchange.shard)
        if gate is not None:
            if gate.probe is exchange:
                gate.probe = None
            if exchange.is_held:
                gate.remove(exchange)
                self._unhold(exchange)
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
            gate = self.gates.get(exchange.shard)
            if gate is not None and gate.probe is exchange:
                gate.probe = None
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

    def tunnelled(self, exchange: Exchange) -> None:
        """It has become a tunnel, which closes when its shard moves."""
        self.counts.tunnels += 1
        self._tunnels.setdefault(exchange.shard, {})[exchange] = None

    # --- carrying out

    def _go_on(self, exchange: Exchange, what: Happened) -> None:
        shard = exchange.shard
        gate = self.gates.get(shard)
        now = self._clock.now_ns()
        tried = 0 if gate is None else gate.turned_down
        if what is Happened.ARRIVED and gate is not None and not exchange.is_held:
            if len(gate):  # first in, first out
                self._hold(exchange, gate.turned_down, 0.0)
                return
            if gate.probe is None and gate.ask_at_ns is not None and gate.ask_at_ns <= now:
                self._make_probe(gate, exchange, now)  # whoever was to ask again has left
                what = Happened.PAUSED
        if what is Happened.PAUSED:
            tried = 0
        elif what is Happened.UNSENT:
            exchange.why = what
        elif what is not Happened.ARRIVED and exchange.leader is not None:
            exchange.why = what
            tried = max(tried, exchange.leader.epoch)
        if exchange.hold_until_ns == 0:
            exchange.hold_until_ns = now + self._hold_ns(shard)
        floor = 0 if gate is None else gate.floor
        seen = self._view.map.leader(shard)
        if seen is not None and seen.epoch > floor:
            floor = seen.epoch
        facts = Facts(
            leader=self._leader(shard),
            floor=floor,
            tried=tried,
            time_left_s=(exchange.hold_until_ns - now) / NS_PER_S,
            is_harmless_twice=self._is_harmless_twice(exchange),
            is_body_kept=exchange.body.is_kept,
            repeats=exchange.repeats,
        )
        self._carry_out(exchange, what, next_step(what, facts))

    def _carry_out(self, exchange: Exchange, what: Happened, step: Step) -> None:
        if not isinstance(step, PassOn):
            exchange.detach()
        if what not in _RESENT_WHY and what not in _NOT_THE_EPOCHS_FAULT:
            exchange.repeats += 1  # if it is sent again, then though it may have been processed
        match step:
            case Send(leader):
                if exchange.leader is not None:
                    self.counts.resent[_RESENT_WHY.get(exchange.why) or _harmless_why(exchange)] += 1
                self._unhold(exchange)
                self._send(exchange, leader)
                gate = self.gates.get(exchange.shard)
                if gate is not None:
                    self._tidy(gate)
            case Hold(above):
                self._hold_after(exchange, what, above, 0.0)
            case AskAgain(above, pause_s):
                self._hold_after(exchange, what, above, pause_s)
            case Answer():
                self._forget_probe(exchange)
                self._unhold(exchange)
                exchange.fail(step)
            case PassOn():
                pass
            case Cut():
                exchange.cut()

    def _send(self, exchange: Exchange, leader: Leader) -> None:
        pool = self.pools.to(leader.worker, leader.address)
        must_be_alive = exchange.repeats > 0 or exchange.head.method not in _SAFE
        exchange.send(leader, pool, must_be_alive=must_be_alive)

    def _leader(self, shard: int) -> Leader | None:
        """The leader with the largest epoch that anybody has told of."""
        seen = self._view.map.leader(shard)
        if self.gates:
            gate = self.gates.get(shard)
            if gate is not None and gate.hint is not None and (seen is None or seen.epoch < gate.hint.epoch):
                return gate.hint
        return seen

    def _is_harmless_twice(self, exchange: Exchange) -> bool:
        head = exchange.head
        is_idempotent = False
        if head.has_idempotency_key and exchange.leader is not None:
            member = self._view.map.workers.get(exchange.leader.worker)
            # Of a worker that has just died nothing is known any more; its fleet runs one class.
            members = [member] if member is not None else self._view.map.workers.values()
            is_idempotent = any(each.record.idempotent for each in members) and all(
                each.record.idempotent for each in members
            )
        return is_harmless_twice(
            head.method, has_idempotency_key=head.has_idempotency_key, is_class_idempotent=is_idempotent
        )

    def _hold_ns(self, shard: int) -> int:
        """How long a request of this shard may wait: a drain must not outlast it."""
        hold_s = self._settings.hold_timeout_s
        leader = self._view.map.leader(shard)
        if leader is not None:
            member = self._view.map.workers.get(leader.worker)
            if member is not None:
                hold_s = max(hold_s, min(member.record.drain_timeout_s, DRAIN_MAX_S) + DRAIN_SLACK_S)
        return int(hold_s * NS_PER_S)

    # --- holding

    def _gate(self, shard: int) -> Gate[Exchange]:
        gate = self.gates.get(shard)
        if gate is None:
            gate = self.gates[shard] = Gate(shard)
        return gate

    def _forget_probe(self, exchange: Exchange) -> None:
        gate = self.gates.get(exchange.shard)
        if gate is not None and gate.probe is exchange:
            gate.probe = None

    def _hold_after(self, exchange: Exchange, what: Happened, above: int, pause_s: float) -> None:
        gate = self._gate(exchange.shard)
        if gate.probe is exchange:
            gate.probe = None
        if above > gate.turned_down:
            gate.turned_down = above
            gate.ask_at_ns = None
        if what not in _NOT_THE_EPOCHS_FAULT and pause_s:
            gate.pause_ns = int(pause_s * NS_PER_S)
            gate.ask_at_ns = self._clock.now_ns() + gate.pause_ns
        self._hold(exchange, above, pause_s)

    def _hold(self, exchange: Exchange, above: int, pause_s: float) -> None:
        gate = self._gate(exchange.shard)
        if not exchange.is_held:
            if self.counts.held >= self._settings.held_max or len(gate) >= self._settings.held_per_shard_max:
                exchange.fail(_TOO_MANY)
                return
            exchange.is_held = True
            exchange.held_ns = self._clock.now_ns()
            self.counts.held += 1
        if exchange.hold_until_ns == 0:
            exchange.hold_until_ns = exchange.held_ns + self._hold_ns(exchange.shard)
        if gate.ask_at_ns is None and (pause_s or gate.turned_down):
            gate.pause_ns = int((pause_s or 1.0) * NS_PER_S)
            gate.ask_at_ns = self._clock.now_ns() + gate.pause_ns
        gate.turned_down = max(gate.turned_down, above)
        gate.push(exchange)
        if self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _unhold(self, exchange: Exchange) -> None:
        if exchange.is_held:
            exchange.is_held = False
            exchange.client.touch()
            self.counts.held -= 1
            self.counts.hold_durations.add((self._clock.now_ns() - exchange.held_ns) / NS_PER_S)

    def _release(self, gate: Gate[Exchange], what: Happened) -> None:
        """All that wait go on, first come first. Those that must wait on are put back."""
        for exchange in gate.take_all():
            self._go_on(exchange, what)

    def _open(self, gate: Gate[Exchange]) -> None:
        """Under the present epoch requests are admitted after all."""
        gate.probe = None
        gate.turned_down = 0
        gate.ask_at_ns = None
        self._release(gate, Happened.PAUSED)
        self._tidy(gate)

    def _reconsider(self, gate: Gate[Exchange]) -> None:
        """News of this shard's leader."""
        leader = self._leader(gate.shard)
        if leader is not None and leader.address and leader.epoch >= gate.floor and leader.epoch > gate.turned_down:
            probe, gate.probe = gate.probe, None
            gate.ask_at_ns = None
            if probe is not None and probe.take_back():  # it still waits for a connection to the leader of before
                self._hold(probe, gate.turned_down, 0.0)
            self._release(gate, Happened.ARRIVED)
        self._tidy(gate)

    def _tidy(self, gate: Gate[Exchange]) -> None:
        """Take the gate away if the shard is ordinary again."""
        seen = self._view.map.leader(gate.shard)
        if (
            not len(gate)
            and self.gates.get(gate.shard) is gate
            and gate.probe is None
            and seen is not None
            and seen.address
            and seen.epoch >= gate.floor
            and seen.epoch > gate.turned_down
        ):
            self.gates.pop(gate.shard, None)

    def _sweep(self) -> None:
        """Wake what waits by time: end holds, ask again."""
        self._sweep_timer = None
        now = self._clock.now_ns()
        for gate in tuple(self.gates.values()):
            for exchange in gate.waiting():
                if exchange.hold_until_ns <= now:
                    gate.remove(exchange)
                    self._expire(exchange)
            if gate.ask_at_ns is not None and gate.ask_at_ns <= now:
                self._ask_again(gate, now)
            self._tidy(gate)
        if self.counts.held or any(gate.probe is not None for gate in self.gates.values()):
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _expire(self, exchange: Exchange) -> None:
        self._unhold(exchange)
        step = next_step(exchange.why, Facts(leader=None, time_left_s=0.0, is_harmless_twice=True))
        exchange.fail(step if isinstance(step, Answer) else NOT_LED)

    def _ask_again(self, gate: Gate[Exchange], now: int) -> None:
        leader = self._leader(gate.shard)
        if leader is None or not leader.address or leader.epoch < gate.floor:
            gate.ask_at_ns = now + gate.pause_ns
            return
        if gate.probe is not None and gate.probe.state == WAITING:
            gate.ask_at_ns = now + gate.pause_ns  # the connection is still being opened
            return
        if gate.probe is not None:
            self._open(gate)  # one was sent a pause ago and was not refused, which a worker does at once
            return
        first = gate.pop()
        if first is None:
            gate.ask_at_ns = None
            gate.turned_down = 0  # nobody waits: the next to arrive may ask
            return
        self._make_probe(gate, first, now)
        self._go_on(first, Happened.PAUSED)

    def _make_probe(self, gate: Gate[Exchange], exchange: Exchange, now: int) -> None:
        """This one asks for all."""
        gate.probe = exchange
        gate.ask_at_ns = now + gate.pause_ns

    # --- news

    def _on_delta(self, delta: Delta) -> None:
        touched: dict[str, None] = {}  # a set that keeps its order
        for change in delta.leaders:
            if change.after is not None:
                self.pools.news_of(change.after.worker)  # before anything is sent: the first try after news is at once
        for member in delta.workers_changed:
            self.pools.news_of(member.name)
        for change in delta.leaders:
            gate = self.gates.get(change.shard)
            if gate is not None:
                self._reconsider(gate)
            if change.before is not None:
                touched[change.before.worker] = None
            if change.after is not None:
                touched[change.after.worker] = None
            for exchange in tuple(self._tunnels.get(change.shard, ())):
                if (
                    exchange.state == TUNNEL
                    and exchange.leader is not None
                    and (change.after is None or change.after.epoch > exchange.leader.epoch)
                ):
                    exchange.close_tunnel()
        if delta.is_reset:
            for gate in tuple(self.gates.values()):
                self._reconsider(gate)
        for name, sid in delta.workers_gone:
            self.pools.session_ended(name, sid)
        touched.update((change.name, None) for change in delta.workers_changed)
        for name in touched:
            for pool in self.pools.of(name):
                for taker in tuple(pool.waiting):  # no use in waiting for a connection to a leader of the past
                    if isinstance(taker, Exchange) and not self.is_current(taker) and taker.take_back():
                        self._go_on(taker, Happened.UNSENT)
            self.pools.heed(self._view.map, name)

    def sweep_pools(self, now_s: float) -> None:
        """Called about once a second, with the router's time."""
        self.pools.sweep(self._view.map, now_s)


def _harmless_why(exchange: Exchange) -> str:
    return "safe" if exchange.head.method in _SAFE else "idempotent"


def _read_hint(text: bytes) -> Leader | None:
    """The leader that a worker names: `<worker> <address> <epoch>`."""
    parts = text.decode("latin-1").split(" ")
    if len(parts) != 3 or not parts[1] or not (parts[2].isascii() and parts[2].isdigit()) or len(parts[2]) > 16:
        return None
    return Leader(parts[0], "", int(parts[2]), parts[1], 0)
