"""The store as a client of etcd's JSON gateway: several endpoints, bounded tries, three outcomes for a write.

Law: protocol.md A.7, A.9 and C. A transaction is sent again only while it is certain that nothing of it was sent, or
that the server refused it before it could be applied; otherwise its outcome is Unknown. A keepalive without a TTL is
a lost lease. A revision that goes back is a bad endpoint. Nothing here decides what a lost answer means for a shard.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from shardlead.clock import Clock
from shardlead.config import StoreSettings
from shardlead.errors import (
    Compacted,
    ConfigError,
    LeaseGone,
    Problem,
    StoreRejected,
    StoreReplaced,
    StoreUnavailable,
    WatchCanceled,
    WatchSilent,
)
from shardlead.store import gateway
from shardlead.store.base import (
    Grant,
    LeaseKeys,
    Outcome,
    Put,
    Range,
    RangeResult,
    StoreStatus,
    Txn,
    Unknown,
    WatchBatch,
)
from shardlead.store.gateway import Fault, Header, Verdict
from shardlead.store.transport import Channel, HttpTransport, Stream, Transport, TransportError
from shardlead.store.versions import is_progress_trusted, warnings_for

_log = logging.getLogger("shardlead.store.etcd")

PAUSE_MIN_S: Final = 0.05  # between rounds over all endpoints, doubled each time, jittered
PAUSE_MAX_S: Final = 1.0

_JSON: Final = {"Content-Type": "application/json"}
_WATCH_HEADERS: Final = {**_JSON, "Grpc-Metadata-hasleader": "true"}  # an isolated member ends the watch itself

T = TypeVar("T")


class _Faulted(Exception):
    """The server answered with an error."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(str(fault))


class _Regressed(Exception):
    """The answer's revision is below one that was known when the request was sent."""


class _Cursor:
    """Which endpoint one channel uses. Two calls that fail on the same endpoint move it once."""

    __slots__ = ("_count", "at")

    def __init__(self, count: int, at: int) -> None:
        self._count = count
        self.at = at

    def leave(self, index: int) -> None:
        if index == self.at:
            self.at = (index + 1) % self._count


class _Budget:
    """The time and the pauses of one call over all its tries."""

    __slots__ = ("_deadline", "_endpoints", "_failures", "_rng")

    def __init__(self, timeout_s: float, endpoints: int, rng: random.Random) -> None:
        self._deadline = _now() + timeout_s
        self._endpoints = endpoints
        self._rng = rng
        self._failures = 0

    @property
    def left_s(self) -> float:
        return self._deadline - _now()

    async def has_another_try(self) -> bool:
        """Whether time is left; pauses first where every endpoint has just failed once more."""
        self._failures += 1
        rounds, rest = divmod(self._failures, self._endpoints)
        if rest == 0:
            pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** min(rounds - 1, 10)) * self._rng.uniform(0.5, 1.0)
            if pause_s >= self.left_s:
                return False
            await asyncio.sleep(pause_s)
        return self.left_s > 0


class EtcdStore:
    """`store.base.Store` over etcd's gateway. Use `async with`, or call `close`.

    Calls may run side by side. Renewals, watches and all other calls have connections of their own and turn to the
    next endpoint each for themselves.
    """

    def __init__(
        self, settings: StoreSettings, *, clock: Clock, rng: random.Random, transport: Transport | None = None
    ) -> None:
        if not settings.endpoints:
            raise ConfigError([Problem("store", "store.endpoints", settings.endpoints, "at least one URL")])
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._transport = transport if transport is not None else HttpTransport(settings)
        self._endpoints = tuple(endpoint.rstrip("/") for endpoint in settings.endpoints)
        # each process begins somewhere else, so that a fleet's load spreads over the members
        self._cursors = {channel: _Cursor(len(self._endpoints), self._random_index()) for channel in Channel}
        self._troubled: set[str] = set()  # endpoints whose failure has been logged and that have not answered since
        self._cluster_id = 0
        self._revision = 0
        self._token = ""
        self._is_auth_off = False  # credentials are set, but the server has no auth
        self._token_lock = asyncio.Lock()

    def __repr__(self) -> str:
        at = self._endpoints[self._cursors[Channel.CALL].at]
        return f"<EtcdStore at {at} of {len(self._endpoints)}, revision {self._revision}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()

    def rotate(self, reason: str) -> None:
        """Take the next endpoint for reads, writes and watches; renewals have their own reasons."""
        for channel in (Channel.CALL, Channel.WATCH):
            cursor = self._cursors[channel]
            cursor.leave(cursor.at)
        _log.info(
            "endpoint left", extra={"reason": reason, "endpoint": self._endpoints[self._cursors[Channel.CALL].at]}
        )

    # --- reads, and calls that may be repeated -----------------------------------------------------------------

    async def read(self, op: Range) -> RangeResult:
        def decode(raw: dict[str, Any], floor: int) -> RangeResult:
            self._check_revision(self._seen(raw), floor)
            return gateway.range_result(raw)

        return await self._repeated(gateway.RANGE, gateway.range_body(op), decode)

    async def grant(self, ttl_s: int) -> Grant:
        def decode(raw: dict[str, Any], _floor: int) -> Grant:
            self._seen(raw)
            return gateway.grant_result(raw)

        return await self._repeated(gateway.GRANT, gateway.grant_body(ttl_s), decode)

    async def lease_keys(self, lease: int) -> LeaseKeys:
        def decode(raw: dict[str, Any], _floor: int) -> LeaseKeys:
            self._seen(raw)
            found = gateway.lease_keys(raw, lease)
            if found is None:
                raise LeaseGone(lease)
            return found

        return await self._repeated(gateway.LEASE_KEYS, gateway.lease_keys_body(lease), decode, lease=lease)

    async def revoke(self, lease: int) -> None:
        """May be repeated, since lease ids are not used again. "Not found" after a try that brought no answer is
        then our own work, and no error."""

        def decode(raw: dict[str, Any], _floor: int) -> None:
            self._seen(raw)

        tries = 0

        def count(_index: int) -> None:
            nonlocal tries
            tries += 1

        try:
            await self._repeated(gateway.REVOKE, gateway.lease_body(lease), decode, lease=lease, on_uncertain=count)
        except LeaseGone:
            if not tries:
                raise

    async def status(self) -> StoreStatus:
        endpoint = ""

        def decode(raw: dict[str, Any], _floor: int) -> StoreStatus:
            header = self._seen(raw)
            version = gateway.version_of(raw)
            return StoreStatus(
                endpoint,
                version,
                header.cluster_id,
                header.revision,
                is_progress_trusted(version),
                warnings_for(version),
            )

        def note(index: int) -> None:
            nonlocal endpoint
            endpoint = self._endpoints[index]

        return await self._repeated(gateway.STATUS, b"{}", decode, on_try=note)

    async def _repeated(
        self,
        path: str,
        body: bytes,
        decode: Callable[[dict[str, Any], int], T],
        *,
        lease: int = 0,
        on_try: Callable[[int], None] = lambda _index: None,
        on_uncertain: Callable[[int], None] = lambda _index: None,
    ) -> T:
        """Ask one endpoint after the other until one answers, for `call_timeout_s` in all."""
        cursor = self._cursors[Channel.CALL]
        budget = _Budget(self._settings.call_timeout_s, len(self._endpoints), self._rng)
        while True:
            index, floor = cursor.at, self._revision
            on_try(index)
            try:
                raw = await self._attempt(Channel.CALL, index, path, body, budget.left_s)
                return decode(raw, floor)
            except TransportError as exc:
                reason = exc.reason
                if exc.is_sent:
                    on_uncertain(index)
            except _Faulted as exc:
                self._raise_refusal(exc.fault, lease)
                reason = str(exc.fault)
                on_uncertain(index)
            except _Regressed as exc:
                reason = str(exc)
            except ValueError as exc:
                reason = f"unreadable answer: {exc}"
                on_uncertain(index)
            self._left(cursor, index, reason)
            if not await budget.has_another_try():
                raise StoreUnavailable(reason, endpoint=self._endpoints[index])

    # --- writes ------------------------------------------------------------------------------------------------

    async def commit(self, txn: Txn) -> Outcome:
        body = gateway.txn_body(txn)
        cursor = self._cursors[Channel.CALL]
        budget = _Budget(self._settings.call_timeout_s, len(self._endpoints), self._rng)
        while True:
            index, floor = cursor.at, self._revision
            try:
                raw = await self._attempt(Channel.CALL, index, gateway.TXN, body, budget.left_s)
                outcome = gateway.txn_outcome(raw)
                self._check_revision(self._seen(raw), floor)
            except TransportError as exc:
                reason, is_decided = exc.reason, not exc.is_sent
            except _Faulted as exc:
                self._raise_refusal(exc.fault, _lease_in(txn.success) or _lease_in(txn.failure))
                reason, is_decided = str(exc.fault), judge_is_not_now(exc.fault)
            except _Regressed as exc:
                reason, is_decided = str(exc), False
            except ValueError as exc:
                reason, is_decided = f"unreadable answer: {exc}", False
            else:
                return outcome
            self._left(cursor, index, reason)
            if not is_decided:
                return Unknown(f"{self._endpoints[index]}: {reason}")
            if not await budget.has_another_try():
                return Unknown(f"{self._endpoints[index]}: {reason}", is_sent=False)

    async def renew(self, lease: int) -> int:
        cursor = self._cursors[Channel.RENEWAL]
        index = cursor.at
        try:
            raw = await self._attempt(
                Channel.RENEWAL, index, gateway.RENEW, gateway.lease_body(lease), self._settings.try_timeout_s
            )
            self._seen(raw)
            ttl_s = gateway.renewed_ttl_s(raw)
        except TransportError as exc:
            reason = exc.reason
        except _Faulted as exc:
            self._raise_refusal(exc.fault, lease)
            reason = str(exc.fault)
        except ValueError as exc:
            reason = f"unreadable answer: {exc}"
        else:
            if ttl_s == 0:
                raise LeaseGone(lease)
            return ttl_s
        self._left(cursor, index, reason)
        raise StoreUnavailable(reason, endpoint=self._endpoints[index])

    # --- watch -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def watch(
        self, key: bytes, range_end: bytes, start_revision: int
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        assert start_revision > 0, "a watch without a start would skip what happens before it stands"
        watch = await self._watch_opened(gateway.watch_body(key, range_end, start_revision))
        try:
            yield watch
        finally:
            watch.close()

    async def _watch_opened(self, body: bytes) -> "_Watch":
        cursor = self._cursors[Channel.WATCH]
        budget = _Budget(self._settings.call_timeout_s, len(self._endpoints), self._rng)
        has_new_token = False
        while True:
            index, token = cursor.at, self._token
            try:
                return await self._watch_attempted(index, body, budget.left_s)
            except TransportError as exc:
                reason = exc.reason
            except _Faulted as exc:
                if judge_is_unauthenticated(exc.fault) and self._has_credentials and not has_new_token:
                    has_new_token = True
                    self._forget(token)
                    continue
                self._raise_refusal(exc.fault, 0)
                reason = str(exc.fault)
            except WatchCanceled as exc:
                # a member that does not know the token any more says "permission denied" and no more
                if exc.compact_revision or not self._has_credentials or has_new_token:
                    raise
                has_new_token = True
                self._forget(token)
                continue
            except ValueError as exc:
                reason = f"unreadable answer: {exc}"
            self._left(cursor, index, reason)
            if not await budget.has_another_try():
                raise StoreUnavailable(reason, endpoint=self._endpoints[index])

    async def _watch_attempted(self, index: int, body: bytes, left_s: float) -> "_Watch":
        endpoint = self._endpoints[index]
        timeout_s = min(self._settings.try_timeout_s, left_s)
        headers = await self._authorized(_WATCH_HEADERS, index, left_s)
        is_trusted = await self._is_progress_trusted(index, headers, timeout_s)
        stream = await self._transport.stream(endpoint, gateway.WATCH, body, headers, timeout_s)
        try:
            if stream.status != 200:
                async with asyncio.timeout(timeout_s):
                    raise _Faulted(gateway.fault_of(stream.status, await stream.read()))
            watch = _Watch(stream, endpoint, self._settings.watch_silence_s, self._seen_header, is_trusted=is_trusted)
            async with asyncio.timeout(timeout_s):
                await watch.created()
        except TimeoutError as exc:
            stream.close()
            raise TransportError(f"the watch was not created within {timeout_s:.3g} s", is_sent=True) from exc
        except BaseException:
            stream.close()
            raise
        self._troubled.discard(endpoint)
        return watch

    async def _is_progress_trusted(self, index: int, headers: Mapping[str, str], timeout_s: float) -> bool:
        """Asked at each opening, since a member may have been replaced by another version meanwhile."""
        answer = await self._transport.post(
            Channel.WATCH, self._endpoints[index], gateway.STATUS, b"{}", {**headers}, timeout_s
        )
        try:
            return answer.status == 200 and is_progress_trusted(gateway.version_of(gateway.parse(answer.body)))
        except ValueError:
            return False

    # --- one attempt -------------------------------------------------------------------------------------------

    async def _attempt(self, channel: Channel, index: int, path: str, body: bytes, left_s: float) -> dict[str, Any]:
        """One request to one endpoint; once more with a new token where the old one was refused. Raises
        TransportError, _Faulted, or ValueError."""
        deadline = _now() + min(self._settings.try_timeout_s, left_s)
        token = self._token
        try:
            return await self._posted(channel, index, path, body, deadline)
        except _Faulted as exc:
            if not (judge_is_unauthenticated(exc.fault) and self._has_credentials):
                raise
        self._forget(token)
        return await self._posted(channel, index, path, body, deadline)

    async def _posted(self, channel: Channel, index: int, path: str, body: bytes, deadline: float) -> dict[str, Any]:
        headers = await self._authorized(_JSON, index, deadline - _now())
        endpoint = self._endpoints[index]
        answer = await self._transport.post(channel, endpoint, path, body, headers, max(0.0, deadline - _now()))
        if answer.status != 200:
            raise _Faulted(gateway.fault_of(answer.status, answer.body))
        if path == gateway.RENEW:  # a stream of one answer
            item = gateway.stream_item(answer.body)
            if isinstance(item, Fault):
                raise _Faulted(item)
        else:
            item = gateway.parse(answer.body)
        self._troubled.discard(endpoint)
        return item

    def _raise_refusal(self, fault: Fault, lease: int) -> None:
        """Raises what the fault proves; returns if it proves nothing for good."""
        match gateway.judge(fault):
            case Verdict.NOT_NOW | Verdict.UNCERTAIN:
                return
            case Verdict.COMPACTED:
                raise Compacted(0)  # the answer does not say up to where
            case Verdict.LEASE_GONE if lease:
                raise LeaseGone(lease)
            case _:
                raise StoreRejected(fault.code, fault.message)

    def _left(self, cursor: _Cursor, index: int, reason: str) -> None:
        """Turn to the next endpoint, and say so once per trouble."""
        cursor.leave(index)
        endpoint = self._endpoints[index]
        if endpoint not in self._troubled:
            self._troubled.add(endpoint)
            _log.warning("endpoint failed", extra={"endpoint": endpoint, "reason": reason})

    def _random_index(self) -> int:
        return self._rng.randrange(len(self._endpoints))

    # --- which cluster, and how far it is ----------------------------------------------------------------------

    def _seen(self, raw: Mapping[str, Any]) -> Header:
        header = gateway.header_of(raw)
        self._seen_header(header)
        return header

    def _seen_header(self, header: Header) -> None:
        if not self._cluster_id:
            self._cluster_id = header.cluster_id
        elif header.cluster_id not in (0, self._cluster_id):
            self.rotate("another cluster answers")
            raise StoreReplaced(self._cluster_id, header.cluster_id)
        self._revision = max(self._revision, header.revision)

    def _check_revision(self, header: Header, floor: int) -> None:
        """`floor` was read before the request was sent: answers may overtake each other."""
        if header.revision < floor:
            raise _Regressed(
                f"revision went back from {floor} to {header.revision}: this member is behind, or the store was "
                f"restored from a backup (then stop all workers and run `shardlead generation raise`)"
            )

    # --- who we are --------------------------------------------------------------------------------------------

    @property
    def _has_credentials(self) -> bool:
        return bool(self._settings.username) and not self._is_auth_off

    def _forget(self, token: str) -> None:
        """Of many calls whose token was refused at once, one gets a new one."""
        if self._token == token:
            self._token = ""

    async def _authorized(self, headers: Mapping[str, str], index: int, timeout_s: float) -> Mapping[str, str]:
        if not self._has_credentials:
            return headers
        if not self._token:
            await self._authenticate(index, timeout_s)
        return {**headers, "Authorization": self._token} if self._token else headers

    async def _authenticate(self, index: int, timeout_s: float) -> None:
        """Get a token. Nothing of the request that needs it has been sent yet, and no error here says it was."""
        body = gateway.authenticate_body(self._settings.username, self._settings.password)
        try:
            async with asyncio.timeout(timeout_s), self._token_lock:
                if self._token or self._is_auth_off:
                    return
                answer = await self._transport.post(
                    Channel.CALL, self._endpoints[index], gateway.AUTHENTICATE, body, _JSON, timeout_s
                )
        except TimeoutError as exc:
            raise TransportError(f"no token within {timeout_s:.3g} s", is_sent=False) from exc
        except TransportError as exc:
            raise TransportError(f"no token: {exc.reason}", is_sent=False) from exc
        if answer.status == 200:
            try:
                self._token = gateway.token_of(gateway.parse(answer.body))
            except ValueError as exc:
                raise TransportError(f"no token: {exc}", is_sent=False) from exc
            return
        fault = gateway.fault_of(answer.status, answer.body)
        if "authentication is not enabled" in fault.message:
            self._is_auth_off = True
            _log.warning("store has no authentication; user and password are not used", extra={"fault": str(fault)})
            return
        self._raise_refusal(fault, 0)
        raise TransportError(f"no token: {fault}", is_sent=False)


class _Watch(AsyncIterator[WatchBatch]):
    """The messages of one watch stream."""

    def __init__(
        self,
        stream: Stream,
        endpoint: str,
        silence_s: float,
        on_header: Callable[[Header], None],
        *,
        is_trusted: bool,
    ) -> None:
        self._stream = stream
        self._endpoint = endpoint
        self._silence_s = silence_s
        self._on_header = on_header
        self._is_trusted = is_trusted
        self._lines: deque[bytes] = deque()
        self._splitter = gateway.LineSplitter()
        self._is_closed = False

    async def created(self) -> None:
        """Returns when the store has said that the watch stands. Raises _Faulted, WatchCanceled."""
        message = self._message(await self._line())
        if not message.is_created:
            raise ValueError("a watch whose first message is not `created`")
        if message.batch.events:
            raise ValueError("a watch that begins with events")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    line = await self._line()
                batch = self._message(line).batch
            except TimeoutError as exc:
                raise WatchSilent(f"the watch was silent for {self._silence_s:g} s", endpoint=self._endpoint) from exc
            except TransportError as exc:
                raise StoreUnavailable(f"the watch broke: {exc.reason}", endpoint=self._endpoint) from exc
            except _Faulted as exc:
                raise StoreUnavailable(f"the watch ended: {exc.fault}", endpoint=self._endpoint) from exc
            except ValueError as exc:
                raise WatchCanceled(f"unreadable message: {exc}") from exc
            if batch.events or self._is_trusted:
                return batch

    def close(self) -> None:
        self._is_closed = True
        self._lines.clear()
        self._stream.close()

    async def _line(self) -> bytes:
        while not self._lines:
            if self._is_closed:
                raise TransportError("closed", is_sent=True)
            chunk = await self._stream.read()
            if chunk:
                self._lines.extend(self._splitter.feed(chunk))
                continue
            rest = self._splitter.rest()
            self._is_closed = True
            if not rest:
                raise TransportError("the server ended the stream", is_sent=True)
            self._lines.append(rest)  # an error comes as a last line without a newline
        return self._lines.popleft()

    def _message(self, line: bytes) -> gateway.WatchMessage:
        item = gateway.stream_item(line)
        if isinstance(item, Fault):
            raise _Faulted(item)
        message = gateway.watch_message(item)
        self._on_header(message.header)
        if message.is_canceled:
            raise WatchCanceled(message.reason, message.compact_revision)
        return message


def judge_is_not_now(fault: Fault) -> bool:
    return gateway.judge(fault) is Verdict.NOT_NOW


def judge_is_unauthenticated(fault: Fault) -> bool:
    return gateway.judge(fault) is Verdict.UNAUTHENTICATED


def _lease_in(ops: Sequence[object]) -> int:
    """The lease that a transaction puts keys on, nested ones included; 0 if there is none."""
    for op in ops:
        if isinstance(op, Put) and op.lease:
            return op.lease
        if isinstance(op, Txn):
            lease = _lease_in(op.success) or _lease_in(op.failure)
            if lease:
                return lease
    return 0


def _now() -> float:
    """For waking and bounding only; a lease's deadline is the session's business, on another clock."""
    return asyncio.get_running_loop().time()
