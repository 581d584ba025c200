"""The admin server of a role: is it alive, is it ready and if not why, its metrics, its map, and changes as they come.

    /livez      200 while the process is worth keeping; 503 with the reason
    /readyz     200 while it should be sent work; 503 with the reason
    /metrics    Prometheus' text format
    /v1/map     who leads what, as this process sees it
    /v1/events  changes as JSON lines, one line each, for as long as the client listens

It never decides and never asks the store: what it shows is handed in as plain callables. It has no authentication
and changes nothing, so its port belongs on an inner network.

Law: a slow listener of /v1/events is cut off after EVENTS_WAITING_MAX lines; it never holds anybody up.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from shardlead.admin.pages import event_lines, map_page
from shardlead.clock import Clock
from shardlead.config import AdminSettings
from shardlead.core.shardmap import Delta, ShardMap

log = logging.getLogger("shardlead.admin")

EVENTS_WAITING_MAX: Final = 100_000
CLOSE_TIMEOUT_S: Final = 1.0


def _good() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Window:
    """What a process lets be seen of its view: anything with these three, `cluster.view.View` among them."""

    shard_map: Callable[[], ShardMap]
    subscribe: Callable[[Callable[[Delta], None]], Callable[[], None]]
    age_s: Callable[[], float]
    is_fresh: Callable[[], bool]
    open: Callable[[], Awaitable[object]] | None = None
    """Awaited before a first look, where a process follows the map only if somebody wants to see it."""


class AdminServer:
    """One role's admin server: `start`, then `close`.

    `live` and `ready` return "" for yes, else the reason why not; `note` what is to be known though the answer is yes
    (a router that goes on with its last view). Without a `window` there is no map (404). `metrics` makes the page of
    metrics where it is not that of `registry` alone (several processes).
    """

    def __init__(
        self,
        settings: AdminSettings,
        *,
        role: str,
        name: str,
        registry: CollectorRegistry,
        clock: Clock,
        live: Callable[[], str] = _good,
        ready: Callable[[], str] = _good,
        note: Callable[[], str] = _good,
        window: Window | None = None,
        metrics: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        self._settings = settings
        self._role = role
        self._name = name
        self._registry = registry
        self._clock = clock
        self._live = live
        self._ready = ready
        self._note = note
        self._window = window
        self._metrics_page = metrics
        self._runner: web.AppRunner | None = None
        self._listeners: set[asyncio.Task[Any]] = set()
        self.address = ""
        """host:port it listens on; "" before `start` and where there is none."""

    def __repr__(self) -> str:
        return f"<AdminServer of {self._role} {self._name} at {self.address or 'no port'}>"

    async def start(self) -> str:
        """Listen, and return the address; "" if the settings want none (port -1). Raises OSError if it cannot."""
        if self._settings.port < 0:
            return ""
        app = web.Application()
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/v1/map", self._map),
                web.get("/v1/events", self._events),
            ]
        )
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, handle_signals=False, shutdown_timeout=CLOSE_TIMEOUT_S
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._settings.host, self._settings.port)
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        host, port = runner.addresses[0][:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self.address

    async def close(self) -> None:
        """Stop listening, and end what is being answered. Idempotent."""
        for task in self._listeners:
            task.cancel()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    # --- pages

    async def _index(self, _request: web.Request) -> web.Response:
        return _json({"role": self._role, "name": self._name, "pages": list(PAGES)})

    async def _livez(self, _request: web.Request) -> web.Response:
        return self._judged("live", self._live())

    async def _readyz(self, _request: web.Request) -> web.Response:
        return self._judged("ready", self._ready() or self._live())

    def _judged(self, what: str, reason: str) -> web.Response:
        page = {
            what: not reason,
            "reason": reason or None,
            "note": self._note() or None,
            "role": self._role,
            "name": self._name,
        }
        return _json(page, status=503 if reason else 200)

    async def _metrics(self, _request: web.Request) -> web.Response:
        page = generate_latest(self._registry) if self._metrics_page is None else await self._metrics_page()
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _map(self, _request: web.Request) -> web.Response:
        window = await self._opened_window()
        page = map_page(
            window.shard_map(), role=self._role, name=self._name, age_s=window.age_s(), is_fresh=window.is_fresh()
        )
        return _json(page)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        window = await self._opened_window()
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        waiting: deque[bytes] = deque()
        wake = asyncio.Event()

        def on_change(delta: Delta) -> None:
            lines = event_lines(delta, window.shard_map().revision, self._clock.wall_s())
            waiting.extend(orjson.dumps(line) + b"\n" for line in lines)
            wake.set()

        unsubscribe = window.subscribe(on_change)  # before the head goes out: who has the head misses nothing
        task = asyncio.current_task()
        assert task is not None
        self._listeners.add(task)
        try:
            await answer.prepare(request)
            while True:
                await wake.wait()
                wake.clear()
                if len(waiting) > EVENTS_WAITING_MAX:
                    log.warning("listener cut off", extra={"waiting": len(waiting), "peer": request.remote})
                    break
                body = b"".join(waiting)
                waiting.clear()
                await answer.write(body)
        except ConnectionError:
            pass  # it went away, which is how such a stream ends
        finally:
            unsubscribe()
            self._listeners.discard(task)
        return answer

    async def _opened_window(self) -> Window:
        if self._window is None:
            raise web.HTTPNotFound
        if self._window.open is not None:
            await self._window.open()
        return self._window


PAGES: Final = ("/livez", "/readyz", "/metrics", "/v1/map", "/v1/events")


def _json(page: Mapping[str, Any], status: int = 200) -> web.Response:
    body = orjson.dumps(page, option=orjson.OPT_NON_STR_KEYS) + b"\n"
    return web.Response(
        body=body, status=status, content_type="application/json", headers={"Cache-Control": "no-store"}
    )
