"""The application's objects: opened, run, drained, stopped, closed, and asked for their health.

Law: design.md, Worker. An object is opened once and closed once; it may take its time, raise, or refuse to be
cancelled, and costs its own shard only. Each step runs in a task and ends in one event, which is reported only while
the shard still waits for it in that tenure. What is left running of a fenced class is storage's to refuse; of an
unfenced one, nothing may be left (protocol.md A.4), and what was cancelled has not ended cleanly: what it has sent may
still take effect, so whoever leads next waits, this worker too.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Final

from shardlead.config import WorkerSettings
from shardlead.core import ownership
from shardlead.errors import EpochRegressed, Fenced, LeadershipError, LeadershipLost, WriteUnknown, weightiest
from shardlead.metrics import WorkerMetrics
from shardlead.worker.audit import AuditLog
from shardlead.worker.entry import Entry
from shardlead.worker.leadership import Guard, Leadership
from shardlead.worker.tasks import Tasks
from shardlead.worker.tenure import CANCELLED, Hosted, Tenure
from shardlead.worker.tracebacks import Tracebacks, in_a_line

log = logging.getLogger("shardlead.objects")

HEALTH_INTERVAL_S: Final = 1.0
HEALTH_STRIKES: Final = 3
EXIT_STUCK: Final = 70  # sysexits' EX_SOFTWARE: work of an unfenced class outlived its leadership
OPENS_MAX: Final = 64  # objects that open at once
REFUSALS_MAX: Final = 3  # new epochs in a row for a shard whose storage refuses them; then it is given up as a failure


class Objects:
    """The objects of one worker's shards. `report` takes the event in which a step has ended."""

    def __init__(
        self,
        settings: WorkerSettings,
        worker: str,
        make: Callable[[Leadership], Hosted],
        report: Callable[[int, ownership.Event], None],
        tasks: Tasks,
        *,
        fenced: bool,
        metrics: WorkerMetrics,
        tracebacks: Tracebacks,
        executor: Executor | None,
        exit_process: Callable[[int], object],
        audit: AuditLog | None = None,
    ) -> None:
        self._settings = settings
        self._tracebacks = tracebacks
        self._worker = worker
        self._make = make
        self._report = report
        self._tasks = tasks
        self._fenced = fenced
        self._metrics = metrics
        self._executor = executor
        self._exit_process = exit_process
        self._audit = audit
        self._opens = asyncio.Semaphore(OPENS_MAX)
        self._is_unfenced_told = False

    def _log_failure(self, what: str, error: BaseException, facts: Mapping[str, object]) -> None:
        log.error(what, exc_info=self._tracebacks.of(error), extra={**facts, "reason": in_a_line(error)})

    # --- opening ---

    def open(self, shard: int, entry: Entry, epoch: int, guard: Guard) -> None:
        """Begin a tenure under `epoch`: make its object and open it. Ends in Opened, Suspended, FencedOff or Failed."""
        trail = self._audit.lead(shard, epoch) if self._audit is not None else None

        def unknown(reason: str) -> None:
            self._met(shard, entry, tenure, ownership.FencedOff(f"the outcome of a write is unknown: {reason}"))

        lead = Leadership(shard, epoch, self._worker, guard, self._executor, unknown)
        tenure = entry.tenure = Tenure(lead, trail)
        tenure.opening = self._tasks.begin(self._open_object(shard, entry, tenure), f"open {shard}")

    async def _open_object(self, shard: int, entry: Entry, tenure: Tenure) -> None:
        event: ownership.Event
        settings = self._settings
        try:
            async with self._opens:
                tenure.application = self._make(tenure.lead)
                if not await self._call(shard, entry, tenure.application.open(), settings.open_timeout_s):
                    raise TimeoutError(f"it took longer than {settings.open_timeout_s} s")
            # After a pause this may be heard before the session's own word that its deadline has passed.
            event = ownership.Opened() if tenure.lead.is_valid(0.0) else ownership.Suspended(is_busy=True)
        except (Fenced, LeadershipLost) as exc:
            event = self._refused(entry, f"open() was refused: {exc}")
        except EpochRegressed as exc:  # no defect of the application: it says itself what to do
            log.error("open() met an epoch from the future", extra={"shard": shard, "reason": str(exc)})  # noqa: TRY400  # one line
            event = ownership.Failed(str(exc))
        except Exception as exc:  # the application's own code may raise anything; it costs it the shard, not us
            self._log_failure("open() failed", exc, {"shard": shard, "epoch": tenure.lead.epoch})
            event = ownership.Failed(f"open() raised {type(exc).__name__}: {exc}")
        if isinstance(event, ownership.Failed):
            self._metrics.application_failures.labels("open").inc()
        if entry.tenure is tenure and isinstance(entry.state, ownership.Opening):
            self._report(shard, event)

    # --- serving ---

    def serve(self, shard: int, entry: Entry) -> None:
        """It serves: run its background work, if it has any. Ends in FencedOff or Failed, if at all."""
        tenure = entry.tenure
        assert tenure is not None, "serving has a tenure"
        assert tenure.application is not None, "serving has an opened object"
        if tenure.trail is not None:
            tenure.trail.serve()
        if self._fenced and not tenure.lead.has_barrier and not self._is_unfenced_told:
            self._is_unfenced_told = True
            log.warning(
                "the class says fenced = True, and open() has passed no fence: an old leader's late writes may count; "
                "use shardlead.fencing (or lead.note_barrier() in a fence of your own), or say fenced = False",
                extra={"shard": shard},
            )
        if tenure.application.has_run and tenure.run_task is None:
            tenure.run_task = self._tasks.begin(self._run_object(shard, entry, tenure), f"run {shard}")

    async def _run_object(self, shard: int, entry: Entry, tenure: Tenure) -> None:
        assert tenure.application is not None, "run() comes after open()"
        event: ownership.Event | None = None
        try:
            await tenure.application.run()
        except asyncio.CancelledError as exc:
            if _is_cancelled():
                raise
            self._log_failure("run() was cancelled from within", exc, {"shard": shard, "epoch": tenure.lead.epoch})
            event = ownership.Failed("run() was cancelled from within")
        except Exception as exc:  # the application's own code may raise anything; it costs it the shard, not us
            match weightiest(exc):
                case WriteUnknown() as unknown:
                    entry.refusals += 1
                    event = ownership.FencedOff(f"run() does not know: {unknown}")
                case Fenced() | LeadershipLost() as refusal:
                    event = self._refused(entry, f"run() was refused: {refusal}")
                case _:
                    self._log_failure("run() failed", exc, {"shard": shard, "epoch": tenure.lead.epoch})
                    event = ownership.Failed(f"run() raised {type(exc).__name__}: {exc}")
        finally:
            tenure.lead.note_end()
        if isinstance(event, ownership.Failed):
            self._metrics.application_failures.labels("run").inc()
        if event is not None:
            self._met(shard, entry, tenure, event)

    def _met(self, shard: int, entry: Entry, tenure: Tenure, event: ownership.Event) -> None:
        """What work of a serving or draining shard has met. A shard that goes on under new epochs and never gets
        anywhere is given up, once all work of it has ended."""
        if entry.tenure is not tenure or not isinstance(entry.state, ownership.Serving | ownership.Draining):
            return
        self._report(shard, event)
        if isinstance(event, ownership.FencedOff) and entry.refusals > REFUSALS_MAX:
            self._report(shard, ownership.GivenUp(event.reason, is_failure=True))

    def _refused(self, entry: Entry, reason: str) -> ownership.Event:
        """A new epoch helps where a newer leader has come and gone; where it does not, the shard is given up."""
        entry.refusals += 1
        if entry.refusals > REFUSALS_MAX:
            return ownership.Failed(reason)
        return ownership.FencedOff(reason)

    async def watch_health(self, entries: Mapping[int, Entry]) -> None:
        """healthy() of every serving object, once a second; three times no gives the shard up."""
        strikes: dict[int, int] = {}
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            for shard, entry in tuple(entries.items()):
                application = entry.tenure.application if entry.tenure is not None else None
                if application is None or not application.has_healthy or not isinstance(entry.state, ownership.Serving):
                    strikes.pop(shard, None)
                    continue
                try:
                    is_healthy = bool(application.healthy())
                except (Exception, asyncio.CancelledError) as exc:  # the application's own code; raising is not healthy
                    self._log_failure("healthy() failed", exc, {"shard": shard})
                    is_healthy = False
                strikes[shard] = 0 if is_healthy else strikes.get(shard, 0) + 1
                if strikes[shard] >= HEALTH_STRIKES:
                    strikes.pop(shard)
                    self._metrics.application_failures.labels("healthy").inc()
                    self._report(shard, ownership.Failed(f"healthy() said no {HEALTH_STRIKES} times"))

    # --- ending ---

    def drain(self, shard: int, entry: Entry) -> None:
        """Let requests and threads end, at most for the drain time; cancel the rest. Ends in WorkEnded."""
        tenure = entry.tenure
        assert tenure is not None, "draining has a tenure"
        tenure.lead.draining.begin()
        tenure.close_tunnels()
        self._tasks.begin(self._drain(shard, entry, tenure), f"drain {shard}")

    def stop(self, shard: int, entry: Entry, reason: str) -> None:
        """Cancel all its work, now. Ends in WorkEnded."""
        tenure = entry.tenure
        assert tenure is not None, "stopping has a tenure"
        tenure.revoke(reason)
        tenure.cancel()
        self._tasks.begin(self._stop(shard, entry, tenure), f"stop {shard}")

    def close(self, shard: int, entry: Entry) -> None:
        """Close it, whatever has become of its leadership. Ends in Closed."""
        tenure = entry.tenure
        assert tenure is not None, "closing has a tenure"
        self._tasks.begin(self._close(shard, entry, tenure), f"close {shard}")

    async def _drain(self, shard: int, entry: Entry, tenure: Tenure) -> None:
        def is_over() -> bool:  # it was stopped meanwhile; then `_stop` says how it has ended
            return entry.tenure is not tenure or not isinstance(entry.state, ownership.Draining)

        until_s = asyncio.get_running_loop().time() + self._settings.drain_timeout_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                await tenure.wait_idle()
        if is_over():
            return
        if tenure.running_count:
            log.warning("drain time is over, cancelling", extra={"shard": shard, "running": tenure.running_count})
            tenure.revoke("the drain time is over")
            tenure.cancel()
            is_clean = False
        else:
            await tenure.wait_threads(until_s)  # run() may be waiting for one, and return by itself then
            if is_over():
                return
            is_clean = await self._end_run(shard, tenure)
            await tenure.wait_threads(until_s)
            if is_over():
                return
        has_ended = await self._wait_ended(shard, tenure)
        if not is_over():
            entry.is_clean = has_ended and (is_clean or self._fenced)
            self._report(shard, ownership.WorkEnded())

    async def _end_run(self, shard: int, tenure: Tenure) -> bool:
        """Cancel run(). Of an unfenced class it may first return by itself, as draining has begun; whether it has, or
        there is none: a step of it that is cancelled in the middle may still take effect."""
        task = tenure.run_task
        if task is None:
            return True
        if not self._fenced:
            await asyncio.wait({task}, timeout=self._settings.cancel_grace_s)
            if task.done():
                return not task.cancelled()
            log.warning(
                "run() of an unfenced class was cancelled: the next leader waits before it serves; "
                "let run() return when lead.draining is set",
                extra={"shard": shard},
            )
        task.cancel()
        return False

    async def _stop(self, shard: int, entry: Entry, tenure: Tenure) -> None:
        entry.is_clean = await self._wait_ended(shard, tenure) and self._fenced  # it was cancelled
        if entry.tenure is tenure and isinstance(entry.state, ownership.Stopping):
            self._report(shard, ownership.WorkEnded())

    async def _wait_ended(self, shard: int, tenure: Tenure) -> bool:
        """Wait for cancelled work. What does not end within the grace is left behind if the class is fenced (storage
        refuses it); else the process ends, because nothing else would stop it (protocol.md A.4)."""
        if await tenure.wait_ended(self._settings.cancel_grace_s):
            return True
        self._leave_behind(shard)
        return False

    def _leave_behind(self, shard: int) -> None:
        if not self._fenced:
            log.critical("work of an unfenced class outlived its leadership: exiting", extra={"shard": shard})
            self._exit_process(EXIT_STUCK)
        log.error("work goes on after it was cancelled; storage will refuse it", extra={"shard": shard})

    async def _close(self, shard: int, entry: Entry, tenure: Tenure) -> None:
        application = tenure.application
        if application is not None:
            await self._close_object(shard, entry, tenure, application)
        tenure.revoke("closed")
        if tenure.lead.threads and entry.is_clean:  # of open() or close(); others have been waited for
            entry.is_clean = await self._wait_ended(shard, tenure)
        if entry.tenure is tenure and isinstance(entry.state, ownership.Closing):
            self._report(shard, ownership.Closed())

    async def _close_object(self, shard: int, entry: Entry, tenure: Tenure, application: Hosted) -> None:
        facts = {"shard": shard, "epoch": tenure.lead.epoch}
        try:
            if await self._call(shard, entry, application.close(), self._settings.close_timeout_s):
                return
            entry.is_clean = False
            log.warning("close() took too long", extra=facts)
        except LeadershipError as exc:
            log.info("close() found its leadership over", extra={**facts, "reason": str(exc)})
            return
        except Exception as exc:  # the application's own code may raise anything
            self._log_failure("close() failed", exc, facts)
        self._metrics.application_failures.labels("close").inc()

    async def _call(self, shard: int, entry: Entry, work: Coroutine[object, object, None], timeout_s: float) -> bool:
        """Await the application's open() or close(), at most so long; whether it has ended in time. Raises what it
        raises, and RuntimeError for a cancellation of its own making.

        It has a task of its own, so that not even one that will not be cancelled can hold the shard.
        """
        task = self._tasks.keep(work, f"application {shard}")
        try:
            _, late = await asyncio.wait({task}, timeout=timeout_s)
        except asyncio.CancelledError:
            task.cancel(CANCELLED)
            _, late = await asyncio.wait({task}, timeout=self._settings.cancel_grace_s)
            if late:
                self._leave_behind(shard)
            raise
        if not late:
            if task.cancelled():
                raise RuntimeError("it was cancelled from within")
            task.result()
            return True
        task.cancel()
        _, late = await asyncio.wait({task}, timeout=self._settings.cancel_grace_s)
        if late:
            self._leave_behind(shard)
        entry.is_clean = self._fenced and not late
        return False


def _is_cancelled() -> bool:
    """Whether somebody has cancelled this task; if not, a CancelledError in it is of the application's own making."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
