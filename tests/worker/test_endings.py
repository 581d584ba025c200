"""How work ends: writes of unknown outcome, drains with threads and background work, work that enters twice."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
from aiohttp import web

from shardlead.core import ownership
from shardlead.core.keyspace import decode
from shardlead.core.model import History
from shardlead.core.ownership import Serving
from shardlead.errors import Fenced, LeadershipError, LeadershipLost, NotLeading, WriteUnknown, weightiest
from shardlead.worker.leadership import Leadership
from shardlead.worker.objects import REFUSALS_MAX
from tests.worker.scene import SHORT, Scene, Script, play
from tests.worker.stage import EPOCH, SHARD, staged, until, words
from tests.worker.stage import play as play_http

LATE_S = 5.0


# --- unknown outcomes ---


@pytest.mark.parametrize("is_draining", [False, True])
def test_background_work_that_does_not_know_ends_all_work_of_its_epoch(is_draining: bool) -> None:
    """What its write may yet undo must not be acknowledged: a request that runs beside it is cancelled, whether the
    shard serves or drains."""

    async def act(scene: Scene) -> None:
        go = asyncio.Event()
        begun: list[int] = []

        async def run(lead: Leadership) -> None:
            begun.append(lead.epoch)
            if len(begun) == 1:
                await go.wait()
                raise WriteUnknown(lead.shard, lead.epoch, "no answer")

        one = await scene.start("w1", Script(run=run), drain_timeout_s=2 * LATE_S)
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        epoch = one.epoch(0)

        async def work() -> None:
            async with one.request(0) as subject:
                if is_draining:
                    await scene.assign({0: ("w2", "w1")})
                    await asyncio.wait_for(subject.lead.draining.wait(), LATE_S)
                go.set()
                await asyncio.sleep(LATE_S)

        with pytest.raises(LeadershipLost):
            await work()
        await scene.until(lambda: scene.epoch(0) > epoch)
        await scene.until_serving("w2" if is_draining else "w1", 0)

    play("embedded", act)


@pytest.mark.parametrize("how", ["itself", "in a group", "as the cause", "while it was handled"])
def test_an_unknown_outcome_counts_however_it_is_wrapped(how: str) -> None:
    """The shard goes on under a new epoch; and the caller, who ends by itself, is not cancelled for it."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0)
        lead = scene.lead(0)
        unknown = WriteUnknown(0, lead.epoch, "no answer")

        async def work() -> None:
            async with one.request(0):
                match how:
                    case "in a group":
                        raise ExceptionGroup("of a TaskGroup", [ValueError(), ExceptionGroup("inner", [unknown])])
                    case "as the cause":
                        raise web.HTTPServiceUnavailable from unknown
                    case "while it was handled":
                        try:
                            raise unknown
                        except WriteUnknown:
                            raise web.HTTPServiceUnavailable  # noqa: B904  # this is what applications do
                    case _:
                        raise unknown

        with pytest.raises((WriteUnknown, ExceptionGroup, web.HTTPServiceUnavailable)):
            await work()
        assert not lead.is_valid(0.0)
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        await scene.until(lambda: one.epoch(0) > lead.epoch)
        await scene.until_serving("w1", 0)

    play("embedded", act)


def test_an_error_about_another_shard_costs_this_one_nothing() -> None:
    """Raised through work of a shard that it says nothing of."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0)
        epoch = one.epoch(0)
        with pytest.raises(Fenced):
            async with one.request(0):
                raise Fenced(5, epoch, None)
        await scene.settle()
        assert scene.lead(0).is_valid(0.0)
        assert one.epoch(0) == epoch

    play("embedded", act)


def test_a_fence_says_it_whatever_the_application_makes_of_the_error() -> None:
    """`note_unknown`: the application has swallowed the error, and its request goes on."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0)
        epoch = one.epoch(0)
        lead = scene.lead(0)

        async def work() -> None:
            async with one.request(0):
                lead.note_unknown("no answer")
                await asyncio.sleep(LATE_S)

        with pytest.raises(LeadershipLost):
            await work()
        await scene.until(lambda: one.epoch(0) > epoch)
        lead.note_unknown("told once more, of an epoch that is over")
        await scene.until_serving("w1", 0)

    play("embedded", act)


def test_background_work_that_never_knows_gives_its_shard_up() -> None:
    """New epochs in a row have a bound; then another worker leads."""

    async def act(scene: Scene) -> None:
        epochs: list[int] = []

        async def run(lead: Leadership) -> None:
            if lead.worker == "w1":
                epochs.append(lead.epoch)
                raise WriteUnknown(lead.shard, lead.epoch, "no answer")

        one = await scene.start("w1", Script(run=run))
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until(lambda: len(epochs) > REFUSALS_MAX)
        await scene.until(lambda: scene.leader(0) == "w2")
        assert one.host.backoff_until_ns(0) > one.clock.now_ns(), "it has failed here, and is not tried again at once"

    play("embedded", act)


def test_the_weightiest_error_is_told() -> None:
    """An unknown outcome before a refusal before a loss; nothing for others; and circles end."""
    lost, fenced, unknown = LeadershipLost(1, 2, "x"), Fenced(1, 2, 3), WriteUnknown(1, 2, "x")
    assert weightiest(ExceptionGroup("", [lost, fenced, unknown])) is unknown
    assert weightiest(ExceptionGroup("", [lost, fenced])) is fenced
    assert weightiest(lost) is lost
    others: list[LeadershipError | ValueError] = [ValueError(), NotLeading(1, 2, reason="stale")]
    assert [weightiest(error) for error in others] == [None, None]
    assert weightiest(None) is None
    one, two = ValueError(), ValueError()
    one.__cause__, two.__cause__ = two, one
    assert weightiest(one) is None


@pytest.mark.parametrize("how", ["as the cause", "in a group"])
def test_a_handler_that_wraps_an_unknown_outcome_is_answered_and_its_epoch_ends(how: str) -> None:
    """The application's own answer is sent as it is; without one nobody knows. The connection stays either way."""

    async def main() -> None:
        async with staged() as stage, aiohttp.ClientSession() as session:

            @stage.on("/x")
            async def wraps(lead: Leadership, _request: web.Request) -> web.Response:
                if lead.epoch > EPOCH:
                    return web.Response()
                unknown = WriteUnknown(SHARD, EPOCH, "no answer")
                if how == "in a group":
                    raise ExceptionGroup("of a TaskGroup", [unknown])
                raise web.HTTPServiceUnavailable(text="sorry") from unknown

            async with session.post(f"{stage.url}/x", headers=words()) as answer:
                if how == "in a group":
                    assert (answer.status, answer.headers["Shardlead-Outcome"]) == (502, "unknown")
                else:
                    assert (answer.status, await answer.text()) == (503, "sorry")
                await answer.read()
            await until(lambda: stage.host.state(SHARD) == Serving(EPOCH + 1))
            async with session.post(f"{stage.url}/x", headers=words(epoch=EPOCH + 1)) as answer:
                assert answer.status == 200

    play_http("asyncio", main())


# --- drains ---


def test_work_that_a_stop_cancels_during_a_drain_has_not_ended_cleanly() -> None:
    """Of an unfenced class, run() was cancelled in the middle: whoever leads next waits, though the drain, too, saw it
    end."""

    async def act(scene: Scene) -> None:
        async def run(_lead: Leadership) -> None:
            await asyncio.Event().wait()

        one = await scene.start("w1", Script(fenced=False, run=run), lease=SHORT, cancel_grace_s=1.0)
        await scene.start("w2", Script(fenced=False), lease=SHORT)
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        await scene.assign({0: ("w2", "w1")})
        await scene.until(lambda: isinstance(one.host.state(0), ownership.Draining))
        assert one.worker.session is not None
        one.worker.session.doubt("the test")
        began = time.monotonic()
        await scene.until(lambda: scene.leader(0) == "w2")
        found = scene.kv(scene.keys.history(0))
        assert found is not None
        history = decode(History, found.key, found.value)
        assert history is not None
        assert not history.clean
        await scene.until_serving("w2", 0)
        assert time.monotonic() - began >= SHORT.ttl_s + SHORT.margin_s

    play("embedded", act)


@pytest.mark.parametrize("is_fenced", [True, False])
def test_a_drain_waits_for_threads(is_fenced: bool) -> None:
    """A blocking function that takes longer than the grace: it ends before the shard is passed on, and the process of
    an unfenced class lives on."""

    async def act(scene: Scene) -> None:
        ended: list[float] = []

        def work() -> None:
            time.sleep(1.0)
            ended.append(time.monotonic())

        async def run(lead: Leadership) -> None:
            while not lead.draining.is_set():
                await lead.run_blocking(work)

        one = await scene.start("w1", Script(fenced=is_fenced, run=run), cancel_grace_s=0.2)
        await scene.start("w2", Script(fenced=is_fenced))
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        await scene.until(lambda: bool(scene.lead(0).threads))
        await scene.assign({0: ("w2", "w1")})
        await scene.until(lambda: scene.leader(0) == "w2")
        assert ended, "it was passed on while the function ran"
        await scene.until_serving("w2", 0)
        assert one.exits == []

    play("embedded", act)


def test_a_function_whose_thread_has_not_begun_is_not_run_after_the_end() -> None:
    """Cancelled, or of a lost leadership: it is no work of that leadership any more."""

    class Always:
        def is_valid(self, need_s: float) -> bool:
            return need_s >= 0.0

    async def main() -> None:
        ran: list[str] = []
        may_end = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            lead = Leadership(1, 2, "w1", Always(), threads)
            running = asyncio.create_task(lead.run_blocking(may_end.wait, 10.0))
            cancelled = asyncio.create_task(lead.run_blocking(ran.append, "cancelled"))
            lost = asyncio.create_task(lead.run_blocking(ran.append, "lost"))
            await asyncio.sleep(0)
            assert len(lead.threads) == 3
            cancelled.cancel()
            await asyncio.wait({cancelled})
            assert len(lead.threads) == 2
            lead.revoke("the test")
            may_end.set()
            assert await running
            with pytest.raises(LeadershipLost):
                await lost
        assert ran == []
        assert not lead.threads

    asyncio.run(main())


def test_a_pool_that_ends_drops_cancelled_functions_without_a_word() -> None:
    """A worker stops while functions that nobody waits for are still queued: no error is told of."""

    class Always:
        def is_valid(self, need_s: float) -> bool:
            return need_s >= 0.0

    async def main() -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
        may_end = threading.Event()
        threads = ThreadPoolExecutor(1)
        lead = Leadership(1, 2, "w1", Always(), threads)
        running = asyncio.create_task(lead.run_blocking(may_end.wait, 10.0))
        cancelled = asyncio.create_task(lead.run_blocking(may_end.wait, 10.0))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        threads.shutdown(wait=False, cancel_futures=True)
        may_end.set()
        assert await running
        assert told == []

    asyncio.run(main())


def test_threads_of_the_application_keep_nobody_elses_work_waiting() -> None:
    """Look-ups of names and the controller's planning use the loop's own threads."""

    async def act(scene: Scene) -> None:
        may_end = threading.Event()
        one = await scene.start("w1")
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0)
        async with one.request(0) as subject:
            work = [asyncio.create_task(subject.lead.run_blocking(may_end.wait, 20.0)) for _ in range(100)]
            await asyncio.sleep(0)
            try:
                await asyncio.wait_for(asyncio.get_running_loop().getaddrinfo("localhost", 1), 5.0)
                await asyncio.wait_for(asyncio.to_thread(int), 5.0)
            finally:
                may_end.set()
            assert all(await asyncio.gather(*work))

    play("embedded", act)


def test_work_that_enters_twice_is_waited_for_until_it_has_left_twice() -> None:
    """One task, two keys of one shard: the inner end is not the end."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        async with one.request(0) as subject:
            async with one.request(0):
                pass
            await scene.assign({0: ("w2", "w1")})
            await asyncio.wait_for(subject.lead.draining.wait(), LATE_S)
            await scene.settle()
            assert isinstance(one.host.state(0), ownership.Draining)
            assert scene.leader(0) == "w1"
        await scene.until_serving("w2", 0)

    play("embedded", act)


def test_work_that_is_cancelled_twice_hears_of_a_lost_leadership() -> None:
    """By the end of the drain time, and, while it still cleans up, by the loss."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", drain_timeout_s=0.1, cancel_grace_s=2.0)
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        session = one.worker.session
        assert session is not None

        async def work() -> None:
            async with one.request(0):
                await scene.assign({0: ("w2", "w1")})
                try:
                    await asyncio.sleep(LATE_S)
                finally:
                    session.doubt("the test")
                    await asyncio.sleep(LATE_S)

        with pytest.raises(LeadershipLost):
            await work()
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    play("embedded", act)
