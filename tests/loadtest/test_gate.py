"""The gate: open it forwards, shut it swallows, opened again it resets."""

import asyncio

import pytest

from loadtest.gate import Gate

SILENCE_S = 0.2


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(100):
        writer.write(piece)
    writer.close()


def test_a_gate_swallows_and_then_resets() -> None:
    """What a network does that drops packets: nobody is told until it works again."""

    async def story() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with Gate(f"127.0.0.1:{port}") as gate:
            address = gate.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"

            gate.shut()
            writer.write(b"two")
            _, late = await asyncio.open_connection(*address)  # taken, and led nowhere
            late.write(b"three")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SILENCE_S):
                    await reader.read(1)

            gate.open()
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            new_reader, new = await asyncio.open_connection(*address)
            new.write(b"four")
            assert await new_reader.readexactly(4) == b"four"
            for each in (writer, late, new):
                each.close()
        server.close()

    asyncio.run(story())
