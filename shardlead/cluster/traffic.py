"""Requests on their way to a leader: finds each one's leader, holds it, sends it again, as `core.routing` says.

Router and smart client each have one; so they decide alike. What it never does: parse or write HTTP, or know a
connection. It owns the gates (`hold`).

Law: the rules are `routing.LAW`; here they are only given their facts and carried out. The one short cut, which the
callers take, is an arriving request whose shard has a leader and no gate: it is sent at once, which is what the law
says too.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.hold import Gate
from shardlead.cluster.view import View
from shardlead.config import RouterSettings
from shardlead.core.contract import Problem
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

SWEEP_S: Final = 0.05  # how exactly waiting requests are woken by time; news of leaders wakes them at once
DRAIN_SLACK_S: Final = 1.0
DRAIN_MAX_S: Final = 86_400.0  # as in the settings; a worker's record may say anything

NOT_READY: Final = Answer(Problem.NOT_READY, 503, "there is no picture of the cluster yet", 1)
_TOO_MANY: Final = Answer(Problem.OVERLOADED, 503, "too many requests wait for this shard's leader", 1)
_RESENT_WHY: Final = {
    Happened.UNSENT: "unsent",
    Happened.NOT_OPENED: "unsent",
    Happened.STALE: "refused",
    Happened.DRAINING: "refused",
    Happened.UNKNOWN: "refused",
    Happened.SUSPENDED: "refused",
}
_NOT_THE_EPOCHS_FAULT: Final = frozenset({Happened.ARRIVED, Happened.PAUSED, Happened.UNSENT})


class Request(Protocol):
    """A request, as far as its way is concerned. `Traffic` alone writes `why`, `repeats` and what begins with hold."""

    shard: int
    leader: Leader | None  # under whom it was sent last
    why: Happened
    repeats: int
    is_held: bool
    held_ns: int  # when the present hold began
    hold_until_ns: int  # 0: was never held

    @property
    def number(self) -> int:
        """Its number of arrival."""
        ...

    @property
    def method(self) -> bytes | str: ...

    @property
    def has_idempotency_key(self) -> bool: ...

    @property
    def is_body_kept(self) -> bool:
        """Whether all that was sent of its body can be sent again."""
        ...

    @property
    def is_connecting(self) -> bool:
        """Whether it waits for a connection."""
        ...

    def touch(self) -> None:
        """There was progress."""

    def detach(self) -> None:
        """What its worker still has to say does not matter any more."""

    def take_back(self) -> bool:
        """Whether it was still waiting for a connection; then it waits for none any more."""
        ...

    def fail(self, answer: Answer) -> None:
        """It ends with this problem."""

    def cut(self) -> None:
        """Its answer has begun and cannot be made whole."""


class Durations(Protocol):
    def add(self, seconds: float) -> None: ...


class Tally(Protocol):
    """What is counted."""

    held: int  # now
    resent: Counter[str]
    refused: Counter[str]

    @property
    def hold_durations(self) -> Durations: ...


R = TypeVar("R", bound=Request)


class Traffic(Generic[R]):
    """`send(request, leader)` is called for each sending. Call `heed` with every change of the view."""

    def __init__(
        self,
        settings: RouterSettings,
        view: View,
        send: Callable[[R, Leader], None],
        *,
        tally: Tally,
        clock: Clock,
    ) -> None:
        self.gates: dict[int, Gate[R]] = {}
        self._ended: dict[int, int] = {}  # the last leader's epoch, of shards that nobody leads any more
        self._settings = settings
        self._view = view
        self._send = send
        self._tally = tally
        self._clock = clock
        self._sweep_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Traffic: {self._tally.held} held at {len(self.gates)} gates>"

    def close(self) -> None:
        """Wake nobody any more."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()

    # --- what happens

    def happened(self, request: R, what: Happened) -> None:
        """That has happened to it; carry on. Within this call it is sent, held, failed or cut, or what its worker
        has said stands."""
        shard = request.shard
        gate = self.gates.get(shard)
        now = self._clock.now_ns()
        tried = 0 if gate is None else gate.turned_down
        if what is Happened.ARRIVED and gate is not None and not request.is_held:
            if len(gate):  # first in, first out
                self._hold(request, gate.turned_down, 0.0)
                return
            if gate.probe is None and gate.ask_at_ns is not None and gate.ask_at_ns <= now:
                self._make_probe(gate, request, now)  # whoever was to ask again has left
                what = Happened.PAUSED
        if what is Happened.PAUSED:
            tried = 0
        elif what is Happened.UNSENT:
            request.why = what
        elif what is not Happened.ARRIVED and request.leader is not None:
            request.why = what
            tried = max(tried, request.leader.epoch)
        if request.hold_until_ns == 0:
            request.hold_until_ns = now + self._hold_ns(shard)
        floor = 0 if gate is None else gate.floor
        seen = self._view.map.leader(shard)
        if seen is not None and seen.epoch > floor:
            floor = seen.epoch
        facts = Facts(
            leader=self.leader(shard),
            floor=floor,
            tried=tried,
            time_left_s=(request.hold_until_ns - now) / NS_PER_S,
            is_harmless_twice=self._is_harmless_twice(request),
            is_body_kept=request.is_body_kept,
            repeats=request.repeats,
        )
        self._carry_out(request, what, next_step(what, facts))

    def turned_down(self, request: R, what: Happened, epoch: int, hint: str) -> None:
        """Refused, or handled with an outcome unknown; the worker knows this epoch and, if any, this leader."""
        self._tally.refused[what.value] += 1
        if request.leader is not None:
            gate = self._gate(request.shard)
            gate.floor = max(gate.floor, epoch, request.leader.epoch)
            leader = read_hint(hint)
            if leader is not None and leader.epoch > max(gate.floor - 1, request.leader.epoch):
                gate.floor = leader.epoch
                seen = self._view.map.leader(request.shard)
                if seen is None or seen.epoch < leader.epoch:
                    gate.hint = leader
        self.happened(request, what)

    def accepted(self, request: R) -> None:
        """Its worker has admitted it."""
        gate = self.gates.get(request.shard)
        if gate is not None and gate.probe is request:
            self._open(gate)

    def withdraw(self, request: R) -> None:
        """Nobody waits for it any more."""
        gate = self.gates.get(request.shard)
        if gate is not None:
            if gate.probe is request:
                gate.probe = None
            if request.is_held:
                gate.remove(request)
                self._unhold(request)

    def give_up(self, request: R) -> None:
        """It is held, and may not wait any longer."""
        self._gate(request.shard).remove(request)
        self._expire(request)

    def ended(self, request: R) -> None:
        """It is over, whatever became of it."""
        if self.gates:
            self._forget_probe(request)

    def leader(self, shard: int) -> Leader | None:
        """The leader with the largest epoch that anybody has told of."""
        seen = self._view.map.leader(shard)
        if self.gates:
            gate = self.gates.get(shard)
            if gate is not None and gate.hint is not None and (seen is None or seen.epoch < gate.hint.epoch):
                return gate.hint
        return seen

    def is_current(self, request: R) -> bool:
        """Whether the leader that it waits for a connection to is still the one to send to, and nobody has told of a
        larger epoch."""
        leader = self.leader(request.shard)
        if leader is not request.leader:
            return False
        gate = self.gates.get(request.shard) if self.gates else None
        return gate is None or leader is None or leader.epoch >= gate.floor

    def heed(self, delta: Delta) -> None:
        """News of leaders."""
        for change in delta.leaders:
            if change.after is not None:
                self._ended.pop(change.shard, None)
            elif change.before is not None:
                self._ended[change.shard] = change.before.epoch
            gate = self.gates.get(change.shard)
            if gate is not None:
                self._raise_floor(gate)
                self._reconsider(gate)
        if delta.is_reset:
            for gate in tuple(self.gates.values()):
                self._reconsider(gate)

    # --- carrying out

    def _carry_out(self, request: R, what: Happened, step: Step) -> None:
        if not isinstance(step, PassOn):
            request.detach()
        if what not in _RESENT_WHY and what not in _NOT_THE_EPOCHS_FAULT:
            request.repeats += 1  # if it is sent again, then though it may have been processed
        match step:
            case Send(leader):
                if request.leader is not None:
                    self._tally.resent[_RESENT_WHY.get(request.why) or _harmless_why(request)] += 1
                self._unhold(request)
                self._send(request, leader)
                gate = self.gates.get(request.shard)
                if gate is not None:
                    self._tidy(gate)
            case Hold(above):
                self._hold_after(request, what, above, 0.0)
            case AskAgain(above, pause_s):
                self._hold_after(request, what, above, pause_s)
            case Answer():
                self._forget_probe(request)
                self._unhold(request)
                request.fail(step)
            case PassOn():
                pass
            case Cut():
                request.cut()

    def _is_harmless_twice(self, request: R) -> bool:
        is_idempotent = False
        if request.has_idempotency_key and request.leader is not None:
            member = self._view.map.workers.get(request.leader.worker)
            # Of a worker that has just died nothing is known any more; its fleet runs one class.
            members = [member] if member is not None else self._view.map.workers.values()
            is_idempotent = any(each.record.idempotent for each in members) and all(
                each.record.idempotent for each in members
            )
        return is_harmless_twice(
            request.method, has_idempotency_key=request.has_idempotency_key, is_class_idempotent=is_idempotent
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

    def _gate(self, shard: int) -> Gate[R]:
        gate = self.gates.get(shard)
        if gate is None:
            gate = self.gates[shard] = Gate(shard)
            self._raise_floor(gate)
        return gate

    def _raise_floor(self, gate: Gate[R]) -> None:
        """Nobody's word of a leader counts that is older than one who has been seen, and has gone."""
        gate.floor = max(gate.floor, self._ended.get(gate.shard, 0))
        if gate.hint is not None and gate.hint.epoch < gate.floor:
            gate.hint = None

    def _forget_probe(self, request: R) -> None:
        gate = self.gates.get(request.shard)
        if gate is not None and gate.probe is request:
            gate.probe = None

    def _hold_after(self, request: R, what: Happened, above: int, pause_s: float) -> None:
        gate = self._gate(request.shard)
        if gate.probe is request:
            gate.probe = None
        if above > gate.turned_down:
            gate.turned_down = above
            gate.ask_at_ns = None
        if what not in _NOT_THE_EPOCHS_FAULT and pause_s:
            gate.pause_ns = int(pause_s * NS_PER_S)
            gate.ask_at_ns = self._clock.now_ns() + gate.pause_ns
        self._hold(request, above, pause_s)

    def _hold(self, request: R, above: int, pause_s: float) -> None:
        gate = self._gate(request.shard)
        if not request.is_held:
            if self._tally.held >= self._settings.held_max or len(gate) >= self._settings.held_per_shard_max:
                request.fail(_TOO_MANY)
                return
            request.is_held = True
            request.held_ns = self._clock.now_ns()
            self._tally.held += 1
        if request.hold_until_ns == 0:
            request.hold_until_ns = request.held_ns + self._hold_ns(request.shard)
        if gate.ask_at_ns is None and (pause_s or gate.turned_down):
            gate.pause_ns = int((pause_s or 1.0) * NS_PER_S)
            gate.ask_at_ns = self._clock.now_ns() + gate.pause_ns
        gate.turned_down = max(gate.turned_down, above)
        gate.push(request)
        if self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _unhold(self, request: R) -> None:
        if request.is_held:
            request.is_held = False
            request.touch()
            self._tally.held -= 1
            self._tally.hold_durations.add((self._clock.now_ns() - request.held_ns) / NS_PER_S)

    def _release(self, gate: Gate[R], what: Happened) -> None:
        """All that wait go on, first come first. Those that must wait on are put back."""
        for request in gate.take_all():
            self.happened(request, what)

    def _open(self, gate: Gate[R]) -> None:
        """Under the present epoch requests are admitted after all."""
        gate.probe = None
        gate.turned_down = 0
        gate.ask_at_ns = None
        self._release(gate, Happened.PAUSED)
        self._tidy(gate)

    def _reconsider(self, gate: Gate[R]) -> None:
        """News of this shard's leader."""
        leader = self.leader(gate.shard)
        if leader is not None and leader.address and leader.epoch >= gate.floor and leader.epoch > gate.turned_down:
            probe, gate.probe = gate.probe, None
            gate.ask_at_ns = None
            if probe is not None and probe.take_back():  # it still waits for a connection to the leader of before
                self._hold(probe, gate.turned_down, 0.0)
            self._release(gate, Happened.ARRIVED)
        self._tidy(gate)

    def _tidy(self, gate: Gate[R]) -> None:
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
            for request in gate.waiting():
                if request.hold_until_ns <= now:
                    gate.remove(request)
                    self._expire(request)
            if gate.ask_at_ns is not None and gate.ask_at_ns <= now:
                self._ask_again(gate, now)
            self._tidy(gate)
        if self._tally.held or any(gate.probe is not None for gate in self.gates.values()):
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _expire(self, request: R) -> None:
        self._unhold(request)
        step = next_step(request.why, Facts(leader=None, time_left_s=0.0, is_harmless_twice=True))
        request.fail(step if isinstance(step, Answer) else NOT_LED)

    def _ask_again(self, gate: Gate[R], now: int) -> None:
        leader = self.leader(gate.shard)
        if leader is None or not leader.address or leader.epoch < gate.floor:
            gate.ask_at_ns = now + gate.pause_ns
            return
        if gate.probe is not None and gate.probe.is_connecting:
            gate.ask_at_ns = now + gate.pause_ns  # the connection is still being opened
            return
        if gate.probe is not None:
            self._open(gate)  # one was sent a pause ago and was not refused, which a worker does at once
            return
        request = gate.next_probe()
        if request is None:
            gate.ask_at_ns = None
            gate.turned_down = 0  # nobody waits: the next to arrive may ask
            return
        self._make_probe(gate, request, now)
        self.happened(request, Happened.PAUSED)

    def _make_probe(self, gate: Gate[R], request: R, now: int) -> None:
        """This one asks for all."""
        gate.probe = request
        gate.ask_at_ns = now + gate.pause_ns


def _harmless_why(request: Request) -> str:
    is_safe = is_harmless_twice(request.method, has_idempotency_key=False, is_class_idempotent=False)
    return "safe" if is_safe else "idempotent"


def read_hint(text: str) -> Leader | None:
    """The leader that a worker names: `<worker> <address> <epoch>`."""
    parts = text.split(" ")
    if len(parts) != 3 or not parts[1] or not (parts[2].isascii() and parts[2].isdigit()) or len(parts[2]) > 16:
        return None
    return Leader(parts[0], "", int(parts[2]), parts[1], 0)
