"""The state file of a running dev cluster."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shardlead import devfile
from shardlead.devfile import DevCluster

HERE = DevCluster(
    pid=os.getpid(),
    port=8080,
    store="http://127.0.0.1:2379",
    cluster="dev",
    admin="127.0.0.1:9090",
    started=100.0,
    data="/tmp/data",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def _plain(found: list[DevCluster]) -> list[DevCluster]:
    return [replace(info, birth=0) for info in found]


def test_what_is_written_is_found_until_it_is_removed() -> None:
    """A running dev cluster is found from anywhere, and no longer once it has removed its file."""
    path = devfile.write(HERE)
    assert _plain(devfile.alive()) == [HERE]
    devfile.remove(path)
    devfile.remove(path)
    assert devfile.alive() == []


def test_only_its_user_can_read_it(home: Path) -> None:
    """The file has mode 0600, its folder 0700, and nothing else stands beside it."""
    path = devfile.write(HERE)
    assert path.parent == home / "run" / "shardlead"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_several_are_listed_newest_first() -> None:
    """With several dev clusters alive the newest is the first."""
    older, newer = replace(HERE, port=1, started=1.5), replace(HERE, port=2, started=2.5)
    devfile.write(newer)
    devfile.write(older)
    assert _plain(devfile.alive()) == [newer, older]


def test_a_dead_process_is_forgotten() -> None:
    """The file of a process that is gone is dropped and removed."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=20)
    path = devfile.write(replace(HERE, pid=ended.pid))
    assert devfile.alive() == []
    assert not path.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell when a process began")
def test_a_recycled_pid_is_not_taken_for_the_cluster() -> None:
    """A living process with the same number that began at another time is another process."""
    path = devfile.write(HERE)
    path.write_bytes(path.read_bytes().replace(b'"birth": ', b'"birth": 9'))
    assert devfile.alive() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b'{"pid": 1}', b"\xff\xfe"])
def test_a_file_that_is_not_ours_is_passed_over(content: bytes) -> None:
    """Garbage in the folder is neither an error nor removed."""
    path = devfile.write(HERE)
    garbage = path.with_name("dev-garbage.json")
    garbage.write_bytes(content)
    assert _plain(devfile.alive()) == [HERE]
    assert garbage.exists()


def test_fields_of_a_newer_build_are_passed_over() -> None:
    """A file with one field more is read as before."""
    path = devfile.write(HERE)
    path.write_bytes(path.read_bytes().replace(b"{", b'{"colour": "red",', 1))
    assert _plain(devfile.alive()) == [HERE]


def test_without_a_runtime_folder_the_cache_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime folder that cannot be made, as after `su`, leaves the cache folder."""
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "file"))
    assert devfile.write(HERE).parent == home / "cache" / "shardlead"
    assert _plain(devfile.alive()) == [HERE]
