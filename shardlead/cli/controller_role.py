"""`shardlead controller`: store, controller and admin, put together."""

import random
from contextlib import AsyncExitStack
from dataclasses import replace

from shardlead import log as logs
from shardlead.cli.parts import LazyView, new_registry, new_view, serving_admin, window_of
from shardlead.cli.running import Stop, default_name, opened_store, reach, run_until_stopped, running, say_ready
from shardlead.clock import SystemClock
from shardlead.controller.alone import run_alone
from shardlead.loading import Loaded
from shardlead.metrics import ControllerMetrics


def run_controller(loaded: Loaded, name: str, *, is_fail_fast: bool) -> int:
    """A controller until a signal comes; the exit code."""
    settings = loaded.settings
    name = name or default_name()
    logs.configure(settings.log.level, settings.log.format, role="controller", name=name)

    async def main(stop: Stop) -> int:
        registry = new_registry("controller")
        metrics = ControllerMetrics(registry)
        has_store = False

        def why_not_ready() -> str:
            if stop.asked.is_set():
                return "stopping"
            return "" if has_store else "the store has not answered yet"

        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(opened_store(settings, registry))
            view = new_view(store, settings)
            lazy = LazyView(view)
            stack.push_async_callback(lazy.close)
            admin = await stack.enter_async_context(
                serving_admin(
                    settings,
                    role="controller",
                    name=name,
                    registry=registry,
                    ready=why_not_ready,
                    window=replace(window_of(view), open=lazy.open),
                )
            )
            async with stop.interrupting():
                await reach(settings, is_fail_fast=is_fail_fast)
                has_store = True
                work = run_alone(store, settings, name=name, clock=SystemClock(), rng=random.Random(), metrics=metrics)
                await stack.enter_async_context(running(work))
                say_ready("controller", name, "", admin.address)
                await stop.asked.wait()
        return 0

    return run_until_stopped(main)
