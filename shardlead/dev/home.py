"""Where a dev cluster keeps its files: a temporary folder, or one that remembers.

Law: one cluster at a time; a folder's shard count and kind of store never change, for its epochs must not go back.
"""

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from shardlead.dev.options import SHARDS_DEFAULT, DevOptions
from shardlead.errors import CommandError, ConfigError, Problem


@dataclass(frozen=True, slots=True)
class Home:
    """Where this dev cluster keeps its files."""

    folder: Path
    shards: int
    is_kept: bool

    @property
    def database(self) -> Path:
        return self.folder / "counters.sqlite3"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


@contextlib.contextmanager
def home_of(options: DevOptions) -> Iterator[Home]:
    """The folder, locked for as long as the block lasts. Raises CommandError, ConfigError."""
    if options.data is None:
        with tempfile.TemporaryDirectory(prefix="shardlead-dev-", ignore_cleanup_errors=True) as folder:
            home = Home(Path(folder), options.shards or SHARDS_DEFAULT, is_kept=False)
            home.logs.mkdir()
            yield home
        return
    folder_path = options.data.expanduser().resolve()
    try:
        (folder_path / "logs").mkdir(parents=True, exist_ok=True)
        lock = (folder_path / "lock").open("a")
    except OSError as exc:
        raise CommandError(f"--data {options.data}: {exc.strerror}: {exc.filename}") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise CommandError(f"--data {options.data} is in use by another `shardlead dev`") from exc
        yield Home(folder_path, _remembered_shards(options, folder_path / "dev.json"), is_kept=True)


def _remembered_shards(options: DevOptions, path: Path) -> int:
    """The shard count of that folder; written down at the first start. Raises ConfigError if flags contradict it."""
    kind = "etcd" if options.etcd else "embedded"
    if not path.exists():
        shards = options.shards or SHARDS_DEFAULT
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(orjson.dumps({"shards": shards, "store": kind}) + b"\n")
        temporary.replace(path)
        return shards
    try:
        known = orjson.loads(path.read_bytes())
        shards, store = int(known["shards"]), str(known["store"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as exc:
        raise CommandError(f"{path} is not what `shardlead dev --data` wrote there: {exc}") from exc
    problems = []
    if options.shards not in (None, shards):
        allowed = f"{options.data} was made with {shards} shards: leave --shards out, or name another folder"
        problems.append(Problem("--shards", "cluster.shards", options.shards, allowed))
    if store != kind:
        allowed = f"{options.data} was made with the {store} store, and epochs must never go back: name another folder"
        problems.append(Problem("--etcd", "store", kind, allowed))
    if problems:
        raise ConfigError(problems)
    return shards
