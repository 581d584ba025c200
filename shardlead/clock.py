"""The clock that lease deadlines are measured with, and the protocol by which shells receive it.

Law: a deadline is elapsed time on this machine since its boot. The wall clock never takes part, and neither does
`loop.time()`, which uvloop caches for an iteration and so still shows the time before a stall.
"""

import time
from functools import partial
from typing import Protocol, runtime_checkable

_CLOCK_ID = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # macOS has no CLOCK_BOOTTIME
_AWAKE_ID = getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)  # macOS's stands still while it sleeps

NS_PER_S = 1_000_000_000


class Clock(Protocol):
    """Where a shell reads elapsed time. The simulator gives every host its own."""

    def now_ns(self) -> int:
        """Nanoseconds since boot, suspended time included; never goes back."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970. For log lines and records that people read, never for a decision."""
        ...


@runtime_checkable
class SleepAware(Protocol):
    """A clock that can tell suspended time from other time."""

    def awake_ns(self) -> int:
        """As `now_ns`, without the time in which the machine was suspended. For alarms alone."""
        ...


class SystemClock:
    """The machine's own clock.

    CLOCK_BOOTTIME goes on through SIGSTOP, cgroup freezes and suspend-to-RAM. It does *not* go on while a
    hypervisor holds the whole machine still: only fencing at the resource helps there.
    """

    __slots__ = ()

    now_ns = staticmethod(partial(time.clock_gettime_ns, _CLOCK_ID))  # no frame of Python: it is asked very often

    def awake_ns(self) -> int:
        return time.clock_gettime_ns(_AWAKE_ID)

    def wall_s(self) -> float:
        return time.time()
