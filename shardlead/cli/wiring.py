"""Putting the roles together: store, view, worker or router, controller candidate, admin; and running them.

Law: the only place that knows how parts fit. Everything is started inside one TaskGroup and stopped in reverse; the
first SIGTERM or SIGINT stops gracefully, a second one exits at once. `ready ...` goes to stdout once, when it serves.
"""

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvloop

from shardlead import log as logs
from shardlead.clock import SystemClock
from shardlead.config import Settings
from shardlead.errors import CommandError, StoreUnavailable
from shardlead.loading import Loaded
from shardlead.store.base import Store
from shardlead.store.etcd import EtcdStore

log = logging.getLogger("shardlead.cli")

REACH_TIMEOUT_S: Final = 4.0  # "the store does not answer" is said within 5 s
REACH_PAUSE_S: Final = 1.0
REPEAT_EVERY: Final = 30  # then said again


class Stop:
    """The wish to stop. `asked` is set by the first signal; the second exits the process at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.signal = 0

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard, number)

    def _heard(self, number: int) -> None:
        if self.asked.is_set():
            log.warning("second signal: exit at once", extra={"signal": signal.Signals(number).name})
            os._exit(128 + number)
        log.info("stopping", extra={"signal": signal.Signals(number).name})
        self.signal = number
        self.asked.set()


def run_until_stopped(main: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    """Run on uvloop; the exit code. A signal that comes before `main` listens ends the process quietly."""
    signal.signal(signal.SIGTERM, _leave)

    async def listening() -> int:
        stop = Stop()
        stop.listen()
        return await main(stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(listening())


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


async def unless_stopped(stop: Stop, work: Coroutine[Any, Any, Any]) -> bool:
    """Do `work` to its end; False if the wish to stop came first, and `work` was cancelled. Raises what it raises."""
    task = asyncio.ensure_future(work)
    asked = asyncio.ensure_future(stop.asked.wait())
    try:
        await asyncio.wait((task, asked), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        for each in (task, asked):
            each.cancel()
        await asyncio.gather(task, asked, return_exceptions=True)


async def reach(store: Store, settings: Settings, *, is_fail_fast: bool) -> None:
    """Return once the store has answered. Says within 5 s that it does not, and goes on trying; with `is_fail_fast`
    raises CommandError instead."""
    endpoints = ", ".join(settings.store.endpoints)
    tries = 0
    while True:
        try:
            async with asyncio.timeout(REACH_TIMEOUT_S):
                status = await store.status()
        except (StoreUnavailable, TimeoutError) as exc:
            reason = str(exc) or f"no answer in {REACH_TIMEOUT_S:g} s"
            if is_fail_fast:
                raise CommandError(f"the store does not answer ({reason}); it was looked for at {endpoints}") from exc
            if tries % REPEAT_EVERY == 0:
                facts = {"endpoints": endpoints, "reason": reason}
                log.error("the store does not answer; trying on", extra=facts)  # noqa: TRY400  # no traceback: one line
        else:
            for warning in status.warnings:
                log.warning("etcd version", extra={"endpoint": status.endpoint, "warning": warning})
            return
        tries += 1
        await asyncio.sleep(REACH_PAUSE_S)


@asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[Store]:
    """A store client, not yet proven to reach anything."""
    async with EtcdStore(settings.store, clock=SystemClock(), rng=random.Random()) as store:
        yield store


def default_name() -> str:
    """<hostname>-<pid>, as far as a worker's name may go."""
    host = "".join(
        each if each.isascii() and (each.isalnum() or each in "._-") else "-" for each in socket.gethostname()
    )
    return f"{host[:100].lstrip('._-') or 'host'}-{os.getpid()}"


def say_ready(role: str, name: str, address: str, admin: str) -> None:
    """Tell whoever started this process that it serves."""
    with contextlib.suppress(BrokenPipeError):
        print(f"ready {role} {name} {address} admin {admin or '-'}", flush=True)


def port_taken(error: OSError, what: str, flag: str, host: str, port: int) -> CommandError:
    """What a failed listen means, with the flag that changes it."""
    return CommandError(
        f"cannot listen on {host}:{port} for {what}: {error.strerror or error}; choose another with {flag}"
    )


def run_embedded_store(host: str, port: int, data: Path | None) -> int:
    """The embedded store until a signal comes."""
    from shardlead.store.embedded import serve

    logs.configure("info", "text", role="store", name="embedded")

    async def main(stop: Stop) -> int:
        await unless_stopped(
            stop, serve(host, port, data=data, on_ready=lambda url: print(f"listening on {url}", flush=True))
        )
        return 0

    return run_until_stopped(main)


def run_worker(loaded: Loaded, application: str, *, is_fail_fast: bool) -> int:
    """A worker until a signal comes."""
    raise CommandError("not built yet")


def run_router(loaded: Loaded, name: str, *, is_fail_fast: bool) -> int:
    """A router until a signal comes."""
    raise CommandError("not built yet")


def run_controller(loaded: Loaded, name: str, *, is_fail_fast: bool) -> int:
    """A controller until a signal comes."""
    raise CommandError("not built yet")
