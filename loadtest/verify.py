"""`shardlead verify` over the workers' audit logs, where this build writes them."""

from loadtest.result import Verify
from shardlead.testing import LocalCluster

NO_LOGS = "this build writes none"


def audit_settings() -> dict[str, object]:
    """The settings that make workers write audit logs; {} where they cannot."""
    return {}


async def verify(cluster: LocalCluster) -> tuple[Verify | None, str]:
    """What it says, or None and why there is nothing to say."""
    return None, NO_LOGS
