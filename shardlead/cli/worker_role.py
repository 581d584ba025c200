"""The worker process: store, worker, controller candidate, last will and admin, put together."""

import asyncio
import logging
import random
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Final

from shardlead import log as logs
from shardlead.admin.server import AdminServer
from shardlead.cli.parts import LazyView, new_registry, new_view, serving_admin, window_of
from shardlead.cli.running import Stop, default_name, opened_store, reach, run_until_stopped, running, say_ready
from shardlead.cli.version import version_of
from shardlead.clock import SystemClock
from shardlead.cluster.session import Session
from shardlead.config import Settings
from shardlead.controller.controller import Controller
from shardlead.core.keyspace import Keyspace
from shardlead.errors import ClusterMissing, StoreUnavailable
from shardlead.loading import Loaded
from shardlead.metrics import ControllerMetrics, WorkerMetrics
from shardlead.store.base import Store
from shardlead.worker.application import load
from shardlead.worker.runtime import Worker
from shardlead.worker.will import LastWill

log = logging.getLogger("shardlead.cli")

LOOK_S: Final = 0.02
PLACED_WAIT_S: Final = 2.0  # a controller places a newcomer within a tenth of a second; perhaps there is none
JOIN_PAUSE_S: Final = 1.0


def run_worker(loaded: Loaded, application: str, *, is_fail_fast: bool) -> int:
    """A worker until a signal comes or its parent dies; the exit code: 0 if it left in good order."""
    settings = loaded.settings
    name = settings.worker.name or default_name()
    settings = replace(settings, worker=replace(settings.worker, name=name))
    logs.configure(settings.log.level, settings.log.format, role="worker", name=name)
    hosted = load(application)

    async def main(stop: Stop) -> int:
        registry = new_registry("worker")
        metrics = WorkerMetrics(registry)
        will = LastWill.from_environment()
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(opened_store(settings, registry))
            candidate = Candidate(store, settings, ControllerMetrics(registry))
            view = new_view(store, settings)
            lazy = LazyView(view)
            stack.push_async_callback(lazy.close)
            worker = Worker(
                store,
                hosted,
                settings,
                clock=SystemClock(),
                rng=random.Random(),
                metrics=metrics,
                explicit=_explicit_shape(loaded),
                version=version_of(),
                will=will,
                companion=candidate if settings.worker.controller else None,
            )

            is_begun = asyncio.Event()

            def why_not_ready() -> str:
                if stop.asked.is_set():
                    return "leaving"
                if worker.is_ready:
                    return "" if is_begun.is_set() else "no order of the controller names it yet"
                return "no session yet" if worker.session is None else "the session is not active"

            admin = await stack.enter_async_context(
                serving_admin(
                    settings,
                    role="worker",
                    name=name,
                    registry=registry,
                    ready=why_not_ready,
                    window=replace(window_of(view), open=lazy.open),
                )
            )
            if will is not None:
                await stack.enter_async_context(running(_stop_with_parent(will, stop)))
            async with stop.interrupting():
                await _joined(worker, settings, stack, is_fail_fast=is_fail_fast)
                worker.admin = admin.address
            if stop.asked.is_set():
                return 0
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(worker.run())
                begun = tasks.create_task(_say_when_ready(worker, admin, is_begun))
                asked = tasks.create_task(stop.asked.wait())
                await asyncio.wait((work, asked), return_when=asyncio.FIRST_COMPLETED)
                begun.cancel()
                asked.cancel()
                worker.stop()
            return 0 if work.result() else 1

    return run_until_stopped(main)


class Candidate:
    """Runs for the controller's seat beside each session of the worker."""

    def __init__(self, store: Store, settings: Settings, metrics: ControllerMetrics) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics

    def __call__(self, session: Session) -> Awaitable[None]:
        keyspace = Keyspace(self._settings.cluster.name)
        return Controller(
            self._store,
            keyspace,
            session,
            self._settings.controller,
            clock=SystemClock(),
            rng=random.Random(),
            metrics=self._metrics,
        ).run()


def _explicit_shape(loaded: Loaded) -> frozenset[str]:
    """The fields of the cluster's shape that somebody set on purpose."""
    return frozenset(name.partition(".")[2] for name in loaded.explicit if name.startswith("cluster."))


async def _joined(worker: Worker, settings: Settings, stack: AsyncExitStack, *, is_fail_fast: bool) -> None:
    """Enter the worker, for as long as it takes the store to answer."""
    while True:
        await reach(settings, is_fail_fast=is_fail_fast)
        try:
            await stack.enter_async_context(worker)
        except (StoreUnavailable, ClusterMissing) as exc:
            if is_fail_fast:
                raise
            log.warning("cannot join yet; trying on", extra={"reason": str(exc)})
            await asyncio.sleep(JOIN_PAUSE_S)
        else:
            return


async def _say_when_ready(worker: Worker, admin: AdminServer, is_begun: asyncio.Event) -> None:
    """Only a worker that can stand in for others is ready: whoever restarts a fleet one by one then stops the next."""
    while not worker.is_ready:  # noqa: ASYNC110  # it has no event; a session takes as long as it takes
        await asyncio.sleep(LOOK_S)
    await worker.wait_placed(PLACED_WAIT_S)
    is_begun.set()
    say_ready("worker", worker.name, worker.address, admin.address)


async def _stop_with_parent(will: LastWill, stop: Stop) -> None:
    await will.parent_died()
    stop.ask("the parent process died")
