"""The store as a client of etcd's JSON gateway: several endpoints, bounded tries, three outcomes for a write.

Law: protocol.md A.7, A.9 and C. A transaction is sent again only while it is certain that nothing of it was sent, or
that the server refused it before it could be applied; otherwise its outcome is Unknown. A keepalive without a TTL is
a lost lease. A revision that goes back is a bad endpoint. Nothing here decides what a lost answer means for a shard.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

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
)
from shardlead.store import gateway
from shardlead.store.base import (
    Grant,
    LeaseKeys,
    Op,
    Outcome,
    Put,
    Range,
    RangeResult,
    StoreStatus,
    Txn,
    Unknown,
    WatchBatch,
)
from shardlead.store.credentials import Credentials
from shardlead.store.endpoints import Budget, Cursor, Health, loop_time
from shardlead.store.faults import Fault, Faulted, Verdict, fault_of, judge
from shardlead.store.gateway import Header
from shardlead.store.jsonfields import parse
from shardlead.store.transport import Channel, HttpTransport, Transport, TransportError
from shardlead.store.versions import is_progress_trusted, warnings_for
from shardlead.store.watchstream import WatchStream

_log = logging.getLogger("shardlead.store.etcd")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Try:
    """What was known when a request was sent."""

    endpoint: str
    floor: int  # the largest revision so far: no answer that reads may be below it


class _Regressed(Exception):
    """The answer's revision is below one that was known when the request was sent."""


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
        self._rng = rng
        self._transport = transport if transport is not None else HttpTransport(settings)
        self._credentials = Credentials(settings, self._transport)
        self._endpoints = tuple(endpoint.rstrip("/") for endpoint in settings.endpoints)
        count = len(self._endpoints)
        # each process begins somewhere else, so that a fleet's load spreads over the members
        self._cursors = {channel: Cursor(count, rng.randrange(count)) for channel in Channel}
        self._health = Health(clock)
        self._cluster_id = 0
        self._revision = 0

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
        """Close all connections. Idempotent."""
        await self._credentials.close()
        await self._transport.close()

    def rotate(self, reason: str) -> None:
        """Take the next endpoint for reads, writes and watches; renewals leave one only for failing themselves."""
        for channel in (Channel.CALL, Channel.WATCH):
            cursor = self._cursors[channel]
            cursor.leave(cursor.at)
        _log.info("endpoint left", extra={"reason": reason})

    # --- calls that may be repeated ----------------------------------------------------------------------------

    async def read(self, op: Range) -> RangeResult:
        """Asked again on the next endpoint until one answers. Raises Compacted, StoreUnavailable, StoreRejected."""

        def decode(raw: dict[str, Any], asked: _Try) -> RangeResult:
            self._check_revision(self._seen(raw), asked.floor)
            return gateway.range_result(raw)

        return await self._repeated(gateway.RANGE, gateway.range_body(op), decode)

    async def grant(self, ttl_s: int) -> Grant:
        """Asked again on the next endpoint until one answers; a lease whose grant was not heard of expires."""

        def decode(raw: dict[str, Any], _asked: _Try) -> Grant:
            self._seen(raw)
            return gateway.grant_result(raw)

        return await self._repeated(gateway.GRANT, gateway.grant_body(ttl_s), decode)

    async def lease_keys(self, lease: int) -> LeaseKeys:
        """Asked again on the next endpoint until one answers. Raises LeaseGone."""

        def decode(raw: dict[str, Any], _asked: _Try) -> LeaseKeys:
            self._seen(raw)
            found = gateway.lease_keys(raw, lease)
            if found is None:
                raise LeaseGone(lease)
            return found

        return await self._repeated(gateway.LEASE_KEYS, gateway.lease_keys_body(lease), decode, lease=lease)

    async def revoke(self, lease: int) -> None:
        """May be repeated, since no lease id comes twice. "Not found" after a try without an answer is our own work,
        and no error."""
        is_ours = False

        def note() -> None:
            nonlocal is_ours
            is_ours = True

        def decode(raw: dict[str, Any], _asked: _Try) -> None:
            self._seen(raw)

        try:
            await self._repeated(gateway.REVOKE, gateway.lease_body(lease), decode, lease=lease, on_uncertain=note)
        except LeaseGone:
            if not is_ours:
                raise

    async def status(self) -> StoreStatus:
        """Who answers, and which known faults that version has."""

        def decode(raw: dict[str, Any], asked: _Try) -> StoreStatus:
            header = self._seen(raw)
            version = gateway.version_of(raw)
            trusted, warnings = is_progress_trusted(version), warnings_for(version)
            return StoreStatus(asked.endpoint, version, header.cluster_id, header.revision, trusted, warnings)

        return await self._repeated(gateway.STATUS, b"{}", decode)

    async def _repeated(
        self,
        path: str,
        body: bytes,
        decode: Callable[[dict[str, Any], _Try], T],
        *,
        lease: int = 0,
        on_uncertain: Callable[[], None] = lambda: None,
    ) -> T:
        """Ask one endpoint after the other until one answers, for `call_timeout_s` in all. `on_uncertain` hears of
        each try that may have had an effect without our knowing."""
        cursor = self._cursors[Channel.CALL]
        budget = Budget(self._settings.call_timeout_s, len(self._endpoints), self._rng)
        while True:
            index = cursor.at
            asked = _Try(self._endpoints[index], self._revision)
            try:
                return decode(await self._attempt(Channel.CALL, index, path, body, budget.left_s), asked)
            except TransportError as exc:
                reason, is_uncertain = exc.reason, exc.is_sent
            except Faulted as exc:
                _raise_refusal(exc.fault, lease)
                reason, is_uncertain = str(exc.fault), judge(exc.fault) is not Verdict.NOT_NOW
            except _Regressed as exc:
                reason, is_uncertain = str(exc), False
            except ValueError as exc:
                reason, is_uncertain = f"unreadable answer: {exc}", True
            if is_uncertain:
                on_uncertain()
            self._left(cursor, index, reason)
            if not await budget.has_another_try():
                raise StoreUnavailable(reason, endpoint=self._endpoints[index])

    # --- calls that may not ------------------------------------------------------------------------------------

    async def commit(self, txn: Txn) -> Outcome:
        """Committed, Conflict or Unknown. Raises StoreRejected or LeaseGone where the refusal proves that nothing
        was applied; never StoreUnavailable: that is Unknown, with `is_sent` false if nothing was sent. A transaction
        that only reads may be sent again like any read."""
        body = gateway.txn_body(txn)
        is_write = _writes(txn)
        cursor = self._cursors[Channel.CALL]
        budget = Budget(self._settings.call_timeout_s, len(self._endpoints), self._rng)
        while True:
            index, floor = cursor.at, self._revision
            try:
                raw = await self._attempt(Channel.CALL, index, gateway.TXN, body, budget.left_s)
                outcome = gateway.txn_outcome(raw)
                self._check_revision(self._seen(raw), floor)
            except TransportError as exc:
                reason, is_sent = exc.reason, exc.is_sent
            except Faulted as exc:
                _raise_refusal(exc.fault, _lease_in(txn.success) or _lease_in(txn.failure))
                reason, is_sent = str(exc.fault), judge(exc.fault) is not Verdict.NOT_NOW
            except _Regressed as exc:
                reason, is_sent = str(exc), True
            except ValueError as exc:
                reason, is_sent = f"unreadable answer: {exc}", True
            else:
                return outcome
            self._left(cursor, index, reason)
            is_sent = is_sent and is_write
            if is_sent or not await budget.has_another_try():
                return Unknown(f"{self._endpoints[index]}: {reason}", is_sent=is_sent)

    async def renew(self, lease: int) -> int:
        """One attempt. Raises LeaseGone, StoreReplaced, and for all else, refused credentials too, StoreUnavailable:
        nothing but the lease's absence may count as its loss."""
        cursor = self._cursors[Channel.RENEWAL]
        index = cursor.at
        body = gateway.lease_body(lease)
        try:
            raw = await self._attempt(Channel.RENEWAL, index, gateway.RENEW, body, self._settings.try_timeout_s)
            self._seen(raw)
            gateway.check_lease(raw, lease)
            ttl_s = gateway.renewed_ttl_s(raw)
        except TransportError as exc:
            reason = exc.reason
        except Faulted as exc:
            if judge(exc.fault) is Verdict.LEASE_GONE:
                raise LeaseGone(lease) from exc
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
        """Entered when the store has said that the watch stands; its connection ends with the block."""
        assert start_revision > 0, "a watch without a start would skip what happens before it stands"
        stream = await self._watch_opened(gateway.watch_body(key, range_end, start_revision))
        try:
            yield stream
        finally:
            stream.close()

    async def _watch_opened(self, body: bytes) -> WatchStream:
        cursor = self._cursors[Channel.WATCH]
        budget = Budget(self._settings.call_timeout_s, len(self._endpoints), self._rng)
        has_new_token = False
        while True:
            index = cursor.at
            headers: Mapping[str, str] = gateway.WATCH_HEADERS
            refusal: Exception | None = None
            timeout_s = max(0.0, min(self._settings.try_timeout_s, budget.left_s))
            try:
                headers = await self._credentials.authorized(headers, self._endpoints[index], timeout_s)
                return await self._watch_attempted(self._endpoints[index], body, headers, timeout_s)
            except TransportError as exc:
                reason = exc.reason
            except Faulted as exc:
                if judge(exc.fault) is Verdict.UNAUTHENTICATED:
                    refusal = exc
                else:
                    _raise_refusal(exc.fault, 0)
                reason = str(exc.fault)
            except WatchCanceled as exc:
                if exc.compact_revision:
                    raise
                refusal = exc  # to a token that it has forgotten a member says "permission denied" or nothing at all
                reason = exc.reason
            except ValueError as exc:
                reason = f"unreadable answer: {exc}"
            if refusal is not None:
                if has_new_token or not self._credentials.can_renew:
                    if isinstance(refusal, Faulted):
                        _raise_refusal(refusal.fault, 0)
                    raise refusal
                has_new_token = True
                self._credentials.forget(headers)
                continue
            self._left(cursor, index, reason)
            if not await budget.has_another_try():
                raise StoreUnavailable(reason, endpoint=self._endpoints[index])

    async def _watch_attempted(
        self, endpoint: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> WatchStream:
        """Raises TransportError, Faulted, WatchCanceled, ValueError."""
        is_trusted = await self._is_progress_trusted(endpoint, headers, timeout_s)
        stream = await self._transport.stream(endpoint, gateway.WATCH, body, headers, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                if stream.status != 200:
                    raise Faulted(fault_of(stream.status, await stream.read()))
                watch = WatchStream(
                    stream, endpoint, self._settings.watch_silence_s, self._seen_header, is_trusted=is_trusted
                )
                await watch.created()
        except TimeoutError as exc:
            stream.close()
            raise TransportError(f"the watch was not created within {timeout_s:.3g} s", is_sent=True) from exc
        except BaseException:  # cancelled, too: a watch that nobody reads would stay open at the server
            stream.close()
            raise
        self._health.answered(endpoint)
        return watch

    async def _is_progress_trusted(self, endpoint: str, headers: Mapping[str, str], timeout_s: float) -> bool:
        """Asked at each opening, since a member may have been replaced by another version meanwhile."""
        answer = await self._transport.post(Channel.WATCH, endpoint, gateway.STATUS, b"{}", headers, timeout_s)
        try:
            return answer.status == 200 and is_progress_trusted(gateway.version_of(parse(answer.body)))
        except ValueError:
            return False

    # --- one attempt -------------------------------------------------------------------------------------------

    async def _attempt(self, channel: Channel, index: int, path: str, body: bytes, left_s: float) -> dict[str, Any]:
        """One request to one endpoint; once more with a new token where the old one was refused. Waiting for a token
        takes nothing from the time that the request has. Raises TransportError, Faulted, ValueError."""
        endpoint = self._endpoints[index]
        over = loop_time() + left_s
        # etcd renews without looking at the token: one that is lost must not cost the lease
        headers = self._credentials.shown(gateway.HEADERS) if channel is Channel.RENEWAL else None
        if headers is None:
            headers = await self._credentials.authorized(gateway.HEADERS, endpoint, self._try_s(over))
        try:
            return await self._posted(channel, endpoint, path, body, headers, self._try_s(over))
        except Faulted as exc:
            if judge(exc.fault) is not Verdict.UNAUTHENTICATED or not self._credentials.can_renew:
                raise
        self._credentials.forget(headers)
        headers = await self._credentials.authorized(gateway.HEADERS, endpoint, self._try_s(over))
        return await self._posted(channel, endpoint, path, body, headers, self._try_s(over))

    def _try_s(self, over: float) -> float:
        """How long one try may take that begins now, in a call that is over then."""
        return min(self._settings.try_timeout_s, _left_until(over))

    async def _posted(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> dict[str, Any]:
        answer = await self._transport.post(channel, endpoint, path, body, headers, timeout_s)
        if answer.status != 200:
            raise Faulted(fault_of(answer.status, answer.body))
        # a renewal's answer is a stream of one
        item = gateway.stream_item(answer.body) if path == gateway.RENEW else parse(answer.body)
        if isinstance(item, Fault):
            raise Faulted(item)
        self._health.answered(endpoint)
        return item

    def _left(self, cursor: Cursor, index: int, reason: str) -> None:
        cursor.leave(index)
        self._health.failed(self._endpoints[index], reason)

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


def _left_until(deadline: float) -> float:
    return max(0.0, deadline - loop_time())


def _raise_refusal(fault: Fault, lease: int) -> None:
    """Raises what the fault proves; returns if it proves nothing for good."""
    match judge(fault):
        case Verdict.NOT_NOW | Verdict.UNCERTAIN:
            return
        case Verdict.COMPACTED:
            raise Compacted(0)  # the answer does not say up to where
        case Verdict.LEASE_GONE if lease:
            raise LeaseGone(lease)
        case _:
            raise StoreRejected(fault.code, fault.message)


def _writes(txn: Txn) -> bool:
    """Whether a transaction can change anything, nested ones included."""
    return any(_writes(op) if isinstance(op, Txn) else not isinstance(op, Range) for op in (*txn.success, *txn.failure))


def _lease_in(ops: Sequence[Op]) -> int:
    """The lease that a transaction puts keys on, nested ones included; 0 if there is none."""
    for op in ops:
        if isinstance(op, Put) and op.lease:
            return op.lease
        if isinstance(op, Txn):
            lease = _lease_in(op.success) or _lease_in(op.failure)
            if lease:
                return lease
    return 0
