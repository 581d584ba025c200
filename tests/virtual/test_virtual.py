"""The loop in virtual time, its machines and its network."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web

from shardlead.clock import NS_PER_S
from shardlead.testing import Machine, Stuck, VirtualLoop


def play(seed: int, act: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    """Run `act` on a fresh loop; nothing may be left unhandled."""
    loop = VirtualLoop(seed)
    try:
        result = loop.run_until_complete(act(loop))
        assert loop.errors == []
        return result
    finally:
        loop.abandon()


def test_sleeping_takes_virtual_time_alone_and_time_outs_come_in_order() -> None:
    async def act(loop: VirtualLoop) -> list[str]:
        said: list[str] = []

        async def wait(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            said.append(f"{name} {loop.time():g}")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(wait("b", 7))
            tasks.create_task(wait("a", 5))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 3_593)
        assert loop.time() == 3_600
        return said

    assert play(1, act) == ["a 5", "b 7"]


def test_what_waits_for_nothing_is_told() -> None:
    async def act(_loop: VirtualLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="nothing is scheduled"):
        play(1, act)


def test_each_machine_goes_by_its_own_clock() -> None:
    """A tenth too fast: ten of its seconds are over after nine true ones."""

    async def act(loop: VirtualLoop) -> None:
        fast, other = loop.machine("fast", offset_s=50, rate=10 / 9), loop.machine("other")

        async def sleep_ten() -> list[float]:
            await asyncio.sleep(10)
            return [loop.true_ns() / NS_PER_S, loop.time()]

        assert await other.spawn(sleep_ten()) == [10, 10]
        assert await fast.spawn(sleep_ten()) == pytest.approx([19, 50 + 19 * 10 / 9])

    play(1, act)


def test_a_paused_machine_does_nothing_and_knows_afterwards_how_long_it_was() -> None:
    async def act(loop: VirtualLoop) -> None:
        machine = loop.machine("m")
        said: list[float] = []

        async def tick() -> None:
            while True:
                await asyncio.sleep(1)
                said.append(loop.time())

        machine.spawn(tick())
        await asyncio.sleep(2.5)
        machine.pause()
        await asyncio.sleep(10)
        assert said == [1, 2]
        machine.resume()
        await asyncio.sleep(1.1)
        assert said == [1, 2, 12.5, 13.5]
        machine.crash()
        await asyncio.sleep(5)
        assert len(said) == 4

    play(1, act)


def test_a_frozen_machine_has_not_noticed_anything() -> None:
    """What no local clock can see: a hypervisor that held it."""

    async def act(loop: VirtualLoop) -> None:
        machine = loop.machine("m")
        sleeper = machine.spawn(asyncio.sleep(3))
        await asyncio.sleep(1)
        machine.freeze()
        await asyncio.sleep(100)
        assert machine.clock.now_ns() == NS_PER_S
        machine.thaw()
        await sleeper
        assert (loop.true_ns(), machine.clock.now_ns()) == (103 * NS_PER_S, 3 * NS_PER_S)

    play(1, act)


async def _echo(loop: VirtualLoop, machine: Machine) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(body=await request.read())

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 80).start()
    assert runner.addresses == [(machine.address, 80)]
    await asyncio.Event().wait()


async def _post(machine: Machine, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(machine.address, 80)
    head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


def test_a_server_of_another_library_serves_over_the_simulated_network() -> None:
    async def act(loop: VirtualLoop) -> None:
        server, client = loop.machine("server"), loop.machine("client")
        server.spawn(_echo(loop, server))
        await asyncio.sleep(0.1)
        assert await client.spawn(_post(server, b"x" * 500_000)) == b"x" * 500_000

    play(1, act)


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_cut_link_holds_back_what_was_sent_and_nothing_is_lost_when_it_heals(way: str) -> None:
    async def act(loop: VirtualLoop) -> None:
        server, client = loop.machine("server"), loop.machine("client")
        ends = (client.address, server.address) if way == "there" else (server.address, client.address)
        server.spawn(_echo(loop, server))
        await asyncio.sleep(0.1)
        reader, writer = await client.spawn(asyncio.open_connection(server.address, 80))
        loop.network.cut(*ends)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = client.spawn(reader.readline())
        await asyncio.sleep(5)
        assert not answer.done()
        loop.network.heal(*ends)
        assert await answer == b"HTTP/1.1 200 OK\r\n"
        assert loop.time() < 5.2
        writer.close()

    play(1, act)


@pytest.mark.parametrize(("with_machine", "waits_s"), [(False, 1.0), (True, 20.0)])
def test_a_killed_process_resets_its_connections_and_a_lost_machine_says_nothing(
    with_machine: bool, waits_s: float
) -> None:
    async def act(loop: VirtualLoop) -> None:
        server, client = loop.machine("server"), loop.machine("client")
        server.spawn(_echo(loop, server))
        await asyncio.sleep(0.1)
        reader, writer = await client.spawn(asyncio.open_connection(server.address, 80))
        server.crash(with_machine=with_machine)
        began_s = loop.time()
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises((ConnectionError, TimeoutError)):
            await client.spawn(reader.readexactly(1))
        assert loop.time() - began_s <= waits_s
        assert (loop.time() - began_s > 10) == with_machine
        writer.close()
        with pytest.raises((ConnectionError, TimeoutError)):
            await client.spawn(asyncio.open_connection(server.address, 80))

    play(1, act)


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    async def act(loop: VirtualLoop) -> list[str]:
        said: list[str] = []

        async def talk(name: str) -> None:
            for _ in range(3):
                await asyncio.sleep(1)
                said.append(name)

        tasks = [loop.machine(name).spawn(talk(name)) for name in "abcdef"]
        await asyncio.gather(*tasks)
        return said

    runs = [play(seed, act) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_callbacks_of_one_machine_keep_their_order_and_late_timers_may_come_after_what_arrived() -> None:
    """As on real loops: after a stall one runs what is ready before the overdue timer, another the timer first."""

    async def order(loop: VirtualLoop) -> tuple[str, ...]:
        machine, said = loop.machine("m"), list[str]()
        machine.call_later(1, said.append, "timer")
        machine.pause()
        await asyncio.sleep(2)
        machine.call_soon(said.append, "first")
        machine.call_soon(said.append, "second")
        machine.resume()
        await asyncio.sleep(1)
        return tuple(said)

    orders = {play(seed, order) for seed in range(20)}
    assert orders == {("timer", "first", "second"), ("first", "second", "timer")}


def test_whoever_kills_or_pauses_a_process_while_the_run_ends_keeps_nobody_from_ending() -> None:
    """What the end of one task does to its machine means nothing to the others, which all come to their end."""
    loop, ended = VirtualLoop(1), []

    async def act() -> None:
        machine = loop.machine("m")

        async def end(name: str, then: Callable[[], object]) -> None:
            try:
                await asyncio.sleep(3_600)
            finally:
                then()
                await asyncio.sleep(1)
                ended.append(name)

        for name, then in (("a", machine.crash), ("b", machine.pause), ("c", machine.freeze), ("d", lambda: None)):
            machine.spawn(end(name, then), name)
        await asyncio.sleep(1)

    loop.run_until_complete(act())
    loop.abandon()
    assert sorted(ended) == ["a", "b", "c", "d"]
