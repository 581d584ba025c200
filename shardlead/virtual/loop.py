"""An event loop in virtual time, on which many machines run in one thread: the same seed gives the same run.

    loop = VirtualLoop(seed=7)
    a, b = loop.machine("a"), loop.machine("b", rate=1.01)
    a.spawn(serve()); b.spawn(call())
    loop.run_until_complete(until_done())

Sleeping costs nothing: when nobody is ready, time jumps to the next timer. Every machine has a clock of its own
(offset, rate, freeze) and its own queue of callbacks, first in first out as on a loop of its own; which machine's turn
is next is drawn from the seed. What runs on which machine follows from the context: a task belongs to the machine that
made it.

Law: no callback takes time. `time()` is the time of the machine that asks; `true_ns()` is nobody's, for whoever
watches.
Sockets are those of `shardlead.virtual.network`; threads are not simulated: what is handed to an executor runs at once.
"""

import asyncio
import contextvars
import heapq
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Final, TypeVar, TypeVarTuple, cast

from shardlead.clock import NS_PER_S
from shardlead.virtual.network import Network

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ROUNDS_MAX: Final = 5
WALL_AT_BOOT_S: Final = 1_700_000_000.0
_MACHINE: contextvars.ContextVar["Machine"] = contextvars.ContextVar("machine")


class Stuck(RuntimeError):
    """Nothing is ready and nothing is scheduled, so that nothing will ever happen again; or far too much happens."""


class _Step:
    """A callback of one machine: what asyncio calls a handle, with all that its users ask of one and no more, since
    a run makes twenty thousand. `when_ns` is that machine's time; 0: as soon as may be."""

    __slots__ = ("_args", "_callback", "_context", "_is_cancelled", "machine", "when_ns")

    def __init__(
        self,
        machine: "Machine",
        when_ns: int,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
    ) -> None:
        self.machine = machine
        self.when_ns = when_ns
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._context = context
        self._is_cancelled = False

    def __repr__(self) -> str:
        state = " cancelled" if self._is_cancelled else ""
        return f"<Step{state} of {self.machine.name} at {self.when()}: {self._callback!r}>"

    def when(self) -> float:
        """As asyncio's timers tell it."""
        return self.when_ns / NS_PER_S

    def cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self) -> None:
        self._is_cancelled = True
        self._callback, self._args = None, ()  # what they hold may go

    def run(self, loop: "VirtualLoop") -> None:
        """As a handle of asyncio runs: what it raises is the loop's, unless it must end everything."""
        callback = self._callback
        assert callback is not None
        try:
            self._context.run(callback, *self._args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # as asyncio does
            loop.call_exception_handler({"message": f"Exception in callback {callback!r}", "exception": exc})


class _Task(asyncio.Task[T]):
    """A task whose place in a set does not hang on its address."""

    __slots__ = ("number",)
    number: int

    def __hash__(self) -> int:
        return self.number


class _Future(asyncio.Future[T]):
    """The same for futures."""

    def __init__(self, loop: "VirtualLoop", number: int) -> None:
        self.number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class Machine:
    """A process on a machine of its own: a clock, a queue of callbacks, an address. Made by `VirtualLoop.machine`.

    Paused, it runs nothing while its clock goes on (SIGSTOP, a long collection of garbage). Frozen, its clock stands,
    too (a virtual machine held by its hypervisor). Crashed, it never runs again, not even a `finally`.
    """

    def __init__(self, loop: "VirtualLoop", name: str, address: str, offset_ns: int, rate: float) -> None:
        self.name = name
        self.address = address
        self.rate = rate
        self.is_crashed = False
        self.context = contextvars.copy_context()
        self.context.run(_MACHINE.set, self)
        self.clock = MachineClock(self)
        self.on_crash: list[Callable[[bool], object]] = []  # told whether the whole machine is gone
        self._loop = loop
        self._base_local_ns = offset_ns
        self._base_true_ns = loop.true_ns()
        self._pauses = 0
        self._frozen = 0
        self.runs = True  # neither paused nor frozen nor crashed
        self.on_step: Callable[[], object] | None = None  # called after each of its callbacks
        self.has_turn = False  # kept by the loop: it stands among those whose turn may come
        self.ready: deque[_Step] = deque()
        self._spawned: dict[asyncio.Task[Any], None] = {}
        self._overdue: list[_Step] = []  # fell due while it was paused or frozen

    def __repr__(self) -> str:
        state = " crashed" if self.is_crashed else " frozen" if self._frozen else " paused" if self._pauses else ""
        return f"<Machine {self.name}{state} at {self.now_ns() / NS_PER_S:.6f}>"

    # --- its clock

    def now_ns(self) -> int:
        """This machine's boot-time clock."""
        if self._frozen:
            return self._base_local_ns
        passed_ns = self._loop._now_ns - self._base_true_ns  # noqa: SLF001  # asked for 25,000 times a run
        return self._base_local_ns + (passed_ns if self.rate == 1.0 else int(passed_ns * self.rate))

    def true_s(self) -> float:
        """What a wall clock goes by that somebody keeps right."""
        return self._loop.true_ns() / NS_PER_S

    def true_ns_of(self, local_ns: int) -> int:
        """When it will be `local_ns` here if the clock goes on as now; rounded up."""
        left_ns = local_ns - self._base_local_ns
        return self._base_true_ns + (left_ns if self.rate == 1.0 else -int(-left_ns / self.rate // 1))

    # --- what runs on it

    @property
    def is_paused(self) -> bool:
        """Whether it runs nothing at present, though it will again."""
        return bool(self._pauses or self._frozen) and not self.is_crashed

    def spawn(self, coro: Coroutine[Any, Any, T], name: str = "") -> "asyncio.Task[T]":
        """A task on this machine, which is kept until it is done."""
        task = self._loop.create_task(coro, name=name or None, context=self.context.copy())
        self._spawned[task] = None
        task.add_done_callback(lambda done: self._spawned.pop(done, None))
        return task

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts) -> asyncio.Handle:
        """Run it here after what is ready."""
        step = _Step(self, 0, callback, args, self.context.copy())
        self.ready.append(step)
        if self.runs and not self.has_turn:
            self._loop.note_ready(self)
        return cast("asyncio.Handle", step)

    def call_later(self, delay_s: float, callback: Callable[[*Ts], object], *args: *Ts) -> asyncio.TimerHandle:
        """Run it here after `delay_s` seconds of this machine's clock."""
        when_ns = self.now_ns() + max(0, round(delay_s * NS_PER_S))
        return self._loop.schedule(self, when_ns, callback, args, self.context.copy())

    # --- what befalls it

    def pause(self) -> None:
        """Run nothing until `resume`. Pauses add up."""
        self._pauses += 1
        self._judge()

    def resume(self) -> None:
        """Go on; what came or fell due meanwhile is run now. Whether what came goes before the timers is drawn, since
        event loops differ in it."""
        assert self._pauses, "resume without pause"
        self._pauses -= 1
        self._judge()
        self._wake()

    def freeze(self) -> None:
        """Run nothing, and let the clock stand, until `thaw`."""
        if self._loop.is_abandoned:
            return
        if not self._frozen:
            self._base_local_ns = self.now_ns()
        self._frozen += 1
        self._judge()

    def thaw(self) -> None:
        assert self._frozen, "thaw without freeze"
        self._frozen -= 1
        if not self._frozen:
            self._base_true_ns = self._loop.true_ns()
            self._judge()
            self._wake()

    def crash(self, *, with_machine: bool = False) -> None:
        """The process is gone (SIGKILL); its peers' connections are reset. With the machine, they hear nothing."""
        if self.is_crashed or self._loop.is_abandoned:
            return
        self.is_crashed = True
        self._judge()
        for tell in tuple(self.on_crash):
            tell(with_machine)

    def revive(self) -> None:
        """See `VirtualLoop.abandon`."""
        self.is_crashed = False
        self._pauses = 0
        if self._frozen:
            self._frozen = 1
            self.thaw()
        self._judge()
        self._wake()

    def _judge(self) -> None:
        self.runs = self._loop.is_abandoned or not (self._pauses or self._frozen or self.is_crashed)

    def _wake(self) -> None:
        if not self.runs:
            return
        overdue, self._overdue = self._overdue, []
        due: list[_Step] = []
        now_ns = self.now_ns()
        for step in sorted(overdue, key=lambda step: step.when_ns):
            if step.when_ns <= now_ns:
                due.append(step)
            else:
                self._loop.push(step)
        if due and self._loop.rng.random() < 0.5:
            self.ready.extendleft(reversed(due))
        else:
            self.ready.extend(due)
        self._loop.note_ready(self)

    # --- for the loop

    def take(self, step: _Step) -> None:
        """Its time has come, by the reckoning of when it was pushed."""
        if self.runs:
            if step.when_ns > self.now_ns():
                self._loop.push(step)  # the clock stood still meanwhile
                return
            self.ready.append(step)
            if not self.has_turn:
                self._loop.note_ready(self)
        elif not self.is_crashed:
            self._overdue.append(step)


class MachineClock:
    """`shardlead.clock.Clock` of one machine."""

    __slots__ = ("_machine", "wall_ahead_s")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.wall_ahead_s = 0.0  # by how much its wall clock is wrong

    def now_ns(self) -> int:
        return self._machine.now_ns()

    def wall_s(self) -> float:
        return WALL_AT_BOOT_S + self._machine.true_s() + self.wall_ahead_s


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. What asyncio offers and is not here (signals, subprocesses, TLS, datagrams) cannot be used."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.errors: list[dict[str, Any]] = []  # what nobody has handled
        self.steps = 0
        self.network = Network(self)
        self._now_ns = 0
        self._numbers = 0
        self._timers: list[tuple[int, int, _Step]] = []
        self._turns: list[Machine] = []  # those with something ready, each once
        self._machines: list[Machine] = []
        self._is_running = self._is_closed = self._is_stopping = False
        self.is_abandoned = False  # what befalls machines means nothing any more
        self.steps_max = 0  # if set, more are too many: something goes round and round without time going on
        self.observer = self.machine("observer")

    def __repr__(self) -> str:
        return f"<VirtualLoop at {self._now_ns / NS_PER_S:.6f} s, {self.steps} steps, {len(self._timers)} timers>"

    # --- time and machines

    def true_ns(self) -> int:
        """Elapsed time that no machine's clock shows; starts at 0."""
        return self._now_ns

    def time(self) -> float:
        """The time of the machine that asks, in seconds."""
        return _MACHINE.get(self.observer).now_ns() / NS_PER_S

    @property
    def current(self) -> Machine:
        """The machine of the running callback; the observer outside of all."""
        return _MACHINE.get(self.observer)

    def machine(self, name: str, *, address: str = "", offset_s: float = 0.0, rate: float = 1.0) -> Machine:
        """A machine more. `address` is its own on the simulated network; several processes of one may share it."""
        address = address or f"10.0.{len(self._machines) // 250}.{len(self._machines) % 250 + 1}"
        machine = Machine(self, name, address, round(offset_s * NS_PER_S), rate)
        self._machines.append(machine)
        machine.on_crash.append(lambda with_machine: self.network.crashed(machine, with_machine=with_machine))
        return machine

    def abandon(self, timeout_s: float = 120.0) -> None:
        """End a run: cancel every task, those of paused, frozen and crashed machines too, let them come to their end,
        and close the loop. What the machines do meanwhile means nothing."""
        self.steps_max = 0
        self.is_abandoned = True
        for machine in self._machines:
            machine.on_step = None
            machine.revive()

        async def end() -> None:
            me = asyncio.current_task()
            for _ in range(ROUNDS_MAX):  # what ends may begin something to tidy up
                tasks = sorted((task for task in asyncio.all_tasks(self) if task is not me), key=hash)
                if not tasks:
                    return
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=timeout_s)

        self.run_until_complete(end())
        self.close()

    # --- callbacks

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if context is None:
            context = contextvars.copy_context()
        machine = context.get(_MACHINE, self.observer)
        step = _Step(machine, 0, callback, args, context)
        machine.ready.append(step)  # of a crashed machine, too, for `abandon`
        if machine.runs and not machine.has_turn:
            self.note_ready(machine)
        return cast("asyncio.Handle", step)

    call_soon_threadsafe = call_soon  # type: ignore[assignment]  # there is one thread

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        if context is None:
            context = contextvars.copy_context()
        machine = context.get(_MACHINE, self.observer)
        return self.schedule(machine, machine.now_ns() + round(delay * NS_PER_S), callback, args, context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        if context is None:
            context = contextvars.copy_context()
        return self.schedule(context.get(_MACHINE, self.observer), round(when * NS_PER_S), callback, args, context)

    def schedule(
        self,
        machine: Machine,
        when_ns: int,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
    ) -> asyncio.TimerHandle:
        """A timer at `when_ns` of that machine's clock."""
        step = _Step(machine, when_ns, callback, args, context)
        if not machine.is_crashed:
            self.push(step)
        return cast("asyncio.TimerHandle", step)

    def push(self, step: _Step) -> None:
        """For machines: have `step.machine.take` called when its time comes, by the clock as it goes now."""
        self._numbers += 1
        due_ns = step.machine.true_ns_of(step.when_ns)
        heapq.heappush(self._timers, (max(self._now_ns, due_ns), self._numbers, step))

    def note_ready(self, machine: Machine) -> None:
        """For machines: it has something ready now."""
        if machine.ready and machine.runs and not machine.has_turn:
            machine.has_turn = True
            self._turns.append(machine)

    # --- running

    def run_forever(self) -> None:
        if self._is_closed:
            raise RuntimeError("the loop is closed")
        if self._is_running:
            raise RuntimeError("the loop runs already")
        self._is_running = True
        self._thread = threading.get_ident()
        asyncio._set_running_loop(self)  # noqa: SLF001  # how a loop of one's own says that it runs
        try:
            self._run()
        finally:
            self._is_running = self._is_stopping = False
            asyncio._set_running_loop(None)  # noqa: SLF001

    def _run(self) -> None:
        """One callback of one machine after the other; time goes on if there is none."""
        turns, random_ = self._turns, self.rng.random
        while not self._is_stopping:
            while not turns:
                self._advance()
            count = len(turns)
            index = int(random_() * count) if count > 1 else 0
            machine = turns[index]
            ready = machine.ready
            if not ready or not machine.runs:
                turns[index] = turns[-1]
                turns.pop()
                machine.has_turn = False
                continue
            step = ready.popleft()
            if step.cancelled():
                continue
            self.steps += 1
            if self.steps == self.steps_max:
                raise Stuck(f"{self!r}: {self.steps} steps were not enough")
            step.run(self)
            if machine.on_step is not None:
                machine.on_step()

    def _advance(self) -> None:
        timers = self._timers
        while timers:
            due_ns, _, step = heapq.heappop(timers)
            if step.cancelled():
                continue
            if due_ns > self._now_ns:
                self._now_ns = due_ns
            step.machine.take(step)
            if not timers or timers[0][0] > self._now_ns:
                return
        raise Stuck(f"{self!r}: nothing is ready and nothing is scheduled")

    def run_until_complete(self, future: "Generator[Any, None, T] | Awaitable[T]") -> T:
        is_new = not asyncio.isfuture(future)
        task: asyncio.Future[T] = asyncio.ensure_future(cast("Awaitable[T]", future), loop=self)
        task.add_done_callback(self._end_with)
        try:
            self.run_forever()
        except BaseException:  # as asyncio's own loop does
            if is_new and task.done() and not task.cancelled():
                task.exception()  # so that it is not called unretrieved: the first failure is the one to see
            raise
        finally:
            task.remove_done_callback(self._end_with)
        if not task.done():
            raise RuntimeError("the loop was stopped before the future was done")
        return task.result()

    def _end_with(self, _future: "asyncio.Future[Any]") -> None:
        self.stop()

    def stop(self) -> None:
        self._is_stopping = True

    def is_running(self) -> bool:
        return self._is_running

    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        if self._is_running:
            raise RuntimeError("the loop still runs")
        self._is_closed = True
        self._timers.clear()
        self._turns.clear()
        for machine in self._machines:
            machine.ready.clear()

    # --- tasks and futures

    def create_future(self) -> "asyncio.Future[Any]":
        self._numbers += 1
        return _Future(self, self._numbers)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: contextvars.Context | None = None
    ) -> "asyncio.Task[T]":
        self._numbers += 1
        number, _Task.number = self._numbers, self._numbers  # the first hash is asked for inside the constructor
        task = _Task(coro, loop=self, name=name or f"task-{number}", context=context)
        task.number = number
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]  # noqa: ARG002
        """No threads here: it runs at once, and the future is done."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # handed to whoever awaits it
            future.set_exception(exc)
        return future

    async def shutdown_asyncgens(self) -> None:
        pass

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        pass

    # --- the network

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # noqa: ARG002
        """Listens at the machine's own address, whatever `host` says."""
        return self.network.listen(self.current, protocol_factory, port or 0, options.get("start_serving", True))

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        """`sock` may be anything that says by `getpeername` where it would be connected to."""
        if options.get("sock") is not None:
            host, port = options["sock"].getpeername()
        return await self.network.connect(self.current, protocol_factory, str(host), int(port))

    # --- errors and debugging

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def set_exception_handler(self, handler: Any) -> None:
        raise NotImplementedError("read `errors`")

    def get_exception_handler(self) -> None:
        return None

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        pass
