"""`shardlead embedded-store`: the store of `shardlead dev`, as a process of its own."""

from pathlib import Path

from shardlead import log as logs
from shardlead.cli.running import Stop, run_until_stopped
from shardlead.store.embedded import serve


def run_embedded_store(host: str, port: int, data: Path | None) -> int:
    """The embedded store until a signal comes; the exit code."""
    logs.configure("info", "text", role="store", name="embedded")

    def say(url: str) -> None:
        print(f"listening on {url}", flush=True)

    async def main(stop: Stop) -> int:
        async with stop.interrupting():
            await serve(host, port, data=data, on_ready=say)
        return 0

    return run_until_stopped(main)
