"""The links that fail: each does to bytes what it says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from shardlead.processes import LOOPBACK
from tests.e2e.faults.proxy import Link, PeerNetwork
from tests.support.load import settled

SOON_S = 5.0
QUIET_S = 0.15

Story = Callable[[Link, asyncio.StreamReader, asyncio.StreamWriter, list[bytes]], Awaitable[None]]


@asynccontextmanager
async def echo() -> AsyncIterator[tuple[Link, list[bytes]]]:
    """A link to a server that keeps what comes and answers it in capitals."""
    came: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65_536):
                came.append(piece)
                writer.write(piece.upper())
            writer.close()
        except OSError:
            writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    link = Link("test", server.sockets[0].getsockname()[:2])
    await link.open()
    try:
        yield link, came
    finally:
        await link.close()
        server.close()


def play(story: Story) -> None:
    async def main() -> None:
        async with asyncio.timeout(3 * SOON_S), echo() as (link, came):
            reader, writer = await asyncio.open_connection(LOOPBACK, link.port)
            try:
                await story(link, reader, writer, came)
            finally:
                writer.close()

    asyncio.run(main())


async def told(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(SOON_S):
        return await reader.read(65_536)


async def is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(QUIET_S):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


def test_a_good_link_passes_both_ways() -> None:
    async def story(link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, came: list[bytes]) -> None:
        writer.write(b"hello")
        assert await told(reader) == b"HELLO"

    play(story)


@pytest.mark.parametrize("forward", [True, False])
def test_a_one_way_cut_holds_one_direction_and_heals(forward: bool) -> None:
    """Cut forward, the server hears nothing; cut backward, it hears, and its answer waits. Healed, all arrives."""

    async def story(link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, came: list[bytes]) -> None:
        link.cut(forward=forward, backward=not forward)
        writer.write(b"hello")
        assert await is_silent(reader)
        assert came == ([] if forward else [b"hello"])
        await link.heal(resets=False)
        assert await told(reader) == b"HELLO"

    play(story)


def test_what_was_sent_into_a_cut_arrives_late_though_its_sender_is_gone() -> None:
    """As TCP would: the request that was given up is applied after the cut."""

    async def story(link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, came: list[bytes]) -> None:
        writer.write(b"a")
        assert await told(reader) == b"A"  # connected through
        link.cut(forward=True, backward=True)
        writer.write(b"hello")
        await writer.drain()
        writer.close()
        await asyncio.sleep(QUIET_S)  # nothing must come, and nothing says when it would have
        assert came == [b"a"]
        await link.heal(resets=False)
        await settled(lambda: came == [b"a", b"hello"], timeout_s=SOON_S)

    play(story)


def test_a_reset_ends_connections_and_drops_what_waited() -> None:
    async def story(link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, came: list[bytes]) -> None:
        writer.write(b"a")
        assert await told(reader) == b"A"
        link.cut(forward=True)
        writer.write(b"hello")
        assert await is_silent(reader)
        await link.heal(resets=True)
        with pytest.raises(ConnectionResetError):
            await told(reader)
        assert came == [b"a"]

    play(story)


def test_a_refusing_link_lets_nobody_in_until_it_heals_at_the_same_port() -> None:
    async def story(link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, came: list[bytes]) -> None:
        port = link.port
        link.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(LOOPBACK, port)
        await link.heal(resets=False)
        again, sender = await asyncio.open_connection(LOOPBACK, port)
        sender.write(b"x")
        assert await told(again) == b"X"
        sender.close()

    play(story)


def test_a_late_link_delays_each_way() -> None:
    async def story(link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, came: list[bytes]) -> None:
        link.delay(0.1, 0.1)
        began_s = asyncio.get_running_loop().time()
        writer.write(b"hello")
        assert await told(reader) == b"HELLO"
        assert asyncio.get_running_loop().time() - began_s >= 0.2

    play(story)


def test_a_member_can_be_made_deaf_or_mute() -> None:
    """Between members the cut knows whose bytes they are: those of one member's connections, and no others'."""

    async def main() -> None:
        async with asyncio.timeout(3 * SOON_S), echo() as (link, _), echo() as (other, _):
            network = PeerNetwork([link.target[1], other.target[1]], [0, 0])
            await network.open()
            ends = [await asyncio.open_connection(LOOPBACK, network.links[0].port) for _ in range(2)]
            heads = [b"GET /raft/stream HTTP/1.1\r\nX-Server-From: %s\r\n\r\n" % source for source in (b"a", b"b")]
            for (reader, writer), head in zip(ends, heads, strict=True):
                writer.write(head)
                assert await told(reader) == head.upper()
            network.cut(1, ["a", "b"], hears=True, speaks=False)  # the second one, b, is mute
            for (reader, writer), head in zip(ends, heads, strict=True):
                writer.write(b"x")
                assert await is_silent(reader) is (head == heads[1])
            network.heal()
            assert await told(ends[1][0]) == b"X"
            for _, writer in ends:
                writer.close()
            await network.close()

    asyncio.run(main())
