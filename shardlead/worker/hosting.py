"""An `aiohttp.web.Application` of one's own as a worker: its routes, middlewares and signals, under the same guard.

    routes = web.RouteTableDef()

    @routes.post("/counters/{name}")
    async def add(request): ...lead_of(request)...

    def make():
        app = web.Application(middlewares=[...])
        app.add_routes(routes)
        return app

    worker = hosted(make, open=load, close=flush, fenced=True)      # shardlead worker MODULE:worker

Law: the application is started and cleaned up once for each process, before its first shard opens and after its last
has closed; `open`, `run`, `close` and `healthy` are called for each led shard, as the methods of a class are
(`application.Handles`). aiohttp's own server is not used, and of its application public names only.
"""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from shardlead.worker.leadership import Leadership

LEAD: Final[Any] = web.RequestKey("lead", Leadership) if hasattr(web, "RequestKey") else "shardlead.lead"
"""Where a request keeps its leadership (aiohttp has keys with a type from 3.14 on); tests without a worker may put one
there."""

Make = Callable[[], web.Application | Awaitable[web.Application]]
Hook = Callable[[Leadership], Awaitable[None] | None]


def lead_of(request: web.BaseRequest) -> Leadership:
    """The leadership under which this request is handled. Raises LookupError for a request that no worker's door has
    let in."""
    lead = request.get(LEAD)
    if isinstance(lead, Leadership):
        return lead
    raise LookupError("this request has no leadership: it came by no shardlead worker; see shardlead.hosted")


def hosted(
    app: web.Application | Make,
    *,
    open: Hook | None = None,  # noqa: A002  # the name that the method of a class has
    run: Hook | None = None,
    close: Hook | None = None,
    healthy: Callable[[Leadership], bool] | None = None,
    fenced: bool = True,
    idempotent: bool = False,
) -> "HostedApplication":
    """`app` as something that `shardlead worker` and `Worker` take. A function that makes it can be started again,
    as tests do; an application itself only once. Raises TypeError for what is neither, or for a hook that cannot be
    called.

    `open(lead)`: barrier, then load; before any request of the shard. What it keeps for the shard goes into
    `lead.state`. `run(lead)`: background work while leading. `close(lead)`: exactly once. `healthy(lead)`: three times
    False gives the shard up. `fenced` and `idempotent` as on a class. The largest body is the worker's
    (`worker.body_bytes_max`), not the application's `client_max_size`.
    """
    if not isinstance(app, web.Application) and not callable(app):
        raise TypeError(f"hosted() takes an aiohttp.web.Application or a function that makes one, not {app!r}")
    hooks = {"open": open, "run": run, "close": close, "healthy": healthy}
    for name, hook in hooks.items():
        if hook is not None and not callable(hook):
            raise TypeError(f"hosted({name}=…) takes a function of a Leadership, not {hook!r}")
    return HostedApplication(
        app, {name: hook for name, hook in hooks.items() if hook}, fenced=fenced, idempotent=idempotent
    )


class HostedApplication:
    """An async context manager that yields what makes an object of each led shard; see `hosted`."""

    def __init__(
        self,
        app: web.Application | Make,
        hooks: dict[str, Callable[[Leadership], Any]],
        *,
        fenced: bool,
        idempotent: bool,
    ) -> None:
        self.fenced = fenced
        self.idempotent = idempotent
        self._app = app
        self._hooks = hooks
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        return f"<HostedApplication of {self._app!r} with {', '.join(self._hooks) or 'nothing'}>"

    async def __aenter__(self) -> Callable[[Leadership], object]:
        app = self._app
        if not isinstance(app, web.Application):
            made = app()
            app = await made if inspect.isawaitable(made) else made
            if not isinstance(app, web.Application):
                raise TypeError(f"the function given to hosted() made no aiohttp.web.Application, but {app!r}")
        self._runner = web.AppRunner(app)
        try:
            await self._runner.setup()
        except BaseException:  # cancelled, too: without __aenter__ nobody calls __aexit__, and hooks have begun
            await self._runner.cleanup()
            raise
        server = self._runner.server
        assert server is not None, "it is set up"
        handle = server.request_handler
        members = {name: _asking(hook) for name, hook in self._hooks.items()}
        kind = type("HostedShard", (_Shard,), members)  # it has the methods that it has hooks for, and no others

        def make(lead: Leadership) -> object:
            return kind(lead, handle)

        return make

    async def __aexit__(self, *exc_info: object) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()


class _Shard:
    """What stands for the application in one led shard."""

    def __init__(self, lead: Leadership, handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        self.lead = lead
        self._handle = handle

    async def handle(self, request: web.Request) -> web.StreamResponse:
        request[LEAD] = self.lead
        return await self._handle(request)


def _asking(hook: Callable[[Leadership], Any]) -> Callable[[_Shard], Any]:
    def method(self: _Shard) -> Any:
        return hook(self.lead)

    return method
