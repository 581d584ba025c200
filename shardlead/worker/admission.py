"""What becomes of a request at a worker's door: served, turned away, or parked until more is known.

Law: design.md, "The contract between router and worker". Decided by `Host.admission`, acted on by the doors.
"""

from dataclasses import dataclass

from shardlead.core.contract import Refused
from shardlead.worker.tenure import Tenure


@dataclass(frozen=True, slots=True)
class Admitted:
    """Serve it."""

    tenure: Tenure


@dataclass(frozen=True, slots=True)
class Turned:
    """Refuse it, before its handler. `epoch` is what this worker knows, 0 if nothing; `leader` as in the header."""

    reason: Refused
    epoch: int = 0
    leader: str = ""


@dataclass(frozen=True, slots=True)
class Parked:
    """Let it wait for this shard's next change, and ask again."""


Admission = Admitted | Turned | Parked
