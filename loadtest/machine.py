"""The machine and the versions that a figure was measured with: a figure without them says nothing."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Final

PACKAGES: Final = ("shardlead", "aiohttp", "uvloop", "httptools", "orjson", "uhashring")


def describe() -> dict[str, object]:
    """Machine and versions, as the reports carry them."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def describe_line() -> str:
    """The same in one line, for people."""
    found = describe()
    versions = ", ".join(f"{name} {found[name]}" for name in ("shardlead", "uvloop", "httptools", "aiohttp"))
    return f"{found['cpu']}, {found['cores']} cores, {found['system']}, Python {found['python']}, {versions}"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
