"""A worker's death, however it comes, is followed by the end of its lease. Real processes, real stores."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from shardlead import parent, watchdog
from tests.parent.actor import Facts, Plan
from tests.support.etcd import KINDS, EtcdCluster, etcd_server

REPOSITORY: Final = Path(__file__).parents[2]
WAIT_S: Final = 20.0
RSS_BYTES_MAX: Final = 15 * 1024 * 1024
FAILOVER_S: Final = 0.5
TRIES: Final = 3  # of which one has to be as fast as promised: the machine may be busy with other things
EMBEDDED: Final = """
import asyncio
from shardlead.store.embedded import serve
asyncio.run(serve("127.0.0.1", 0, data=None, on_ready=lambda url: print(url, flush=True)))
"""


# --- what the tests hold ------------------------------------------------------------------------------------------


class Stage:
    """Parents and what hangs on them; nothing outlives the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def spawn(self, *, prefix: Sequence[str] = ()) -> "Family":
        """A parent with an actor, which waits for its plan."""
        command = [*prefix, *parent.command_line([sys.executable, "-m", "tests.parent.actor"])]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        family = Family(process)
        self._stack.callback(family.clear_away)
        return family

    def start(self, plan: Plan, *, prefix: Sequence[str] = ()) -> "Family":
        """A parent with an actor, which has said its facts."""
        family = self.spawn(prefix=prefix)
        process = family.process
        assert process.stdin is not None
        process.stdin.write(orjson.dumps(asdict(plan)) + b"\n")
        process.stdin.flush()
        said = Facts(**family.hear())
        # Pids of another name space mean strangers here, whom nobody may kill; they end with their PID 1.
        family.facts = replace(said, pid=0, child=0) if prefix else said
        family.inner_pid = said.pid
        family.born.update(map(born, watchdog.members([process.pid])))
        return family


class Family:
    """A parent and its worker."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.facts = Facts(0, 0)
        self.inner_pid = 0  # the worker's in its own PID name space
        self.born: set[tuple[int, str]] = set()  # all of them, once it has said its facts
        self._heard = b""

    def hear(self) -> Any:
        """The worker's next line."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + WAIT_S
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the worker says nothing"
            data = os.read(self.process.stdout.fileno(), 65_536)
            assert data, f"the worker is gone: {self.last_words()}"
            self._heard += data
        line, self._heard = self._heard.split(b"\n", 1)
        return json.loads(line)

    def last_words(self) -> str:
        """What came on stderr until the parent's end."""
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        return (self.process.stderr.read() or b"").decode()

    def end(self) -> int:
        """The parent's exit code, once it has ended."""
        return self.process.wait(WAIT_S)

    def clear_away(self) -> None:
        """Kill what still lives of it, however far the test has come."""
        alone = {self.facts.pid, self.facts.child} - {0}  # init's, if those above them are dead
        watchdog.end(alone if self.process.poll() is not None else {*alone, self.process.pid})
        self.process.wait(WAIT_S)
        wait_until(lambda: not living(self.born), "a name space ends soon after its first process, and this did not")
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def born(pid: int) -> tuple[int, str]:
    """A process and when it began, for numbers come again; no time if there is none."""
    done = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=False
    )
    return pid, done.stdout.strip()


def living(of: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Those of these processes that have not ended."""
    alive = {row.pid for row in watchdog.table() if row.state not in "ZX"}
    return of & {born(pid) for pid, _ in of if pid in alive}


@pytest.mark.parametrize("is_pid_1", [False, True])
def test_nothing_outlives_its_test(is_pid_1: bool, request: pytest.FixtureRequest) -> None:
    """However far it has come: parent, worker and what the worker has forked are gone, as PID 1 too."""
    prefix = request.getfixturevalue("as_pid_1") if is_pid_1 else []
    seen: set[tuple[int, str]] = set()

    def see(process: "subprocess.Popen[bytes]") -> None:
        seen.update(map(born, watchdog.members([process.pid])))

    with ExitStack() as stack:
        see(Stage(stack).start(Plan(fork=True, end="signals"), prefix=prefix).process)
    with ExitStack() as stack:
        mute = Stage(stack).spawn(prefix=prefix)  # its worker waits for a plan
        wait_until(lambda: len(watchdog.members([mute.process.pid])) >= 2 + is_pid_1, "it does not come up")
        see(mute.process)
    with ExitStack() as stack:
        orphan = Stage(stack).start(Plan(fork=True, end="signals"), prefix=prefix)
        see(orphan.process)
        orphan.process.kill()
        orphan.end()
    assert len(seen) >= 8
    assert not living(seen)


class Registry:
    """A store, as the tests look at it: whether a lease lives."""

    def __init__(self, url: str, call: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
        self.url = url
        self._call = call

    def is_alive(self, lease: int) -> bool:
        return int(self._call("/v3/lease/timetolive", {"ID": str(lease)}).get("TTL", 0)) > 0

    def wait_revoked(self, lease: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.is_alive(lease):
            assert time.monotonic() < deadline, "the lease was not revoked"
            time.sleep(0.005)

    @classmethod
    def of(cls, cluster: EtcdCluster, token: str = "") -> "Registry":
        return cls(cluster.url, partial(cluster.call, token=token))


@contextmanager
def embedded() -> Iterator[Registry]:
    with subprocess.Popen([sys.executable, "-c", EMBEDDED], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            yield Registry(url, lambda path, body: parent.post(url, path, body, "", {})[1])
        finally:
            process.terminate()


@pytest.fixture(scope="module", params=["embedded", *(pytest.param(kind, marks=pytest.mark.etcd) for kind in KINDS)])
def registry(request: pytest.FixtureRequest) -> Iterator[Registry]:
    """The embedded store, and each real etcd."""
    if request.param == "embedded":
        with embedded() as found:
            yield found
    else:
        with etcd_server(request.param) as cluster:
            yield Registry.of(cluster)


@pytest.fixture(scope="module")
def store() -> Iterator[Registry]:
    """Any store, where it does not matter which."""
    with embedded() as found:
        yield found


# --- deaths -------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_followed_by_the_end_of_its_lease(stage: Stage, registry: Registry) -> None:
    """kill -9, and within 500 ms the lease is revoked; the exit code says 128 + 9."""
    took: list[float] = []
    while len(took) < TRIES and not (took and min(took) < FAILOVER_S):
        family = stage.start(Plan(endpoints=(registry.url,)))
        (lease,) = family.facts.leases
        assert registry.is_alive(lease)
        began = time.monotonic()
        os.kill(family.facts.pid, signal.SIGKILL)
        registry.wait_revoked(lease)
        took.append(time.monotonic() - began)
        assert family.end() == 128 + signal.SIGKILL
        assert re.search(rf"ended by signal 9; lease {lease:x} revoked in \d+ ms", family.last_words())
    assert min(took) < FAILOVER_S, took


def test_a_crashed_worker_is_too(stage: Stage, store: Registry) -> None:
    """An exit code is passed on; what counts is that the will still stood."""
    family = stage.start(Plan(endpoints=(store.url,), end="exit"))
    assert family.end() == 3
    assert not store.is_alive(family.facts.leases[0])


def test_unfenced_work_keeps_its_lease(stage: Stage, store: Registry) -> None:
    """Bytes of the dead process may still arrive somewhere: the lease is left to its time-out."""
    family = stage.start(Plan(endpoints=(store.url,), fenced=False, end="kill"))
    assert family.end() == 128 + signal.SIGKILL
    assert store.is_alive(family.facts.leases[0])
    assert "not fenced" in family.last_words()


def test_a_withdrawn_will_is_not_carried_out(stage: Stage, store: Registry) -> None:
    """The worker had revoked the lease itself, or says so: nothing is asked of the store, nothing is said."""
    family = stage.start(Plan(endpoints=(store.url,), withdraw=True, end="exit"))
    assert family.end() == 3
    assert store.is_alive(family.facts.leases[0])
    assert family.last_words() == ""


def test_a_worker_with_a_new_session_loses_that_one(stage: Stage, store: Registry) -> None:
    """Only the last lease declared is revoked."""
    family = stage.start(Plan(endpoints=(store.url,), sessions=3, end="kill"))
    assert family.end() == 128 + signal.SIGKILL
    assert [store.is_alive(lease) for lease in family.facts.leases] == [True, True, False]


def test_forked_children_hold_nothing_up(stage: Stage, store: Registry) -> None:
    """A child that lives on holds the worker's end of the socket; the parent goes by the worker's death alone."""
    family = stage.start(Plan(endpoints=(store.url,), fork=True))
    os.kill(family.facts.pid, signal.SIGKILL)
    assert family.end() == 128 + signal.SIGKILL
    os.kill(family.facts.child, 0)  # it lives
    assert not store.is_alive(family.facts.leases[0])


# --- PID 1 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_pid_1() -> list[str]:
    """What to put in front of a command to run it as PID 1 of a name space of its own."""
    for flags in ("-pf", "-Urpf"):
        command = ["unshare", flags, "--mount-proc", "--kill-child"]  # all of it ends with the first process
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("this machine lets nobody unshare a PID name space")


def test_as_pid_1_it_does_the_same(stage: Stage, store: Registry, as_pid_1: list[str]) -> None:
    """In a container: the worker is killed, the lease revoked, the exit code passed on."""
    family = stage.start(Plan(endpoints=(store.url,), fork=True, orphan=True, end="kill"), prefix=as_pid_1)
    assert family.inner_pid == 2
    assert family.end() == 128 + signal.SIGKILL
    assert not store.is_alive(family.facts.leases[0])


def test_as_pid_1_it_forwards_signals_and_reaps_orphans(stage: Stage, as_pid_1: list[str]) -> None:
    """PID 1 has no default actions and inherits every orphan: neither is a problem."""
    family = stage.start(Plan(orphan=True, end="signals"), prefix=as_pid_1)
    (first,) = children_of(family.process.pid)
    wait_until(lambda: len(children_of(first)) == 1, "the orphan is still there, dead or alive")
    os.kill(first, signal.SIGTERM)
    assert family.hear() == "SIGTERM"
    (worker,) = children_of(first)
    os.kill(worker, signal.SIGKILL)
    assert family.end() == 128 + signal.SIGKILL


def children_of(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


# --- while it lives -----------------------------------------------------------------------------------------------


def test_signals_reach_the_worker_once_each_and_by_the_parent_alone(stage: Stage) -> None:
    """TERM, INT, HUP, QUIT, USR1 and USR2 are forwarded, a second TERM too. The worker has a process group of its
    own, so that the terminal's Ctrl-C reaches it through the parent only."""
    family = stage.start(Plan(end="signals"))
    sent = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGTERM"]
    heard = []
    for name in sent:
        family.process.send_signal(signal.Signals[name])
        heard.append(family.hear())
    assert heard == sent
    assert family.facts.group == family.facts.pid != os.getpgid(family.process.pid)


def test_a_worker_notices_that_its_parent_was_killed(stage: Stage) -> None:
    """The end of the stream, on the worker's side, is the parent's death."""
    family = stage.start(Plan())
    family.process.kill()
    assert family.hear() == "orphaned"


def test_it_is_small(stage: Stage, store: Registry) -> None:
    """Under 15 MiB as long as its worker lives."""
    family = stage.start(Plan(endpoints=(store.url,)))
    status = Path(f"/proc/{family.process.pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident is not None
    assert int(resident[1]) * 1024 < RSS_BYTES_MAX


# --- credentials --------------------------------------------------------------------------------------------------


@pytest.mark.etcd
@pytest.mark.parametrize("kind", KINDS)
def test_a_password_is_used_and_never_shown(stage: Stage, kind: str) -> None:
    """With etcd's authentication on the lease is revoked, and neither process has the password in its arguments or
    environment."""
    password = "correct horse battery staple"
    with etcd_server(kind) as cluster:
        registry = Registry.of(cluster, cluster.enable_auth(password))
        family = stage.start(Plan(endpoints=(cluster.url,), username="root", password=password))
        (lease,) = family.facts.leases
        assert registry.is_alive(lease)
        for pid in (family.process.pid, family.facts.pid):
            for name in ("cmdline", "environ"):
                assert b"horse" not in Path(f"/proc/{pid}/{name}").read_bytes()
        os.kill(family.facts.pid, signal.SIGKILL)
        assert family.end() == 128 + signal.SIGKILL
        assert not registry.is_alive(lease)
        assert "horse" not in family.last_words()


@pytest.mark.etcd
def test_it_speaks_tls_with_a_client_certificate(stage: Stage) -> None:
    """As the worker's own store settings say."""
    with etcd_server("3.5", tls=True) as cluster:
        assert cluster.tls is not None
        family = stage.start(
            Plan(
                endpoints=(cluster.url,),
                ca_file=str(cluster.tls.ca_file),
                cert_file=str(cluster.tls.client_cert_file),
                key_file=str(cluster.tls.client_key_file),
                end="kill",
            )
        )
        assert family.end() == 128 + signal.SIGKILL
        assert not Registry.of(cluster).is_alive(family.facts.leases[0])


# --- trouble ------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_url() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing_url() -> Iterator[str]:
    """Nobody listens there, and nobody can begin to."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_endpoints_are_asked_in_turn(stage: Stage, store: Registry, silent_url: str, refusing_url: str) -> None:
    """One that refuses, one that says nothing and one that is no URL cost little: less than a try's time-out."""
    dead = ("ftp:nonsense", refusing_url, silent_url)
    family = stage.start(Plan(endpoints=(store.url,), dead_endpoints=dead, end="kill"))
    assert family.end() == 128 + signal.SIGKILL
    assert not store.is_alive(family.facts.leases[0])
    took_ms = re.search(r"revoked in (\d+) ms", family.last_words())
    assert took_ms is not None
    assert int(took_ms[1]) < 1_000 * parent.TRY_TIMEOUT_S


def test_a_store_that_never_answers_delays_the_end_by_no_more_than_said(
    silent_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Then the parent says which lease is left to its time-out, and why."""
    monkeypatch.setattr(parent, "TRY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(parent, "REVOKE_TIMEOUT_S", 0.4)
    began = time.monotonic()
    parent.execute(orjson.dumps({"lease": "171", "fenced": True, "endpoints": [silent_url]}), 1, "signal 9")
    assert time.monotonic() - began < 2
    assert re.fullmatch(r".*lease ab could not be revoked and ends by time-out: http.*\n", capfd.readouterr().err)


def test_a_lease_that_is_gone_already_is_a_success(registry: Registry, capfd: pytest.CaptureFixture[str]) -> None:
    """The store has been quicker, or an answer was lost before."""
    parent.execute(orjson.dumps({"lease": "171", "fenced": True, "endpoints": [registry.url]}), 1, "signal 9")
    assert "lease ab revoked" in capfd.readouterr().err


@pytest.mark.parametrize(
    "line", [b"garbage", b"[]", b'"x"', b"{}", b'{"lease": "many"}', b"\xff\xfe", b'{"lease": []}']
)
def test_an_unreadable_will_is_one_clear_line(line: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Never a traceback."""
    parent.execute(line, 1, "signal 9")
    assert re.fullmatch(r"shardlead parent: .*its last will is not readable.*\n", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--", "/no/such/command"], 127, "cannot start /no/such/command: No such file or directory"),
        (["--", "/etc/passwd"], 126, "cannot start /etc/passwd: Permission denied"),
        ([], 2, "usage:"),
        (["sleep", "1"], 2, "usage:"),
    ],
)
def test_a_command_that_cannot_start_is_one_clear_line(arguments: list[str], code: int, says: str) -> None:
    """With the exit codes of a shell."""
    command = [*parent.command_line([])[:-1], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(rf"shardlead parent: {re.escape(says)}.*\n", done.stderr)


def test_exit_codes_are_passed_on() -> None:
    """The worker's own, and 128 + n for signal n."""
    codes = [
        subprocess.run(parent.command_line(["sh", "-c", script]), timeout=WAIT_S).returncode
        for script in ("exit 0", "exit 70", "kill -TERM $$", "kill -SEGV $$")
    ]
    assert codes == [0, 70, 128 + 15, 128 + 11]
