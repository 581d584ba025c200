"""Audit logs of fleets that kept the law, made by playing it: a store, machines with clocks of their own, processes
that claim, serve, hand over, are killed, frozen, suspended, and stopped.

Every step is a triple of small numbers, so that Hypothesis can make histories short. Nothing of `core.audit` but its
lines is used here: what a good history is, is said a second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from hypothesis import strategies as st

from shardlead.core.audit import Accept, AnyLine, Begin, Deadline, Lead, Reject, Serve, Stop

TTL_NS: Final = 150
EXPIRY_NS: Final = 170  # after so long the store ends a lease; later than any deadline
SHARDS: Final = 3
WORKERS: Final = 4
BOOTS: Final = ("boot-a", "boot-b")
OFFSETS: Final = (1_000, 7)  # of their clocks against true time

STEPS: Final = st.lists(st.tuples(st.integers(0, 13), st.integers(0, WORKERS - 1), st.integers(0, 20)), max_size=120)


@dataclass
class Led:
    """A shard, as the process that leads it sees it."""

    epoch: int
    is_served: bool = False


@dataclass
class Player:
    """A process and its log."""

    name: str
    boot: int
    lines: list[AnyLine] = field(default_factory=list)
    sid: str = ""
    deadline_ns: int = 0  # true time, as all of these
    is_valid: bool = False
    granted_ns: int = 0
    led: dict[int, Led] = field(default_factory=dict)
    is_frozen: bool = False


class Fleet:
    """Plays the steps. `files` are the logs of all processes that ever were."""

    def __init__(self, *, revision: int = 0) -> None:
        self.now_ns = 100
        self.revision = revision
        self.sessions = 0
        self.leaders: dict[int, str] = {}  # shard -> sid
        self.leases: dict[str, int] = {}  # sid -> true time at which the store ends it, unless it is renewed
        self.players: list[Player | None] = [None] * WORKERS
        self.files: list[list[AnyLine]] = []
        self.leaderships = self.requests = 0

    def play(self, steps: Sequence[tuple[int, int, int]]) -> "Fleet":
        for what, who, how in steps:
            self._expire()
            player = self.players[who]
            if player is None:
                self._start(who)
            elif player.is_frozen:
                self.now_ns += how
                self._expire()
                if what % 3 == 0:
                    player.is_frozen = False
            else:
                self._step(what, who, player, how)
        return self

    def _step(self, what: int, who: int, player: Player, how: int) -> None:
        if player.is_valid and self.now_ns >= player.deadline_ns:
            self._deadline(player, 0)
        if not player.sid or self.leases.get(player.sid) is None:
            self._lose(player)
            return
        now = self.now_ns
        shard = how % SHARDS if what in (4, 5) or not player.led else sorted(player.led)[how % len(player.led)]
        led = player.led.get(shard)
        match what:
            case 0 | 1:
                self.now_ns += how
            case 2 | 3:
                self._renew(player)
            case 4 | 5 if shard not in self.leaders and player.is_valid:
                self._lead(player, shard)
            case 6 if led is not None and player.is_valid:
                led.is_served = True
                self._say(player, Serve(**self._facts(player, shard)))
            case 7 | 8 if led is not None and led.is_served and player.is_valid:
                late_ns = min(how, player.deadline_ns - 1 - now)
                self.now_ns += late_ns
                self._say(player, Accept(**self._facts(player, shard), admitted_ns=self._clock(player) - late_ns))
                self.requests += 1
            case 9:
                facts = {**self._facts(player, shard), "epoch": how}
                self._say(player, Reject(**facts, why="stale"))
            case 10 if led is not None:
                self._pass_on(player, shard, how)
            case 11 if how % 2 == 0:
                player.is_frozen = True
            case 12 if how % 3 == 0:
                self._kill(who, player, is_revoked=how % 2 == 0)
            case 13 if how % 3 == 0:
                self._stop(who, player)
            case _:
                pass

    # --- steps

    def _start(self, who: int) -> None:
        player = self.players[who] = Player(f"w{who}", who % len(BOOTS))
        self.files.append(player.lines)
        begin = Begin(
            boot_id=BOOTS[player.boot], at_ns=self._clock(player), worker=player.name, format=1, pid=len(self.files)
        )
        self._say(player, begin)
        self._open(player)

    def _open(self, player: Player) -> None:
        self.sessions += 1
        player.sid = f"sid-{self.sessions}"
        self._renew(player)

    def _renew(self, player: Player) -> None:
        self.leases[player.sid] = self.now_ns + EXPIRY_NS
        self._deadline(player, self.now_ns + TTL_NS)

    def _deadline(self, player: Player, deadline_ns: int) -> None:
        player.deadline_ns, player.is_valid = deadline_ns, deadline_ns > 0
        local_ns = deadline_ns + OFFSETS[player.boot] if deadline_ns else 0
        self._say(
            player,
            Deadline(
                boot_id=BOOTS[player.boot],
                at_ns=self._clock(player),
                worker=player.name,
                sid=player.sid,
                deadline_ns=local_ns,
            ),
        )

    def _lead(self, player: Player, shard: int) -> None:
        self.revision += 1
        self.leaders[shard] = player.sid
        player.led[shard] = Led(self.revision)
        self.leaderships += 1
        self._say(player, Lead(**self._facts(player, shard)))

    def _pass_on(self, player: Player, shard: int, how: int) -> None:
        """To itself (a re-mint), to another, or to nobody."""
        self._say(player, Stop(**self._facts(player, shard), why="closed"))
        del player.led[shard]
        del self.leaders[shard]
        target = self.players[how % WORKERS]
        if target is not None and target.is_valid and not target.is_frozen and target.deadline_ns > self.now_ns:
            self._lead(target, shard)

    def _lose(self, player: Player) -> None:
        """Its lease has ended: it finds out, ends its work, and opens another session."""
        if player.is_valid:
            self._deadline(player, 0)
        for shard in sorted(player.led):
            self._say(player, Stop(**self._facts(player, shard), why="the session is lost"))
        player.led.clear()
        self._open(player)

    def _kill(self, who: int, player: Player, *, is_revoked: bool) -> None:
        """SIGKILL; its parent revokes at once, or has died with it."""
        if is_revoked:
            self.leases.pop(player.sid, None)
        self.players[who] = None

    def _stop(self, who: int, player: Player) -> None:
        for shard in sorted(player.led):
            self._pass_on(player, shard, (who + 1) % WORKERS)
        self._deadline(player, 0)
        self.leases.pop(player.sid, None)
        self.players[who] = None

    # --- inside

    def _expire(self) -> None:
        self.leases = {sid: end_ns for sid, end_ns in self.leases.items() if end_ns > self.now_ns}
        self.leaders = {shard: sid for shard, sid in self.leaders.items() if sid in self.leases}

    def _clock(self, player: Player) -> int:
        return self.now_ns + OFFSETS[player.boot]

    def _facts(self, player: Player, shard: int) -> dict[str, Any]:
        led = player.led.get(shard)
        return {
            "boot_id": BOOTS[player.boot],
            "at_ns": self._clock(player),
            "worker": player.name,
            "sid": player.sid,
            "shard": shard,
            "epoch": led.epoch if led is not None else 0,
        }

    def _say(self, player: Player, line: AnyLine) -> None:
        player.lines.append(line)
