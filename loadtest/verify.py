"""The workers' audit logs: where they are written, and what `shardlead.verify` says of them."""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Final

from loadtest.result import Verify
from shardlead import ShardleadError
from shardlead import verify as verdict_of

SETTING: Final = "worker.audit_dir"
NO_LOGS: Final = "none were written (--no-audit)"
NOT_OURS: Final = "the cluster was not started here"
TEXT_CHARS_MAX: Final = 20_000


async def verify(logs: Path) -> tuple[Verify | None, str]:
    """The verdict on all logs of a folder, or None and why there is none. Logs that prove a violation are kept."""
    try:
        report = await asyncio.to_thread(verdict_of, logs)
    except ShardleadError as exc:
        return None, str(exc)
    text = ""
    if not report.is_good:
        kept = Path.cwd() / f"loadtest-audit-{os.getpid()}"
        shutil.copytree(logs, kept)
        text = f"{report}\nThe logs are kept in {kept}"[:TEXT_CHARS_MAX]
    return Verify(report.leaderships, report.requests, report.violation_count, text), ""
