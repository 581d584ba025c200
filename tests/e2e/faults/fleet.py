"""Three etcd members, workers and routers on loopback, with a link that can fail between any two that talk.

Every worker and router has links of its own to every member, and every worker stands behind one link, which is the
address that it advertises. Processes are `LocalCluster`'s; the members are `tests.support.etcd`'s.
"""

import asyncio
import contextlib
import http.client
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from shardlead.core.ring import build_table, slot_count_for, slot_of
from shardlead.errors import ProcessFailed
from shardlead.processes import LOOPBACK, ClusterMap, Process, WorkerProcess, free_port, read_map
from shardlead.testing import LocalCluster
from tests.e2e.faults.apps import FILE, FOLDER_VARIABLE, stored
from tests.e2e.faults.proxy import Link, PeerNetwork
from tests.support.etcd import EtcdCluster, EtcdMember, etcd_binary, etcd_server, free_ports

CASES: Final = ("plain", "auth", "tls")
USER: Final = "shardlead"
PASSWORD: Final = "a word"
TOKEN_TTL_S: Final = 2
STARTED_S: Final = 60.0
PROBE_S: Final = 2.0
EXIT_UNFENCED: Final = 70
_POLL_S: Final = 0.02


@dataclass(frozen=True)
class Plan:
    """What is started. `folder` takes everything that is written: logs, data, history."""

    folder: Path
    app: str = "tests.e2e.faults.apps:Fenced"
    etcd: str = "3.5"
    case: str = "plain"
    workers: int = 4
    routers: int = 2
    shards: int = 24
    ttl_s: int = 5
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_fenced(self) -> bool:
        return self.app.endswith(":Fenced")


class Store:
    """The etcd of a plan, with a network between its members, for as long as the block lasts."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        ports = free_ports(6)
        self._listening, self._told = ports[:3], ports[3:]
        self.peers = PeerNetwork(self._listening, self._told)
        self.members: Members
        self._exit = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        await self.peers.open()
        try:
            etcd = await asyncio.to_thread(self._start)
        except BaseException:  # Ctrl-C, too: without __aenter__ nobody calls __aexit__
            await self.peers.close()
            raise
        self.members = Members(etcd, has_auth=self.plan.case == "auth")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peers.heal()
        await asyncio.to_thread(self._exit.close)
        await self.peers.close()

    def _start(self) -> EtcdCluster:
        plan = self.plan
        extra = ("--auth-token-ttl", str(TOKEN_TTL_S)) if plan.case == "auth" and plan.etcd != "3.4" else ()
        folder = plan.folder / "etcd"
        folder.mkdir(parents=True)
        peers = list(zip(self._listening, self._told, strict=True))
        server = etcd_server(plan.etcd, members=3, tls=plan.case == "tls", extra_args=extra, folder=folder, peers=peers)
        etcd = self._exit.enter_context(server)
        if plan.case == "auth":
            etcd.enable_auth(users={USER: PASSWORD})
        return etcd


class Fleet:
    """The cluster for as long as the block lasts."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.members = store.members
        self.peers = store.peers
        etcd = store.members.etcd
        self.to_store: dict[str, list[Link]] = {}
        """The links of a worker or router to each member."""
        self.to_worker: dict[str, Link] = {}
        """The link at which a worker is reached."""
        self.expected: set[int] = set()
        """Processes (by the pid of their parent) whose end is our doing."""
        self.surprises: list[str] = []
        self._starting: dict[str, asyncio.Task[Any]] = {}
        self._exit = AsyncExitStack()
        self._ports: dict[str, int] = {}
        self._keys = probe_keys(plan.shards)
        scheme = "https" if plan.case == "tls" else "http"
        self._scheme = scheme
        environment = {FOLDER_VARIABLE: str(plan.folder)}
        if plan.case == "auth":
            environment |= {"SHARDLEAD_STORE_USERNAME": USER, "SHARDLEAD_STORE_PASSWORD": PASSWORD}
        if etcd.tls is not None:
            environment |= {
                "SHARDLEAD_STORE_CA_FILE": str(etcd.tls.ca_file),
                "SHARDLEAD_STORE_CERT_FILE": str(etcd.tls.client_cert_file),
                "SHARDLEAD_STORE_KEY_FILE": str(etcd.tls.client_key_file),
            }
        self.cluster = LocalCluster(
            plan.app,
            workers=0,
            routers=0,
            shards=plan.shards,
            ttl_s=plan.ttl_s,
            store=",".join(etcd.endpoints),
            folder=plan.folder / "cluster",
            environment=environment,
            ready_timeout_s=STARTED_S,
            settings={
                "worker.controller": True,
                "router.key_rules": "path:/lists/{key},path:/counts/{key}",
                "router.hold_timeout_s": plan.ttl_s + 5,
                "router.answer_timeout_s": 10,
                "worker.drain_timeout_s": 3,
                "worker.shutdown_timeout_s": 10,
                "worker.linger_s": 1,
                "worker.audit_dir": plan.folder / "audit",
                "controller.brake_window_s": 5,
                "log.level": "debug",
                **plan.settings,
            },
        )

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:  # Ctrl-C, too: processes run by now
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    async def _begin(self) -> None:
        for name in ("cluster", "audit"):
            (self.plan.folder / name).mkdir(parents=True, exist_ok=True)
        self._exit.push_async_callback(self._close_links)
        await self._exit.enter_async_context(self.cluster)
        self._exit.push_async_callback(self._end_starting)
        names = [f"w{number + 1}" for number in range(self.plan.workers)]
        routers = [f"r{number + 1}" for number in range(self.plan.routers)]
        for name in (*names, *routers):
            self.to_store[name] = [
                await self._link(f"{name}-m{number}", _address(member.url))
                for number, member in enumerate(self.members)
            ]
        for name in names:
            self._ports[name] = free_port()
            self.to_worker[name] = await self._link(f"to-{name}", (LOOPBACK, self._ports[name]))
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(self.start_worker(name))
            for name in routers:
                self._ports[name] = free_port()
                tasks.create_task(self._start_router(name))
        await self.cluster.wait_led(STARTED_S)
        await self.cluster.wait_ready(STARTED_S)

    async def _link(self, name: str, target: tuple[str, int]) -> Link:
        link = Link(name, target)
        await link.open()
        return link

    async def _close_links(self) -> None:
        for link in self.links():
            await link.close()

    def links(self) -> list[Link]:
        return [*(link for links in self.to_store.values() for link in links), *self.to_worker.values()]

    def _endpoints(self, name: str) -> str:
        return ",".join(f"{self._scheme}://{link.address}" for link in self.to_store[name])

    # --- processes

    @property
    def workers(self) -> dict[str, WorkerProcess]:
        return self.cluster.workers

    async def start_worker(self, name: str) -> WorkerProcess:
        """Start it, or start it again under its name, and return once it is up."""
        own = {
            "worker.port": self._ports[name],
            "worker.advertise": self.to_worker[name].address,
            "store.endpoints": self._endpoints(name),
        }
        return await self.cluster.add_worker(name, own)

    async def _start_router(self, name: str) -> Process:
        return await self.cluster.add_router(
            {"router.port": self._ports[name], "store.endpoints": self._endpoints(name)}
        )

    def address(self, router: str) -> str:
        """Where that router listens."""
        return f"{LOOPBACK}:{self._ports[router]}"

    def router(self, name: str) -> Process:
        """The process of that router."""
        return next(each for each in self.cluster.routers if each.is_ready and each.address == self.address(name))

    def _router_name(self, process: Process) -> str:
        return next(name for name in self._ports if self.address(name) == process.address)

    def start_again(self, name: str) -> None:
        """Begin to start that worker or router; `started` waits."""
        if name in self.to_worker:
            self._starting[name] = asyncio.create_task(self.start_worker(name), name=f"start {name}")
        else:
            self.cluster.routers[:] = [each for each in self.cluster.routers if each.is_running]
            self._starting[name] = asyncio.create_task(self._start_router(name), name=f"start {name}")

    async def started(self, *names: str) -> None:
        """Returns once these (all) that were started again are up. One that is not is a surprise."""
        for name in names or tuple(self._starting):
            try:
                await self._starting.pop(name)
            except ProcessFailed as exc:
                self.surprises.append(f"{name} did not come back: {exc}")

    async def _end_starting(self) -> None:
        for task in self._starting.values():
            task.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)

    def expect_end(self, process: Process) -> None:
        """Its end is our doing."""
        self.expected.add(process.root_pid)

    def note_surprises(self) -> list[str]:
        """Processes that ended without our doing since the last call; they are started again."""
        found = []
        for process in [*self.workers.values(), *self.cluster.routers]:
            if not process.is_running and process.root_pid not in self.expected:
                self.expected.add(process.root_pid)
                if process.returncode == EXIT_UNFENCED and not self.plan.is_fenced:
                    self.start_again(process.name)  # work of a class without a fence did not end: as promised
                    continue
                found.append(f"{process.name} ended by itself with code {process.returncode}")
                self.start_again(process.name if isinstance(process, WorkerProcess) else self._router_name(process))
        self.surprises += found
        return found

    # --- what it is like now

    async def wait_whole(self, timeout_s: float) -> float:
        """Returns once every router sees every shard led by a worker that it sees, and every shard answers through
        every router; how long that took. Raises TimeoutError with what is missing."""
        began_s = time.monotonic()
        missing = ""
        try:
            async with asyncio.timeout(timeout_s):
                for router in self.cluster.routers:
                    while missing := _missing(await self._map(router)):  # noqa: ASYNC110 - asked over HTTP
                        await asyncio.sleep(_POLL_S)
                    pending = list(range(self.plan.shards))
                    while pending:
                        answers = await asyncio.gather(*(self._probe(router, shard) for shard in pending))
                        pending = [shard for shard, answer in zip(pending, answers, strict=True) if answer]
                        missing = f"{router.name}: {', '.join(each for each in answers if each)}"
                        await asyncio.sleep(_POLL_S if pending else 0)
        except TimeoutError:
            raise TimeoutError(f"not whole after {timeout_s:g} s: {missing}") from None
        return time.monotonic() - began_s

    async def _map(self, router: Process) -> ClusterMap | None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            return await read_map(self.cluster.session, router.admin)
        return None

    async def _probe(self, router: Process, shard: int) -> str:
        """Whether that shard answers now: "", or what came instead."""
        url = f"http://{router.address}/counts/{self._keys[shard]}"
        try:
            async with self.cluster.session.get(url, timeout=aiohttp.ClientTimeout(total=PROBE_S)) as answer:
                return "" if answer.status == 200 else f"shard {shard} {answer.status} {(await answer.text())[:120]}"
        except (aiohttp.ClientError, TimeoutError) as exc:
            return f"shard {shard} {type(exc).__name__}"

    def stored(self) -> dict[str, Any]:
        """What the application's file holds."""
        return stored(self.plan.folder / FILE)


def _missing(seen: ClusterMap | None) -> str:
    if seen is None:
        return "no map"
    unled = [shard for shard in range(seen.shards) if seen.leaders.get(shard) not in seen.workers]
    return f"shards without a living leader: {unled}" if unled else ""


def probe_keys(shards: int) -> list[str]:
    """One key for each shard."""
    slot_count = slot_count_for(shards)
    table = build_table(shards, slot_count, 0)
    keys: dict[int, str] = {}
    number = 0
    while len(keys) < shards:
        key = f"probe{number}"
        keys.setdefault(table[slot_of(key.encode(), slot_count)], key)
        number += 1
    return [keys[shard] for shard in range(shards)]


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.partition("://")[2].rpartition(":")
    return host, int(port)


# --- the store -------------------------------------------------------------------------------------------------------


class Members:
    """The etcd members. Everything that blocks runs in a thread: links must not wait for it."""

    def __init__(self, etcd: EtcdCluster, *, has_auth: bool) -> None:
        self.etcd = etcd
        self._has_auth = has_auth
        self._token = ""
        self._authenticating = threading.Lock()

    def __iter__(self) -> Iterator[EtcdMember]:
        return iter(self.etcd.members)

    def __getitem__(self, number: int) -> EtcdMember:
        return self.etcd.members[number]

    async def ask(self, member: EtcdMember, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One request. Raises OSError, and ValueError for an error that etcd tells."""

        def call() -> dict[str, Any]:
            used = self._token
            answer = member.call(path, body, used)
            if self._has_auth and "auth token" in str(answer.get("error", "")):
                self._authenticate(member, used)
                answer = member.call(path, body, self._token)
            if "error" in answer:
                raise ValueError(answer["error"])
            return answer

        try:
            return await asyncio.to_thread(call)
        except http.client.HTTPException as exc:
            raise OSError(str(exc)) from exc

    def _authenticate(self, member: EtcdMember, used: str) -> None:
        """A new token, unless another thread has got one meanwhile: a password costs etcd a tenth of a second."""
        with self._authenticating:
            if self._token == used:
                who = {"name": "root", "password": "secret"}
                self._token = member.call("/v3/auth/authenticate", who).get("token", "")

    async def status(self) -> list[dict[str, Any]]:
        """Of each member: its status, or {} if it does not answer."""

        async def one(member: EtcdMember) -> dict[str, Any]:
            try:
                return await self.ask(member, "/v3/maintenance/status", {})
            except (OSError, ValueError):
                return {}

        return list(await asyncio.gather(*(one(member) for member in self)))

    async def ids(self) -> list[str]:
        """The members' ids in hex, in their order; "" of one that does not answer."""
        found = [status.get("header", {}).get("member_id", "") for status in await self.status()]
        return [f"{int(each):x}" if each else "" for each in found]

    async def term(self) -> int:
        """Raft's term: it grows with each election."""
        return max((int(status.get("raftTerm", 0)) for status in await self.status()), default=0)

    async def leader(self) -> int | None:
        """The number of the member that leads; None if nobody says so."""
        for number, status in enumerate(await self.status()):
            if status and status.get("leader") == status["header"]["member_id"]:
                return number
        return None

    async def move_leader(self, choose: Callable[[Sequence[int]], int]) -> str:
        """Ask the leading member to pass its place on; what came of it."""
        statuses = await self.status()
        ids = [status["header"]["member_id"] if status else "" for status in statuses]
        leaders = [number for number, status in enumerate(statuses) if status and status.get("leader") == ids[number]]
        others = [number for number, member in enumerate(ids) if member and number not in leaders]
        if len(leaders) != 1 or not others:
            return "nobody to move from or to"
        target = choose(others)
        try:
            await self.ask(self[leaders[0]], "/v3/maintenance/transfer-leadership", {"targetID": ids[target]})
        except (OSError, ValueError) as exc:
            return f"refused: {exc}"
        return f"m{leaders[0]} -> m{target}"

    async def compact(self, behind: int) -> bool:
        """Compact to some revisions behind the present."""
        for member, status in zip(self, await self.status(), strict=True):
            revision = int(status.get("header", {}).get("revision", 0)) - behind
            if revision > 0:
                with contextlib.suppress(OSError, ValueError):
                    await self.ask(member, "/v3/kv/compaction", {"revision": str(revision)})
                    return True
        return False

    async def spoiled(self) -> str:
        """What `etcdctl endpoint hashkv` says of members that differ; "" if all hold the same."""
        last = ""
        for _ in range(20):
            revisions = [int(status.get("header", {}).get("revision", 0)) for status in await self.status()]
            hashes = await asyncio.to_thread(self._hashes, min(revisions))
            if isinstance(hashes, str):
                last = hashes
            elif len({each["HashKV"]["compact_revision"] for each in hashes}) == 1:
                found = {each["Endpoint"]: each["HashKV"]["hash"] for each in hashes}
                last = "" if len(set(found.values())) == 1 else f"hashkv differs: {found}"
                if not last:
                    return ""
            else:
                last = f"members are compacted to different revisions: {hashes}"
            await asyncio.sleep(0.5)
        return last

    def _hashes(self, revision: int) -> Any:
        command = [str(etcd_binary("3.5").with_name("etcdctl")), "endpoint", "hashkv", "--rev", str(revision)]
        command += ["--endpoints", ",".join(self.etcd.endpoints), "--write-out", "json"]
        if self._has_auth:
            command += ["--user", "root:secret"]
        if self.etcd.tls is not None:
            tls = self.etcd.tls
            command += ["--cacert", str(tls.ca_file), "--cert", str(tls.client_cert_file)]
            command += ["--key", str(tls.client_key_file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            return f"etcdctl endpoint hashkv failed: {done.stderr.strip()[-300:]}"
        return json.loads(done.stdout)

    def log_findings(self) -> list[str]:
        """Lines of the members' logs that speak of a damaged store."""
        words = ("corrupt", "inconsistent", "panic", "mismatch")
        return [
            f"m{number}: {line.strip()[:300]}"
            for number, member in enumerate(self)
            if member.log_path.exists()
            for line in member.log_path.read_text(errors="replace").splitlines()
            if any(word in line.lower() for word in words) and "corrupt-check" not in line.lower()
        ]
