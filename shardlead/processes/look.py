"""What started processes say of the cluster: their admin servers' pages, and a store's single keys.

Law: facts as one role or the store has them, read over HTTP like anybody could.
"""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson

from shardlead.errors import ProcessFailed
from shardlead.processes.process import Process

_POLL_S: Final = 0.05
_EVENT_BYTES_MAX: Final = 65_536


async def wait_etcd(process: Process, url: str, timeout_s: float) -> None:
    """Returns once etcd answers /health with true. Raises ProcessFailed."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0)) as session:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while process.is_running:
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError):
                        async with session.get(f"{url}/health") as answer:
                            health = orjson.loads(await answer.read())
                            if isinstance(health, dict) and health.get("health") == "true":
                                return
                    await asyncio.sleep(_POLL_S)
    raise ProcessFailed(process.name, f"etcd at {url} is not healthy after {timeout_s:g} s", process.tail())


async def is_etcd_leader(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether that etcd member leads the others now; no for one that does not answer."""
    try:
        timeout = aiohttp.ClientTimeout(total=1.0)
        async with session.post(f"{url}/v3/maintenance/status", data=b"{}", timeout=timeout) as answer:
            status = orjson.loads(await answer.read())
        return bool(status["leader"] == status["header"]["member_id"])
    except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError, KeyError, TypeError):
        return False


async def read_key(session: aiohttp.ClientSession, store_url: str, key: str) -> bytes | None:
    """The value of one key, past every layer of ours; None: absent. Raises aiohttp.ClientError, TimeoutError.

    `store_url` is one member's."""
    body = orjson.dumps({"key": base64.b64encode(key.encode()).decode()})
    async with session.post(f"{store_url}/v3/kv/range", data=body, timeout=aiohttp.ClientTimeout(total=5)) as answer:
        answer.raise_for_status()
        found = orjson.loads(await answer.read()).get("kvs") or []
    return base64.b64decode(found[0].get("value", "")) if found else None


@dataclass(frozen=True, slots=True)
class Member:
    """A living worker, as /v1/map shows it."""

    name: str
    address: str
    state: str
    pid: int
    admin: str


@dataclass(frozen=True, slots=True)
class ClusterMap:
    """Who leads what, as one role sees it at one revision."""

    revision: int
    shards: int
    leaders: Mapping[int, str]
    """The worker that leads each shard; shards without a leader are missing."""
    epochs: Mapping[int, int]
    workers: Mapping[str, Member]

    @property
    def is_led(self) -> bool:
        """Whether every shard has a leader."""
        return 0 < self.shards == len(self.leaders)

    def counts(self) -> dict[str, int]:
        """How many shards each living worker leads."""
        counts = dict.fromkeys(self.workers, 0)
        for worker in self.leaders.values():
            counts[worker] = counts.get(worker, 0) + 1
        return counts

    @property
    def spread(self) -> int:
        """The difference between the most and the fewest shards that a worker leads, over those that are up."""
        counts = self.counts()
        of_living = [counts[name] for name, member in self.workers.items() if member.state == "up"]
        return max(of_living) - min(of_living) if of_living else 0


async def read_map(session: aiohttp.ClientSession, admin: str) -> ClusterMap:
    """/v1/map of a role's admin server. Raises aiohttp.ClientError (for what is no map, too) or TimeoutError."""
    async with session.get(f"http://{admin}/v1/map", timeout=aiohttp.ClientTimeout(total=5)) as answer:
        answer.raise_for_status()
        try:
            return parse_map(orjson.loads(await answer.read()))
        except ValueError as exc:
            raise aiohttp.ClientPayloadError(f"not a map: {exc}") from exc


def parse_map(raw: Mapping[str, Any]) -> ClusterMap:
    """What /v1/map answered. Raises ValueError for anything else."""
    try:
        return _parse_map(raw)
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc}") from exc


def _parse_map(raw: Mapping[str, Any]) -> ClusterMap:
    leaders = {int(item["shard"]): item for item in raw["leaders"]}
    return ClusterMap(
        revision=int(raw["revision"]),
        shards=int(raw["shards"]),
        leaders={shard: str(item["worker"]) for shard, item in leaders.items()},
        epochs={shard: int(item["epoch"]) for shard, item in leaders.items()},
        workers={
            str(item["name"]): Member(
                name=str(item["name"]),
                address=str(item.get("address", "")),
                state=str(item.get("state", "up")),
                pid=int(item.get("pid", 0)),
                admin=str(item.get("admin", "")),
            )
            for item in raw["workers"]
        },
    )


async def is_admin_ready(session: aiohttp.ClientSession, admin: str) -> tuple[bool, str]:
    """Whether /readyz says yes, and what it says."""
    try:
        async with session.get(f"http://{admin}/readyz", timeout=aiohttp.ClientTimeout(total=2)) as answer:
            return answer.status == 200, (await answer.text()).strip()
    except (aiohttp.ClientError, TimeoutError) as exc:
        return False, str(exc) or type(exc).__name__


async def stream_events(session: aiohttp.ClientSession, admin: str) -> AsyncIterator[dict[str, Any]]:
    """/v1/events of a role's admin server, until it ends. Raises aiohttp.ClientError, for what is no event, too."""
    unbounded = aiohttp.ClientTimeout(total=None, sock_connect=5)  # it is quiet while nothing changes
    async with session.get(f"http://{admin}/v1/events", timeout=unbounded) as answer:
        answer.raise_for_status()
        rest = b""
        async for piece in answer.content.iter_any():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > _EVENT_BYTES_MAX:
                raise aiohttp.ClientPayloadError(f"an event of more than {_EVENT_BYTES_MAX} bytes")
            for line in lines:
                if line.strip():
                    yield parse_event(line)


def parse_event(line: bytes) -> dict[str, Any]:
    """One line of /v1/events. Raises aiohttp.ClientError if it is none."""
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError as exc:
        raise aiohttp.ClientPayloadError(f"not an event: {exc}") from exc
    if not isinstance(event, dict):
        raise aiohttp.ClientPayloadError("not an event: no object")
    return event
