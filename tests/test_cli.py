"""The command line as a user meets it: real processes, a real store; exit codes, one-line errors, nothing left over.

The commands are tried on records that stand in the store without any worker behind them, so that each answer is known.
"""

import asyncio
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardlead import cli, devfile
from shardlead.cli import pages, shardlead
from shardlead.clock import SystemClock
from shardlead.config import StoreSettings
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import Assignment, LeaderRecord, Wish, WorkerRecord
from shardlead.store.base import UNGUARDED, Committed, Put, Range, Store, Txn
from shardlead.store.etcd import EtcdStore

LIMIT_S = 30.0
CLUSTER = "orders"


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user's, in which no `shardlead dev` of this machine is seen."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SHARDLEAD_", "XDG_"))}
    own = {"XDG_RUNTIME_DIR": "run", "XDG_CACHE_HOME": "cache", "SHARDLEAD_DEMO_DB": "counters.sqlite3"}
    return kept | {name: str(tmp_path / path) for name, path in own.items()}


@pytest.fixture
def run(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    """Runs a command that is no role to its end, in this process: a tenth of a second less each time."""
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    root = logging.getLogger()
    before = (list(root.handlers), root.level)

    def run(*words: str) -> Ran:
        capfd.readouterr()
        code = cli.run(words)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Ran(code, out, err)

    yield run
    root.handlers[:], root.level = before


@pytest.fixture
def spawn(environment: dict[str, str], tmp_path: Path) -> Callable[..., Ran]:
    """Runs `shardlead WORDS...` to its end as a process, in an empty folder. No output of any may be a traceback."""

    def spawn(*words: str, env: dict[str, str] | None = None) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "shardlead", *words],
            env={**environment, **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return spawn


@contextmanager
def started(environment: dict[str, str], *words: str) -> Iterator[subprocess.Popen[str]]:
    """A role's process; killed at the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "shardlead", *words],
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def line_of(process: subprocess.Popen[str], beginning: str) -> str:
    """The first line of stdout that begins so. The test's own time-out bounds it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return line.strip()
    _, err = process.communicate(timeout=LIMIT_S)
    raise AssertionError(f"ended with {process.returncode}: {err}")


@pytest.fixture
def url(environment: dict[str, str]) -> Iterator[str]:
    """An embedded store."""
    with started(environment, "embedded-store") as process:
        yield line_of(process, "listening on ").removeprefix("listening on ")
        process.terminate()
        assert process.wait(LIMIT_S) == 0


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    async with EtcdStore(StoreSettings(endpoints=(url,)), clock=SystemClock(), rng=random.Random(1)) as store:
        yield store


def on_store(url: str, story: Callable[[Store], Awaitable[Any]]) -> Any:
    """What `story` makes of the store."""

    async def main() -> Any:
        async with asyncio.timeout(LIMIT_S), opened(url) as store:
            return await story(store)

    return asyncio.run(main())


KEYS = Keyspace(CLUSTER)


async def populate(store: Store) -> None:
    """Two workers; w1 leads shards 0 and 1, w2 shard 2, nobody shard 3. The store is a fresh one."""
    puts = [
        Put(KEYS.worker("w1"), encode(WorkerRecord(sid="s1", address="h1:80", pid=11))),
        Put(KEYS.worker("w2"), encode(WorkerRecord(sid="s2", address="h2:80", pid=22, state="draining"))),
        *(Put(KEYS.leader(shard), encode(LeaderRecord("w1", "s1"))) for shard in (0, 1)),
        Put(KEYS.leader(2), encode(LeaderRecord("w2", "s2"))),
        Put(KEYS.assignment("w1", 0), encode(Assignment(("w1", "w2"), "even"))),
        Put(KEYS.assignment("w2", 0), encode(Assignment(("w1", "w2"), "even"))),
        Put(KEYS.assignment("w1", 1), encode(Assignment(("w2", "w1"), "even"))),
        Put(KEYS.seat, encode(LeaderRecord("w1", "s1"))),
        Put(KEYS.prefix + b"leaders/000009/foreign", b"garbage"),
    ]
    outcome = await store.commit(Txn(UNGUARDED, tuple(puts)))  # UNGUARDED: nobody else is here
    assert isinstance(outcome, Committed)


@pytest.fixture
def target(url: str, run: Callable[..., Ran]) -> list[str]:
    """The flags of a store with a cluster of four shards in it, as `populate` makes it."""
    flags = ["--store", url, "--cluster", CLUSTER]
    assert run("init", "--shards", "4", *flags).code == 0
    on_store(url, populate)
    return flags


# --- usage ---------------------------------------------------------------------------------------------------------


def test_help_answers_at_once(spawn: Callable[..., Ran]) -> None:
    """`shardlead --help` takes under 0.4 s on a quiet machine: it imports neither aiohttp nor a role."""
    began = time.monotonic()
    best_s = LIMIT_S
    for _ in range(3):
        began = time.monotonic()
        assert "Run a whole cluster" in spawn("--help").out
        best_s = min(best_s, time.monotonic() - began)
    assert best_s < 1.2  # three times what is promised: this machine may be busy


def test_help_imports_nothing_heavy() -> None:
    """What makes it quick, held exactly: the heavy modules are not loaded."""
    code = (
        "import sys; from shardlead.cli import run; run(['--help']); "
        "heavy = {'aiohttp', 'asyncio', 'uvloop', 'msgspec', 'orjson', 'prometheus_client', 'uhashring'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_while_it_loads_is_no_traceback() -> None:
    """The process ends by the signal, as any program does; whoever started it with SIGINT ignored is not disobeyed."""
    code = """if True:
        import os, signal, sys
        class AtClick:
            def find_spec(self, name, *_):
                if name == "click":
                    os.kill(os.getpid(), signal.SIGINT)
        if "ignored" in sys.argv:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.argv[1:] = ["version"]
        from shardlead.__main__ import main
        sys.meta_path.insert(0, AtClick())
        main()
    """
    for words, returncode in (((), -signal.SIGINT), (("ignored",), 0)):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert (done.returncode, done.stderr) == (returncode, "")


def test_every_command_explains_itself(run: Callable[..., Ran]) -> None:
    """Each command and subcommand has a help of its own, and none of them fails on it."""
    listed = run("--help").out
    for name, command in shardlead.commands.items():
        assert command.help or command.callback is not None
        assert (f"  {name} " in listed) != command.hidden
        assert run(name, "--help").code == 0


def test_version(spawn: Callable[..., Ran]) -> None:
    """One line."""
    assert spawn("version").out.startswith("shardlead 0.")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fly",), "No such command 'fly'"),
        (("status", "--loud"), "No such option"),
        (("move", "one", "w1"), "'one' is not a valid integer"),
        (("move", "1"), "Missing argument 'WORKER'"),
        (("worker",), "Missing argument 'MODULE:NAME'"),
        (("worker", "nomodule"), "must be MODULE:NAME"),
        (("worker", ":Thing"), "must be MODULE:NAME"),
        (("dev", "--app", "no.such:"), "must be MODULE:NAME"),
        (("worker", "no.such:Thing"), "there is no module 'no'"),
        (("worker", "shardlead.demo:Countre"), "did you mean Counter"),
        (("router", "--port", "http"), "--port: router.port = 'http': must be a whole number"),
        (("router", "--port", "99999"), "at most 65535"),
        (("router", "--admin-port", "-2"), "--admin-port: admin.port = '-2'"),
        (("router", "--store", "localhost:2379"), "--store: store.endpoints"),
        (("router", "--cluster", "A B"), "--cluster: cluster.name = 'A B'"),
        (("router", "--set", "router.hold_timeout_s=3"), "must exceed lease.ttl_s (10)"),
        (("router", "--set", "router.hold_timout_s=30"), "did you mean router.hold_timeout_s?"),
        (("router", "--config", "no.toml"), "'no.toml': a file that can be read (No such file or directory)"),
        (("worker", "shardlead.demo:Counter", "--name", "a/b"), "--name: worker.name = 'a/b'"),
        (("init", "--shards", "0"), "--shards: cluster.shards = '0': must be a whole number, at least 1"),
        (("dev", "--workers", "0"), "0 is not in the range"),
    ],
)
def test_wrong_usage_is_two_and_one_clear_line(spawn: Callable[..., Ran], words: tuple[str, ...], said: str) -> None:
    """What is wrong is named with the flag as it was typed; nothing is started."""
    ran = spawn(*words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_wrong_variables_are_named(spawn: Callable[..., Ran]) -> None:
    """The environment is read like a file, and all problems are listed at once."""
    ran = spawn("router", "--port", "x", env={"SHARDLEAD_LEASE_TTL": "5", "SHARDLEAD_LOG_LEVEL": "loud"})
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 4  # a headline and three problems
    assert "SHARDLEAD_LEASE_TTL_S" in ran.err


# --- the store ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("command", ["status", "init"])
def test_a_store_that_does_not_answer_is_said_soon(spawn: Callable[..., Ran], command: str) -> None:
    """Within 5 s, with the URL, and exit code 1."""
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    ran = spawn(command, "--store", url)
    assert ran.code == 1
    assert "the store does not answer" in ran.err
    assert url in ran.err
    assert time.monotonic() - began < 8  # 5 s and a busy machine


def test_without_any_store_it_says_where_it_looked(spawn: Callable[..., Ran]) -> None:
    """Nothing named, no dev cluster running: the default is tried, and that is said."""
    ran = spawn("status", "--set", "store.call_timeout_s=1", env={"SHARDLEAD_CLUSTER_NAME": "nowhere"})
    assert ran.code == 1
    assert "as no `shardlead dev` is running here" in ran.err or "nowhere" in ran.err  # or a local etcd answered


def test_a_cluster_that_does_not_exist(run: Callable[..., Ran], url: str) -> None:
    """Reading commands say how to make one."""
    ran = run("status", "--store", url, "--cluster", "nothing")
    assert (ran.code, ran.out) == (1, "")
    assert "'nothing' does not exist yet" in ran.err


def test_init_creates_once_and_refuses_another_shape(run: Callable[..., Ran], url: str) -> None:
    """The second time it says that it exists; another number of shards is a named mismatch."""
    flags = ["--store", url, "--cluster", CLUSTER]
    assert run("init", "--shards", "8", *flags).out == "cluster 'orders' created: 8 shards, 16384 slots\n"
    assert run("init", *flags).out == "cluster 'orders' exists already: 8 shards, 16384 slots\n"
    ran = run("init", "--shards", "9", *flags)
    assert (ran.code, ran.out) == (1, "")
    assert "shards = 8, the settings here say 9" in ran.err


# --- looking --------------------------------------------------------------------------------------------------------


def test_workers_json(run: Callable[..., Ran], target: list[str]) -> None:
    """A list of {name, sid, pid, address, state, shards}, in order of name."""
    assert run("workers", "--json", *target).json == [
        {"name": "w1", "sid": "s1", "pid": 11, "address": "h1:80", "state": "up", "shards": 2},
        {"name": "w2", "sid": "s2", "pid": 22, "address": "h2:80", "state": "draining", "shards": 1},
    ]


def test_shards_json(run: Callable[..., Ran], target: list[str]) -> None:
    """A list of {shard, leader, epoch, address, assigned, successors}, null where there is none."""
    rows = run("shards", "--json", *target).json
    epoch = rows[0]["epoch"]
    assert epoch > 1
    assert rows == [
        {"shard": 0, "leader": "w1", "epoch": epoch, "address": "h1:80", "assigned": "w1", "successors": ["w2"]},
        {"shard": 1, "leader": "w1", "epoch": epoch, "address": "h1:80", "assigned": "w2", "successors": ["w1"]},
        {"shard": 2, "leader": "w2", "epoch": epoch, "address": "h2:80", "assigned": None, "successors": []},
        {"shard": 3, "leader": None, "epoch": None, "address": None, "assigned": None, "successors": []},
    ]
    assert [row["shard"] for row in run("shards", "--json", "--worker", "w2", *target).json] == [1, 2]


def test_status_counts(run: Callable[..., Ran], target: list[str]) -> None:
    """As JSON and for people; a foreign record is counted, not stumbled over."""
    page = run("status", "--json", *target).json
    expected = {"shards": 4, "led": 3, "leaderless": 1, "moving": 1, "workers": 2, "spread": 1, "controller": "w1"}
    assert {name: page[name] for name in expected} == expected
    assert (page["draining"], page["unreadable"]) == (["w2"], 1)
    text = run("status", *target).out
    assert "4: 3 led, 1 without a leader, 1 about to move" in text
    assert "2 alive, 1 to 2 each" in text


def test_columns_are_aligned(run: Callable[..., Ran], target: list[str]) -> None:
    """Heads above their columns; what is to come is marked."""
    lines = run("shards", *target).out.splitlines()
    at = lines[0].index("ADDRESS")
    assert [line[at : at + 5] for line in lines[1:]] == ["h1:80", "h1:80", "h2:80", "-    "]
    assert "w2 (to come)" in lines[2]
    assert "controller" in run("workers", *target).out.splitlines()[1]


def test_tables_of_nothing() -> None:
    """Heads alone, and columns of which nothing is known stand to the left."""
    assert pages.table(("a", "bb"), []) == ["A  BB"]
    assert pages.table(("a", "bb"), [(1, None), (22, "")]) == [" A  BB", " 1  -", "22  -"]


def test_a_dev_cluster_is_found(run: Callable[..., Ran], target: list[str], environment: dict[str, str]) -> None:
    """From any folder: the newest, said on stderr where there are several; --dev picks; --store is stronger."""
    url = target[1]
    Path(environment["XDG_RUNTIME_DIR"]).mkdir(mode=0o700)

    def write(port: int, store: str, started: float) -> None:
        devfile.write(devfile.DevCluster(os.getpid(), port, store, CLUSTER, "127.0.0.1:1", started))

    write(8081, url, 1.0)
    assert len(run("workers", "--json").json) == 2
    write(8082, f"http://127.0.0.1:{free_port()}", 2.0)
    newest = run("status", "--set", "store.call_timeout_s=1")
    assert newest.code == 1
    assert "taking the newest, on port 8082 (--dev PORT picks another: 8081)" in newest.err
    picked = run("workers", "--json", "--dev", "8081")
    assert (len(picked.json), picked.err) == (2, "")
    assert len(run("workers", "--json", "--store", url, "--cluster", CLUSTER).json) == 2
    missing = run("workers", "--dev", "8083")
    assert missing.code == 1
    assert "8082, 8081" in missing.err


# --- operating ------------------------------------------------------------------------------------------------------


def test_unknown_shards_and_workers_are_named(run: Callable[..., Ran], target: list[str]) -> None:
    """With the range there is, and with the workers that are alive; nothing is written."""
    for words, said in (
        (("move", "4", "w1"), "there is no shard 4: cluster 'orders' has shards 0 to 3"),
        (("move", "--", "-1", "w1"), "there is no shard -1"),
        (("move", "1", "w9"), "no worker 'w9' is alive in cluster 'orders': alive are w1, w2"),
        (("drain", "w9"), "alive are w1, w2"),
        (("cordon", "w9"), "alive are w1, w2"),
        (("unpin", "7"), "there is no shard 7"),
        (("shards", "--worker", "w9"), "alive are w1, w2"),
    ):
        ran = run(words[0], *target, *words[1:])
        assert (ran.code, ran.out) == (1, ""), words
        assert said in ran.err
    assert run("status", "--json", *target).json["pins"] == {}


def test_a_move_is_a_pin_that_ends_by_itself(run: Callable[..., Ran], target: list[str]) -> None:
    """On a lease of 600 s; `pin` has none; where nothing happens, that is said, with what is missing."""
    assert run("move", "0", "w1", *target).out.startswith("shard 0 is led by w1 under epoch ")
    assert "The order stands for 600 s" in run("move", "--wait", "0", "1", "w2", *target).out
    late = run("pin", "--wait", "0.3", "2", "w1", *target)
    assert late.code == 1
    assert "w2 leads it. The order stands until unpin" in late.err

    async def story(store: Store) -> list[tuple[Wish, int]]:
        pins = []
        for shard in (0, 1, 2):
            (kv,) = (await store.read(Range(KEYS.pin(shard)))).kvs
            granted = (await store.lease_keys(kv.lease)).granted_ttl_s if kv.lease else 0
            pins.append((decode(Wish, kv.key, kv.value), granted))
        return pins

    pins = on_store(target[1], story)
    assert [(wish.worker, granted) for wish, granted in pins] == [("w1", 600), ("w2", 600), ("w1", 0)]
    assert run("status", "--json", *target).json["pins"] == {"0": "w1", "1": "w2", "2": "w1"}
    assert run("unpin", "2", *target).out == "shard 2 is no longer pinned to w1\n"
    assert run("unpin", "2", *target).out == "shard 2 is not pinned\n"


def test_drain_cordon_and_freeze_are_written_and_taken_back(run: Callable[..., Ran], target: list[str]) -> None:
    """Each wish shows in `status`; undoing twice is no error."""
    late = run("drain", "--wait", "0.3", "w1", *target)
    assert late.code == 1
    assert "still leads 2 of 2 shards" in late.err
    assert "keeps its 2 shards" in run("cordon", "w1", *target).out
    assert run("freeze", "--reason", "deploy", *target).code == 0
    page = run("status", "--json", *target).json
    assert (page["drained"], page["cordoned"], page["is_frozen"]) == (["w1"], ["w1"], True)
    assert "deploy: no moves for evenness" in run("status", *target).out
    assert "to be drained" in run("workers", *target).out
    for _ in range(2):
        assert run("drain", "--undo", "w1", *target).code == 0
        assert run("uncordon", "w1", *target).code == 0
        assert run("unfreeze", *target).code == 0
    page = run("status", "--json", *target).json
    assert (page["drained"], page["cordoned"], page["is_frozen"]) == ([], [], False)


def test_generation_raise_needs_a_cluster_without_workers(run: Callable[..., Ran], target: list[str]) -> None:
    """With workers alive it is refused; without, every epoch rises by 2**48."""
    ran = run("generation", "raise", *target)
    assert (ran.code, ran.out) == (1, "")
    assert "stop all of them first" in ran.err
    empty = [*target[:2], "--cluster", "empty"]
    assert run("init", *empty).code == 0
    assert "generation is now 1" in run("generation", "raise", *empty).out
    assert run("status", "--json", *empty).json["generation"] == 1


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_taken_ports_are_named_with_their_flags(spawn: Callable[..., Ran], target: list[str]) -> None:
    """A router's and an admin server's port, and a worker's; exit code 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, flag in (
            (("router", "--port", port, "--admin-port", "0"), "choose another with --port"),
            (("router", "--port", "0", "--admin-port", port), "choose another with --admin-port"),
            (("controller", "--admin-port", port), "choose another with --admin-port"),
            (("worker", "shardlead.demo:Counter", "--port", port), "port"),
            (("embedded-store", "--port", port), port),
        ):
            ran = spawn(*words, *([] if words[0] == "embedded-store" else target))
            assert (ran.code, ran.out) == (1, "")
            assert port in ran.err
            assert flag in ran.err


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("role", ["router", "controller", "worker"])
def test_a_signal_stops_a_role_in_good_order(
    role: str, number: signal.Signals, url: str, environment: dict[str, str], run: Callable[..., Ran], tmp_path: Path
) -> None:
    """Ready line on stdout; then Ctrl-C or SIGTERM: exit code 0, and a worker's record is gone at once."""
    flags = ["--store", url, "--cluster", CLUSTER]
    assert run("init", "--shards", "4", *flags).code == 0
    app = ["shardlead.demo:Counter"] if role == "worker" else []
    port = ["--port", "0"] if role == "router" else []
    with started(environment, role, *app, *flags, *port, "--name", "n1") as process:
        words = line_of(process, "ready ").split()
        assert (words[1], words[2], words[4]) == (role, "n1", "admin")
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, err
        assert "Traceback" not in err
    assert run("workers", "--json", *flags).json == []


@pytest.mark.e2e
def test_a_role_says_that_its_store_is_silent_and_recovers(
    environment: dict[str, str], run: Callable[..., Ran], tmp_path: Path
) -> None:
    """The router says it, tries on, and is ready once store and cluster are there; a signal ends the waiting."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    with started(environment, "router", "--port", "0", "--store", url) as waiting:
        assert waiting.stderr is not None
        assert url in waiting.stderr.readline()
        waiting.terminate()
        assert waiting.wait(LIMIT_S) == 0
    with started(environment, "router", "--port", "0", "--store", url) as process:
        assert process.stderr is not None
        assert url in process.stderr.readline()
        with started(environment, "embedded-store", "--port", port) as store:
            line_of(store, "listening on ")
            assert run("init", "--store", url).code == 0
            line_of(process, "ready router ")
            process.terminate()
            assert process.wait(LIMIT_S) == 0


@pytest.mark.e2e
def test_a_second_signal_ends_a_stopping_role_at_once(environment: dict[str, str], url: str, tmp_path: Path) -> None:
    """A worker that lingers for its routers exits with 128 + the signal's number when it is told twice."""
    flags = ["--store", url, "--cluster", CLUSTER, "--set", "cluster.shards=4", "--name", "n1"]
    with started(environment, "worker", "shardlead.demo:Counter", *flags) as process:
        address = line_of(process, "ready ").split()[3]
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port))):  # a router that stays connected: the worker lingers for it
            process.terminate()
            assert process.stderr is not None
            while "leaving" not in process.stderr.readline():
                pass
            process.terminate()
            assert process.wait(LIMIT_S) == 128 + signal.SIGTERM


def _fetch(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=LIMIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def _values(page: str, name: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in page.splitlines() if line.partition("{")[0].partition(" ")[0] == name)
    return {labels: float(value) for labels, _, value in lines}


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are looked up in /proc")
def test_several_router_processes_are_one_router(
    environment: dict[str, str], url: str, run: Callable[..., Ran]
) -> None:
    """One ready line, one port, one page of metrics whose counters never go back; one that is killed is started again
    and said; SIGTERM stops all, and so does the parent's death."""
    flags = ["--store", url, "--cluster", CLUSTER]
    assert run("init", "--shards", "4", *flags).code == 0
    group = ["router", *flags, "--processes", "3", "--port", "0", "--name", "edge"]
    with started(environment, *group) as parent:
        assert parent.stderr is not None
        words = line_of(parent, "ready ").split()
        assert words[:3] == ["ready", "router", "edge"]
        address, admin = words[3], words[5]

        def refused() -> float:
            page = _fetch(admin, "/metrics")[1]
            return _values(page, "shardlead_router_requests_total")[
                'shardlead_router_requests_total{outcome="bad-request"}'
            ]

        def serving() -> float:
            page = _fetch(admin, "/metrics")[1]
            return _values(page, "shardlead_router_processes")["shardlead_router_processes"]

        for _ in range(30):
            assert _fetch(address, "/without-a-key")[0] == 400
        assert (refused(), serving()) == (30, 3)
        assert _fetch(admin, "/readyz")[0] == 200
        assert '"shards":4' in _fetch(admin, "/v1/map")[1]
        before = _children(parent.pid)
        assert len(before) == 3
        os.kill(before[0], signal.SIGKILL)
        assert any("a router process has ended; starting it again" in line for line in parent.stderr)
        while serving() < 3:
            assert _fetch(admin, "/readyz")[0] == 200
        assert refused() == 30
        for _ in range(30):
            assert _fetch(address, "/without-a-key")[0] == 400
        assert refused() == 60
        assert len(_children(parent.pid)) == 3
        assert set(_children(parent.pid)) & set(before) == set(before[1:])
        parent.terminate()
        _, err = parent.communicate(timeout=LIMIT_S)
        assert parent.returncode == 0, err
        assert "Traceback" not in err
    with started(environment, *group) as parent:
        line_of(parent, "ready ")
        orphans = _children(parent.pid)
        parent.kill()
        parent.wait(LIMIT_S)
        ends = time.monotonic() + LIMIT_S
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in orphans):
            assert time.monotonic() < ends, "they stay"
            time.sleep(0.05)


@pytest.mark.e2e
def test_router_processes_that_cannot_start_end_their_parent(spawn: Callable[..., Ran], target: list[str]) -> None:
    """What a process of the group says against its start is said once more by none, and the exit code is its own; a
    port that is taken is found before any is started."""
    done = spawn("router", *target, "--processes", "2", "--port", "0", "--set", "router.access_log=/none/there")
    assert done.code == 1
    assert "router.access_log" in done.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = spawn("router", *target, "--processes", "2", "--port", port)
    assert done.code == 1
    assert "choose another with --port" in done.err
