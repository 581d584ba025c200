"""The shards of one worker: their states, their objects, and the carrying out of what `core.ownership` commands.

Law: core/ownership.py decides, this module acts: every command becomes a task or a synchronous act, and its end
becomes the next event. A task that finds its tenure replaced says nothing. The host outlives sessions; what speaks
to the store for it (`Envoy`) is there for one session only.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, assert_never

from shardlead.clock import NS_PER_S, Clock
from shardlead.config import WorkerSettings
from shardlead.core import ownership
from shardlead.core.contract import Refused
from shardlead.core.ownership import HandOver, Remint, Resign
from shardlead.errors import Fenced, LeadershipError, LeadershipLost
from shardlead.metrics import WorkerMetrics
from shardlead.worker.leadership import Guard, Leadership
from shardlead.worker.tenure import CANCELLED, Hosted, Tenure

log = logging.getLogger("shardlead.host")

BACKOFF_MAX_S: Final = 60.0
GOOD_TENURE_S: Final = 60.0  # a shard served for so long has forgotten its failures
SEND_PAUSE_S: Final = 0.05  # first pause before an undecided transaction is sent again; doubles
SEND_PAUSE_MAX_S: Final = 1.0
HEALTH_INTERVAL_S: Final = 1.0
HEALTH_STRIKES: Final = 3
EXIT_STUCK: Final = 70  # sysexits' EX_SOFTWARE: work of an unfenced class outlived its leadership
OPENS_MAX: Final = 64  # objects that open at once
SENDS_MAX: Final = 16  # shards passed on at once: a fleet that stops as a whole must not drown its store
REFUSALS_MAX: Final = 3  # new epochs in a row for a shard whose storage refuses them; then it is given up as a failure


# --- answers to a request ---


@dataclass(frozen=True, slots=True)
class Admitted:
    """Serve it."""

    tenure: Tenure


@dataclass(frozen=True, slots=True)
class Turned:
    """Refuse it, before its handler. `epoch` is what this worker knows, 0 if nothing; `leader` as in the header."""

    reason: Refused
    epoch: int = 0
    leader: str = ""


@dataclass(frozen=True, slots=True)
class Parked:
    """Let it wait for this shard's next change, and ask again."""


Admission = Admitted | Turned | Parked


# --- what the host asks of the session's speaker ---


@dataclass(frozen=True, slots=True)
class PassedOn:
    """The transaction was applied. `new_epoch` for a re-mint; `leader` for a handoff, as in the header."""

    new_epoch: int = 0
    leader: str = ""


@dataclass(frozen=True, slots=True)
class NotPassed:
    """A handoff whose target is gone: the shard is still ours."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotOurs:
    """The leadership is another's, or nobody's."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Undecided."""

    reason: str


Passage = PassedOn | NotPassed | NotOurs | AskAgain


class Envoy(Protocol):
    """Speaks to the store for one session."""

    @property
    def guard(self) -> Guard: ...

    def queue_claim(self, shard: int) -> None:
        """Claim it with the next batch; answers with Won or ClaimLost."""
        ...

    def former_wait_s(self, shard: int) -> float:
        """TTL + delta of the former leader's lease."""
        ...

    def doubt(self, shard: int, epoch: int) -> None:
        """Somebody spoke of a larger epoch than ours: look whether the shard is still ours."""
        ...

    def look_up(self, shard: int) -> None:
        """Somebody takes us for its leader and we know nothing of it: look who is, and tell `note_elsewhere`."""
        ...

    async def pass_on(self, shard: int, epoch: int, goal: HandOver | Resign | Remint, *, is_clean: bool) -> Passage: ...


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


class _Entry:
    """One shard's mutable place in the host."""

    __slots__ = (
        "backoff_until_ns",
        "changed",
        "draining_since_ns",
        "elsewhere_epoch",
        "entered_ns",
        "failures",
        "is_clean",
        "leader",
        "refusals",
        "serving_since_ns",
        "state",
        "tenure",
    )

    def __init__(self) -> None:
        self.state: ownership.State = ownership.Idle()
        self.tenure: Tenure | None = None
        self.changed = asyncio.Event()
        self.backoff_until_ns = 0
        self.failures = 0
        self.refusals = 0  # since it was last served for long
        self.leader = ""  # whom it was handed to, or who was found to lead it
        self.elsewhere_epoch = 0  # no epoch up to this one is ours, as a look at the store has shown
        self.serving_since_ns = 0
        self.entered_ns = 0  # when the present state began, and the last draining: for the metrics
        self.draining_since_ns = 0
        self.is_clean = True  # whether a successor need not wait: all work, here and before us, has surely ended


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
    ) -> None:
        self.shard_of = shard_of
        self.fenced = fenced
        self.is_stopping = False
        self.envoy: Envoy | None = None
        self.on_settled: Callable[[int], None] = lambda _shard: None
        self._settings = settings
        self._worker = worker
        self._make = make
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._executor = executor
        self._exit_process = exit_process
        self._entries: dict[int, _Entry] = {}
        self._held_count = 0  # kept by differences: counting all at each change would cost the square of their number
        self._busy_count = 0  # shards that are not Idle
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opens = asyncio.Semaphore(OPENS_MAX)
        self._sends = asyncio.Semaphore(SENDS_MAX)
        self._health: asyncio.Task[None] | None = None
        self._is_unfenced_told = False
        metrics.leaderships.set_function(lambda: len(self.led()))
        for kind in _COUNTED:
            metrics.shards.labels(kind.__name__.lower()).set_function(partial(self._count, kind))

    async def __aenter__(self) -> "Host":
        self._health = asyncio.create_task(self._watch_health(), name="health")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.lose_all("the worker ends")  # nothing is led after a graceful stop; else close() is still called
        await self.wait_idle(self._settings.cancel_grace_s + self._settings.close_timeout_s)
        if self._health is not None:
            self._tasks.add(self._health)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.cancel_grace_s)

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

    def _entry(self, shard: int) -> _Entry:
        entry = self._entries.get(shard)
        if entry is None:
            entry = self._entries[shard] = _Entry()
        return entry

    def _entered(self, shard: int, entry: _Entry, before: ownership.State, event: ownership.Event) -> None:
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

    def _measure(self, entry: _Entry, before: ownership.State, event: ownership.Event) -> None:
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

    def _tell_changed(self, entry: _Entry) -> None:
        changed, entry.changed = entry.changed, asyncio.Event()
        changed.set()

    def _carry_out(self, shard: int, entry: _Entry, command: ownership.Command) -> None:
        match command:
            case ownership.Claim():
                if self.envoy is not None:
                    self.envoy.queue_claim(shard)
            case ownership.Wait():
                self._begin(self._wait_out(shard, entry, entry.state), f"wait {shard}")
            case ownership.Open(epoch):
                self._open(shard, entry, epoch)
            case ownership.Serve():
                self._serve(shard, entry)
            case ownership.Drain():
                assert entry.tenure is not None, "draining has a tenure"
                entry.tenure.lead.draining.begin()
                entry.tenure.close_tunnels()
                self._begin(self._drain(shard, entry, entry.tenure), f"drain {shard}")
            case ownership.Cancel():
                assert entry.tenure is not None, "stopping has a tenure"
                entry.tenure.lead.revoke(_goal_reason(entry.state))
                entry.tenure.cancel()
                self._begin(self._stop(shard, entry, entry.tenure), f"stop {shard}")
            case ownership.Close():
                assert entry.tenure is not None, "closing has a tenure"
                self._begin(self._close(shard, entry, entry.tenure), f"close {shard}")
            case ownership.Send(epoch, goal):
                self._begin(self._send(shard, entry, epoch, goal), f"send {shard}")
            case _:
                assert_never(command)

    def _begin(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("defect in shardlead: a shard's task failed", exc_info=error, extra={"task": task.get_name()})

    async def _wait_out(self, shard: int, entry: _Entry, state: ownership.State) -> None:
        if self.envoy is None:
            return
        wait_s = self.envoy.former_wait_s(shard)
        log.info("waiting: the former tenure did not end cleanly", extra={"shard": shard, "wait_s": round(wait_s, 2)})
        await asyncio.sleep(wait_s)
        if entry.state == state:
            self.feed(shard, ownership.WaitOver(is_active=not self.is_suspended))

    def _open(self, shard: int, entry: _Entry, epoch: int) -> None:
        assert self.envoy is not None, "a leadership begins within a session"
        lead = Leadership(shard, epoch, self._worker, self.envoy.guard, self._executor)
        tenure = entry.tenure = Tenure(lead)
        tenure.opening = self._begin(self._open_object(shard, entry, tenure), f"open {shard}")

    async def _open_object(self, shard: int, entry: _Entry, tenure: Tenure) -> None:
        event: ownership.Event
        settings = self._settings
        try:
            async with self._opens:
                tenure.application = self._make(tenure.lead)
                if not await self._call(shard, entry, tenure.application.open(), settings.open_timeout_s):
                    raise TimeoutError(f"it took longer than {settings.open_timeout_s} s")
            event = ownership.Opened()
        except (Fenced, LeadershipLost) as exc:
            event = self._refused(entry, f"open() was refused: {exc}")
        except Exception as exc:  # the application's own code may raise anything; it costs it the shard, not us
            log.exception("open() failed", extra={"shard": shard, "epoch": tenure.lead.epoch})
            event = ownership.Failed(f"open() raised {type(exc).__name__}: {exc}")
        if isinstance(event, ownership.Failed):
            self._metrics.application_failures.labels("open").inc()
        if entry.tenure is tenure and isinstance(entry.state, ownership.Opening):
            self.feed(shard, event)

    def _serve(self, shard: int, entry: _Entry) -> None:
        tenure = entry.tenure
        assert tenure is not None, "serving has a tenure"
        assert tenure.application is not None, "serving has an opened object"
        if self.fenced and not tenure.lead.has_barrier and not self._is_unfenced_told:
            self._is_unfenced_told = True
            log.warning(
                "the class says fenced = True, and open() has passed no fence: an old leader's late writes may count; "
                "use shardlead.fencing (or lead.note_barrier() in a fence of your own), or say fenced = False",
                extra={"shard": shard},
            )
        if tenure.application.has_run and tenure.run_task is None:
            tenure.run_task = self._begin(self._run_object(shard, entry, tenure), f"run {shard}")

    async def _run_object(self, shard: int, entry: _Entry, tenure: Tenure) -> None:
        assert tenure.application is not None, "run() comes after open()"
        event: ownership.Event | None = None
        try:
            await tenure.application.run()
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            log.exception("run() was cancelled from within", extra={"shard": shard, "epoch": tenure.lead.epoch})
            event = ownership.Failed("run() was cancelled from within")
        except (Fenced, LeadershipLost) as exc:
            event = self._refused(entry, f"run() was refused: {exc}")
        except Exception as exc:  # the application's own code may raise anything; it costs it the shard, not us
            log.exception("run() failed", extra={"shard": shard, "epoch": tenure.lead.epoch})
            event = ownership.Failed(f"run() raised {type(exc).__name__}: {exc}")
        finally:
            tenure.lead.note_end()
        if isinstance(event, ownership.Failed):
            self._metrics.application_failures.labels("run").inc()
        if event is not None and entry.tenure is tenure and isinstance(entry.state, ownership.Serving):
            self.feed(shard, event)

    def _refused(self, entry: _Entry, reason: str) -> ownership.Event:
        """A new epoch helps where a newer leader has come and gone; where it does not, the shard is given up."""
        entry.refusals += 1
        if entry.refusals > REFUSALS_MAX:
            return ownership.Failed(reason)
        return ownership.FencedOff(reason)

    async def _drain(self, shard: int, entry: _Entry, tenure: Tenure) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await tenure.wait_idle()
        if entry.tenure is not tenure or not isinstance(entry.state, ownership.Draining):
            return
        if tenure.running_count:
            log.warning("drain time is over, cancelling", extra={"shard": shard, "running": tenure.running_count})
            tenure.lead.revoke("the drain time is over")
            tenure.cancel()
        elif tenure.run_task is not None:
            tenure.run_task.cancel()
        entry.is_clean = await self._wait_ended(shard, tenure)
        if entry.tenure is tenure and isinstance(entry.state, ownership.Draining):
            self.feed(shard, ownership.WorkEnded())

    async def _stop(self, shard: int, entry: _Entry, tenure: Tenure) -> None:
        entry.is_clean = await self._wait_ended(shard, tenure)
        if entry.tenure is tenure and isinstance(entry.state, ownership.Stopping):
            self.feed(shard, ownership.WorkEnded())

    async def _wait_ended(self, shard: int, tenure: Tenure) -> bool:
        """Wait for cancelled work. What does not end within the grace is left behind if the class is fenced (storage
        refuses it); else the process ends, because nothing else would stop it (protocol.md A.4)."""
        if await tenure.wait_ended(self._settings.cancel_grace_s):
            return True
        self._leave_behind(shard)
        return False

    def _leave_behind(self, shard: int) -> None:
        if not self.fenced:
            log.critical("work of an unfenced class outlived its leadership: exiting", extra={"shard": shard})
            self._exit_process(EXIT_STUCK)
        log.error("work goes on after it was cancelled; storage will refuse it", extra={"shard": shard})

    async def _call(self, shard: int, entry: _Entry, work: Coroutine[object, object, None], timeout_s: float) -> bool:
        """Await the application's open() or close(), at most so long; whether it has ended in time. Raises what it
        raises, and RuntimeError for a cancellation of its own making.

        It has a task of its own, so that not even one that will not be cancelled can hold the shard.
        """
        task = asyncio.create_task(work, name=f"application {shard}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            _, late = await asyncio.wait({task}, timeout=timeout_s)
        except asyncio.CancelledError:
            task.cancel(CANCELLED)
            await asyncio.wait({task}, timeout=self._settings.cancel_grace_s)
            raise
        if not late:
            if task.cancelled():
                raise RuntimeError("it was cancelled from within")
            task.result()
            return True
        task.cancel()
        _, late = await asyncio.wait({task}, timeout=self._settings.cancel_grace_s)
        if late:
            entry.is_clean = False
            self._leave_behind(shard)
        return False

    async def _close(self, shard: int, entry: _Entry, tenure: Tenure) -> None:
        application = tenure.application
        if application is not None:
            await self._close_object(shard, entry, tenure, application)
        tenure.lead.revoke("closed")
        if tenure.lead.threads and entry.is_clean:  # of open() or close(); others have been waited for
            entry.is_clean = await self._wait_ended(shard, tenure)
        if entry.tenure is tenure and isinstance(entry.state, ownership.Closing):
            self.feed(shard, ownership.Closed())

    async def _close_object(self, shard: int, entry: _Entry, tenure: Tenure, application: Hosted) -> None:
        facts = {"shard": shard, "epoch": tenure.lead.epoch}
        try:
            if await self._call(shard, entry, application.close(), self._settings.close_timeout_s):
                return
            entry.is_clean = False
            log.warning("close() took too long", extra=facts)
        except LeadershipError as exc:
            log.info("close() found its leadership over", extra={**facts, "reason": str(exc)})
            return
        except Exception:  # the application's own code may raise anything
            log.exception("close() failed", extra=facts)
        self._metrics.application_failures.labels("close").inc()

    async def _send(self, shard: int, entry: _Entry, epoch: int, goal: HandOver | Resign | Remint) -> None:
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
                    self.feed(shard, ownership.Passed(new_epoch, is_active=not self.is_suspended))
                case NotPassed(reason):
                    log.info("handoff refused", extra={"shard": shard, "reason": reason})
                    self.feed(shard, ownership.Refused(reason, may_keep=not self.is_stopping))
                case NotOurs(reason):
                    self.feed(shard, ownership.Gone(reason))
                case AskAgain(reason):
                    if not is_told:
                        is_told = True
                        log.warning("outcome unknown, asking until it is", extra={"shard": shard, "reason": reason})
                    await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
                    pause_s = min(pause_s * 2, SEND_PAUSE_MAX_S)

    async def _pass_on(self, shard: int, entry: _Entry, epoch: int, goal: HandOver | Resign | Remint) -> Passage:
        if self.envoy is None:
            return NotOurs("the session is over")
        return await self.envoy.pass_on(shard, epoch, goal, is_clean=entry.is_clean)

    def _note_end(self, entry: _Entry, goal: HandOver | Resign | Remint) -> None:
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

    async def _watch_health(self) -> None:
        """healthy() of every serving object, once a second; three times no gives the shard up."""
        strikes: dict[int, int] = {}
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            for shard, entry in tuple(self._entries.items()):
                application = entry.tenure.application if entry.tenure is not None else None
                if application is None or not application.has_healthy or not isinstance(entry.state, ownership.Serving):
                    strikes.pop(shard, None)
                    continue
                try:
                    is_healthy = bool(application.healthy())
                except (Exception, asyncio.CancelledError):  # the application's own code; raising is not healthy
                    log.exception("healthy() failed", extra={"shard": shard})
                    is_healthy = False
                strikes[shard] = 0 if is_healthy else strikes.get(shard, 0) + 1
                if strikes[shard] >= HEALTH_STRIKES:
                    strikes.pop(shard)
                    self._metrics.application_failures.labels("healthy").inc()
                    self.feed(shard, ownership.Failed(f"healthy() said no {HEALTH_STRIKES} times"))


def _is_cancelled() -> bool:
    """Whether somebody has cancelled this task; if not, a CancelledError in it is of the application's own making."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


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
