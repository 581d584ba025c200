"""The smart client: it knows every key's leader and asks it directly.

    async with Client("http://etcd-1:2379", cluster="orders") as client:
        async with client.request("POST", "/orders/7", key="customer-9", json={"count": 1}) as answer:
            print(answer.status, await answer.json())

What it never does: follow a redirect, keep a cookie, or send a request a second time where the router would not: both
decide by `core.routing` and `cluster.traffic`. In the ordinary case (the shard has a leader and nothing is held) a
request costs no timer and no task of its own: time-outs are found by a coarse sweep.

Law: nothing waits without a bound. A request ends with the application's own answer, or with a RequestFailed that says
whether it may have been processed; or, if it could never be sent, with a RequestError.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
from multidict import CIMultiDict, istr

from shardlead.client.answer import Answer
from shardlead.client.body import Body, body_of
from shardlead.client.call import ANSWERING, DECIDED, DONE, NEVER_NS, SENT, WAITING, Call
from shardlead.client.pool import Broken, NotOpened, Overtaken, Pool, Pools, Unsendable
from shardlead.clock import NS_PER_S, Clock, SystemClock
from shardlead.cluster.traffic import NOT_READY, Traffic
from shardlead.cluster.view import View
from shardlead.config import Settings
from shardlead.core import contract, routing
from shardlead.core.contract import Problem
from shardlead.core.keyspace import Keyspace
from shardlead.core.routing import Happened, check_key, encode_key
from shardlead.core.shardmap import Delta, Leader
from shardlead.errors import OutcomeUnknown, RequestError, RequestFailed, RingError, Unserved
from shardlead.store.base import Store
from shardlead.store.etcd import EtcdStore

SWEEP_S: Final = 0.1  # how exactly a time-out comes
READY_TIMEOUT_S: Final = 10.0
# A worker that ended in order has answered before its session ends, but the store's news may overtake its answer.
SESSION_GRACE_S: Final = 0.05

_CROWDED: Final = routing.Answer(Problem.OVERLOADED, 503, "all connections to the shard's leader are in use", 1)
_CLOSED: Final = routing.Answer(Problem.NOT_READY, 503, "the client is not open (any more); nothing was sent")
_CUT_BY_CLOSE: Final = routing.Answer(Problem.OUTCOME_UNKNOWN, 502, "the client was closed before the answer came")
_MAYBE_DONE: Final = frozenset({Problem.OUTCOME_UNKNOWN, Problem.TIMED_OUT})

# The caller's fields that do not pass: the connection is ours, and so is the contract with the worker.
_OURS: Final = frozenset(
    {"connection", "content-length", "expect", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding",
     "upgrade"}
)  # fmt: skip
_SHARD: Final = istr(contract.SHARD)  # an istr is lowered once, not at every look
_EPOCH: Final = istr(contract.EPOCH)
_KEY: Final = istr(contract.KEY)
_CONTENT_TYPE: Final = istr("Content-Type")
_CONTENT_LENGTH: Final = istr("Content-Length")
_IDEMPOTENCY_KEY: Final = istr(contract.IDEMPOTENCY_KEY)
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Z-]+")
_REFUSING: Final = frozenset({421, 502, 503})  # the statuses under which a runtime speaks for itself

Headers = Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Led:
    """Who leads a key's shard, for a protocol of one's own: say the epoch to `Worker.admit`."""

    worker: str
    address: str
    """host:port of its HTTP server."""
    shard: int
    epoch: int


class Counts:
    """What became of requests: `cluster.traffic.Tally`."""

    def __init__(self) -> None:
        self.held = 0  # now
        self.resent: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.connects: Counter[str] = Counter()  # that came to nothing: failed, timed-out
        self.hold_durations = self
        self.held_s = 0.0  # of all requests that were held

    def add(self, seconds: float) -> None:
        self.held_s += seconds


class Client:
    """Entering reads the cluster's map, and follows it until left; a client is entered once. Bounds and time-outs are
    those of the settings' section `router`, with the same meaning.

    `store`: URL of an etcd, several of them, or a Store of one's own, which is then not closed. Entering raises
    StoreUnavailable if the store did not answer in time, ClusterMissing if nobody has created the cluster, RuntimeError
    if it is not the first time.
    """

    def __init__(
        self,
        store: str | Sequence[str] | Store,
        *,
        cluster: str = "",
        settings: Settings | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        settings = settings or Settings()
        self.counts = Counts()
        self._settings = settings.router
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._own_store: EtcdStore | None = None
        if isinstance(store, str | Sequence):
            endpoints = (store,) if isinstance(store, str) else tuple(store)
            store = self._own_store = EtcdStore(
                replace(settings.store, endpoints=endpoints), clock=self._clock, rng=self._rng
            )
        self._cluster = cluster or settings.cluster.name
        self._view = View(store, Keyspace(self._cluster), clock=self._clock, rng=self._rng)
        self._traffic: Traffic[Call] = Traffic(
            self._settings, self._view, Call.send, tally=self.counts, clock=self._clock
        )
        self._timeout_ns = int(self._settings.answer_timeout_s * NS_PER_S)
        self._calls: dict[Call, None] = {}  # a set that keeps its order
        self._number = 0
        self._pools: Pools | None = None
        self._task: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()
        self._was_entered = False
        self._news: asyncio.Future[None] | None = None  # set by the next change of the view

    def __repr__(self) -> str:
        return f"<Client of {self._cluster!r}: {len(self._calls)} under way, {self.counts.held} held>"

    @property
    def age_s(self) -> float:
        """Seconds since the map was last known to be as it is; it grows while the store is silent, and requests go by
        the last map then."""
        return self._view.age_s

    # --- its life

    async def __aenter__(self) -> Self:
        if self._was_entered:
            raise RuntimeError("a Client can be entered only once, even if it failed or was closed: make a new Client")
        self._was_entered = True
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._live(), name=f"client of {self._cluster}")
        try:
            await self._view.wait_ready(READY_TIMEOUT_S)
        except BaseException:  # cancelled, too: without __aenter__ nobody calls __aexit__, and a task runs by now
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End what is under way and close every connection. Leaving the block does it."""
        task, self._task = self._task, None
        self._leave.set()
        if task is not None:
            await asyncio.shield(task)

    async def _live(self) -> None:
        """The parent of all that runs for this client."""
        try:
            async with asyncio.TaskGroup() as tasks:
                pools = self._pools = Pools(self._settings, self._traffic.is_current, self._end, tasks)
                unsubscribe = self._view.subscribe(self._on_delta)
                work = [
                    tasks.create_task(self._view.run(), name="client view"),
                    tasks.create_task(self._sweep(pools), name="client sweep"),
                ]
                try:
                    await self._leave.wait()
                finally:
                    unsubscribe()
                    self._end_all()
                    for task in work:
                        task.cancel()
                    await pools.close()
        finally:
            self._pools = None
            self._traffic.close()
            if self._own_store is not None:
                await self._own_store.close()

    # --- asking

    def request(
        self,
        method: str,
        path: str,
        *,
        key: bytes | str,
        data: Any = None,
        json: Any = None,
        params: Mapping[str, str] | None = None,
        headers: Headers | None = None,
        timeout_s: float | None = None,
    ) -> "Asking":
        """Ask the leader of `key`'s shard; await it, or use it as `async with … as answer`.

        `path` begins with a slash. `data`: bytes, str, a form, a file, or an async iterable of bytes. `timeout_s`
        bounds the time until the answer begins (from the last piece of the body on, if it is streamed), and how long
        that may stand still afterwards; default: `router.answer_timeout_s`.

        Raises Unserved (surely not processed; may be asked again), OutcomeUnknown, AnswerBroken, RequestError.
        """
        return Asking(self._ask(method, path, key, data, json, params, headers, timeout_s))

    async def leader(self, key: bytes | str, *, above: int = 0, timeout_s: float | None = None) -> Led:
        """Who leads `key`'s shard under an epoch above `above`, at once if that is known; else it is waited for, at
        most `router.hold_timeout_s`. For protocols of one's own: one that was refused asks with the epoch that the
        refusal told of. Raises Unserved."""
        key = check_key(key.encode() if isinstance(key, str) else key)
        try:
            async with asyncio.timeout(self._settings.hold_timeout_s if timeout_s is None else timeout_s):
                while True:
                    if self._pools is None:
                        raise _failure(_CLOSED, -1)
                    with suppress(RingError):
                        shard = self._view.map.shard_of(key)
                        leader = self._traffic.leader(shard)
                        if leader is not None and leader.address and leader.epoch > above:
                            return Led(leader.worker, leader.address, shard, leader.epoch)
                    if self._news is None:
                        self._news = asyncio.get_running_loop().create_future()
                    await asyncio.shield(self._news)
        except TimeoutError:
            shard = self._view.map.shard_of(key) if self._view.is_ready else -1
            raise _failure(routing.NOT_LED, shard) from None

    async def _ask(
        self,
        method: str,
        path: str,
        key: bytes | str,
        data: Any,
        json: Any,
        params: Mapping[str, str] | None,
        headers: Headers | None,
        timeout_s: float | None,
    ) -> Answer:
        raw_key = check_key(key.encode() if isinstance(key, str) else key)
        method = method.upper()
        if not path.startswith("/"):
            raise RequestError(Problem.BAD_REQUEST, f"the path {path[:100]!r} does not begin with a slash")
        if method not in _METHODS and (method == "CONNECT" or _TOKEN.fullmatch(method) is None):
            raise RequestError(Problem.BAD_REQUEST, f"the method {method[:100]!r} is none that has a key and a path")
        body = await body_of(data, json)
        if self._pools is None:
            raise _failure(_CLOSED, -1)
        try:
            _, shard, leader = self._view.map.route(raw_key)
        except RingError as exc:
            raise _failure(NOT_READY, -1) from exc
        fields = _fields(headers, body)
        fields[_SHARD] = str(shard)
        fields[_KEY] = encode_key(raw_key).decode("ascii")
        self._number += 1
        timeout_ns = self._timeout_ns if timeout_s is None else int(timeout_s * NS_PER_S)
        call = Call(
            self._number,
            method,
            shard,
            body,
            has_idempotency_key=headers is not None and _IDEMPOTENCY_KEY in fields,
            task=asyncio.current_task(),
            timeout_ns=timeout_ns,
            deadline_ns=self._clock.now_ns() + timeout_ns,
        )
        if body.is_large:
            body.on_begin = lambda: self._traffic.accepted(call)
            body.on_progress = lambda: self._touch(call)
        self._calls[call] = None
        try:
            if leader is not None and leader.address and shard not in self._traffic.gates:
                call.decision = leader
            else:
                self._traffic.happened(call, Happened.ARRIVED)
            while True:
                if (decision := call.decision) is None:
                    await call.woken()
                    continue
                call.decision = None
                if not isinstance(decision, Leader):
                    raise _failure(decision, call.shard)
                response = await self._send(call, decision, path, params, fields)
                if response is not None:
                    return Answer(call, response, self._clock)
        except BaseException:  # cancelled, too: its caller has gone, and it would hold its place and its connection
            self._traffic.withdraw(call)
            self._end(call)
            raise

    async def _send(
        self, call: Call, leader: Leader, path: str, params: Mapping[str, str] | None, fields: CIMultiDict[str]
    ) -> aiohttp.ClientResponse | None:
        """Send it once. The application's answer; or None, and what comes next is decided, or it is held."""
        if self._pools is None:  # closed while this was held
            raise _failure(_CLOSED, call.shard)
        call.leader = leader
        call.state = WAITING
        fields[_EPOCH] = str(leader.epoch)
        pool = call.pool = self._pools.to(leader.worker, leader.address)
        what = Happened.NOT_OPENED
        try:
            if not pool.enter(call):
                await self._queued(call, pool)
            if call.state == WAITING:
                return self._answered(call, await pool.send(call, path, params, fields))
        except NotOpened as exc:
            self.counts.connects["timed-out" if isinstance(exc.__cause__, TimeoutError) else "failed"] += 1
        except Overtaken:
            what = Happened.UNSENT
        except Broken:
            if call.body.error is not None:
                raise call.body.error from None
            what = Happened.BROKEN
        except Unsendable as exc:
            raise RequestError(Problem.BAD_REQUEST, f"this request cannot be written: {exc}") from exc
        except asyncio.CancelledError:
            if not call.was_taken_back():
                raise
        if call.is_taken_back:  # its cancellation was turned into something else on the way
            call.was_taken_back()
        if call.state != DECIDED:  # else somebody has ended this sending, and decided
            call.state = DECIDED
            self._traffic.happened(call, what)
        return None

    async def _queued(self, call: Call, pool: Pool) -> None:
        """Return once it has a place in the pool, or was taken back."""
        call.queued_ns = self._clock.now_ns()
        try:
            while not call.has_place and call.state == WAITING:
                await call.woken()
        except BaseException:  # cancelled, too: a place given to nobody would be lost to the pool
            if call.queued_ns:
                pool.withdraw(call)
            pool.give_back(call)
            raise
        if call.state != WAITING:
            pool.give_back(call)

    def _answered(self, call: Call, response: aiohttp.ClientResponse) -> aiohttp.ClientResponse | None:
        """The head of an answer has come: the application's, or the runtime's refusal."""
        if call.state == DECIDED:
            response.close()
            return None
        if response.status in _REFUSING and (what := _what(response)) is not None:
            headers = response.headers
            epoch = headers.get(contract.EPOCH, "")
            call.state = DECIDED
            # The contract's runtimes send a refusal in one piece; one that is not whole is not worth waiting for.
            response.close() if call.body.is_large else response.release()
            self._traffic.turned_down(
                call,
                what,
                int(epoch) if epoch.isdecimal() and len(epoch) <= 16 else 0,
                headers.get(contract.LEADER, ""),
            )
            if call.decision is None and not call.is_held:
                raise _failure(routing.OUTCOME_UNKNOWN, call.shard)
            return None
        if self._traffic.gates:
            self._traffic.accepted(call)
        call.deadline_ns = NEVER_NS
        if call.connection is None:  # it has come whole
            self._end(call)
        else:
            call.state = ANSWERING
            call.stream = response.content
        return response

    # --- while it is under way

    def _touch(self, call: Call) -> None:
        call.deadline_ns = self._clock.now_ns() + call.timeout_ns

    def _end(self, call: Call) -> None:
        call.state = DONE
        self._calls.pop(call, None)
        if self._traffic.gates:
            self._traffic.ended(call)

    def _end_all(self) -> None:
        """The client is being closed."""
        for call in tuple(self._calls):
            if call.state == SENT:
                call.state = DECIDED
                call.fail(_CUT_BY_CLOSE)
                call.abort()
            elif call.state == ANSWERING:
                call.tear("the client was closed before the answer was whole")
            else:
                self._traffic.withdraw(call)
                call.take_back()
                call.fail(_CLOSED)
        news, self._news = self._news, None
        if news is not None and not news.done():
            news.set_result(None)

    async def _sweep(self, pools: Pools) -> None:
        """End what has waited for too long."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._clock.now_ns()
            for call in tuple(self._calls):
                if call.deadline_ns <= now:
                    self._time_out(call)
            hold_ns = int(self._settings.hold_timeout_s * NS_PER_S)
            for pool in pools.values():
                for call in tuple(pool.waiting):
                    if call.queued_ns + hold_ns <= now:
                        call.take_back()
                        call.fail(_CROWDED)
            pools.sweep(self._view.map)

    def _time_out(self, call: Call) -> None:
        if call.is_held:
            self._traffic.give_up(call)
        elif call.state == WAITING:
            is_queued = call.queued_ns > 0
            call.take_back()
            call.fail(_CROWDED if is_queued else routing.UNREACHABLE)
        elif call.state == SENT:
            call.state = DECIDED
            call.abort()
            self._traffic.happened(call, Happened.SILENT)
        elif call.state == ANSWERING:
            call.tear("the answer stood still for longer than the time allowed")

    # --- news

    def _on_delta(self, delta: Delta) -> None:
        if self._news is not None:
            self._news.set_result(None)
            self._news = None
        self._traffic.heed(delta)
        for name, sid in delta.workers_gone:
            self._session_ended(name, sid)
        pools = self._pools
        if pools is not None:
            for pool in pools.values():
                for call in tuple(pool.waiting):  # no use in waiting for a connection to a leader of the past
                    if not self._traffic.is_current(call) and call.take_back():
                        self._traffic.happened(call, Happened.UNSENT)
            pools.sweep(self._view.map)

    def _session_ended(self, worker: str, sid: str) -> None:
        """The session has ended. What its connections have already brought comes first; then its calls give up."""
        loop = asyncio.get_running_loop()
        for call in tuple(self._calls):
            leader = call.leader
            if leader is None or leader.worker != worker or leader.sid not in ("", sid):
                continue
            if call.connection is not None:
                loop.call_later(SESSION_GRACE_S, self._give_up_on, call, call.connection)
            elif call.take_back():
                self._traffic.happened(call, Happened.UNSENT)

    def _give_up_on(self, call: Call, connection: object) -> None:
        if call.connection is not connection:
            return
        if call.state == SENT:
            call.state = DECIDED
            call.abort()
            self._traffic.happened(call, Happened.FORCED)
        elif call.state == ANSWERING:
            call.tear("the session of the shard's leader ended before the answer was whole")


class Asking:
    """A request that begins when it is awaited or entered. Leaving the block gives the answer's connection back."""

    __slots__ = ("_answer", "_work")

    def __init__(self, work: Any) -> None:
        self._work = work
        self._answer: Answer | None = None

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._work.__await__()  # type: ignore[no-any-return]  # a coroutine of an Answer

    async def __aenter__(self) -> Answer:
        self._answer = await self._work
        assert self._answer is not None, "it answers or raises"
        return self._answer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._answer is not None:
            self._answer.release()


def _fields(headers: Headers | None, body: Body) -> CIMultiDict[str]:
    """The caller's header fields, as far as they pass."""
    fields: CIMultiDict[str] = CIMultiDict()
    if headers:
        for name, value in headers.items() if isinstance(headers, Mapping) else headers:
            lowered = name.lower()
            if lowered not in _OURS and not lowered.startswith(contract.RESERVED_PREFIX):
                fields.add(name, value)
    if body.content_type and _CONTENT_TYPE not in fields:
        fields[_CONTENT_TYPE] = body.content_type
    if body.kept is not None:
        fields[_CONTENT_LENGTH] = str(len(body.kept))
    return fields


def _what(response: aiohttp.ClientResponse) -> Happened | None:
    """What a runtime's own answer means; None: it is the application's."""
    refused = response.headers.get(contract.REFUSED)
    if refused is not None:
        return routing.REFUSALS.get(refused.encode("ascii", "replace"))
    if response.headers.get(contract.OUTCOME) == contract.OUTCOME_IS_UNKNOWN:
        return Happened.UNCERTAIN
    return None


def _failure(answer: routing.Answer, shard: int) -> RequestFailed:
    kind = OutcomeUnknown if answer.problem in _MAYBE_DONE else Unserved
    return kind(answer.problem, answer.detail, shard=shard)
