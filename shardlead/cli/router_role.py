"""`shardlead router`: store, view, router and admin, put together."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack

from prometheus_client.exposition import generate_latest

from shardlead import log as logs
from shardlead.cli.parts import looked_up, new_registry, new_view, serving_admin, show_view, staleness, window_of
from shardlead.cli.running import (
    Stop,
    default_name,
    opened_store,
    port_taken,
    reach,
    run_until_stopped,
    running,
    say_ready,
)
from shardlead.clock import SystemClock
from shardlead.errors import ClusterMissing
from shardlead.loading import Loaded
from shardlead.metrics import RouterMetrics
from shardlead.router.counts import Counts
from shardlead.router.server import Router


def run_router(
    loaded: Loaded, name: str, *, is_fail_fast: bool, is_sharing_port: bool = False, parent_fd: int | None = None
) -> int:
    """A router until a signal comes; the exit code. `parent_fd`: the socket of a parent that has started several."""
    settings = loaded.settings
    name = name or default_name()
    logs.configure(settings.log.level, settings.log.format, role="router", name=name)

    async def main(stop: Stop) -> int:
        clock = SystemClock()
        registry = new_registry("router")
        counts = Counts()
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(opened_store(settings, registry))
            view = new_view(store, settings)
            router = Router(
                settings.router, view, clock=clock, counts=counts, share_port=is_sharing_port, tls=settings.tls
            )

            def upstream_connections() -> tuple[int, int]:
                pools = router.desk.pools.values() if router.address else ()
                return sum(len(pool.busy) for pool in pools), sum(len(pool.idle) for pool in pools)

            def why_not_ready() -> str:
                if stop.asked.is_set():
                    return "stopping"
                if not view.is_loaded:
                    return "the store has not answered yet"
                return "" if router.is_ready else view.map.fault or str(ClusterMissing(settings.cluster.name))

            show_view(view, registry)
            RouterMetrics(registry, counts, upstream_connections)
            admin = await stack.enter_async_context(
                serving_admin(
                    settings,
                    role="router",
                    name=name,
                    registry=registry,
                    ready=why_not_ready,
                    note=lambda: staleness(view),
                    window=window_of(view),
                )
            )
            serving: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            if parent_fd is not None:
                telling = _tell(parent_fd, serving, lambda: generate_latest(registry), stop)
                await stack.enter_async_context(running(telling))
            async with stop.interrupting():
                await reach(settings, is_fail_fast=is_fail_fast)
                try:
                    await stack.enter_async_context(router)
                except* OSError as group:
                    error = group.exceptions[0]
                    assert isinstance(error, OSError)
                    raise port_taken(error, "requests", "--port", settings.router.host, settings.router.port) from None
                await stack.enter_async_context(running(view.run()))
                await looked_up(view)
                if parent_fd is None:
                    say_ready("router", name, router.address, admin.address)
                else:
                    serving.set_result(router.address)
                await stop.asked.wait()
        return 0

    return run_until_stopped(main)


async def _tell(parent_fd: int, serving: "asyncio.Future[str]", page: Callable[[], bytes], stop: Stop) -> None:
    """Tell the parent (`router_group`) the address once it serves, answer it, and stop when it has gone."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=parent_fd))
    try:
        serving.add_done_callback(lambda done: writer.write(f"ready {done.result()}\n".encode()))
        while await reader.readline():
            text = page()
            writer.write(b"%d\n%b" % (len(text), text))
    except (ConnectionError, ValueError):
        pass
    finally:
        writer.close()
    stop.ask("the parent process has gone")
