"""The state file by which commands in other terminals find a running `shardlead dev`.

One small JSON file a dev cluster, in the user's runtime folder (`$XDG_RUNTIME_DIR/shardlead`, else
`$XDG_CACHE_HOME/shardlead` or `~/.cache/shardlead`), readable by its user alone. It is a hint and never an authority:
whoever reads it asks the store that it names.

Law: written in one step, so that a reader sees a whole file or none; a file whose process is gone is removed by the
next reader, so a killed dev cluster leaves nothing that matters.
"""

import contextlib
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import orjson

_FOLDER: Final = "shardlead"
_PATTERN: Final = "dev-*.json"


@dataclass(frozen=True, slots=True)
class DevCluster:
    """A running dev cluster, as another terminal needs to know it."""

    pid: int
    """The process of `shardlead dev` itself."""
    port: int
    """Where its router listens; what `--dev PORT` names."""
    store: str
    """The store's URL."""
    cluster: str
    """The cluster's name in that store."""
    admin: str
    """host:port of the router's admin server."""
    started: float
    """When it started, in seconds since 1970; the newest is taken where several are alive."""
    data: str = ""
    """Its --data folder; empty: none, everything ends with it."""
    birth: int = 0
    """The process's start as the kernel counts it, so that a recycled pid is not taken for it; `write` fills it in.
    0 where the system does not tell."""


def write(info: DevCluster) -> Path:
    """Make `info` visible to other terminals, in one step, with mode 0600; returns the file's path for `remove`.

    Raises OSError if neither folder can be written.
    """
    folder = _writable_folder()
    path = folder / f"dev-{info.port}.json"
    content = orjson.dumps(asdict(replace(info, birth=_birth(info.pid))), option=orjson.OPT_INDENT_2)
    handle, temporary = tempfile.mkstemp(prefix=".dev-", dir=folder)  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content + b"\n")
        Path(temporary).replace(path)
    except BaseException:  # Ctrl-C, too: nobody would ever remove it
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def remove(path: Path) -> None:
    """Take the file away; a file that is gone already is no error."""
    path.unlink(missing_ok=True)


def alive() -> list[DevCluster]:
    """The dev clusters that run now, newest first. Files of processes that are gone are removed on the way.

    A file that cannot be read as one of ours is passed over and left where it is.
    """
    found: list[DevCluster] = []
    for folder in folders():
        for path in sorted(folder.glob(_PATTERN)):
            info = _read(path)
            if info is None:
                continue
            if _is_running(info):
                found.append(info)
            else:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
    return sorted(found, key=lambda info: info.started, reverse=True)


def folders() -> list[Path]:
    """Where state files may stand, the preferred folder first."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    roots = [runtime, cache] if runtime else [cache]
    return [Path(root) / _FOLDER for root in roots]


def _writable_folder() -> Path:
    problem: OSError | None = None
    for folder in folders():  # a runtime folder may be named and missing, after `su` for example
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            problem = exc
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise problem or PermissionError(f"no folder for the dev cluster's state file is writable: {folders()}")


def _read(path: Path) -> DevCluster | None:
    try:
        raw = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    if not isinstance(raw, dict):
        return None
    known: dict[str, Any] = {}
    for item in fields(DevCluster):
        if item.name not in raw:
            continue
        value = raw[item.name]
        if item.name == "started" and isinstance(value, int):
            value = float(value)
        if type(value) is not item.type:
            return None
        known[item.name] = value
    try:
        info = DevCluster(**known)
    except TypeError:  # a field without a default is missing
        return None
    # 0 and below name process groups, and what is above fits no pid
    return info if 0 < info.pid < 1 << 31 and 0 < info.port < 1 << 16 else None


def _is_running(info: DevCluster) -> bool:
    try:
        os.kill(info.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # another user's process: the number was given to somebody else
    birth = _birth(info.pid)
    return info.birth == birth if info.birth and birth else True


def _birth(pid: int) -> int:
    """The process's start in clock ticks since boot (field 22 of its stat); 0 if unknown or a zombie's."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # a name may be any bytes
    except OSError:
        return 0
    return int(after_name[19])
