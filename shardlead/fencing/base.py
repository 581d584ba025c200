"""What every fence knows of a leadership, and what a leadership finds at every fence."""

from typing import Protocol


class Lead(Protocol):
    """What a fence needs to know of a leadership. `check` is called from other threads too: it compares clocks and
    a flag, and awaits nothing."""

    @property
    def shard(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    def check(self, need_s: float = 0.05) -> None:
        """Raises LeadershipLost unless the lease lasts for `need_s` seconds more."""
        ...

    def note_barrier(self) -> None:
        """A fence says that this leadership's epoch is registered there."""
        ...

    def note_unknown(self, reason: str) -> None:
        """A write under this leadership's epoch may still take effect, and nobody knows."""
        ...


class Fence(Protocol):
    """What all adapters share. How data is read and written differs with the resource."""

    async def barrier(self, lead: Lead) -> None:
        """Return once no leader before `lead` can write its shard any more; only then load state. May be repeated.

        Raises EpochRegressed if the resource knows a higher epoch, LeadershipLost, ResourceUnavailable.
        """
        ...
