"""The shards of one worker: their states, who is admitted to them, and the carrying out of what `core.ownership`
commands.

Law: core/ownership.py decides, this module acts: every command becomes a task or a synchronous act, and its end
becomes the next event. A task that finds its tenure replaced says nothing. The host outlives sessions; what speaks
to the store for it (`Envoy`) is there for one session only.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Final, assert_never

from shardlead.clock import NS_PER_S, Clock
from shardlead.config import WorkerSettings
from shardlead.core import ownership
from shardlead.core.contract import Refused
from shardlead.core.ownership import HandOver, Remint, Resign
from shardlead.metrics import WorkerMetrics
from shardlead.worker.admission import Admission, Admitted, Parked, Turned
from shardlead.worker.audit import AuditLog
from shardlead.worker.entry import Entry
from shardlead.worker.envoy import AskAgain, Envoy, NotOurs, NotPassed, Passage, PassedOn, StillOurs
from shardlead.worker.leadership import Leadership
from shardlead.worker.objects import Objects
from shardlead.worker.tasks import Tasks
from shardlead.worker.tenure import Hosted
from shardlead.worker.tracebacks import Tracebacks

log = logging.getLogger("shardlead.host")

BACKOFF_MAX_S: Final = 60.0
GOOD_TENURE_S: Final = 60.0  # a shard served for so long has forgotten its failures
SEND_PAUSE_S: Final = 0.05  # first pause before an undecided transaction is sent again; doubles
SEND_PAUSE_MAX_S: Final = 1.0
SENDS_MAX: Final = 16  # shards passed on at once: a fleet that stops as a whole must not drown its store

_STEPS: Final[Mapping[type[ownership.State], str]] = {
    ownership.Opening: "open",
    ownership.Draining: "drain",
    ownership.Closing: "close",
}
"""The states in which the application is waited for, as the metrics call them."""
_COUNTED: Final = (
    ownership.Claiming,
    ownership.Waiting,
    ownership.Opening,
    ownership.Serving,
    ownership.Draining,
    ownership.Stopping,
    ownership.Closing,
    ownership.Passing,
    ownership.Paused,
)


class Host:
    """All shards of one worker. Use inside `async with`, which ends every task on leaving."""

    def __init__(
        self,
        settings: WorkerSettings,
        worker: str,
        make: Callable[[Leadership], Hosted],
        shard_of: Callable[[bytes], int],
        *,
        fenced: bool,
        clock: Clock,
        rng: random.Random,
        metrics: WorkerMetrics,
        executor: Executor | None = None,
        exit_process: Callable[[int], object] = os._exit,
        audit: AuditLog | None = None,
    ) -> None:
        self.shard_of = shard_of
        self.fenced = fenced
        self.is_stopping = False
        self.audit = audit
        self.envoy: Envoy | None = None
        self.on_settled: Callable[[int], None] = lambda _shard: None
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._entries: dict[int, Entry] = {}
        self._held_count = 0  # kept by differences: counting all at each change would cost the square of their number
        self._busy_count = 0  # shards that are not Idle
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks = Tasks()
        self._objects = Objects(
            settings,
            worker,
            make,
            self.feed,
            self._tasks,
            fenced=fenced,
            metrics=metrics,
            tracebacks=Tracebacks(clock),
            executor=executor,
            exit_process=exit_process,
            audit=audit,
        )
        self._sends = asyncio.Semaphore(SENDS_MAX)
        metrics.leaderships.set_function(lambda: len(self.led()))
        for kind in _COUNTED:
            metrics.shards.labels(kind.__name__.lower()).set_function(partial(self._count, kind))

    async def __aenter__(self) -> "Host":
        self._tasks.keep(self._objects.watch_health(self._entries), "health")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.lose_all("the worker ends")  # nothing is led after a graceful stop; else close() is still called
        await self.wait_idle(self._settings.cancel_grace_s + self._settings.close_timeout_s)
        await self._tasks.end(self._settings.cancel_grace_s)

    # --- for the request path ---

    @property
    def is_suspended(self) -> bool:
        """Whether no session of this worker is certain of its lease right now."""
        return self.envoy is None or not self.envoy.guard.is_valid(0.0)

    def admission(self, shard: int, epoch: int) -> Admission:
        """What to do with a request for `shard` that was sent under `epoch`. Decides on what is known this instant."""
        entry = self._entries.get(shard)
        state = entry.state if entry is not None else ownership.Idle()
        leader = entry.leader if entry is not None else ""
        match state:
            case ownership.Serving(own) | ownership.Opening(own) | ownership.Waiting(own) | ownership.Paused(own):
                if epoch < own:
                    return Turned(Refused.STALE, own)
                if epoch > own:
                    if self.envoy is not None:
                        self.envoy.doubt(shard, own)
                    return Parked()
                if self.is_suspended or isinstance(state, ownership.Paused):
                    return Turned(Refused.SUSPENDED, own)
                if isinstance(state, ownership.Serving):
                    assert entry is not None, "a state has its entry"
                    assert entry.tenure is not None, "serving has a tenure"
                    if not entry.tenure.lead.is_valid(self._settings.handle_need_s):
                        return Turned(Refused.SUSPENDED, own)
                    return Admitted(entry.tenure)
                return Parked()
            case ownership.Draining(own) | ownership.Stopping(own) | ownership.Closing(own) | ownership.Passing(own):
                return Parked() if epoch > own else Turned(Refused.DRAINING, own)
            case ownership.Idle(dead_epoch) | ownership.Claiming(dead_epoch):
                known_epoch = max(dead_epoch, entry.elsewhere_epoch if entry is not None else 0)
                if epoch > known_epoch and not self.is_stopping:
                    if isinstance(state, ownership.Idle) and self.envoy is not None:
                        self.envoy.look_up(shard)
                    return Parked()  # it may be ours before we have heard of it
                return Turned(Refused.STALE if dead_epoch else Refused.UNKNOWN, dead_epoch, leader)
            case _:
                assert_never(state)

    async def changed(self, shard: int) -> None:
        """Return at that shard's next change of state. The caller bounds it."""
        await self._entry(shard).changed.wait()  # no time-out: see the docstring

    def leader_hint(self, shard: int) -> str:
        """Whom the shard was handed to, as in the header; "" if unknown."""
        entry = self._entries.get(shard)
        return entry.leader if entry is not None else ""

    # --- for the steward ---

    def note_elsewhere(self, shard: int, epoch: int, leader: str) -> None:
        """The store says that no epoch of this shard up to `epoch` is ours now; `leader` as in the header."""
        entry = self._entry(shard)
        entry.elsewhere_epoch = max(entry.elsewhere_epoch, epoch)
        entry.leader = leader
        self._tell_changed(entry)

    def state(self, shard: int) -> ownership.State:
        """The shard's state; Idle for one that was never heard of."""
        entry = self._entries.get(shard)
        return entry.state if entry is not None else ownership.Idle()

    def states(self) -> Iterator[tuple[int, ownership.State]]:
        """Every shard that has ever been anything here."""
        return ((shard, entry.state) for shard, entry in tuple(self._entries.items()))

    def led(self) -> dict[int, int]:
        """shard -> epoch of what this worker holds, by its own account."""
        return {shard: epoch for shard, state in self.states() if (epoch := ownership.epoch_led(state))}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is led, nothing runs and nothing is under way."""
        return not self._busy_count

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until it is, at most so long; whether it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self.is_idle

    @property
    def held_count(self) -> int:
        """How many shards this worker leads or is claiming."""
        return self._held_count

    def running_count(self) -> int:
        """Requests being handled now."""
        return sum(entry.tenure.running_count for entry in self._entries.values() if entry.tenure is not None)

    def backoff_until_ns(self, shard: int) -> int:
        """Until when this worker does not claim or want that shard; 0 or past: it may."""
        entry = self._entries.get(shard)
        return entry.backoff_until_ns if entry is not None else 0

    def suspend(self) -> None:
        """The session's deadline passed."""
        for shard, entry in tuple(self._entries.items()):
            is_busy = entry.tenure is not None and entry.tenure.is_busy
            self.feed(shard, ownership.Suspended(is_busy))

    def resume(self) -> None:
        """The session is active again, and T3 found our epochs on what is still ours."""
        for shard, entry in tuple(self._entries.items()):
            if isinstance(entry.state, ownership.Paused):
                self.feed(shard, ownership.Confirmed())

    def lose_all(self, reason: str) -> None:
        """The session is lost, and with it every leadership."""
        for shard in tuple(self._entries):
            self.feed(shard, ownership.Gone(reason))

    def fenced_off(self, shard: int, epoch: int, reason: str) -> None:
        """Storage has refused a write under `epoch`, or has not said whether it was done. Whatever else runs under it
        is over at once: what a late write may yet undo must not be acknowledged. The shard goes on under a new epoch,
        or to where it was going."""
        match self.state(shard):
            case ownership.Serving(own) | ownership.Draining(own) if own == epoch:
                self.feed(shard, ownership.FencedOff(reason))
            case _:
                pass

    def feed(self, shard: int, event: ownership.Event) -> None:
        """One event for one shard: the next state is entered and its commands are begun."""
        entry = self._entry(shard)
        before = entry.state
        entry.state, commands = ownership.step(before, event)
        if entry.state != before:
            self._entered(shard, entry, before, event)
        for command in commands:
            self._carry_out(shard, entry, command)

    # --- acting ---

    def _entry(self, shard: int) -> Entry:
        entry = self._entries.get(shard)
        if entry is None:
            entry = self._entries[shard] = Entry()
        return entry

    def _entered(self, shard: int, entry: Entry, before: ownership.State, event: ownership.Event) -> None:
        log.debug("shard %s", type(entry.state).__name__.lower(), extra={"shard": shard, "event": repr(event)})
        self._keep_counts(before, entry.state)
        match entry.state:
            case ownership.Waiting():
                entry.is_clean = False  # not before the wait is over, whoever may lead by then
            case ownership.Opening() | ownership.Paused(is_open=False):
                entry.is_clean = True
            case ownership.Serving(epoch):
                entry.serving_since_ns = self._clock.now_ns()
                entry.leader = ""
                log.info("serving", extra={"shard": shard, "epoch": epoch})
            case ownership.Idle():
                if not isinstance(before, ownership.Claiming | ownership.Idle):
                    log.info("no longer led", extra={"shard": shard, "reason": _reason(before, event)})
                entry.tenure = None
            case _:
                pass
        self._tell_changed(entry)
        self._measure(entry, before, event)
        if isinstance(entry.state, ownership.Serving | ownership.Idle):
            self.on_settled(shard)

    def _keep_counts(self, before: ownership.State, state: ownership.State) -> None:
        self._held_count += _is_held(state) - _is_held(before)
        self._busy_count += isinstance(before, ownership.Idle) - isinstance(state, ownership.Idle)
        if self._busy_count:
            self._idle.clear()
        else:
            self._idle.set()

    def _measure(self, entry: Entry, before: ownership.State, event: ownership.Event) -> None:
        now_ns, began_ns = self._clock.now_ns(), entry.entered_ns
        entry.entered_ns = now_ns
        if (step := _STEPS.get(type(before))) is not None:
            self._metrics.application_duration.labels(step).observe((now_ns - began_ns) / NS_PER_S)
        match entry.state:
            case ownership.Draining():
                entry.draining_since_ns = now_ns
            case ownership.Idle() if isinstance(event, ownership.Gone) and ownership.epoch_led(before):
                self._metrics.leadership_losses.inc()
            case ownership.Idle() if isinstance(before, ownership.Passing) and isinstance(before.goal, HandOver):
                self._metrics.handoff_duration.observe((now_ns - entry.draining_since_ns) / NS_PER_S)
            case _:
                pass

    def _count(self, kind: type[ownership.State]) -> int:
        return sum(isinstance(entry.state, kind) for entry in self._entries.values())

    def _tell_changed(self, entry: Entry) -> None:
        changed, entry.changed = entry.changed, asyncio.Event()
        changed.set()

    def _carry_out(self, shard: int, entry: Entry, command: ownership.Command) -> None:
        match command:
            case ownership.Claim():
                if self.envoy is not None:
                    self.envoy.queue_claim(shard)
            case ownership.Wait():
                self._tasks.begin(self._wait_out(shard, entry, entry.state), f"wait {shard}")
            case ownership.Open(epoch):
                assert self.envoy is not None, "a leadership begins within a session"
                self._objects.open(shard, entry, epoch, self.envoy.guard)
            case ownership.Serve():
                self._objects.serve(shard, entry)
            case ownership.Drain():
                self._objects.drain(shard, entry)
            case ownership.Cancel():
                self._objects.stop(shard, entry, _goal_reason(entry.state))
            case ownership.Close():
                self._objects.close(shard, entry)
            case ownership.Send(epoch, goal):
                self._tasks.begin(self._send(shard, entry, epoch, goal), f"send {shard}")
            case _:
                assert_never(command)

    async def _wait_out(self, shard: int, entry: Entry, state: ownership.State) -> None:
        if self.envoy is None:
            return
        wait_s = self.envoy.former_wait_s(shard)
        log.info("waiting: the former tenure did not end cleanly", extra={"shard": shard, "wait_s": round(wait_s, 2)})
        await asyncio.sleep(wait_s)
        while entry.state == state and self.envoy is not None:
            more_s = self.envoy.former_wait_s(shard) - wait_s
            if more_s <= 0.0:
                break
            wait_s += more_s  # the offer came meanwhile, and says so
            await asyncio.sleep(more_s)
        if entry.state == state:
            self.feed(shard, ownership.WaitOver(is_active=not self.is_suspended))

    async def _send(self, shard: int, entry: Entry, epoch: int, goal: HandOver | Resign | Remint) -> None:
        """Repeat the goal's transaction until it is decided, or another goal has taken its place."""
        pause_s = SEND_PAUSE_S
        is_told = False
        while entry.state == ownership.Passing(epoch, goal):
            async with self._sends:
                if entry.state != ownership.Passing(epoch, goal):  # changed while others went first
                    return
                passage = await self._pass_on(shard, entry, epoch, goal)
            if entry.state != ownership.Passing(epoch, goal):
                return
            match passage:
                case PassedOn(new_epoch, leader):
                    self._note_end(entry, goal)
                    entry.leader = leader
                    must_wait = not self.fenced and not entry.is_clean
                    self.feed(shard, ownership.Passed(new_epoch, not self.is_suspended, must_wait))
                case NotPassed(reason):
                    log.info("handoff refused", extra={"shard": shard, "reason": reason})
                    self.feed(shard, ownership.Refused(reason, may_keep=not self.is_stopping))
                case NotOurs(reason):
                    self.feed(shard, ownership.Gone(reason))
                case StillOurs(newer_epoch):
                    self.feed(shard, ownership.Renewed(newer_epoch))
                case AskAgain(reason):
                    if not is_told:
                        is_told = True
                        log.warning("outcome unknown, asking until it is", extra={"shard": shard, "reason": reason})
                    await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
                    pause_s = min(pause_s * 2, SEND_PAUSE_MAX_S)

    async def _pass_on(self, shard: int, entry: Entry, epoch: int, goal: HandOver | Resign | Remint) -> Passage:
        if self.envoy is None:
            return NotOurs("the session is over")
        return await self.envoy.pass_on(shard, epoch, goal, is_clean=entry.is_clean)

    def _note_end(self, entry: Entry, goal: HandOver | Resign | Remint) -> None:
        now_ns = self._clock.now_ns()
        if entry.serving_since_ns and now_ns - entry.serving_since_ns > GOOD_TENURE_S * NS_PER_S:
            entry.failures = entry.refusals = 0
        entry.serving_since_ns = 0
        if not isinstance(goal, Remint):
            entry.refusals = 0
        if isinstance(goal, Resign) and goal.is_failure:
            entry.failures += 1
            pause_s = min(BACKOFF_MAX_S, self._settings.backoff_s * 2 ** (entry.failures - 1))
            entry.backoff_until_ns = now_ns + int(pause_s * NS_PER_S)


def _is_held(state: ownership.State) -> bool:
    return isinstance(state, ownership.Claiming) or ownership.epoch_led(state) > 0


def _goal_reason(state: ownership.State) -> str:
    match state:
        case ownership.Stopping(_, goal) | ownership.Closing(_, goal) | ownership.Draining(_, goal):
            return "handed over" if isinstance(goal, HandOver) else goal.reason
        case _:
            return "over"


def _reason(before: ownership.State, event: ownership.Event) -> str:
    match event:
        case ownership.Gone(reason):
            return reason
        case _:
            match before:
                case ownership.Passing(_, HandOver(want)):
                    return f"handed to {want.target}"
                case ownership.Passing(_, Resign(reason) | Remint(reason)):
                    return reason
                case _:
                    return _goal_reason(before)
