"""Many machines in one thread and in virtual time, for deterministic simulations. Public by `shardlead.testing`."""

from shardlead.virtual.loop import Machine, MachineClock, Stuck, VirtualLoop
from shardlead.virtual.network import Network

__all__ = ["Machine", "MachineClock", "Network", "Stuck", "VirtualLoop"]
