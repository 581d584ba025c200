"""What `shardlead dev` decides before it starts anything, and how it speaks."""

import io
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardlead import dev
from shardlead.dev.console import Console, balance, counted
from shardlead.dev.home import home_of
from shardlead.dev.options import SHARDS_DEFAULT, DevOptions
from shardlead.dev.run import check_port
from shardlead.errors import CommandError, ConfigError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_taken_port_is_named_with_its_flag(taken: int) -> None:
    """Nothing is started on a port that somebody else has; the error says which and what to do."""
    with pytest.raises(CommandError, match=rf"port {taken} is taken.*--port"):
        dev.main(DevOptions(port=taken), out=io.StringIO())
    check_port(0)


def test_what_is_counted_reads_well() -> None:
    """One worker, two workers, no workers."""
    assert [counted(number, "worker") for number in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]


def test_a_data_folder_remembers_its_shards(tmp_path: Path) -> None:
    """The first start writes the shard count down; later ones take it from there and refuse another."""
    data = tmp_path / "data"
    with home_of(DevOptions(data=data, shards=32)) as home:
        assert (home.shards, home.is_kept, home.folder) == (32, True, data)
    with home_of(DevOptions(data=data)) as home:
        assert home.shards == 32
    with pytest.raises(ConfigError, match="was made with 32 shards"), home_of(DevOptions(data=data, shards=33)):
        pass
    with (
        pytest.raises(ConfigError, match="was made with the embedded store"),
        home_of(DevOptions(data=data, etcd=True)),
    ):
        pass


def test_a_data_folder_serves_one_cluster_at_a_time(tmp_path: Path) -> None:
    """Two clusters must not share counts and epochs."""
    options = DevOptions(data=tmp_path)
    with home_of(options), pytest.raises(CommandError, match="in use"), home_of(options):
        pass


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    """A `dev.json` of somebody else, and a file where a folder should be, are errors and stay as they are."""
    (tmp_path / "dev.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(CommandError, match="is not what"), home_of(DevOptions(data=tmp_path)):
        pass
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CommandError, match="--data"), home_of(DevOptions(data=file)):
        pass
    assert file.read_text() == ""


def test_without_a_data_folder_nothing_is_kept() -> None:
    """A temporary folder is gone when the cluster ends."""
    with home_of(DevOptions()) as home:
        assert home.logs.is_dir()
        assert home.shards == SHARDS_DEFAULT
    assert not home.folder.exists()


def test_lines_are_plain_where_nobody_looks() -> None:
    """Colours are for terminals; a file gets none."""
    out = io.StringIO()
    console = Console(out)
    console.line(console.bold("hello"))
    console.event(0.0, "w1 died", colour="31")
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().startswith("hello\n")


def test_the_balance_names_what_is_missing() -> None:
    """Shards without a leader are never left out."""
    assert balance({"w1": 10, "w2": 9}, 19) == "w1 10   w2 9"
    assert balance({"w1": 10}, 19) == "w1 10   9 without a leader"
