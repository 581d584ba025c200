"""The parts that roles have in common: admin server, view, metrics of both.

Law: the admin server is the first to come and the last to go, so that a role that waits for its store can say so.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from prometheus_client import CollectorRegistry, disable_created_metrics

from shardlead import metrics as all_metrics
from shardlead.admin.server import AdminServer, Window
from shardlead.cli.running import port_taken
from shardlead.cli.version import version_of
from shardlead.clock import SystemClock
from shardlead.cluster.view import View
from shardlead.config import Settings
from shardlead.core.keyspace import Keyspace
from shardlead.core.shardmap import Delta
from shardlead.errors import ClusterMissing, StoreUnavailable
from shardlead.store.base import Store

log = logging.getLogger("shardlead.cli")

VIEW_WAIT_S: Final = 2.0
READY_SAID_AFTER_S: Final = 5.0


def new_registry(role: str) -> CollectorRegistry:
    """The registry of this process, which is all ours: without the `_created` series, which only double the page."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types for it
    return all_metrics.new_registry(role, version_of())


@asynccontextmanager
async def serving_admin(
    settings: Settings,
    *,
    role: str,
    name: str,
    registry: CollectorRegistry,
    ready: Callable[[], str],
    window: Window,
    note: Callable[[], str] = str,
    metrics: Callable[[], Awaitable[bytes]] | None = None,
) -> AsyncIterator[AdminServer]:
    """A role's admin server. Raises CommandError if its port is taken."""
    admin = AdminServer(
        settings.admin,
        role=role,
        name=name,
        registry=registry,
        clock=SystemClock(),
        ready=ready,
        note=note,
        window=window,
        metrics=metrics,
    )
    try:
        await admin.start()
    except OSError as exc:
        what = "health and metrics"
        raise port_taken(exc, what, "--admin-port", settings.admin.host, settings.admin.port) from exc
    try:
        yield admin
    finally:
        await admin.close()


class LazyView:
    """A view that is followed from the first time somebody wants to see it: a worker needs none for its work."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to follow, and wait a little for the first load."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._view.run(), name="lazy view")
        try:
            await self._view.wait_ready(VIEW_WAIT_S)
        except (StoreUnavailable, ClusterMissing):
            return  # what is known is shown

    async def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def window_of(view: View) -> Window:
    """What the admin server shows of a view."""
    return Window(lambda: view.map, view.subscribe, lambda: view.age_s, lambda: view.is_fresh)


def show_view(view: View, registry: CollectorRegistry) -> None:
    """The view's metrics, read when somebody looks."""
    shown = all_metrics.ViewMetrics(registry)
    shown.age.set_function(lambda: view.age_s)
    shown.is_fresh.set_function(lambda: view.is_fresh)
    shown.revision.set_function(lambda: view.map.revision)
    shown.led_shards.set_function(lambda: sum(view.map.led.values()))
    shown.shards.set_function(lambda: 0 if view.map.meta is None else view.map.meta.shards)
    shown.workers.set_function(lambda: len(view.map.workers))

    def on_change(delta: Delta) -> None:
        shown.leader_changes.inc(len(delta.leaders))
        shown.resets.inc(delta.is_reset)

    view.subscribe(on_change)


def new_view(store: Store, settings: Settings) -> View:
    return View(store, Keyspace(settings.cluster.name), clock=SystemClock(), rng=random.Random())


async def looked_up(view: View) -> None:
    """Return once keys can be looked up; say what is missing until then."""
    while True:
        try:
            await view.wait_ready(READY_SAID_AFTER_S)
        except (StoreUnavailable, ClusterMissing) as exc:
            log.warning("not ready yet; waiting on", extra={"reason": str(exc)})
        else:
            return


def staleness(view: View) -> str:
    if not view.is_ready or view.is_fresh:
        return ""
    return f"the store is silent: going on with the map of {view.age_s:.0f} s ago"
