"""A followed range of the store: load, watch, resume, load again; whatever happens, its users see only changes.

Law: protocol.md A.7. Pages of the load are pinned to one revision. A resume starts after the last applied *event*,
never at a header's revision. A message is applied whole; per key the larger mod_revision stays. A load replaces the
picture including removals, and is handed on as the difference. Nothing is safe because a mirror was quiet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardlead.store.base import KeyValue, Store


@dataclass(frozen=True, slots=True)
class Change:
    """What became different in one step, applied at once. `puts` hold the new key-values, `deletes` the key-values
    that stood before. `is_load` marks the difference made by a full read."""

    revision: int
    puts: tuple[KeyValue, ...]
    deletes: tuple[KeyValue, ...]
    is_load: bool = False


class Mirror:
    """One range, kept current by `run()`.

    `on_change` is called synchronously, in order, right after `kvs` was brought up to date; it must not raise and
    must not await. `revision` is the last *applied* revision and never goes back.
    """

    def __init__(
        self, store: Store, key: bytes, range_end: bytes, on_change: Callable[[Change], None], *, name: str
    ) -> None:
        raise NotImplementedError

    @property
    def kvs(self) -> Mapping[bytes, KeyValue]:
        """The picture at `revision`."""
        raise NotImplementedError

    @property
    def revision(self) -> int:
        raise NotImplementedError

    @property
    def is_loaded(self) -> bool:
        raise NotImplementedError

    @property
    def is_connected(self) -> bool:
        """Whether a watch stands right now (it may still be silently stale)."""
        raise NotImplementedError

    async def run(self) -> None:
        """Follow the range until cancelled; survives every StoreError with bounded, jittered pauses."""
        raise NotImplementedError

    async def wait_loaded(self, timeout_s: float) -> None:
        """Return once the first load was applied; raises StoreUnavailable after `timeout_s`."""
        raise NotImplementedError

    def distrust(self, reason: str) -> None:
        """Somebody knows better than this watch: drop it, take another endpoint, resume."""
        raise NotImplementedError
