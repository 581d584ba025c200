"""Processes under measurement: started on a core of their own, their CPU time read, and surely ended.

Law: Linux only (/proc, CPU affinity). Leaving the block ends every process, and every wait has a bound.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shardlead.errors import CommandError

LOOPBACK: Final = "127.0.0.1"
READY_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PACKAGES: Final = {"haproxy": "haproxy", "nginx": "nginx-light", "wrk": "wrk", "h2load": "nghttp2-client"}


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Seconds that processes have spent, in their own code and in the kernel's."""

    user_s: float = 0.0
    system_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.user_s + self.system_s

    def __add__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.user_s + other.user_s, self.system_s + other.system_s)

    def __sub__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.user_s - other.user_s, self.system_s - other.system_s)


def cpu_time(pids: Sequence[int]) -> CpuTime:
    """What these processes have used up to now, all their threads; to a hundredth of a second (the kernel's tick)."""
    total = CpuTime()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += CpuTime(int(fields[11]) / _TICKS_PER_S, int(fields[12]) / _TICKS_PER_S)
    return total


def resident_bytes(pid: int) -> int:
    """How much memory a process holds at this moment."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, path.read_text(encoding="ascii").split())
    return found


def pin(pid: int, cores: set[int]) -> None:
    """Let a process and those that it will start run on these cores only."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cores)


def cores() -> list[int]:
    """Those that this process may use. Raises CommandError if there is only one: who is measured needs one alone."""
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise CommandError("this needs two cores: one for the proxy, one for load and upstream")
    return found


def tool(name: str) -> str:
    """The path of a program. Raises CommandError that says how to get it."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise CommandError(f"{name} is needed and was not found: apt-get install {_PACKAGES.get(name, name)}")
    return path


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class Pinned:
    """A started program. `pids` are all its processes."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    others: list[int] = field(default_factory=list)

    @property
    def pids(self) -> list[int]:
        return [self.process.pid, *self.others]

    def said(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2_000:]


@contextlib.contextmanager
def started(
    name: str,
    command: Sequence[str],
    *,
    core: int,
    folder: Path,
    port: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Pinned]:
    """Run a program on one core until the block is left; entered once it listens on `port`. Raises CommandError."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    found = Pinned(name, process, log)
    try:
        _wait(lambda: _listens(port) or process.poll() is not None, READY_TIMEOUT_S)
        if process.poll() is not None or not _listens(port):
            raise CommandError(f"{name} did not listen on port {port}: {found.said() or 'it said nothing'}")
        found.others = children(process.pid)
        yield found
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """All of its process group; a stop that takes too long is cut short."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            break


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _wait(is_it: Callable[[], bool], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not is_it() and time.monotonic() < until:
        time.sleep(0.02)
