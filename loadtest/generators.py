"""The generator processes of a run: started, told to begin at one moment, listened to, stopped.

Law: leaving the block ends them all. One that ends by itself ends the run, with what it said last.
"""

import asyncio
import contextlib
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from loadtest.errors import CannotBegin
from loadtest.histogram import fine, record
from loadtest.messages import Begin, Done, Keys, Ready, Second, Stop, Task, frame, next_report
from loadtest.samples import Samples

READY_TIMEOUT_S: Final = 30.0
BEGIN_AFTER_S: Final = 0.1
END_TIMEOUT_S: Final = 5.0
EXAMPLES_MAX: Final = 50
_STDERR_BYTES: Final = 4_000


@dataclass
class Harvest:
    """What all generators have reported so far."""

    samples: Samples = field(default_factory=Samples)
    lags: Any = field(default_factory=fine)
    sent: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    leaderships: dict[tuple[int, int], str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Tick:
    """What one generator reported for about a second, for those who watch."""

    share: int
    sent: int
    samples: Samples
    lags_us: Sequence[int]
    in_flight: int
    connections: int


class Generators:
    """`tasks` has one task for each process. `on_tick` is told of each report as it comes."""

    def __init__(self, tasks: Sequence[Task], on_tick: Callable[[Tick], None]) -> None:
        self._tasks, self._on_tick = tasks, on_tick
        self._processes: list[asyncio.subprocess.Process] = []
        self._listening: list[asyncio.Task[None]] = []
        self._errors: list[asyncio.Task[bytes]] = []
        self._ready = 0
        self._is_ready = asyncio.Event()
        self._is_stopping = False
        self.harvest = Harvest()
        self.begin_ns = 0
        self.begin_wall_s = 0.0
        """When the schedule began, by the clock that events carry."""

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:  # cancelled, too: without __aenter__ nobody calls __aexit__, and processes run by now
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def begin(self) -> None:
        """Time 0 of the schedule is a moment from now, the same for all; returns then."""
        self.begin_ns = time.monotonic_ns() + int(BEGIN_AFTER_S * 1e9)
        self.begin_wall_s = time.time() + (self.begin_ns - time.monotonic_ns()) / 1e9
        self._tell(Begin(self.begin_ns))
        await asyncio.sleep(BEGIN_AFTER_S)

    def now_s(self) -> float:
        """Seconds since time 0."""
        return (time.monotonic_ns() - self.begin_ns) / 1e9

    def choose(self, choice: str) -> None:
        """Draw keys so from now on."""
        self._tell(Keys(choice))

    async def stop(self, timeout_s: float) -> Harvest:
        """Send nothing more, wait for what is under way. Raises CannotBegin if a generator does not end."""
        self._is_stopping = True
        self._tell(Stop())
        _, late = await asyncio.wait(self._listening, timeout=timeout_s)
        if late:
            raise CannotBegin(f"{len(late)} of {len(self._listening)} generators did not end within {timeout_s:g} s")
        for task in self._listening:
            task.result()
        return self.harvest

    async def failed(self) -> None:
        """Raises what a generator's end before its time means; returns never otherwise, until cancelled."""
        await asyncio.wait(self._listening, return_when=asyncio.FIRST_EXCEPTION)
        for task in self._listening:
            task.result()

    async def _start(self) -> None:
        for _ in self._tasks:
            self._processes.append(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "loadtest.generator"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,  # a terminal's Ctrl-C is the run's to handle
                )
            )
        for number, (process, task) in enumerate(zip(self._processes, self._tasks, strict=True)):
            assert process.stdin is not None
            assert process.stderr is not None
            process.stdin.write(frame(task))
            self._errors.append(asyncio.create_task(process.stderr.read()))
            self._listening.append(asyncio.create_task(self._listen(number)))
        ready = asyncio.create_task(self._is_ready.wait())
        failed = asyncio.create_task(self.failed())
        try:
            done, _ = await asyncio.wait({ready, failed}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if failed in done:
                failed.result()
            if ready not in done:
                raise CannotBegin(f"the generators were not ready within {READY_TIMEOUT_S:g} s")
        finally:
            ready.cancel()
            failed.cancel()
            await asyncio.gather(ready, failed, return_exceptions=True)

    async def _listen(self, number: int) -> None:
        process = self._processes[number]
        assert process.stdout is not None
        while (report := await next_report(process.stdout)) is not None:
            match report:
                case Ready():
                    self._ready += 1
                    if self._ready == len(self._tasks):
                        self._is_ready.set()
                case Second():
                    self._second(number, report)
                case Done():
                    self._done(report)
                    return
        code = await process.wait()
        said = (await self._errors[number])[-_STDERR_BYTES:].decode("utf-8", "backslashreplace").strip()
        raise CannotBegin(f"generator {number} ended with code {code}" + (f"; it said:\n{said}" if said else ""))

    def _second(self, number: int, report: Second) -> None:
        harvest = self.harvest
        part = Samples()
        part.extend(report.columns)
        harvest.samples.extend(report.columns)
        lags_us = array("I")
        lags_us.frombytes(report.lags_us)
        for lag_us in lags_us:
            record(harvest.lags, lag_us)
        harvest.sent += report.sent
        harvest.reasons.update(report.reasons)
        harvest.examples += report.examples[: EXAMPLES_MAX - len(harvest.examples)]
        self._on_tick(Tick(number, report.sent, part, lags_us, report.in_flight, report.connections))

    def _done(self, report: Done) -> None:
        harvest = self.harvest
        harvest.cpu_s += report.cpu_s
        harvest.violations += report.violations
        for shard, epoch, worker in report.leaderships:
            other = harvest.leaderships.setdefault((shard, epoch), worker)
            if other != worker:
                harvest.violations.append(f"shard {shard}, epoch {epoch}: both {other} and {worker} answered")

    def _tell(self, command: Begin | Keys | Stop) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # it has ended: `failed` says so
                process.stdin.write(frame(command))

    async def _end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # it ends by itself then
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await asyncio.gather(*(process.wait() for process in self._processes))
        for process in self._processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
        for task in (*self._listening, *self._errors):
            task.cancel()
        await asyncio.gather(*self._listening, *self._errors, return_exceptions=True)
