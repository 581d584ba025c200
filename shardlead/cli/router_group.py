"""`shardlead router --processes N`: N routers that share a port, and their parent.

The parent reserves the port, starts the routers, starts one that has ended again, and answers for all of them on the
admin port: ready while one serves, metrics summed. It routes nothing itself.

    parent ──socket pair──▸ router      "metrics\n"; its end tells the router to stop
           ◂──                          "ready <address>\n" once; then "<length>\n<page>" for each asking

Law: a router that ends before any has ever served is a fault that starting again does not mend: all stop, with its
exit code. Later ones are started again, after a pause that doubles while they do not last. A stop is passed on to all
at once, and bounded; a router whose parent is gone stops in order.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

from prometheus_client.exposition import generate_latest

from shardlead import log as logs
from shardlead.cli import joint_metrics
from shardlead.cli.parts import new_registry, new_view, serving_admin, show_view, staleness, window_of
from shardlead.cli.running import (
    Stop,
    default_name,
    opened_store,
    port_taken,
    run_until_stopped,
    running,
    say_ready,
)
from shardlead.config import RouterSettings
from shardlead.errors import CommandError
from shardlead.loading import Loaded
from shardlead.metrics import RouterGroupMetrics

log = logging.getLogger("shardlead.cli")

PAUSE_S: Final = 0.1  # before a router is started again; doubles while they do not last
PAUSE_MAX_S: Final = 5.0
LASTS_S: Final = 10.0
PAGE_TIMEOUT_S: Final = 2.0
PAGE_BYTES_MAX: Final = 8_388_608
STOP_SLACK_S: Final = 5.0  # beyond what a router may take to stop; then it is killed


class Member:
    """One of the routers: its process, and the socket to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.is_serving = False
        self.last: joint_metrics.Families = ()  # what it counted when it was asked last
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._asking: asyncio.Task[str] | None = None

    async def start(self, command: Sequence[str]) -> None:
        """Start the process. Raises OSError."""
        self.process = None
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *command,
                    "--tell",
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a Ctrl-C is for the parent, which passes it on once
                )
            except BaseException:  # cancelled, too: no process was started, so nobody else has this end
                ours.close()
                raise
        self._reader, self._writer = await asyncio.open_connection(sock=ours)

    async def ready(self) -> str:
        """The address, once it serves; "" if it has ended before."""
        assert self._reader is not None
        try:
            word, _, address = (await self._reader.readline()).decode().strip().partition(" ")
        except (ConnectionError, ValueError):
            return ""
        self.is_serving = word == "ready"
        return address

    async def page(self) -> joint_metrics.Families:
        """Its metrics; those it had last if it does not answer in time. An answer that is late is still read to its
        end, so that the next one is not taken for it; until then nothing more is asked."""
        if self.is_serving:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(), name=f"metrics of router {self.number}")
            try:
                async with asyncio.timeout(PAGE_TIMEOUT_S):
                    reason = await asyncio.shield(self._asking)
            except TimeoutError:
                reason = f"no answer within {PAGE_TIMEOUT_S:g} s"
            if reason:
                self.is_serving = self.process is not None and self.process.returncode is None
                log.warning("no metrics of a router process", extra={"router": self.number, "reason": reason})
        return self.last

    async def _ask(self) -> str:
        """Ask for a page and read it; why there is none, or "". Has no time-out: the socket's end ends it."""
        reader, writer = self._reader, self._writer
        if reader is None or writer is None:
            return "it has ended"
        try:
            writer.write(b"metrics\n")
            size = int(await reader.readline())
            if size > PAGE_BYTES_MAX:
                raise ValueError(f"a page of {size} bytes")
            page = joint_metrics.read_page((await reader.readexactly(size)).decode())
        except (OSError, ValueError, asyncio.IncompleteReadError) as exc:
            return repr(exc)
        if self._reader is reader:  # else its process has ended, and is counted with those that have
            self.last = page
        return ""

    def close(self) -> None:
        """Its process has ended."""
        self.is_serving = False
        self._asking = None  # if it still reads, it comes to an end with the socket
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class Group:
    """All of them. `run` until told to stop."""

    def __init__(
        self, command: Sequence[str], name: str, settings: RouterSettings, port: int, metrics: RouterGroupMetrics
    ) -> None:
        self.members = [Member(number) for number in range(1, settings.processes + 1)]
        self.failed: int | None = None  # the exit code of one that ended before any had served
        self.address = ""
        self.is_complete = asyncio.Event()  # all have served
        self._command = command
        self._name = name
        self._settings = settings
        self._port = port
        self._metrics = metrics
        self._gone: joint_metrics.Families = ()
        self._serving: set[int] = set()
        self._stopping = asyncio.Event()
        metrics.processes.set_function(self.serving)

    def serving(self) -> int:
        """How many serve now."""
        return sum(member.is_serving for member in self.members)

    async def pages(self) -> list[joint_metrics.Families]:
        """What each counts, and what those counted that have ended."""
        return [self._gone, *await asyncio.gather(*(member.page() for member in self.members))]

    async def keep(self, member: Member, stop: Stop) -> None:
        """Start it, and again whenever it has ended, until the group stops."""
        pause_s = PAUSE_S
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began_s = loop.time()
            code = await self._live(member)
            if self._stopping.is_set():
                return
            facts = {"router": member.number, "exit_code": code}
            if not self.address:
                log.error("a router process ended before it served", extra=facts)
                self.failed = code or 1
                stop.ask("a router process does not start")
                return
            pause_s = PAUSE_S if loop.time() - began_s > LASTS_S else min(pause_s * 2, PAUSE_MAX_S)
            log.error("a router process has ended; starting it again", extra={**facts, "pause_s": pause_s})
            self._metrics.restarts.inc()
            await asyncio.sleep(pause_s)

    async def _live(self, member: Member) -> int:
        settings = [f"router.port={self._port}", "router.processes=1", "admin.port=-1"]
        flags = [word for setting in settings for word in ("--set", setting)]
        try:
            await member.start([*self._command, *flags, "--name", f"{self._name}-{member.number}", "--share-port"])
        except OSError as exc:  # no process or memory to be had: the others go on
            log.warning("a router process could not be started", extra={"router": member.number, "reason": str(exc)})
            member.close()
            return 1
        assert member.process is not None
        try:
            address = await member.ready()
            if address:
                self.address = address
                self._serving.add(member.number)
                if len(self._serving) == len(self.members):
                    self.is_complete.set()
            return await member.process.wait()
        finally:
            self._gone = joint_metrics.joined((self._gone, joint_metrics.lasting(member.last)))
            member.last = ()
            member.close()

    async def stop(self) -> None:
        """Tell all to stop, and wait; who takes too long is killed."""
        self._stopping.set()
        living = [member.process for member in self.members if member.process is not None]
        for process in living:
            _signal(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(self._settings.shutdown_timeout_s + STOP_SLACK_S):
                await asyncio.gather(*(process.wait() for process in living))
        except TimeoutError:
            log.warning("router processes did not stop in time and are killed")
            for process in living:
                _signal(process, signal.SIGKILL)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def run_group(loaded: Loaded, words: Sequence[str], name: str) -> int:
    """Several routers until a signal comes; the exit code. `words` is the command line after `router`."""
    settings = loaded.settings
    name = name or default_name()
    logs.configure(settings.log.level, settings.log.format, role="router", name=name)

    async def main(stop: Stop) -> int:
        registry = new_registry("router")
        command = [sys.executable, "-m", "shardlead", "router", *words]
        async with AsyncExitStack() as stack:
            port = stack.enter_context(_reserved(settings.router))
            store = await stack.enter_async_context(opened_store(settings, registry))
            view = new_view(store, settings)
            show_view(view, registry)
            group = Group(command, name, settings.router, port, RouterGroupMetrics(registry))

            def why_not_ready() -> str:
                if stop.asked.is_set():
                    return "stopping"
                return "" if group.serving() else "no router process serves yet"

            def note() -> str:
                missing = len(group.members) - group.serving()
                return f"{missing} of {len(group.members)} processes do not serve" if missing else staleness(view)

            async def metrics() -> bytes:
                own = joint_metrics.read_page(generate_latest(registry).decode())
                return joint_metrics.write_page(joint_metrics.joined([own, *await group.pages()]))

            admin = await stack.enter_async_context(
                serving_admin(
                    settings,
                    role="router",
                    name=name,
                    registry=registry,
                    ready=why_not_ready,
                    note=note,
                    window=window_of(view),
                    metrics=metrics,
                )
            )
            await stack.enter_async_context(running(view.run()))
            async with _kept(group, stop):
                async with stop.interrupting():
                    await group.is_complete.wait()
                    say_ready("router", name, group.address, admin.address)
                await stop.asked.wait()
        return group.failed or 0

    return run_until_stopped(main)


@asynccontextmanager
async def _kept(group: Group, stop: Stop) -> AsyncIterator[None]:
    """The group's processes run beside the block and end with it."""
    async with asyncio.TaskGroup() as tasks:
        keeping = [tasks.create_task(group.keep(member, stop)) for member in group.members]
        try:
            yield
        finally:
            await group.stop()
            for task in keeping:
                task.cancel()


@contextmanager
def _reserved(settings: RouterSettings) -> Iterator[int]:
    """The port that all share: nobody else gets it, nothing is accepted on it here. Raises CommandError."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as reserving:
            reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                reserving.bind(address)
            except OSError as exc:
                raise port_taken(exc, "requests", "--port", settings.host, settings.port) from exc
            yield reserving.getsockname()[1]
    except socket.gaierror as exc:
        raise CommandError(f"no such address to listen on: {settings.host} ({exc}): see router.host") from exc
