"""How a role's process runs: event loop, signals, waiting for the store, the ready line.

Law: the first SIGTERM or SIGINT asks to stop, a second one exits at once. A store that does not answer is said within
5 s and tried on; it never ends a process that was not told to --fail-fast.
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
from dataclasses import replace
from itertools import count
from types import FrameType
from typing import Any, Final

import uvloop
from prometheus_client import CollectorRegistry

from shardlead.clock import SystemClock
from shardlead.config import Settings
from shardlead.errors import CommandError, ShardleadError, StoreUnavailable
from shardlead.metrics import StoreMetrics
from shardlead.store.base import Store
from shardlead.store.etcd import EtcdStore
from shardlead.store.metered import MeteredStore

log = logging.getLogger("shardlead.cli")

REACH_TIMEOUT_S: Final = 2.0
REACH_PAUSE_S: Final = 1.0
REPEAT_EVERY: Final = 10  # tries; then it is said again


class Stop:
    """The wish to stop. `asked` is set by the first signal; the second exits the process at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard, number)

    @asynccontextmanager
    async def interrupting(self) -> AsyncIterator[None]:
        """Leave the block, whatever it waits for, once a stop is asked for; look at `asked` afterwards.

        The block stays in its own task, so that what is entered there can be left by it.
        """
        task = asyncio.current_task()
        assert task is not None, "entered within a task"
        is_ours = False

        async def watch() -> None:
            nonlocal is_ours
            await self.asked.wait()
            is_ours = True
            task.cancel()

        watching = asyncio.ensure_future(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not is_ours or task.uncancel() > 0:
                raise
        finally:
            watching.cancel()

    def ask(self, reason: str) -> None:
        """As a signal would."""
        log.info("stopping", extra={"reason": reason})
        self.asked.set()

    def _heard(self, number: int) -> None:
        if self.asked.is_set():
            log.warning("second signal: exit at once", extra={"signal": signal.Signals(number).name})
            os._exit(128 + number)
        self.ask(signal.Signals(number).name)


def run_until_stopped(main: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    """Run on uvloop; the exit code. A signal that comes before the loop listens ends the process quietly."""
    signal.signal(signal.SIGTERM, _leave)

    async def listening() -> int:
        stop = Stop()
        stop.listen()
        try:
            return await main(stop)
        except* ShardleadError:
            raise  # said in one line by whoever called
        except* Exception as defects:
            log.critical("defect in shardlead", exc_info=defects)
            raise

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(listening())


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` beside the block; it ends with it. If it fails, the block is cancelled and the failure raised."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(work)
        try:
            yield
        finally:
            task.cancel()


@asynccontextmanager
async def opened_store(settings: Settings, registry: CollectorRegistry) -> AsyncIterator[Store]:
    """A store client whose calls are counted, not yet proven to reach anything."""
    clock = SystemClock()
    async with EtcdStore(settings.store, clock=clock, rng=random.Random()) as store:
        yield MeteredStore(store, StoreMetrics(registry), clock=clock)


async def reach(settings: Settings, *, is_fail_fast: bool) -> None:
    """Return once the store has answered; with `is_fail_fast` raise CommandError if it does not."""
    patience_s = min(REACH_TIMEOUT_S, settings.store.call_timeout_s)
    probing = replace(
        settings.store, call_timeout_s=patience_s, try_timeout_s=min(settings.store.try_timeout_s, patience_s)
    )
    endpoints = ", ".join(probing.endpoints)
    async with EtcdStore(probing, clock=SystemClock(), rng=random.Random()) as store:
        for tries in count():
            try:
                status = await store.status()
            except StoreUnavailable as exc:
                if is_fail_fast:
                    raise CommandError(f"the store does not answer ({exc}); it was looked for at {endpoints}") from exc
                if tries % REPEAT_EVERY == 0:
                    facts = {"endpoints": endpoints, "reason": str(exc)}
                    log.error("the store does not answer; trying on", extra=facts)  # noqa: TRY400  # one line is enough
                await asyncio.sleep(REACH_PAUSE_S)
            else:
                if tries:
                    log.info("the store answers", extra={"endpoint": status.endpoint})
                for warning in status.warnings:
                    log.warning("etcd version", extra={"endpoint": status.endpoint, "warning": warning})
                return


def default_name() -> str:
    """<hostname>-<pid>, as far as a worker's name may go."""
    allowed = (each if each.isascii() and (each.isalnum() or each in "._-") else "-" for each in socket.gethostname())
    return f"{''.join(allowed)[:100].lstrip('._-') or 'host'}-{os.getpid()}"


def say_ready(role: str, name: str, address: str, admin: str) -> None:
    """Tell whoever started this process that it serves."""
    with contextlib.suppress(BrokenPipeError):
        print(f"ready {role} {name} {address or '-'} admin {admin or '-'}", flush=True)


def port_taken(error: OSError, what: str, flag: str, host: str, port: int) -> CommandError:
    """What a failed listen means, with the flag that changes it."""
    why = error.strerror or str(error)
    return CommandError(f"cannot listen on {host}:{port} for {what} ({why}): choose another with {flag}")
