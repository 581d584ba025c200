"""The scenarios: which deeds a run may see, in which surroundings, and what it must hold besides the invariants."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

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
    duration_s: float = 25.0
    mean_pause_s: float = 3.0
    never_fails: bool = False  # not one request may fail
    deeds_at_once: tuple[int, int] = (2, 5)  # how many kinds of deeds a run knows

    def chosen(self, rng: random.Random) -> tuple[str, ...]:
        """The deeds of one run."""
        count = min(len(self.deeds), rng.randint(*self.deeds_at_once))
        return tuple(sorted(rng.sample(self.deeds, count)))


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "operations": Scenario(
        "Moves, drains, rolling restarts, growth, with slow handlers: not one request fails.",
        ("restart", "move", "drain", "cordon", "freeze_moves", "scale_out", "compact"),
        never_fails=True,
        mean_pause_s=2.5,
    ),
    "crashes": Scenario(
        "Processes are killed, paused, stalled; machines are lost; what is left goes on.",
        ("kill", "lose_machine", "restart", "pause", "stall", "kill_router", "pause_router", "trouble_open", "move"),
        Setup(drift=0.009, manners=Manners(stubborn=0.3)),
    ),
    "networks": Scenario(
        "Requests and answers are lost, late, twice; links are cut, one way or both.",
        (
            *("cut_from_etcd", "cut_from_routers", "reset_connections", "slow_network", "trouble_storage"),
            *("kill", "move", "restart"),
        ),
        Setup(link=LOSSY, drift=0.009, storage=StorageFaults(slow=0.05, late=0.02, lost=0.01, answer_lost=0.01)),
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
            *("stop_member", "compact", "lag_member", "cut_over_compaction"),
        ),
        Setup(link=replace(LOSSY, late=0.03), drift=0.009, storage=StorageFaults(slow=0.05, late=0.03, lost=0.01)),
        mean_pause_s=1.5,
        deeds_at_once=(4, 9),
    ),
}
