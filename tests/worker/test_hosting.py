"""An aiohttp application of one's own: what holds for a class at the worker's door holds for it, scene by scene, and
what aiohttp promises its applications holds as well."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from shardlead.errors import ConfigError
from shardlead.worker.application import Application
from shardlead.worker.hosting import HostedApplication, hosted, lead_of
from shardlead.worker.leadership import Leadership
from tests.worker import test_http, test_http_guard
from tests.worker.stage import EPOCH, KEY, LOOPS, SHARD, Stage, peer, play, staged, words

pytestmark = pytest.mark.parametrize("loop", LOOPS)


def as_hosted(stage: Stage) -> HostedApplication:
    """The stage's script as a web.Application with one route and a middleware."""

    async def handle(request: web.Request) -> web.StreamResponse:
        stage.handled.append(f"{request.method} {request.path}")
        return await stage.script[request.path](lead_of(request), request)

    @web.middleware
    async def passing(request: web.Request, handler: Any) -> web.StreamResponse:
        answer: web.StreamResponse = await handler(request)
        return answer

    async def opened(lead: Leadership) -> None:
        lead.note_barrier()
        await stage.may_open.wait()

    app = web.Application(middlewares=[passing])
    app.router.add_route("*", "/{tail:.*}", handle)
    return hosted(app, open=opened, close=lambda lead: stage.closed.append(lead.epoch))


@pytest.fixture(autouse=True)
def _in_the_classes_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for scenes in (test_http, test_http_guard):
        monkeypatch.setattr(scenes, "staged", partial(staged, subject=as_hosted))


SCENES: dict[str, Any] = {
    name: value
    for scenes in (test_http, test_http_guard)
    for name, value in vars(scenes).items()
    if name.startswith("test_")
}
globals().update(SCENES)


def hosting(make: Callable[[], web.Application], **options: Any) -> Callable[[Stage], object]:
    """A subject for `staged` that needs nothing of the stage."""

    def subject(stage: Stage) -> object:
        stage.may_open.set()
        return hosted(make, open=Leadership.note_barrier, **options)

    return subject


def test_there_are_scenes(loop: str) -> None:
    """None of them was lost on the way into this module."""
    assert len(SCENES) > 40


def test_signals_come_once_and_in_order(loop: str) -> None:
    """Startup before the first open, cleanup after the last close, each once for the process; open, run and close once
    for each led shard; each request by the middlewares, and its answer by on_response_prepare."""
    said: list[str] = []

    def make() -> web.Application:
        async def context(app: web.Application) -> AsyncIterator[None]:
            said.append("startup")
            yield
            said.append("cleanup")

        async def prepared(request: web.Request, answer: web.StreamResponse) -> None:
            answer.headers["X-Prepared"] = str(lead_of(request).shard)

        @web.middleware
        async def naming(request: web.Request, handler: Any) -> web.StreamResponse:
            said.append(f"middleware {lead_of(request).shard}")
            answer: web.StreamResponse = await handler(request)
            return answer

        async def handle(request: web.Request) -> web.Response:
            return web.Response(text=f"{request.match_info['name']} {lead_of(request).state}")

        app = web.Application(middlewares=[naming])
        app.cleanup_ctx.append(context)
        app.on_response_prepare.append(prepared)
        app.router.add_get("/things/{name}", handle)
        return app

    async def opened(lead: Leadership) -> None:
        lead.note_barrier()
        lead.state = f"state of {lead.shard}"
        said.append(f"open {lead.shard}")

    async def ran(lead: Leadership) -> None:
        said.append(f"run {lead.shard}")
        await asyncio.Event().wait()

    async def closed(lead: Leadership) -> None:
        said.append(f"close {lead.shard}")

    async def main() -> None:
        application = hosted(make, open=opened, run=ran, close=closed)
        async with staged(subject=lambda _: application) as stage, peer(stage) as router:
            await stage.lead(SHARD + 1)
            answer = await router.ask("GET", "/things/a")
            assert (answer.status, answer.body) == (200, f"a state of {SHARD}".encode())
            assert answer.headers["x-prepared"] == str(SHARD)
            assert (await router.ask("GET", "/nothing")).status == 404
            assert (await router.ask("POST", "/things/a")).status == 405
        await asyncio.sleep(0)

    for _ in range(2):  # a function can make it again
        said.clear()
        play(loop, main())
        assert said[0] == "startup"
        assert said[-1] == "cleanup"
        assert sorted(said[1:-1]) == sorted(
            [f"{what} {shard}" for what in ("open", "run", "close") for shard in (SHARD, SHARD + 1)]
            + [f"middleware {SHARD}"] * 3
        )


def test_an_announced_body_is_asked_for_once(loop: str) -> None:
    """The runtime tells an expecting peer to go on; the application's own expect handler does not do it again, and
    may still refuse."""

    def make() -> web.Application:
        async def handle(request: web.Request) -> web.Response:
            return web.Response(body=await request.read())

        async def refusing(request: web.Request) -> web.StreamResponse:
            raise web.HTTPRequestEntityTooLarge(max_size=1, actual_size=2)

        app = web.Application()
        app.router.add_post("/x", handle)
        app.router.add_post("/y", handle, expect_handler=refusing)
        return app

    async def main() -> None:
        async with staged(subject=hosting(make)) as stage, peer(stage) as router:
            headers = {**words(), "Expect": "100-continue", "Content-Length": "3"}
            router.send("POST", "/x", headers)
            assert (await router.head()).status == 100
            router.writer.write(b"abc")
            answer = await router.answer()
            assert (answer.status, answer.body) == (200, b"abc")
            router.send("POST", "/y", headers)
            assert (await router.head()).status == 100
            assert (await router.answer()).status == 413

    play(loop, main())


def test_sub_applications_and_websockets(loop: str) -> None:
    """Both work, and know their leadership."""

    def make() -> web.Application:
        async def talk(request: web.Request) -> web.WebSocketResponse:
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                await socket.send_str(f"{lead_of(request).epoch}: {message.data}")
            return socket

        inner = web.Application()
        inner.router.add_get("/talk", talk)
        app = web.Application()
        app.add_subapp("/inner", inner)
        return app

    async def main() -> None:
        async with (
            staged(subject=hosting(make)) as stage,
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{stage.url}/inner/talk", headers=words()) as socket,
        ):
            await socket.send_str("hello")
            assert await socket.receive_str() == f"{EPOCH}: hello"
            stage.hand_over()
            assert (await socket.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)

    play(loop, main())


def test_what_fails_to_start_is_cleaned_up(loop: str) -> None:
    """An application whose startup raises ends the start of the worker with that error, and its contexts end."""
    said: list[str] = []

    def make() -> web.Application:
        async def context(app: web.Application) -> AsyncIterator[None]:
            yield
            said.append("cleanup")

        async def fails(app: web.Application) -> None:
            raise RuntimeError("no database")

        app = web.Application()
        app.cleanup_ctx.append(context)
        app.on_startup.append(fails)
        return app

    async def main() -> None:
        with pytest.raises(RuntimeError, match="no database"):
            async with Application(hosted(make)).factory():
                pass
        assert said == ["cleanup"]

    play(loop, main())


def test_what_it_says_of_itself(loop: str) -> None:
    """`fenced` and `idempotent` as given; a shard has the methods for which there are hooks, and no others."""

    async def main() -> None:
        bare = Application(hosted(web.Application(), fenced=False, idempotent=True))
        async with bare.factory() as make:
            assert (make.fenced, make.idempotent) == (False, True)
            shard = make(None)
            assert (shard.has_run, shard.has_healthy, shard.healthy()) == (False, False, True)
        whole = Application(hosted(web.Application, run=Leadership.note_barrier, healthy=bool))
        async with whole.factory() as make:
            shard = make(None)
            assert (make.fenced, shard.has_run, shard.has_healthy, shard.healthy()) == (True, True, True, False)

    play(loop, main())


def test_what_is_wrong_is_said(loop: str) -> None:
    """A bare application, something else, a hook that is none, a flag that is none, a request from elsewhere."""
    with pytest.raises(ConfigError, match=r"shardlead\.hosted"):
        Application(web.Application())
    with pytest.raises(TypeError, match="function that makes one"):
        hosted("app")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(TypeError, match="open=…"):
        hosted(web.Application(), open=3)  # type: ignore[arg-type]  # as above
    with pytest.raises(ConfigError, match="True or False"):
        Application(hosted(web.Application(), fenced="yes"))  # type: ignore[arg-type]  # as above
    with pytest.raises(LookupError, match="hosted"):
        lead_of({})  # type: ignore[arg-type]  # as above

    async def main() -> None:
        with pytest.raises(TypeError, match="made no"):
            async with Application(hosted(lambda: 3)).factory():  # type: ignore[arg-type,return-value]  # as above
                pass

    play(loop, main())


def test_an_exception_of_a_handler_is_not_shown(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """A 500 of the runtime's, as with a class; the log has it."""

    def make() -> web.Application:
        async def fails(request: web.Request) -> web.Response:
            raise RuntimeError(f"secret of {KEY}")

        app = web.Application()
        app.router.add_get("/x", fails)
        return app

    async def main() -> None:
        async with staged(subject=hosting(make)) as stage, peer(stage) as router:
            answer = await router.ask("GET", "/x")
            assert answer.status == 500
            assert b"secret" not in answer.body

    with caplog.at_level(logging.ERROR):
        play(loop, main())
    assert f"secret of {KEY}" in caplog.text
