"""A store in one small process, for development and tests: `store.model` served over etcd's JSON gateway.

    shardlead embedded-store --port 2379 [--data DIR]

It answers on loopback what etcd 3.5 would answer, so `store.etcd.EtcdStore` is its client, curl too. It keeps its
data in memory and is alone: not for production, and it says so when it starts.

Law:
    A lease never ends before its time as the *server* lived it: while this process stood still (SIGSTOP, a laptop
    asleep) no lease grew older, since renewals were waiting in its sockets.
    With a data directory, revisions, and so epochs, never go back over restarts: a high-water mark is on disk
    before a revision above the last one is used. Keys and leases are not kept, so each start is a new cluster id.
    A watcher that does not read holds nothing but its place: events come from the bounded history, and whoever falls
    behind that is cancelled as compacted.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import orjson
from aiohttp import web

from shardlead.clock import NS_PER_S, Clock, SystemClock
from shardlead.errors import CommandError, Compacted, StoreRejected
from shardlead.store import answers, requests
from shardlead.store.base import REQUEST_BYTES_MAX, Delete, Op
from shardlead.store.mark import RevisionMark
from shardlead.store.model import RESOURCE_EXHAUSTED, Model
from shardlead.store.requests import Json
from shardlead.store.shape import FROM_KEY

VERSION: Final = "3.5.28"  # whose fixes the model has: progress messages and renewals can be trusted
BODY_BYTES_MAX: Final = 4 * 1_048_576  # a request of REQUEST_BYTES_MAX in base64 and JSON, with room
WATCHERS_MAX: Final = 1_024
LEASES_MAX: Final = 10_000
SPACE_BYTES_MAX: Final = 512 * 1_048_576  # keys and values; etcd's own quota is 2 GiB
LEASE_TICK_S: Final = 0.1
STALL_NS: Final = 500_000_000  # the clock was not read for longer than this: the process stood still
PROGRESS_INTERVAL_S: Final = 10.0
STOP_TIMEOUT_S: Final = 1.0
REVISIONS_RESERVED: Final = 1_000_000
REVISIONS_SPARE: Final = LEASES_MAX + 10_000  # reserve anew while so many are left: more than one step can use
UNAVAILABLE: Final = 14
KEEPALIVE: Final = "/v3/lease/keepalive"

_LOG: Final = logging.getLogger("shardlead.store.embedded")
_JSON: Final = {"Content-Type": "application/json"}


class LeaseTime:
    """The age of leases: elapsed time, without the stretches in which this process stood still."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen_ns = clock.now_ns()
        self._value_ns = self._seen_ns

    def now_ns(self) -> int:
        """Ask at least every STALL_NS. Goes at most as fast as the clock, so leases can only end later."""
        seen_ns = self._clock.now_ns()
        passed_ns = seen_ns - self._seen_ns
        self._seen_ns = seen_ns
        if passed_ns <= STALL_NS:
            self._value_ns += passed_ns
        else:
            _LOG.warning("stood still: leases keep what they had left", extra={"stall_s": passed_ns / NS_PER_S})
        return self._value_ns


class EmbeddedStore:
    """The model and its watchers behind HTTP handlers. Whatever a handler does to the model it does at once."""

    def __init__(
        self,
        model: Model,
        *,
        clock: Clock,
        rng: random.Random,
        mark: RevisionMark | None = None,
        progress_interval_s: float = PROGRESS_INTERVAL_S,
    ) -> None:
        self.model = model
        self._time = LeaseTime(clock)
        self._mark = mark
        self._progress_interval_s = progress_interval_s
        self._cluster = str(rng.getrandbits(63) | 1)
        self._member = str(rng.getrandbits(63) | 1)
        self._wakers: set[asyncio.Event] = set()
        self._is_closing = False
        self._answers: dict[str, Callable[[Json], Json]] = {
            "/v3/kv/range": self._range,
            "/v3/kv/put": self._put,
            "/v3/kv/deleterange": self._delete,
            "/v3/kv/txn": self._txn,
            "/v3/kv/compaction": self._compact,
            "/v3/lease/grant": self._grant,
            KEEPALIVE: self._renew,
            "/v3/lease/revoke": self._revoke,
            "/v3/kv/lease/revoke": self._revoke,
            "/v3/lease/timetolive": self._time_to_live,
            "/v3/kv/lease/timetolive": self._time_to_live,
            "/v3/lease/leases": self._leases,
            "/v3/kv/lease/leases": self._leases,
            "/v3/maintenance/status": self._status,
            "/v3/auth/authenticate": _authenticate,
        }

    @property
    def watchers(self) -> int:
        """How many watches are open."""
        return len(self._wakers)

    def application(self) -> web.Application:
        """The gateway's paths."""
        application = web.Application(client_max_size=BODY_BYTES_MAX)
        application.add_routes([web.post(path, self._post) for path in self._answers])
        application.add_routes(
            [web.post("/v3/watch", self._watch), web.get("/version", _version), web.get("/health", _health)]
        )
        return application

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """HTTP status and body for one request to one of the paths that answer once (all but /v3/watch)."""
        try:
            result = self._answers[path](requests.parse_object(body))
        except StoreRejected as refusal:
            return answers.encode_refusal(refusal)
        if path == KEEPALIVE:  # a stream of one answer
            return 200, _line(result)
        return 200, orjson.dumps(result)

    async def tick(self) -> None:
        """End the leases whose time is over, for ever."""
        while True:
            try:
                with self._writing(None):
                    self.model.expire(self._time.now_ns())
            except StoreRejected as refusal:  # no revision can be reserved: writes are refused, leases stay
                _LOG.error("leases do not expire", extra={"reason": refusal.message})
            await asyncio.sleep(LEASE_TICK_S)

    def stop_watches(self) -> None:
        """Let every watch end, so that the server can stop."""
        self._is_closing = True
        self._publish()

    # --- requests with one answer ----------------------------------------------------------------------------

    async def _post(self, request: web.Request) -> web.Response:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            status, answer = answers.encode_refusal(_too_large())
        else:
            status, answer = self.answer(request.path, body)
        return web.Response(status=status, body=answer, headers=_JSON)

    def _range(self, raw: Json) -> Json:
        return answers.encode_range(self.model.range(requests.parse_range(raw)), self._header())

    def _put(self, raw: Json) -> Json:
        op = requests.parse_put(raw)
        with self._writing(op):
            self.model.put(op)
        return {"header": self._header()}

    def _delete(self, raw: Json) -> Json:
        op = requests.parse_delete(raw)
        with self._writing(op):
            result = self.model.delete(op)
        return answers.encode_delete(result, self._header())

    def _txn(self, raw: Json) -> Json:
        txn = requests.parse_txn(raw)
        with self._writing(txn):
            result = self.model.txn(txn)
        return answers.encode_txn(result, self._header())

    def _compact(self, raw: Json) -> Json:
        self.model.compact(requests.integer_of(raw, "revision"))
        return {"header": self._header()}

    def _grant(self, raw: Json) -> Json:
        if len(self.model.leases) >= LEASES_MAX:
            raise StoreRejected(RESOURCE_EXHAUSTED, f"the embedded store has {LEASES_MAX} leases, its most")
        ttl_s, lease = requests.integer_of(raw, "TTL"), requests.integer_of(raw, "ID")
        grant = self.model.grant(ttl_s, self._time.now_ns(), lease)
        return answers.encode_lease(grant.lease, grant.ttl_s, self._header())

    def _revoke(self, raw: Json) -> Json:
        with self._writing(None):
            self.model.revoke(requests.integer_of(raw, "ID"))
        return {"header": self._header()}

    def _time_to_live(self, raw: Json) -> Json:
        lease = requests.integer_of(raw, "ID")
        found = self.model.time_to_live(lease, self._time.now_ns())
        return answers.encode_time_to_live(lease, found, self._header(), with_keys=requests.boolean_of(raw, "keys"))

    def _leases(self, _raw: Json) -> Json:
        out: Json = {"header": self._header()}
        if self.model.leases:
            out["leases"] = [{"ID": str(lease)} for lease in self.model.leases]
        return out

    def _status(self, _raw: Json) -> Json:
        index = str(self.model.revision)
        return {
            "header": self._header(),
            "version": VERSION,
            "dbSize": "1",
            "leader": self._member,
            "raftIndex": index,
            "raftTerm": "1",
            "raftAppliedIndex": index,
            "dbSizeInUse": "1",
        }

    def _renew(self, raw: Json) -> Json:
        """A lease that is gone has no TTL in the answer."""
        lease = requests.integer_of(raw, "ID")
        with self._writing(None):
            ttl_s = self.model.renew(lease, self._time.now_ns())
        return answers.encode_lease(lease, ttl_s, self._header())

    # --- the stream --------------------------------------------------------------------------------------------

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        """A watch lives until its client leaves. After a cancel it stays open and silent, as etcd's gateway does."""
        try:
            asked = requests.parse_watch(requests.parse_object(await request.read()))
            if self.watchers >= WATCHERS_MAX:
                raise StoreRejected(RESOURCE_EXHAUSTED, f"the embedded store has {WATCHERS_MAX} watchers, its most")
        except StoreRejected as refusal:
            status, body = answers.encode_refusal(refusal)
            return web.Response(status=status, body=body, headers=_JSON)
        response = web.StreamResponse(headers=_JSON)
        with self._waker() as wake, contextlib.suppress(ConnectionError):  # the client has left
            await response.prepare(request)
            if asked is None:
                await response.write(_line({"header": self._header(), "watch_id": "-1"}))
            else:
                await self._follow(asked, response, wake)
            while not self._is_closing:  # unbounded on purpose: the client ends it by leaving
                wake.clear()
                await wake.wait()
        return response

    async def _follow(self, asked: requests.Watch, response: web.StreamResponse, wake: asyncio.Event) -> None:
        """Tell what happens until the watch is cancelled or the server stops."""
        shown_id = {"watch_id": str(asked.watch_id)} if asked.watch_id else {}
        if asked.range_end and asked.range_end != FROM_KEY and asked.range_end <= asked.key:
            reason = {"created": True, "canceled": True, "cancel_reason": "mvcc: watcher range is empty"}
            await response.write(_line({"header": self._header(), "watch_id": "-1", **reason}))
            return
        following = asked.start_revision or self.model.revision + 1
        await response.write(_line({"header": self._header(), **shown_id, "created": True}))
        while not self._is_closing:
            wake.clear()
            try:
                batch, following = self.model.events_since(following, asked.key, asked.range_end)
            except Compacted as exc:
                lost = {"canceled": True, "compact_revision": str(exc.compact_revision)}
                await response.write(_line({"header": self._header(has_revision=False), **shown_id, **lost}))
                return
            if batch.events:
                events = [answers.encode_event(event) for event in batch.events]
                await response.write(_line({"header": self._header(), **shown_id, "events": events}))
            if following <= self.model.revision:
                continue
            try:
                async with asyncio.timeout(self._progress_interval_s):
                    await wake.wait()
            except TimeoutError:
                if asked.has_progress and following == self.model.revision + 1:
                    await response.write(_line({"header": self._header(), **shown_id}))

    # --- inside ----------------------------------------------------------------------------------------------

    def _header(self, *, has_revision: bool = True) -> Json:
        header = {"cluster_id": self._cluster, "member_id": self._member}
        if has_revision:
            header["revision"] = str(self.model.revision)
        return {**header, "raft_term": "1"}

    @contextlib.contextmanager
    def _writing(self, op: Op | None) -> Iterator[None]:
        """Around whatever may change the model: its size is checked, revisions are reserved, watchers are told."""
        if op is not None and requests.bytes_in(op) > REQUEST_BYTES_MAX:
            raise _too_large()
        if not isinstance(op, Delete | None) and self.model.size_bytes > SPACE_BYTES_MAX:
            if self.model.compacted < self.model.revision:
                self.model.compact(self.model.revision)  # rather lose the past than refuse
            if self.model.size_bytes > SPACE_BYTES_MAX:
                raise StoreRejected(RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded")
        self._reserve()
        before = self.model.revision
        yield
        if self.model.revision != before:
            self._publish()

    def _reserve(self) -> None:
        """Blocks the loop for an fsync, once in a million revisions."""
        mark = self._mark
        if mark is None or self.model.revision + REVISIONS_SPARE <= mark.reserved:
            return
        try:
            mark.reserve(self.model.revision + REVISIONS_RESERVED)
        except OSError as exc:
            raise StoreRejected(UNAVAILABLE, f"the revision mark cannot be written: {exc.strerror}") from exc

    def _publish(self) -> None:
        for waker in self._wakers:
            waker.set()

    @contextlib.contextmanager
    def _waker(self) -> Iterator[asyncio.Event]:
        waker = asyncio.Event()
        self._wakers.add(waker)
        try:
            yield waker
        finally:
            self._wakers.discard(waker)


def _too_large() -> StoreRejected:
    return StoreRejected(requests.INVALID_ARGUMENT, "etcdserver: request is too large")


def _line(result: Json) -> bytes:
    return orjson.dumps({"result": result}, option=orjson.OPT_APPEND_NEWLINE)


def _authenticate(_raw: Json) -> Json:
    raise StoreRejected(9, "etcdserver: authentication is not enabled")


async def _version(_request: web.Request) -> web.Response:
    return web.Response(body=orjson.dumps({"etcdserver": VERSION, "etcdcluster": "3.5.0"}), headers=_JSON)


async def _health(_request: web.Request) -> web.Response:
    return web.Response(body=orjson.dumps({"health": "true", "reason": ""}), content_type="text/plain")


async def serve(
    host: str,
    port: int,
    *,
    data: Path | None,
    on_ready: Callable[[str], None],
    clock: Clock | None = None,
    rng: random.Random | None = None,
) -> None:
    """Serve until cancelled; `on_ready` is told the URL. Port 0 takes a free one.

    With `data` revisions never go back over restarts; nothing else is kept. Raises CommandError if the address or
    the directory cannot be used.
    """
    clock = clock if clock is not None else SystemClock()
    rng = rng if rng is not None else random.Random()
    with contextlib.ExitStack() as stack:
        mark = None
        revision = 1
        if data is not None:
            mark = RevisionMark(data)
            stack.callback(mark.close)
            revision = mark.reserved
        store = EmbeddedStore(Model(rng=rng, revision=revision), clock=clock, rng=rng, mark=mark)
        runner = web.AppRunner(
            store.application(), handler_cancellation=True, access_log=None, shutdown_timeout=STOP_TIMEOUT_S
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            try:
                await site.start()
            except OSError as exc:
                why = exc.strerror or str(exc)
                raise CommandError(f"the embedded store cannot listen on {host}:{port}: {why}") from exc
            shown_host = f"[{host}]" if ":" in host else host
            address = f"{shown_host}:{runner.addresses[0][1]}"
            _LOG.warning(
                "embedded store: in memory, one process, not for production",
                extra={"address": address, "data": str(data) if data else None},
            )
            on_ready(f"http://{address}")
            await store.tick()
        finally:
            store.stop_watches()
            await runner.cleanup()
