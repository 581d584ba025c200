"""Starts the embedded store for tests: in a thread of this process, or as a process that can be frozen and killed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shardlead.store.embedded import serve

READY_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0


@contextlib.contextmanager
def embedded_server(data: Path | None = None) -> Iterator[str]:
    """The URL of an embedded store that runs in a thread with a loop of its own. Raises what `serve` raises."""
    ready: Future[str] = Future()
    loop = asyncio.new_event_loop()
    task: list[asyncio.Task[None]] = []

    async def main() -> None:
        task.append(asyncio.ensure_future(serve("127.0.0.1", 0, data=data, on_ready=ready.set_result)))
        with contextlib.suppress(asyncio.CancelledError):
            await task[0]

    def run() -> None:
        try:
            loop.run_until_complete(main())
        except BaseException as exc:  # whatever it is, it belongs to the thread that waits for `ready`
            if ready.done():
                raise
            ready.set_exception(exc)
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="embedded store")
    thread.start()
    try:
        yield ready.result(READY_TIMEOUT_S)
    finally:
        if task and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it has ended by itself meanwhile
                loop.call_soon_threadsafe(task[0].cancel)
        thread.join(STOP_TIMEOUT_S)
        assert not thread.is_alive(), "the embedded store does not stop"


_SCRIPT: Final = """
import asyncio, pathlib, sys
from shardlead.store.embedded import serve

data = pathlib.Path(sys.argv[2]) if sys.argv[2] else None
asyncio.run(serve("127.0.0.1", int(sys.argv[1]), data=data, on_ready=lambda url: print(url, flush=True)))
"""


@dataclass
class EmbeddedProcess:
    """An embedded store in a process of its own."""

    url: str
    process: subprocess.Popen[str] = field(repr=False)

    def freeze(self) -> None:
        """SIGSTOP."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def embedded_process(data: Path | None = None, port: int = 0) -> Iterator[EmbeddedProcess]:
    """A running embedded store; killed at the end."""
    command = [sys.executable, "-c", _SCRIPT, str(port), str(data) if data else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, "the embedded store did not start"
            yield EmbeddedProcess(url, process)
        finally:
            process.kill()
