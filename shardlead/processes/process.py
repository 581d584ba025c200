"""One started process, and all that were started here.

Law: see the package. `Process` is a handle; `Processes` owns them and ends them.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from shardlead import watchdog
from shardlead.errors import ProcessFailed

TAIL_LINES: Final = 40
KILL_TIMEOUT_S: Final = 10.0
OUTPUT_TIMEOUT_S: Final = 2.0  # a grandchild may hold the pipe open after the process itself has ended
_POLL_S: Final = 0.05

_READY: Final = re.compile(r"ready (\S+) (\S+) (\S+) admin (\S+)")
_LISTENING: Final = re.compile(r"listening on (\S+)")


@dataclass(frozen=True, slots=True)
class Ready:
    """What a process says of itself on stdout once it serves."""

    role: str
    name: str
    address: str
    admin: str = ""


def ready_role(line: str) -> Ready | None:
    """The line of a worker, router or controller that is up."""
    found = _READY.fullmatch(line)
    return Ready(*found.groups()) if found else None


def ready_store(line: str) -> Ready | None:
    """The line of an embedded store that is up."""
    found = _LISTENING.fullmatch(line)
    return Ready("store", "embedded", found[1]) if found else None


class Process:
    """One process that was started here, in a session of its own; its output goes to a log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.command = tuple(command)
        self.log = log
        self.returncode: int | None = None
        """Its exit code, negative for a signal; None while it runs."""
        self.was_asked = False
        """Whether `terminate` was called while it ran."""
        self._process: asyncio.subprocess.Process | None = None
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"exit {self.returncode}"
        return f"<{type(self).__name__} {self.name} pid={self.root_pid} {state}>"

    @property
    def root_pid(self) -> int:
        """The process as it was started (a worker's parent), whose exit code `exited` returns."""
        assert self._process is not None, f"{self.name} has not been started"
        return self._process.pid

    @property
    def pid(self) -> int:
        """The process that does the work."""
        return self.root_pid

    @property
    def is_running(self) -> bool:
        return self.returncode is None

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it serves."""
        return self._ready.done()

    @property
    def ready(self) -> Ready:
        """What it said when it was up. Raises AssertionError before."""
        assert self._ready.done(), f"{self.name} is not ready"
        return self._ready.result()

    @property
    def address(self) -> str:
        """host:port (of a store: its URL) where it serves."""
        return self.ready.address

    @property
    def admin(self) -> str:
        """host:port of its admin server."""
        return self.ready.admin

    async def wait_ready(self, timeout_s: float) -> Ready:
        """What it prints once it is up. Raises ProcessFailed if it ends before, or takes longer."""
        ended = asyncio.ensure_future(self._ended.wait())
        either: set[asyncio.Future[Any]] = {self._ready, ended}
        try:
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._ready.done():
                return self._ready.result()
            if ended.done():
                reason = f"ended with code {self.returncode} before it was ready"
                raise ProcessFailed(self.name, reason, self.tail(), self.returncode)
            raise ProcessFailed(self.name, f"was not ready within {timeout_s:g} s", self.tail())
        finally:
            ended.cancel()

    async def exited(self, timeout_s: float) -> int:
        """Its exit code, negative for a signal. Raises ProcessFailed if it still runs after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            raise ProcessFailed(self.name, f"still runs after {timeout_s:g} s", self.tail()) from None
        assert self.returncode is not None
        return self.returncode

    async def ended(self) -> None:
        """Returns once it has ended. Unbounded on purpose: this is how to learn of a death that nobody expects."""
        await self._ended.wait()

    def tail(self) -> str:
        """The last lines it printed."""
        return "\n".join(self._tail)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process that does the work; nothing if it has ended."""
        self._send(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM to the process as it was started, as an operator or a supervisor would send it."""
        self.was_asked = self.was_asked or self.is_running
        self._send(self.root_pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process that does the work: a crash."""
        self.send(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP: it is alive and does nothing."""
        self.send(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT after `stop`."""
        self.send(signal.SIGCONT)

    def _send(self, pid: int, number: signal.Signals) -> None:
        if self.returncode is not None and pid == self.root_pid:
            return  # it has been collected: the number may be somebody else's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    # --- what `Processes` does with it

    async def launch(self, environment: Mapping[str, str], folder: Path) -> None:
        """Start it. Raises ProcessFailed if the command cannot be run."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,  # a terminal's Ctrl-C reaches the starter alone
            )
        except OSError as exc:
            raise ProcessFailed(self.name, f"cannot be started: {exc}", "") from exc

    async def attend(self, is_ready: Callable[[str], Ready | None], on_line: Callable[[str, str], None] | None) -> None:
        """Copies its output to the log until it has ended, then collects it."""
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None

        def line_out(line: str) -> None:
            if not self._ready.done() and (ready := is_ready(line)) is not None:
                self._ready.set_result(ready)
            elif on_line is not None:
                on_line(self.name, line)

        def line_err(line: str) -> None:
            if on_line is not None:
                on_line(self.name, line)

        with self.log.open("ab", buffering=0) as log:
            pumps = [
                asyncio.ensure_future(self._pump(self._process.stdout, log.write, line_out)),
                asyncio.ensure_future(self._pump(self._process.stderr, log.write, line_err)),
            ]
            try:
                code = await self._process.wait()
                await asyncio.wait(pumps, timeout=OUTPUT_TIMEOUT_S)
                self.returncode = code
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._ended.set()

    async def _pump(
        self, source: asyncio.StreamReader, write: Callable[[bytes], object], line_seen: Callable[[str], None]
    ) -> None:
        rest = b""
        while piece := await source.read(65_536):
            write(piece)
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._line(line, line_seen)
        if rest:
            self._line(rest, line_seen)

    def _line(self, line: bytes, line_seen: Callable[[str], None]) -> None:
        text = line.decode("utf-8", "backslashreplace").rstrip("\r")
        self._tail.append(text)
        line_seen(text)


class WorkerProcess(Process):
    """A worker and its parent. `pid` is the worker's own, `root_pid` the parent's."""

    _worker_pid = 0

    @property
    def pid(self) -> int:
        """The worker's own process, not its parent. Raises ProcessFailed if there is none."""
        if not self._worker_pid:
            children = [row.pid for row in watchdog.table() if row.parent == self.root_pid and row.state not in "ZX"]
            if not children:
                raise ProcessFailed(self.name, "has no worker process", self.tail())
            self._worker_pid = children[0]
        return self._worker_pid

    @property
    def parent_pid(self) -> int:
        return self.root_pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the worker itself, past its parent; nothing if it has ended."""
        try:
            pid = self.pid
        except ProcessFailed:
            return
        if pid in watchdog.members([self.root_pid]):
            self._send(pid, number)

    def kill_parent(self) -> None:
        """SIGKILL to the parent alone: the worker lives on and stops gracefully."""
        assert self.pid  # noted while its parent can still be named
        self._send(self.root_pid, signal.SIGKILL)

    def kill_host(self) -> None:
        """SIGKILL to parent and worker together, so that nobody is left to revoke the lease: a lost machine."""
        self.stop()  # or it would notice that its parent is gone
        self._send(self.root_pid, signal.SIGKILL)
        self.send(signal.SIGKILL)


class Processes:
    """What has been started here. On exit everything is killed that still runs, and awaited.

    `folder` takes the logs. `environment` is added to what the processes inherit; with `is_hermetic` they inherit no
    SHARDLEAD_… of ours. `on_line(name, line)` is told what they print beyond the ready line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        is_hermetic: bool = False,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self.folder = folder
        self.environment = {**_inherited(is_hermetic), **(environment or {})}
        self.all: list[Process] = []
        self._on_line = on_line
        self._watchdog: asyncio.subprocess.Process | None = None
        self._attending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._watchdog = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", str(Path(watchdog.__file__))),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self._end())

    async def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        is_ready: Callable[[str], Ready | None] = ready_role,
        environment: Mapping[str, str] | None = None,
        is_worker: bool = False,
        working_folder: Path | None = None,
    ) -> Process:
        """Start a process and return at once; `wait_ready` says when it is up. Raises ProcessFailed."""
        process = (WorkerProcess if is_worker else Process)(name, command, self.folder / f"{name}.log")
        await process.launch({**self.environment, **(environment or {})}, working_folder or Path.cwd())
        self._tell_watchdog("+", process.root_pid)
        self.all.append(process)
        task = asyncio.create_task(process.attend(is_ready, self._on_line), name=f"attend {name}")
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)
        return process

    def forget(self, process: Process) -> None:
        """Drop an ended process from the list; nothing of it may be left. Raises AssertionError if something is."""
        assert not watchdog.members([process.root_pid]), f"{process.name} still has processes"
        self.all.remove(process)
        self._tell_watchdog("-", process.root_pid)

    def kill_all(self) -> None:
        """SIGKILL to everything that still runs, forked children included."""
        roots = {process.root_pid for process in self.all}
        for pid in watchdog.members(roots):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                while watchdog.members(process.root_pid for process in self.all):
                    self.kill_all()
                    await asyncio.sleep(_POLL_S)
        finally:
            if self._attending:
                await asyncio.wait(set(self._attending), timeout=OUTPUT_TIMEOUT_S + 1)
            if self._watchdog is not None and self._watchdog.stdin is not None:
                for process in self.all:
                    self._tell_watchdog("-", process.root_pid)
                self._watchdog.stdin.close()
                async with asyncio.timeout(KILL_TIMEOUT_S):
                    await self._watchdog.wait()

    def _tell_watchdog(self, sign: str, pid: int) -> None:
        assert self._watchdog is not None, "use `async with`"
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(f"{sign} {pid}\n".encode())


def _inherited(is_hermetic: bool) -> dict[str, str]:
    """Our environment without ETCD_…, which an etcd would take for settings; output unbuffered, or ready lines come
    late."""
    dropped = ("ETCD", "SHARDLEAD_") if is_hermetic else ("ETCD",)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PYTHONUNBUFFERED": "1"}
