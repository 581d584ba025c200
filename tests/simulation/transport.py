"""The way between a process and the simulated etcd, in place of `store.transport.HttpTransport`.

A request may be lost on its way, or its answer; it may arrive long after its sender gave up, or twice; a cut holds up
what goes one way or the other. What has left its sender is the network's: it goes on if the sender is paused or dead.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardlead.store import requests
from shardlead.store.transport import Answer, Channel, Stream, TransportError
from shardlead.virtual import Machine
from tests.simulation.etcd import Etcd, WatchSide

RETRANSMIT_S = 10.0  # for so long a request that met a cut still arrives when the cut is healed
CONNECT_S = 0.001


@dataclass(frozen=True, slots=True)
class LinkFaults:
    """Shares of the requests that suffer each; and how long everything takes."""

    delay_s: tuple[float, float] = (0.0002, 0.002)
    slow: float = 0.01  # takes up to half a second
    loss: float = 0.0
    loss_after: float = 0.0  # applied, and the answer is lost
    late: float = 0.0  # arrives after its sender gave up, up to `late_s` later
    late_s: float = 6.0
    duplicate: float = 0.0


class SimTransport:
    """`store.transport.Transport` of one process."""

    def __init__(self, machine: Machine, etcd: Etcd, rng: random.Random, faults: LinkFaults) -> None:
        self.faults = faults
        self._machine = machine
        self._etcd = etcd
        self._rng = rng

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        index = self._etcd.endpoints.index(endpoint)
        await self._refused(index, timeout_s)
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def settle(answer: Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        def reply(status: int, data: bytes) -> None:
            if self._rng.random() < self.faults.loss_after:
                return
            self._etcd.machine.call_later(self._delay_s(), come_back, Answer(status, data))

        def come_back(answer: Answer) -> None:
            if not self._etcd.is_cut(self._machine.address, index, "back"):
                self._machine.call_soon(settle, answer)

        self._send(index, path, body, reply, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                return await answered
        except TimeoutError:
            raise TransportError(f"no answer within {timeout_s:.3g} s", is_sent=True) from None

    async def stream(
        self, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Stream:
        index = self._etcd.endpoints.index(endpoint)
        await self._refused(index, timeout_s)
        asked = requests.parse_watch(requests.parse_object(body))
        assert asked is not None
        stream = SimStream(self._machine, self._etcd, index, self._delay_s)
        self._etcd.machine.call_later(self._delay_s(), stream.arrive, asked)
        return stream

    async def close(self) -> None:
        pass

    def _send(
        self, index: int, path: str, body: bytes, reply: Callable[[int, bytes], object], timeout_s: float
    ) -> None:
        etcd, rng, faults = self._etcd, self._rng, self.faults
        name, address = self._machine.name, self._machine.address

        def arrive() -> None:
            if etcd.is_cut(address, index, "there"):
                if rng.random() < 0.5:
                    retransmit()
                return
            etcd.arrive(index, path, body, name, reply)

        def retransmit() -> None:
            until_ns = etcd.loop.true_ns() + int(RETRANSMIT_S * 1e9)

            def healed() -> None:
                if etcd.is_cut(address, index, "there"):
                    return
                etcd.on_heal.remove(healed)
                if etcd.loop.true_ns() < until_ns:
                    etcd.machine.call_later(self._delay_s(), etcd.arrive, index, path, body, name, reply)

            etcd.on_heal.append(healed)

        fate = rng.random()
        if fate < faults.loss:
            return
        if fate < faults.loss + faults.late:
            etcd.machine.call_later(timeout_s + rng.uniform(0.0, faults.late_s), arrive)
            return
        etcd.machine.call_later(self._delay_s(), arrive)
        if fate > 1.0 - faults.duplicate:
            etcd.machine.call_later(self._delay_s() + rng.uniform(0.0, 1.0), arrive)

    async def _refused(self, index: int, timeout_s: float) -> None:
        """A member that is down has nobody who listens."""
        if self._etcd.members[index].is_down:
            await asyncio.sleep(min(timeout_s, CONNECT_S))
            raise TransportError("connection refused", is_sent=False)

    def _delay_s(self) -> float:
        if self._rng.random() < self.faults.slow:
            return self._rng.uniform(0.0, 0.5)
        return self._rng.uniform(*self.faults.delay_s)


class SimStream:
    """A watch's connection, as its client has it. Messages keep their order; a cut holds them up, a heal lets them
    through."""

    status = 200

    def __init__(self, machine: Machine, etcd: Etcd, index: int, delay_s: Callable[[], float]) -> None:
        self._machine = machine
        self._etcd = etcd
        self._index = index
        self._delay_s = delay_s
        self._side: WatchSide | None = None
        self._wire: deque[bytes | None] = deque()  # None: reset
        self._due_ns = 0
        self._came: deque[bytes | None] = deque()
        self._woken = asyncio.Event()
        self._is_closed = False
        self._is_stalled = False

    # --- the client's side

    async def read(self) -> bytes:
        while not self._came:
            self._woken.clear()
            await self._woken.wait()  # no time-out: whoever reads has one
        data = self._came.popleft()
        if data is None:
            raise TransportError("the connection was reset", is_sent=True)
        return data

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._etcd.machine.call_soon(self._closed)

    # --- the way

    def arrive(self, asked: requests.Watch) -> None:
        """The request for the watch reaches its member."""
        if self._is_closed or self._etcd.is_cut(self._machine.address, self._index, "there"):
            return
        self._side = self._etcd.watch(self._index, self._machine.name, asked, self._send, lambda: self._send(None))
        if self._side is None:
            self._send(None)

    def _closed(self) -> None:
        if self._side is not None:
            self._side.close()

    def _send(self, data: bytes | None) -> None:
        if self._is_closed or self._machine.is_crashed:
            self._closed()
            return
        self._wire.append(data)
        self._schedule()

    def _schedule(self) -> None:
        etcd = self._etcd
        now_ns = etcd.machine.now_ns()
        self._due_ns = max(self._due_ns, now_ns + int(self._delay_s() * 1e9))
        etcd.machine.call_later((self._due_ns - now_ns) / 1e9, self._deliver)

    def _deliver(self) -> None:
        etcd = self._etcd
        if not self._wire:
            return
        if etcd.is_cut(self._machine.address, self._index, "back"):
            if not self._is_stalled:
                self._is_stalled = True
                etcd.on_heal.append(self._healed)
            return
        self._machine.call_soon(self._come, self._wire.popleft())

    def _healed(self) -> None:
        etcd = self._etcd
        if etcd.is_cut(self._machine.address, self._index, "back"):
            return
        etcd.on_heal.remove(self._healed)
        self._is_stalled = False
        for _ in range(len(self._wire)):
            self._schedule()

    def _come(self, data: bytes | None) -> None:
        self._came.append(data)
        self._woken.set()
