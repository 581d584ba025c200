"""One generator process: `python -m loadtest.generator`, told over stdin what to send, reporting on stdout.

Law: request n leaves when it is due by the schedule, or as soon after as this process can; how late that was is noted,
and its latency counts from the due time all the same. What has not ended after `timeout_s` has failed. If stdin
closes, everything ends.

An answer is good if it is a 2xx of the application that names the shard which the key belongs to. Beside that, each
answer is held against those before it: two workers under one epoch of a shard, or an epoch below one that had already
answered when the request was sent, is a violation of what shardlead promises, and told as such.
"""

import asyncio
import contextlib
import gc
import os
import random
import signal
import sys
import time
import traceback
from array import array
from collections import Counter
from typing import Any, Final

import orjson
import uvloop

from loadtest.keys import Draw, KeyChoice, Ring
from loadtest.messages import Begin, Done, Keys, Ready, Report, Second, Stop, Task, frame, next_command
from loadtest.pacer import pacer
from loadtest.samples import OK, POST, Samples
from loadtest.schedule import Schedule
from loadtest.through_client import ClientRoute
from loadtest.wire import Request, Route, RouterRoute

SWEEP_S: Final = 0.25
REPORT_S: Final = 1.0
BURST_MAX: Final = 64  # requests that are sent in one go when late; then answers get a turn
EXAMPLES_MAX: Final = 50
VIOLATIONS_MAX: Final = 50
LAG_MAX_US: Final = 2**32 - 1
BROKEN: Final = 70


class Generator:
    """Sends one share of the load and judges the answers."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._schedule = Schedule(task.rates, task.step_s)
        self._ring = Ring.decode(task.table, shards=task.shards, hash_tags=task.hash_tags)
        self._rng = random.Random(f"{task.seed} {task.share}")
        self._draw = self._drawer(task.choice)
        self._loop = asyncio.get_running_loop()
        self._pacer = pacer(self._loop, self._due)
        self._route = _route(task, self)
        self._number = task.share
        self._begin_ns = 0
        self._begin_cpu_s = 0.0
        self._next_ns = 0
        self._is_sending = False
        self._in_flight: dict[int, Request] = {}  # oldest first
        self._empty = asyncio.Event()
        self._sent = 0
        self._samples, self._lags_us = Samples(), array("I")
        self._reasons: Counter[str] = Counter()
        self._examples: list[str] = []
        self._examples_left = EXAMPLES_MAX
        self._workers: dict[tuple[int, int], str] = {}
        self._epochs = [0] * task.shards
        self._violations: list[str] = []

    # --- its life

    async def open(self) -> None:
        await self._route.open()

    def begin(self, at_ns: int) -> None:
        """The schedule's time 0."""
        self._begin_ns = at_ns
        self._begin_cpu_s = time.process_time()
        self._is_sending = True
        self._next_ns = at_ns + int(self._schedule.due_s(self._number) * 1e9)
        self._pacer.set(self._next_ns)

    def choose(self, choice: str) -> None:
        """Draw keys so from now on."""
        self._draw = self._drawer(choice)

    async def stop(self) -> None:
        """Send nothing more; returns when everything has ended."""
        self._is_sending = False
        self._pacer.close()
        self._empty.clear()
        if self._in_flight:
            async with asyncio.timeout(self._task.timeout_s + 2 * SWEEP_S + 1):
                await self._empty.wait()
        await self._route.close()

    def sweep(self) -> None:
        """Give up what has taken too long."""
        late_ns = time.monotonic_ns() - int(self._task.timeout_s * 1e9)
        for request in list(self._in_flight.values()):
            if request.due_ns > late_ns:
                break
            self._route.give_up(request)
            self.failed(request, f"no answer within {self._task.timeout_s:g} s")
        self._route.sweep()

    def second(self) -> Second:
        """What has ended since this was asked last."""
        samples, self._samples = self._samples, Samples()
        lags_us, self._lags_us = self._lags_us, array("I")
        reasons, self._reasons = self._reasons, Counter()
        examples, self._examples = self._examples, []
        sent, self._sent = self._sent, 0
        return Second(
            columns=samples.encode(),
            lags_us=lags_us.tobytes(),
            sent=sent,
            in_flight=len(self._in_flight),
            connections=self._route.connections,
            reasons=dict(reasons),
            examples=examples,
        )

    def done(self) -> Done:
        leaderships = [(shard, epoch, worker) for (shard, epoch), worker in self._workers.items()]
        return Done(cpu_s=time.process_time() - self._begin_cpu_s, leaderships=leaderships, violations=self._violations)

    # --- sending

    def _drawer(self, choice: str) -> Draw:
        return KeyChoice.parse(choice).drawer(self._task.keys, self._rng)

    def _due(self) -> None:
        """Sends everything that is due, then sleeps until the next."""
        if not self._is_sending:
            return
        shares, due_s, begin_ns = self._task.shares, self._schedule.due_s, self._begin_ns
        for _ in range(BURST_MAX):
            late_ns = time.monotonic_ns() - self._next_ns
            if late_ns < 0:
                break
            self._lags_us.append(min(late_ns // 1000, LAG_MAX_US))
            self._send(self._number, self._next_ns)
            self._number += shares
            self._next_ns = begin_ns + int(due_s(self._number) * 1e9)
        self._pacer.set(self._next_ns)

    def _send(self, number: int, due_ns: int) -> None:
        task, rng = self._task, self._rng
        key = f"key-{self._draw()}"
        shard = self._ring.shard_of(key.encode())
        request = Request(number, due_ns, key, shard, self._epochs[shard])
        if rng.random() < task.posts:
            request.is_post = True
            sizes = task.payload_bytes
            request.payload_bytes = sizes[0] if len(sizes) == 1 else rng.choice(sizes)
            if task.idempotent and rng.random() < task.idempotent:
                request.idempotency_key = f"{task.seed}-{number}"
        self._sent += 1
        self._in_flight[number] = request
        self._route.send(request)

    # --- ends: what a route tells

    def answered(self, request: Request, status: int, body: bytes) -> None:
        """An answer came: is it the application's, of the right shard?"""
        if not self._over(request):
            return
        try:
            page = orjson.loads(body)
        except orjson.JSONDecodeError:
            page = None
        fields = page if isinstance(page, dict) else {}
        if not 200 <= status < 300:
            problem = str(fields.get("type", "")).rpartition("/")[2]
            detail = str(fields.get("detail", fields.get("error", "")))
            self._note(request, f"{status} {problem}".strip(), detail)
        elif fields.get("shard") != request.shard:
            self._note(request, f"{status} of the wrong shard", f"{fields.get('shard')!r}, not {request.shard}")
        else:
            self._judge(request, fields.get("epoch"), fields.get("worker"))
            self._note(request, "", "")

    def failed(self, request: Request, reason: str) -> None:
        """No answer came."""
        if self._over(request):
            self._note(request, reason, "")

    def _over(self, request: Request) -> bool:
        if request.is_over:
            return False
        request.is_over = True
        del self._in_flight[request.number]
        if not self._in_flight:
            self._empty.set()
        return True

    def _note(self, request: Request, reason: str, detail: str) -> None:
        latency_us = (time.monotonic_ns() - request.due_ns) // 1000
        due_us = (request.due_ns - self._begin_ns) // 1000
        flags = (0 if reason else OK) | (POST if request.is_post else 0)
        self._samples.add(due_us, latency_us, request.shard, flags)
        if not reason:
            return
        method = "POST" if request.is_post else "GET"
        if request.idempotency_key:
            method += " with Idempotency-Key"
        self._reasons[f"{method}: {reason}"] += 1
        if self._examples_left > 0:
            self._examples_left -= 1
            self._examples.append(
                f"{method} {request.key} (shard {request.shard}), due {due_us / 1e6:.3f} s, after "
                f"{latency_us / 1000:.1f} ms: {reason} {detail}".rstrip()
            )

    def _judge(self, request: Request, epoch: object, worker: object) -> None:
        """Holds a good answer against the ones before it, if the application tells its epoch and worker."""
        if type(epoch) is not int or not isinstance(worker, str):
            return
        shard = request.shard
        if epoch > self._epochs[shard]:
            self._epochs[shard] = epoch
        elif epoch < request.least_epoch:
            self._violate(
                f"shard {shard}: epoch {epoch} of {worker} answered a request that was sent after epoch "
                f"{request.least_epoch} had answered"
            )
        other = self._workers.setdefault((shard, epoch), worker)
        if other != worker:
            self._violate(f"shard {shard}, epoch {epoch}: both {other} and {worker} answered")

    def _violate(self, text: str) -> None:
        if len(self._violations) < VIOLATIONS_MAX and text not in self._violations:
            self._violations.append(text)


def _route(task: Task, generator: Generator) -> Route:
    if task.through == "client":
        return ClientRoute(task.store, task.cluster, task.path, generator)
    return RouterRoute(task.routers, task.path, generator, connections_max=task.connections_max)


async def _pipes() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)


async def _serve() -> None:
    asyncio.get_running_loop().set_exception_handler(_give_up)
    reader, writer = await _pipes()
    task = await next_command(reader)
    if task is None:
        return
    assert isinstance(task, Task)
    generator = Generator(task)
    await generator.open()

    async def tell(report: Report) -> None:
        writer.write(frame(report))
        await writer.drain()

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            generator.sweep()

    async def report() -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            await tell(generator.second())

    gc.collect()
    gc.freeze()  # what is there now stays: collections need not look at it again
    await tell(Ready())
    background = [asyncio.create_task(sweep()), asyncio.create_task(report())]
    try:
        while (command := await next_command(reader)) is not None:
            match command:
                case Begin(at_ns=at_ns):
                    generator.begin(at_ns)
                case Keys(choice=choice):
                    generator.choose(choice)
                case Stop():
                    await generator.stop()
                    background[1].cancel()
                    await tell(generator.second())
                    await tell(generator.done())
                    return
                case Task():
                    raise AssertionError("a second task")
    finally:
        for each in background:
            each.cancel()
        await asyncio.gather(*background, return_exceptions=True)


def _give_up(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A fault of the generator's own: what it would go on to measure is worth nothing. The run shows this text."""
    error = context.get("exception")
    trace = "".join(traceback.format_exception(error)) if isinstance(error, BaseException) else ""
    print(f"{context.get('message')}\n{trace}", file=sys.stderr, flush=True)
    os._exit(BROKEN)


def main() -> None:
    """Serve one run. Ctrl-C is the run's to handle: it closes stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        uvloop.run(_serve())
    os._exit(0)  # a pipe whose reader is gone must not raise once more at exit


if __name__ == "__main__":
    main()
