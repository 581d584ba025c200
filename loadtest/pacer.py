"""Calls back when the next request is due, to some ten microseconds.

uvloop's own timers count whole milliseconds, which at a median of one millisecond would be half of what is measured,
and cost twice the CPU. On Linux the kernel's timerfd wakes the loop instead; elsewhere the loop's timer has to do.
"""

import asyncio
import ctypes
import os
import platform
import time
from collections.abc import Callable
from typing import Final, Protocol

_CLOCK_MONOTONIC: Final = 1
_TFD_NONBLOCK: Final = 0o4000
_TFD_CLOEXEC: Final = 0o2000000
_TFD_TIMER_ABSTIME: Final = 1


class Pacer(Protocol):
    """One alarm at a time."""

    def set(self, at_ns: int) -> None:
        """Call back at this monotonic time, or as soon as possible if it has passed."""
        ...

    def close(self) -> None:
        """No alarm any more. Idempotent."""
        ...


def pacer(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Pacer:
    """The best one that this machine has."""
    kind = _TimerFd if platform.system() == "Linux" else _LoopTimer
    return kind(loop, callback)


class _Moment(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Alarm(ctypes.Structure):
    _fields_ = (("interval", _Moment), ("value", _Moment))


class _TimerFd:
    """Linux's timerfd, by its C library: Python has it from 3.13 on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop, self._callback = loop, callback
        self._c = ctypes.CDLL(None, use_errno=True)
        self._fd = self._c.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._alarm = _Alarm()
        self._by_reference = ctypes.byref(self._alarm)
        loop.add_reader(self._fd, self._fired)

    def set(self, at_ns: int) -> None:
        self._alarm.value.s, self._alarm.value.ns = divmod(max(at_ns, 1), 1_000_000_000)  # 0 would switch it off
        self._c.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, self._by_reference, None)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # it was set anew meanwhile
            return
        self._callback()


class _LoopTimer:
    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop, self._callback = loop, callback
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at_ns: int) -> None:
        self.close()
        self._handle = self._loop.call_later(max(0.0, (at_ns - time.monotonic_ns()) / 1e9), self._callback)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
