"""One shard's mutable place in the host: its state, its tenure, and what is remembered between tenures.

Law: `state` is written by `Host.feed` alone. Whoever awaits on behalf of a tenure asks afterwards whether it is still
the entry's.
"""

import asyncio

from shardlead.core import ownership
from shardlead.worker.tenure import Tenure


class Entry:
    """A shard that has ever been anything here."""

    __slots__ = (
        "backoff_until_ns",
        "changed",
        "draining_since_ns",
        "elsewhere_epoch",
        "entered_ns",
        "failures",
        "is_clean",
        "leader",
        "refusals",
        "serving_since_ns",
        "state",
        "tenure",
    )

    def __init__(self) -> None:
        self.state: ownership.State = ownership.Idle()
        self.tenure: Tenure | None = None
        self.changed = asyncio.Event()
        self.backoff_until_ns = 0
        self.failures = 0
        self.refusals = 0  # since it was last served for long
        self.leader = ""  # whom it was handed to, or who was found to lead it
        self.elsewhere_epoch = 0  # no epoch up to this one is ours, as a look at the store has shown
        self.serving_since_ns = 0
        self.entered_ns = 0  # when the present state began, and the last draining: for the metrics
        self.draining_since_ns = 0
        self.is_clean = True  # whether a successor need not wait: all work, here and before us, has surely ended
