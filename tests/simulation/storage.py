"""The resource behind the service: lists under keys, with a fence row for each shard, or without.

Requests travel: a write may arrive long after its sender has given up, or never. What is decided is decided
when it arrives, in one step, as a transaction of a database is.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardlead.virtual import Machine, VirtualLoop

ANSWER_TIMEOUT_S = 2.0


class Refused(Exception):
    """The fence has registered another epoch."""

    def __init__(self, registered: int) -> None:
        self.registered = registered
        super().__init__(f"epoch {registered} is registered")


class NoAnswer(Exception):
    """It may or may not have happened, and may still happen."""


@dataclass(frozen=True, slots=True)
class StorageFaults:
    """Shares of the requests that suffer each."""

    delay_s: tuple[float, float] = (0.0005, 0.004)
    slow: float = 0.02  # as long as a second
    late: float = 0.0  # arrives up to `late_s` after its sender has given up
    late_s: float = 6.0
    lost: float = 0.0
    answer_lost: float = 0.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """A write that was done, or with an empty key an epoch that was registered."""

    true_ns: int
    shard: int
    epoch: int
    key: str
    value: tuple[str, ...]


@dataclass
class Storage:
    """On a machine of its own, which never fails: its faults are those of the way there."""

    loop: VirtualLoop
    machine: Machine
    rng: random.Random
    is_fenced: bool = True
    faults: StorageFaults = field(default_factory=StorageFaults)
    reads_lock_fence: bool = True  # switched off by an ablation: the fence row is read without a lock
    registers_by_write: bool = False  # by another one: a write registers its epoch, and nothing else does
    registered: dict[int, int] = field(default_factory=dict)
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    accepted: list[Accepted] = field(default_factory=list)
    journal: list[Accepted] = field(default_factory=list)  # registrations, too
    refused: int = 0
    say: Callable[[str, str], object] = lambda *_: None

    # --- what a leader asks

    async def barrier(self, shard: int, epoch: int) -> None:
        """Register the epoch. Raises Refused if a larger one stands there."""
        await self._ask(lambda: self._barrier(shard, epoch))

    async def load(self, shard: int, epoch: int, keys: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The lists under these keys. Raises Refused."""
        found: dict[str, tuple[str, ...]] = await self._ask(lambda: self._load(shard, epoch, keys))
        return found

    async def put(self, shard: int, epoch: int, key: str, value: tuple[str, ...]) -> None:
        """Write the whole list. Raises Refused, NoAnswer."""
        if self.is_fenced and not self.reads_lock_fence:
            await self._ask(lambda: self._check(shard, epoch))  # a transaction that looks, and writes later
            await self._ask(lambda: self._put(shard, epoch, key, value))
            return

        def act() -> None:
            self._check(shard, epoch)
            self._put(shard, epoch, key, value)

        await self._ask(act)

    # --- what is done when a request arrives

    def _barrier(self, shard: int, epoch: int) -> None:
        if not self.is_fenced:
            return
        known = self.registered.get(shard, 0)
        if known > epoch:
            self.refused += 1
            raise Refused(known)
        self.registered[shard] = epoch
        self.journal.append(Accepted(self.loop.true_ns(), shard, epoch, "", ()))
        self.say("storage", f"shard {shard}: registers epoch {epoch}")

    def _load(self, shard: int, epoch: int, keys: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        self._check(shard, epoch)
        return {key: self.values.get(key, ()) for key in keys}

    def _check(self, shard: int, epoch: int) -> None:
        known = self.registered.get(shard, 0)
        if not epoch or (self.registers_by_write and known < epoch):
            return  # a read without an epoch asks no fence
        if self.is_fenced and known != epoch:
            self.refused += 1
            raise Refused(known)

    def _put(self, shard: int, epoch: int, key: str, value: tuple[str, ...]) -> None:
        if self.registers_by_write:
            self.registered[shard] = epoch
        self.values[key] = value
        self.say("storage", f"shard {shard} epoch {epoch}: {key} = {' '.join(value)}")
        done = Accepted(self.loop.true_ns(), shard, epoch, key, value)
        self.accepted.append(done)
        self.journal.append(done)

    # --- the way there and back

    async def _ask(self, act: Callable[[], Any]) -> Any:
        """Whatever befalls the asker, what it has sent goes on."""
        faults, rng = self.faults, self.rng
        asker = self.loop.current
        answered: asyncio.Future[Any] = self.loop.create_future()

        def arrive() -> None:
            try:
                result: Any = act()
                error: Exception | None = None
            except Refused as exc:
                result, error = None, exc
            if rng.random() < faults.answer_lost:
                return
            self.machine.call_later(self._delay_s(), deliver, result, error)

        def deliver(result: Any, error: Exception | None) -> None:
            if not asker.is_crashed:
                asker.call_soon(settle, result, error)

        def settle(result: Any, error: Exception | None) -> None:
            if answered.done():
                return
            if error is not None:
                answered.set_exception(error)
            else:
                answered.set_result(result)

        fate = rng.random()
        if fate < faults.late:
            self.machine.call_later(ANSWER_TIMEOUT_S + rng.uniform(0.0, faults.late_s), arrive)
        elif fate >= faults.late + faults.lost:
            self.machine.call_later(self._delay_s(), arrive)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answered
        except TimeoutError:
            raise NoAnswer(f"no answer within {ANSWER_TIMEOUT_S} s") from None

    def _delay_s(self) -> float:
        if self.rng.random() < self.faults.slow:
            return self.rng.uniform(0.0, 1.0)
        return self.rng.uniform(*self.faults.delay_s)
