"""Who watches: everything that a run must hold is noted here, in omniscient time, and held against the invariants.

Each invariant is a function of `tests.simulation.invariants`, with its sentence; those that can be seen broken in the
moment are called from here, the others at the end of the run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardlead.clock import NS_PER_S
from shardlead.worker.leadership import Leadership
from tests.simulation import invariants
from tests.simulation.invariants import Violation

if TYPE_CHECKING:
    from tests.simulation.processes import WorkerProcess
    from tests.simulation.world import World


@dataclass(slots=True)
class Tenant:
    """A leadership, as its process believes in it."""

    lead: Leadership
    sid: str
    process: "WorkerProcess"
    made_ns: int
    is_open: bool = False
    is_closed: bool = False
    handlers: int = 0
    doubtful_ns: int = -1  # when its key was first seen to be gone or another's, while its guard says yes
    lost_local_ns: int = -1  # by its machine's own clock, when the loss was first seen

    def __str__(self) -> str:
        return f"shard {self.lead.shard} epoch {self.lead.epoch} of {self.process.machine.name} ({self.sid})"

    @property
    def is_valid(self) -> bool:
        """Whether its guard says yes at this instant, whoever asks."""
        return not self.process.machine.is_crashed and self.lead.is_valid(0.0)


@dataclass
class Witness:
    """Of one world."""

    world: "World"
    violations: list[Violation] = field(default_factory=list)
    tenants: dict[int, list[Tenant]] = field(default_factory=dict)  # per shard, those not seen ended
    sids: dict[tuple[int, int], str] = field(default_factory=dict)  # (shard, epoch) -> who led under it
    given_up: dict[tuple[str, int, int], int] = field(default_factory=dict)  # (process, shard, revision) -> when sent
    router_epochs: dict[tuple[str, int], int] = field(default_factory=dict)
    leaderships: int = 0
    requests: int = 0
    _by_lead: dict[int, Tenant] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)

    def fail(self, name: str, text: str) -> None:
        """An invariant is broken. Told once for each kind and text."""
        if self.world.is_over:
            return
        violation = Violation(name, self.world.loop.true_ns(), text)
        if (name, text) not in {(each.name, each.text) for each in self.violations} and len(self.violations) < 50:
            self.violations.append(violation)
            self.world.say("WITNESS", f"{name} broken: {text}")

    # --- leaderships

    def made(self, process: "WorkerProcess", lead: Leadership) -> None:
        session = process.session
        sid = session.sid if session is not None else ""
        tenant = Tenant(lead, sid, process, self.world.loop.true_ns())
        self._by_lead[id(lead)] = tenant
        self.leaderships += 1
        self.world.say(process.machine.name, f"leads shard {lead.shard} epoch {lead.epoch}")
        invariants.one_sid_per_epoch(self, tenant)
        invariants.generation_is_the_stored_one(self, tenant)
        invariants.never_after_given_up(self, tenant, "opens")
        others = self.tenants.setdefault(lead.shard, [])
        others[:] = [other for other in others if not (other.lead.is_lost or other.process.machine.is_crashed)]
        others.append(tenant)
        self.check_overlap(lead.shard)

    def check_overlap(self, shard: int) -> None:
        invariants.guards_never_overlap(self, shard)

    def guard_changed(self, process: "WorkerProcess") -> None:
        """Its session's deadline is another than it was."""
        invariants.deadline_within_lease(self, process)
        for shard, tenants in self.tenants.items():
            if any(tenant.process is process for tenant in tenants):
                self.check_overlap(shard)

    def opened(self, lead: Leadership) -> None:
        tenant = self._by_lead[id(lead)]
        tenant.is_open = True
        self.world.say(tenant.process.machine.name, f"serves shard {lead.shard} epoch {lead.epoch}")

    def closed(self, lead: Leadership) -> None:
        tenant = self._by_lead[id(lead)]
        if tenant.is_closed:
            self.fail("CLOSE", f"closed twice: {tenant}")
        tenant.is_closed = True
        self.world.say(tenant.process.machine.name, f"closes shard {lead.shard} epoch {lead.epoch}")

    # --- requests

    def handler_begins(self, lead: Leadership) -> None:
        tenant = self._by_lead[id(lead)]
        tenant.handlers += 1
        self.requests += 1
        invariants.no_handler_after_the_end(self, tenant)
        invariants.never_after_given_up(self, tenant, "serves")

    def handler_ends(self, lead: Leadership) -> None:
        tenant = self._by_lead[id(lead)]
        tenant.handlers -= 1
        invariants.handlers_end_in_time(self, tenant)

    def look(self) -> None:
        """Now and then: which handlers outlive their leadership, and who believes in a key that is gone."""
        for tenants in self.tenants.values():
            for tenant in tenants:
                machine = tenant.process.machine
                if machine.is_crashed or machine.is_paused:
                    continue
                if tenant.handlers:
                    invariants.handlers_end_in_time(self, tenant)
                invariants.belief_ends(self, tenant)

    # --- transactions and routing

    def gives_up(self, process: str, shard: int, revision: int) -> None:
        """A T4, T5 or T5s for this leadership is about to be sent."""
        self.given_up.setdefault((process, shard, revision), self.world.loop.true_ns())

    def router_saw(self, router: str, shard: int, epoch: int) -> None:
        key = (router, shard)
        self.router_epochs[key] = max(self.router_epochs.get(key, 0), epoch)

    def router_sends(self, router: str, shard: int, epoch: int) -> None:
        invariants.router_never_goes_back(self, router, shard, epoch)


@dataclass
class ProcessWatch:
    """The witness, as one worker process's application tells it."""

    witness: Witness
    process: "WorkerProcess"

    def made(self, subject: Any) -> None:
        self.witness.made(self.process, subject.lead)

    def opening(self, lead: Leadership) -> None:
        pass

    def opened(self, lead: Leadership) -> None:
        self.witness.opened(lead)

    def closed(self, lead: Leadership) -> None:
        self.witness.closed(lead)

    def handler_begins(self, lead: Leadership, _request: object) -> None:
        self.witness.handler_begins(lead)

    def handler_ends(self, lead: Leadership) -> None:
        self.witness.handler_ends(lead)


Check = Callable[[Witness], None]
Facts = Mapping[str, Any]
SECOND = NS_PER_S
