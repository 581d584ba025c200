"""The load driver tells the truth: every request is sent once, and what goes wrong stands in its ledger."""

import asyncio
import itertools

from aiohttp import web

from tests.support.load import Load, Mix


async def _run(handler: web.RequestHandler | object, mix: Mix, answers: int) -> Load:
    app = web.Application(client_max_size=8 * 1024 * 1024)
    app.router.add_route("*", "/counters/{name}", handler)  # type: ignore[arg-type]  # each test's own handler
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with Load("{}:{}".format(*runner.addresses[0][:2]), mix) as load:
            await load.answered(answers, timeout_s=20)
        return load
    finally:
        await runner.cleanup()


def test_a_good_service_gets_a_clean_ledger() -> None:
    """Counts, values, leaderships and 1 MiB bodies agree when nothing goes wrong."""
    counts: dict[str, int] = {}

    async def count(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        await request.read()
        if request.method == "POST":
            counts[name] = counts.get(name, 0) + 1
        return web.json_response({"name": name, "value": counts.get(name, 0), "shard": 1, "epoch": 2, "worker": "w"})

    load = asyncio.run(_run(count, Mix(rate=400, keys=7, big_share=0.1), 200))
    ledger = load.ledger
    assert ledger.failures() == [], ledger.summary()
    assert ledger.lost(counts) == []
    assert ledger.split_leaderships() == []
    assert ledger.values_answered_twice() == []
    assert {entry.body_bytes for entry in ledger.entries} == {0, 1_048_576}
    assert {entry.method for entry in ledger.entries} == {"GET", "POST"}


def test_every_wrong_answer_is_seen() -> None:
    """A dropped connection, an error and a lost increment are failures; none is hidden by sending again."""
    turn = itertools.count()
    stored: dict[str, int] = {}

    async def stumble(request: web.Request) -> web.Response:
        name, number = request.match_info["name"], next(turn)
        if number % 10 == 3:
            assert request.transport is not None
            request.transport.abort()
        if number % 10 == 5:
            problem = {"type": "https://shardlead.dev/problems/not-led", "detail": "held for 15 s"}
            return web.json_response(problem, status=503)
        return web.json_response({"name": name, "value": 1, "shard": 1, "epoch": 2, "worker": f"w{number % 2}"})

    load = asyncio.run(_run(stumble, Mix(rate=400, keys=3), 100))
    ledger = load.ledger
    reasons = {(entry.status, entry.error) for entry in ledger.failures()}
    assert (503, "not-led") in reasons
    assert any(status == 0 for status, _ in reasons)
    assert len(ledger.failures()) >= 20
    assert ledger.lost(stored) != []
    assert ledger.split_leaderships() == ["shard 1 epoch 2: ['w0', 'w1']"]
    assert ledger.values_answered_twice() != []
    assert "503 not-led" in ledger.summary()
