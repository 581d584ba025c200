"""The scenarios: which deeds a run may see, in which surroundings, and what it must hold besides the invariants."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from shardlead.store.embedded import VERSION
from tests.simulation.misbehaviour import Misbehaviour
from tests.simulation.service import Manners
from tests.simulation.storage import StorageFaults
from tests.simulation.transport import LinkFaults
from tests.simulation.world import Setup

LOSSY: Final = LinkFaults(loss=0.03, loss_after=0.03, late=0.02, duplicate=0.02)


@dataclass(frozen=True)
class Scenario:
    """Named by its key in SCENARIOS. `duration_s` is how long harm is done."""

    sentence: str
    deeds: tuple[str, ...]
    setup: Setup = field(default_factory=Setup)
    duration_s: float = 7.0
    mean_pause_s: float = 0.8
    never_fails: bool = False  # not one request may fail
    heals_late_s: float = 0.0  # what it takes longer than the promise to be whole again, for a stated reason
    deeds_at_once: tuple[int, int] = (2, 5)  # how many kinds of deeds a run knows

    def has_failures(self, deeds: Sequence[str]) -> bool:
        """Whether workers may have to give up shards that they cannot serve; the controller then gives them no more for
        a while, which is longer than a run."""
        storage = self.setup.storage
        return bool(
            storage.late or storage.lost or storage.answer_lost or {"trouble_open", "trouble_storage"} & {*deeds}
        )

    def chosen(self, rng: random.Random) -> tuple[str, ...]:
        """The deeds of one run."""
        count = min(len(self.deeds), rng.randint(*self.deeds_at_once))
        return tuple(sorted(rng.sample(self.deeds, count)))


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "operations": Scenario(
        "Moves, drains, rolling restarts, growth, with slow handlers: not one request fails.",
        ("restart", "move", "drain", "cordon", "freeze_moves", "scale_out", "compact"),
        never_fails=True,
        mean_pause_s=0.65,
    ),
    "crashes": Scenario(
        "Processes are killed, paused, stalled; machines are lost; what is left goes on.",
        (
            *(
                "kill",
                "lose_machine",
                "restart",
                "pause",
                "stall",
                "kill_router",
                "pause_router",
                "trouble_open",
                "move",
            ),
            *("evict", "set_wall_clock"),
        ),
        Setup(drift=0.009, idempotent=0.3, manners=Manners(stubborn=0.3)),
    ),
    "networks": Scenario(
        "Requests and answers are lost, late, twice; links are cut, one way or both.",
        (
            *("cut_from_etcd", "cut_from_routers", "reset_connections", "slow_network", "trouble_storage"),
            *("kill", "move", "restart"),
        ),
        Setup(
            link=LOSSY,
            drift=0.009,
            idempotent=0.3,
            storage=StorageFaults(slow=0.05, late=0.02, lost=0.01, answer_lost=0.01),
        ),
    ),
    "store": Scenario(
        "etcd changes its leader, loses its quorum, restarts, compacts; members stop or lag.",
        (
            *("change_etcd_leader", "lose_quorum", "restart_etcd", "stop_member", "compact", "kill", "restart"),
            *("drain", "raise_generation", "lag_member", "cut_over_compaction"),
        ),
        Setup(drift=0.009),
    ),
    "everything": Scenario(
        "All of it, with little mercy.",
        (
            *("kill", "lose_machine", "restart", "pause", "stall", "kill_router", "pause_router", "cut_from_etcd"),
            *("cut_from_routers", "reset_connections", "slow_network", "trouble_storage", "trouble_open", "move"),
            *("drain", "cordon", "freeze_moves", "scale_out", "change_etcd_leader", "lose_quorum", "restart_etcd"),
            *("stop_member", "compact", "lag_member", "cut_over_compaction", "evict", "set_wall_clock"),
        ),
        Setup(
            link=replace(LOSSY, late=0.03),
            drift=0.009,
            idempotent=0.3,
            storage=StorageFaults(slow=0.05, late=0.03, lost=0.01),
        ),
        mean_pause_s=0.45,
        deeds_at_once=(4, 9),
    ),
}
"""The five that every check runs."""

FURTHER: Final[Mapping[str, Scenario]] = {
    "clocks": Scenario(
        "Machines are frozen with their clocks, by a hypervisor: guards may be wrong (I3, I4), the fence holds (I5).",
        ("freeze_machine", "pause", "stall", "set_wall_clock", "kill", "move", "cut_from_etcd"),
        Setup(tolerated=frozenset({"I3", "I4"}), storage=StorageFaults(slow=0.1, late=0.03)),
        mean_pause_s=0.6,
    ),
    "unfenced": Scenario(
        "A class whose storage refuses nobody: whoever follows an unclean end waits, and nothing is lost.",
        (
            *("kill", "lose_machine", "restart", "pause", "stall", "move", "drain", "cut_from_etcd", "lose_quorum"),
            *("change_etcd_leader", "evict", "trouble_open", "set_wall_clock"),
        ),
        Setup(
            fenced=False,
            drift=0.009,
            clients=5,
            manners=Manners(slow=0.3, slow_s=2.5),  # some longer than a drain
            storage=StorageFaults(slow=0.4),  # each takes effect within a second, however its sender has fared
        ),
        heals_late_s=11.0,  # TTL + delta after a death; and again, if a move for evenness then has to cancel work (2 s)
    ),
    "planned": Scenario(
        "Planned operations of a class without a fence: whatever ends cleanly is served at once, and no request fails.",
        ("restart", "move", "drain", "cordon", "freeze_moves", "scale_out", "compact"),
        Setup(fenced=False, clients=8, manners=Manners(polite=1.0)),
        mean_pause_s=0.5,
        never_fails=True,
    ),
    "dense": Scenario(
        "Many deeds at once, some before the last ones are over.",
        (
            *("kill", "restart", "pause", "stall", "move", "drain", "scale_out", "evict", "set_wall_clock"),
            *("trouble_open", "cordon", "lag_member", "change_etcd_leader", "compact", "cut_from_etcd"),
        ),
        Setup(
            link=LOSSY,
            drift=0.009,
            idempotent=0.5,
            clients=8,
            storage=StorageFaults(slow=0.05, late=0.03, lost=0.01),
        ),
        mean_pause_s=0.2,
        deeds_at_once=(5, 12),
    ),
}
"""More surroundings; run by the long form, too."""

ALL: Final[Mapping[str, Scenario]] = {**SCENARIOS, **FURTHER}


@dataclass(frozen=True)
class Case:
    """A misbehaviour of the store, and what it must break on one of its seeds at least: `must_break`, of what the
    scenario tolerates. Whatever it does not tolerate holds on all of them."""

    scenario: Scenario
    must_break: frozenset[str] = frozenset()
    seeds: int = 12


ALL_BUT_THE_FENCE: Final = ("I1", "I2", "I3", "I4", "I7", "I8", "I9", "I13")
"""What a store may break whose revisions go back: epochs come twice, and workers refuse to serve until the operator
raises the generation. What a fence has accepted stays."""

BELIEFS: Final = frozenset({"I3", "I4"})
"""What a wrong acknowledgement or a lease's early end breaks: two guards may say yes at once."""


def _case(
    misbehaviour: Misbehaviour,
    *deeds: str,
    must_break: frozenset[str] = frozenset(),
    tolerated: frozenset[str] = frozenset(),
    etcd_version: str = VERSION,
    pause_s: float = 2.0,
    heals_late_s: float = 0.0,
    seeds: int = 12,
) -> Case:
    setup = Setup(misbehaviour=misbehaviour, tolerated=tolerated | must_break, etcd_version=etcd_version)
    count = (len(deeds), len(deeds))
    scenario = Scenario(str(misbehaviour), deeds, setup, 25.0, pause_s, deeds_at_once=count, heals_late_s=heals_late_s)
    return Case(scenario, must_break, seeds)


_I3: Final = frozenset({"I3"})
_I4: Final = frozenset({"I4"})
_I8: Final = frozenset({"I8"})
_OLD: Final = "3.5.1"  # whose progress messages are known to run ahead

MISBEHAVIOURS: Final[Mapping[str, Case]] = {
    "stale-ack": _case(
        Misbehaviour(stale_ack=1.0),
        "change_etcd_leader",
        "lag_member",
        must_break=_I3,
        tolerated=BELIEFS,
        pause_s=3.0,
        seeds=24,
    ),
    "early-revoke": _case(Misbehaviour(early_revoke=0.1), "lag_member", must_break=_I3, tolerated=BELIEFS),
    "key-gone-lease-alive": _case(
        Misbehaviour(key_gone_lease_alive=0.1), "lag_member", must_break=_I3, tolerated=BELIEFS
    ),
    "renew-after-revoke": _case(
        Misbehaviour(renew_after_revoke=1.0), "revoke_lease", "lag_member", must_break=_I3 | _I4, tolerated=BELIEFS
    ),
    "stale-read": _case(Misbehaviour(stale_read=0.5), "kill", "move", "cut_from_etcd"),
    "progress-overtakes": _case(Misbehaviour(progress_overtakes=0.5), "kill", "move", must_break=_I8),
    "progress-overtakes-in-a-version-known-for-it": _case(
        Misbehaviour(progress_overtakes=0.5), "kill", "move", etcd_version=_OLD
    ),
    "lost-delete-at-compaction": _case(
        Misbehaviour(lost_delete_at_compaction=1.0), "compact", "kill", "move", must_break=_I8
    ),
    "silent-watch": _case(
        Misbehaviour(silent_watch=0.05),
        "kill",
        "move",
        heals_late_s=8.0,  # until three ticks have not been heard and the store was asked
    ),
    "revision-regress": _case(
        Misbehaviour(revision_regress=1.0), "restart_etcd", "kill", tolerated=frozenset(ALL_BUT_THE_FENCE)
    ),
}
