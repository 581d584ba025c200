"""A worker's session: one lease, its deadline, and the record that makes its name unique among the living.

    opening ──T0──▸ active ──deadline passed──▸ suspended ──renewed, then T3 confirmed──▸ active
                       └───────── lease gone, record gone, evicted ─────────▸ lost

Law: protocol.md A.3 (T0, T2, T3) and A.4. The guard is a synchronous comparison of the boot-time clock with the
deadline, at the point of use; the tasks here renew and wake, they never decide. Renewals run on the loop that does
the work, on purpose: a loop that is stalled must lose its lease. A session that is lost stays lost.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from shardlead.clock import NS_PER_S, Clock, SleepAware
from shardlead.config import LeaseSettings
from shardlead.core import lease as lease_rules
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.lease import Active, Foreign, Lost, Readings, Suspended, Terms
from shardlead.core.model import WorkerRecord
from shardlead.errors import KeyspaceError, LeaseGone, NameTaken, StoreError, StoreReplaced, StoreUnavailable
from shardlead.store.base import (
    Committed,
    Compare,
    Conflict,
    Delete,
    KeyValue,
    Put,
    Range,
    RangeResult,
    Store,
    Txn,
    Unknown,
    absent,
    leased_by,
    modified_at,
)

log = logging.getLogger("shardlead.session")

NAME_WAIT_EXTRA_S: Final = 5.0  # a taken name is waited for TTL + this long,
NAME_WAITS_MAX: Final = 4  # and so often, if nobody seems to renew what it stands on
NAME_LOOK_SHARE: Final = 0.25  # of the TTL: how often it is looked at
RETRY_S: Final = 0.1  # first pause after a failed renewal; doubles to RETRY_MAX_S
RETRY_MAX_S: Final = 1.0
WATCHMAN_S: Final = 0.5  # how often the clocks are compared with each other
INSTANT_NS: Final = 5_000_000  # reading all of them takes a microsecond; longer, and we were stalled between two
READINGS_MAX: Final = 5
CONFIRM_JITTER_S: Final = 0.2
CONFIRM_PAUSE_S: Final = 1.0  # T3 at most once a second
CLOSE_TIMEOUT_S: Final = 3.0
CLOSED: Final = "closed"  # the reason of a session that was ended on purpose


def terms_of(settings: LeaseSettings) -> Terms:
    """The deadline's terms that the settings ask for."""
    return Terms(drift=settings.drift, margin_s=settings.margin_s)


class Session:
    """One lease of this process, from T0 (`open_session`) to its loss or `close`.

    `on_change` is called synchronously at each change between active, suspended and lost; `on_deadline` with each new
    guard time (0: the guard says no), *before* it counts. `confirm` is T3: it says True (the record is ours), False (it
    is not: the session is lost) or None (not known).
    """

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        settings: LeaseSettings,
        *,
        clock: Clock,
        rng: random.Random,
        name: str,
        sid: str,
        lease: int,
        ttl_s: int,
        sent_ns: int,
        record: WorkerRecord | None = None,
        create_revision: int = 0,
        meta_revision: int = 0,
    ) -> None:
        self.name = name
        self.sid = sid
        self.lease = lease
        self.ttl_s = ttl_s
        self.record = record
        self.create_revision = create_revision
        self.meta_revision = meta_revision
        self.announced_revision = 0  # of the last `announce` that was applied
        self.terms = terms_of(settings)
        self.on_change: Callable[[lease_rules.State], None] = lambda _state: None
        self.on_deadline: Callable[[int], object] = lambda _deadline_ns: None
        self.confirm: Callable[[], Awaitable[bool | None]] | None = None
        self._store = store
        self._keyspace = keyspace
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._state: lease_rules.State = lease_rules.opened(sent_ns, ttl_s, self.terms)
        self._guard_ns = self._state.deadline_ns if isinstance(self._state, Active) else 0
        self._changed = asyncio.Event()
        self._clocks = self._readings()

    def __repr__(self) -> str:
        return f"<Session {self.name} sid={self.sid} {type(self._state).__name__} {self.remaining_s():.2f} s left>"

    # --- the guard ---

    @property
    def state(self) -> lease_rules.State:
        return self._state

    @property
    def is_active(self) -> bool:
        """Not suspended, not lost, and the deadline has not passed this instant."""
        return self.is_valid()

    @property
    def is_lost(self) -> bool:
        return isinstance(self._state, Lost)

    def is_valid(self, need_s: float = 0.0) -> bool:
        """The guard: may an act that takes effect within `need_s` seconds begin now? One clock read, no await."""
        return self._clock.now_ns() + int(need_s * NS_PER_S) < self._guard_ns

    @property
    def deadline_ns(self) -> int:
        """Until when the guard says yes; 0 when not active."""
        return self._guard_ns

    def remaining_s(self) -> float:
        """Seconds until the deadline; negative after it, and when not active."""
        return (self._guard_ns - self._clock.now_ns()) / NS_PER_S if self._guard_ns else -1.0

    async def suspended_for(self, seconds: float) -> None:
        """Return once it has been suspended for so long and no renewal has succeeded meanwhile: the store is away."""
        while True:
            while not self._is_cut_off():
                await self._next_change()
            try:
                async with asyncio.timeout(seconds):
                    while self._is_cut_off():
                        await self._next_change()
            except TimeoutError:
                return

    def _is_cut_off(self) -> bool:
        return isinstance(self._state, Suspended) and not self._state.renewed_until_ns

    # --- verdicts from outside ---

    def lose(self, reason: str) -> None:
        """A verdict: the session is over (evicted, record gone, another's)."""
        self._set(lease_rules.lost(self._state, reason))

    def doubt(self, reason: str) -> None:
        """Something contradicts our picture: suspend until a renewal and T3 say otherwise."""
        self._set(lease_rules.doubted(self._state, self._clock.now_ns()), reason)

    def guards(self) -> tuple[Compare, ...]:
        """What every transaction of this session compares: its record is on its lease, meta is the one it knows."""
        guards: tuple[Compare, ...] = (modified_at(self._keyspace.meta, self.meta_revision),)
        if self.record is not None:
            guards = (leased_by(self._keyspace.worker(self.name), self.lease), *guards)
        return guards

    # --- life ---

    async def run(self) -> None:
        """Renew until the session is lost; then return. Cancel to stop renewing (the lease then runs out)."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._renew_loop(), name=f"renew {self.sid}"),
                group.create_task(self._watchman(), name=f"watchman {self.sid}"),
                group.create_task(self._confirm_loop(), name=f"confirm {self.sid}"),
            ]
            while not self.is_lost:
                await self._next_change()
            for task in tasks:
                task.cancel()

    async def announce(self, record: WorkerRecord) -> bool:
        """Rewrite our record (a new state, say). False if it is not ours any more or the outcome is not known; it
        is to be said again then. From now on every T3 writes this one, so that none takes it back."""
        self.record = record
        key = self._keyspace.worker(self.name)
        txn = Txn((leased_by(key, self.lease),), (Put(key, encode(record), self.lease),))
        try:
            outcome = await self._store.commit(txn)
        except StoreError:
            return False
        if isinstance(outcome, Committed):
            self.announced_revision = outcome.revision
            return True
        return False

    async def close(self) -> bool:
        """Revoke the lease, which deletes all its keys in one revision; whether it is gone. Bounded; a store that is
        away ends it anyway by expiry. Lost or not, the session is over afterwards."""
        self.lose(CLOSED)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._store.revoke(self.lease)
        except LeaseGone:
            pass
        except (StoreError, TimeoutError) as exc:
            log.warning("lease not revoked, it will expire", extra={"worker": self.name, "reason": str(exc)})
            return False
        return True

    # --- tasks ---

    async def _renew_loop(self) -> None:
        pause_s = RETRY_S
        failing_since_ns = 0
        await self._until_renewal()
        while not self.is_lost:
            sent_ns = self._clock.now_ns()  # before the request is written: protocol.md A.4
            try:
                ttl_s = await self._store.renew(self.lease)
            except LeaseGone:
                self.lose("the store does not know the lease any more")
                return
            except StoreReplaced as exc:
                self.lose(str(exc))
                return
            except StoreError as exc:
                if not failing_since_ns:  # told once, and again when it is over
                    failing_since_ns = sent_ns
                    log.warning("renewals fail", extra={"worker": self.name, "reason": str(exc)})
                await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, RETRY_MAX_S)
                continue
            pause_s = RETRY_S
            if failing_since_ns:
                after_s = round((self._clock.now_ns() - failing_since_ns) / NS_PER_S, 3)
                log.info("renewals succeed again", extra={"worker": self.name, "after_s": after_s})
                failing_since_ns = 0
            self._set(lease_rules.renewed(self._state, sent_ns, ttl_s, self._clock.now_ns(), self.terms))
            self._wake()
            await self._until_renewal()

    async def _until_renewal(self) -> None:
        """The time between two renewals; a suspension that no renewal has followed yet cuts it short."""
        try:
            async with asyncio.timeout(self._settings.renew_interval_s * self._rng.uniform(0.9, 1.1)):
                while not isinstance(self._state, Suspended) or self._state.renewed_until_ns:
                    await self._next_change()
        except TimeoutError:
            return

    async def _watchman(self) -> None:
        """Wakes at the deadline so that loss is acted on in time; watches the clocks against each other."""
        while not self.is_lost:
            now_ns = self._clock.now_ns()
            self._set(lease_rules.lapsed(self._state, now_ns))
            before, self._clocks = self._clocks, self._readings()
            if reason := lease_rules.alarm(before, self._clocks):
                self.doubt(reason)
            until_s = WATCHMAN_S
            if isinstance(self._state, Active):
                until_s = min(until_s, max(0.001, (self._state.deadline_ns - now_ns) / NS_PER_S))
            await asyncio.sleep(until_s)

    def _readings(self) -> Readings:
        """All clocks at one instant, as far as that can be had: a stall between two of them would look like a jump."""
        clock, tries = self._clock, 0
        while True:
            boot_ns = clock.now_ns()
            awake_ns = clock.awake_ns() if isinstance(clock, SleepAware) else boot_ns
            wall_ns = int(clock.wall_s() * NS_PER_S)
            tries += 1
            if clock.now_ns() - boot_ns < INSTANT_NS or tries == READINGS_MAX:
                return Readings(boot_ns, awake_ns, wall_ns)

    async def _confirm_loop(self) -> None:
        """After a renewal that followed a suspension: T3, at most once a second."""
        while not self.is_lost:
            state = self._state
            if not isinstance(state, Suspended) or self._clock.now_ns() >= state.renewed_until_ns:
                await self._next_change()
                continue
            await asyncio.sleep(self._rng.uniform(0.0, CONFIRM_JITTER_S))
            verdict = True if self.confirm is None else await self.confirm()
            match verdict:
                case False:
                    self.lose("the worker's record is not ours any more")
                case True:
                    self._set(lease_rules.confirmed(self._state, state.renewed_until_ns, self._clock.now_ns()))
                case None:
                    pass
            if isinstance(self._state, Suspended):
                await asyncio.sleep(CONFIRM_PAUSE_S)

    async def _next_change(self) -> None:
        await self._changed.wait()  # no time-out: the watchman and the renewals set it, and run() is cancelled

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    def _set(self, state: lease_rules.State, doubt: str = "") -> None:
        before, self._state = self._state, state
        guard_ns = state.deadline_ns if isinstance(state, Active) else 0
        if guard_ns != self._guard_ns:
            self.on_deadline(guard_ns)
            self._guard_ns = guard_ns
        if type(before) is not type(state):
            self._log_change(state, doubt)
            self._wake()
            self.on_change(state)

    def _log_change(self, state: lease_rules.State, doubt: str) -> None:
        facts = {"worker": self.name, "sid": self.sid}
        match state:
            case Active():
                log.info("session active", extra=facts)
            case Suspended():
                reason = doubt or "its deadline passed without a verdict"
                log.warning("session suspended", extra={**facts, "reason": reason})
            case Lost(reason) if reason == CLOSED:
                log.info("session closed", extra=facts)
            case Lost(reason):
                log.warning("session lost", extra={**facts, "reason": reason})


async def open_session(
    store: Store,
    keyspace: Keyspace,
    settings: LeaseSettings,
    *,
    clock: Clock,
    rng: random.Random,
    name: str,
    record: WorkerRecord | None,
    meta_revision: int,
    on_wait: Callable[[KeyValue], None] = lambda _kv: None,
    on_grant: Callable[[int], None] = lambda _lease: None,
) -> Session:
    """T0: a fresh lease, and the worker's record on it if its name is free.

    A taken name is waited for (`on_wait` is called once) for TTL + 5 s, then NameTaken is raised, if its holder keeps
    its lease alive; a dead one's, which the store may have prolonged, is waited for up to four times as long.
    `record.sid` is filled in here. `on_grant` is told each lease before anything stands on it, so that somebody else
    can revoke it should this process die. Without a record (a lone controller) the session is a lease alone. Raises
    StoreError.
    """
    wait_ns = int((settings.ttl_s + NAME_WAIT_EXTRA_S) * NS_PER_S)
    until_ns, last_ns = clock.now_ns() + wait_ns, clock.now_ns() + NAME_WAITS_MAX * wait_ns
    is_told = False
    foreign, foreign_lease = Foreign(), 0
    while True:
        if record is not None:
            taken = await _holder(store, keyspace.worker(name))
            if taken is not None:
                if not is_told:
                    is_told = True
                    on_wait(taken)
                if taken.lease != foreign_lease:
                    foreign, foreign_lease = Foreign(), taken.lease
                foreign = await _look_at(store, taken, foreign, clock)
                now_ns = clock.now_ns()
                if now_ns >= (until_ns if foreign.is_kept_alive or not taken.lease else last_ns):
                    raise _name_taken(name, taken)
                await _wait_gone(store, taken, settings.ttl_s * NAME_LOOK_SHARE)
                continue
        sent_ns = clock.now_ns()
        grant = await store.grant(settings.ttl_s)
        on_grant(grant.lease)
        sid = f"{grant.lease:x}-{rng.getrandbits(32):08x}"
        session = Session(
            store,
            keyspace,
            settings,
            clock=clock,
            rng=rng,
            name=name,
            sid=sid,
            lease=grant.lease,
            ttl_s=grant.ttl_s,
            sent_ns=sent_ns,
            record=replace(record, sid=sid) if record is not None else None,
            meta_revision=meta_revision,
        )
        try:
            if session.record is None or await _register(store, keyspace, session, session.record):
                return session
        except BaseException:  # a stop, too: a record that nobody stands behind would draw requests and shards
            await session.close()
            raise
        await session.close()  # so that a late T0 of this lease fails; then begin again
        if clock.now_ns() >= last_ns:
            raise StoreUnavailable(
                f"worker {name!r} could not register within {NAME_WAITS_MAX * wait_ns // NS_PER_S} s"
            )


async def _register(store: Store, keyspace: Keyspace, session: Session, record: WorkerRecord) -> bool:
    """Whether our record stands; not, if the name is taken. Raises StoreError, and so where meta has changed."""
    key = keyspace.worker(session.name)
    txn = Txn(
        (absent(key), modified_at(keyspace.meta, session.meta_revision)),
        (Put(key, encode(record), session.lease), Delete(keyspace.eviction(session.name))),
    )
    match await store.commit(txn):
        case Committed(revision):
            session.create_revision = revision
            return True
        case Conflict():
            if await _holder(store, key) is None:
                raise StoreUnavailable("the cluster's meta has changed")
            return False
        case Unknown():
            holder = await _holder(store, key)
            if holder is not None and holder.lease == session.lease:
                session.create_revision = holder.create_revision
                return True
            return False


async def _holder(store: Store, key: bytes) -> KeyValue | None:
    result: RangeResult = await store.read(Range(key))
    return result.kvs[0] if result.kvs else None


async def _look_at(store: Store, holder: KeyValue, foreign: Foreign, clock: Clock) -> Foreign:
    """What is known of its lease by now."""
    if not holder.lease:
        return foreign
    try:
        keys = await store.lease_keys(holder.lease)
    except LeaseGone:  # its record goes with it
        return foreign
    return foreign.seen(clock.now_ns(), keys.ttl_s)


async def _wait_gone(store: Store, holder: KeyValue, timeout_s: float) -> None:
    """Until that record is deleted, at most so long; a watch that breaks ends the wait, the caller looks again.

    It begins at the record's own revision, so that a compaction in between breaks it (see `store.mirror`)."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            store.watch(holder.key, b"", holder.mod_revision) as batches,
        ):
            async for batch in batches:
                if any(event.is_delete for event in batch.events):
                    return
    except TimeoutError:
        return
    except StoreError:
        await asyncio.sleep(RETRY_S)


def _name_taken(name: str, holder: KeyValue) -> NameTaken:
    try:
        other = decode(WorkerRecord, holder.key, holder.value)
    except KeyspaceError:
        return NameTaken(name, "an address that cannot be read", 0)
    return NameTaken(name, other.address, other.pid)
