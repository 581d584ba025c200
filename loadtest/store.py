"""What a load test reads of the store by itself: the ring, and leadership where no router of its own tells it.

A few calls of etcd's JSON gateway, written anew so that nothing which is measured vouches for itself. For a running
cluster's etcd: plain http or https, without a client certificate; a user and password in the URL are not supported.
"""

import base64
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson

from loadtest.errors import CannotBegin
from loadtest.keys import Ring

_PAGE: Final = 5_000
_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)
_UNBOUNDED: Final = aiohttp.ClientTimeout(total=None, sock_connect=5)  # a watch is quiet while nothing changes


@dataclass(frozen=True)
class Facts:
    """Who leads what and who lives, at one revision."""

    revision: int
    leaders: Mapping[int, str]
    workers: Mapping[str, str]
    """Each worker's state."""


class Gateway:
    """One cluster's records in one etcd."""

    def __init__(self, session: aiohttp.ClientSession, url: str, cluster: str) -> None:
        self._session, self._url, self._prefix = session, url.split(",")[0].rstrip("/"), f"/{cluster}/"
        self._cluster = cluster

    async def ring(self) -> tuple[Ring, bytes]:
        """The cluster's ring, and its table as stored. Raises CannotBegin if there is none."""
        found = await self._range("meta", "ring~")
        try:
            meta, raw = orjson.loads(found["meta"]), found["ring"]
            return Ring.decode(raw, shards=meta["shards"], hash_tags=meta.get("hash_tags", False)), raw
        except KeyError:
            raise CannotBegin(f"the store at {self._url} has no cluster {self._cluster!r}: see --cluster") from None
        except (ValueError, TypeError) as exc:
            raise CannotBegin(f"the ring of cluster {self._cluster!r} cannot be read: {exc}") from exc

    async def facts(self) -> Facts:
        """Leaders and workers as they are now."""
        revision, leaders = 0, {}
        begin = "leaders/"
        while True:
            answer = await self._post(
                "kv/range", self._bounds(begin, "leaders0") | {"limit": _PAGE, "revision": revision}
            )
            revision = revision or int(answer["header"]["revision"])
            kvs = answer.get("kvs") or []
            for kv in kvs:
                leaders[self._shard(kv["key"])] = _worker(kv["value"])
            if not answer.get("more"):
                break
            begin = base64.b64decode(kvs[-1]["key"]).decode().removeprefix(self._prefix) + "\0"
        workers = await self._range("workers/", "workers0")
        states = {
            name.removeprefix("workers/"): str(orjson.loads(value).get("state", "up"))
            for name, value in workers.items()
        }
        return Facts(revision, leaders, states)

    async def events(self, revision: int) -> AsyncIterator[dict[str, Any]]:
        """Changes after `revision` in the shape of /v1/events, `t` by this machine's clock, until the watch ends."""
        request = {"create_request": self._bounds("leaders/", "workers0") | {"start_revision": revision + 1}}
        body = orjson.dumps(request)
        async with self._session.post(f"{self._url}/v3/watch", data=body, timeout=_UNBOUNDED) as answer:
            answer.raise_for_status()
            rest = b""
            async for piece in answer.content.iter_any():
                *lines, rest = (rest + piece).split(b"\n")
                now_s = time.time()
                for line in lines:
                    for event in orjson.loads(line).get("result", {}).get("events") or ():
                        if (told := self._told(event, now_s)) is not None:
                            yield told

    def _told(self, event: Mapping[str, Any], now_s: float) -> dict[str, Any] | None:
        kv = event["kv"]
        name = base64.b64decode(kv["key"]).decode().removeprefix(self._prefix)
        is_gone, revision = event.get("type") == "DELETE", int(kv["mod_revision"])
        if name.startswith("leaders/"):
            worker = None if is_gone else _worker(kv["value"])
            fields = {"event": "leader", "shard": self._shard(kv["key"]), "worker": worker, "epoch": revision}
        elif name.startswith("workers/"):
            state = "gone" if is_gone else str(orjson.loads(base64.b64decode(kv["value"])).get("state", "up"))
            fields = {"event": "worker", "worker": name.removeprefix("workers/"), "state": state}
        else:
            return None
        return {"t": now_s, "revision": revision, **fields}

    def _shard(self, key: str) -> int:
        return int(base64.b64decode(key).decode().rpartition("/")[2])

    def _bounds(self, begin: str, end: str) -> dict[str, Any]:
        return {
            "key": base64.b64encode((self._prefix + begin).encode()).decode(),
            "range_end": base64.b64encode((self._prefix + end).encode()).decode(),
        }

    async def _range(self, begin: str, end: str) -> dict[str, bytes]:
        answer = await self._post("kv/range", self._bounds(begin, end))
        return {
            base64.b64decode(kv["key"]).decode().removeprefix(self._prefix): base64.b64decode(kv.get("value", ""))
            for kv in answer.get("kvs") or ()
        }

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with self._session.post(
                f"{self._url}/v3/{path}", data=orjson.dumps(body), timeout=_TIMEOUT
            ) as answer:
                raw = await answer.read()
                if answer.status != 200:
                    raise CannotBegin(
                        f"the store at {self._url} answers {answer.status}: {raw[:200].decode(errors='replace')}"
                    )
                found = orjson.loads(raw)
        except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError) as exc:
            raise CannotBegin(f"no etcd answers at {self._url}: {str(exc) or type(exc).__name__}") from exc
        assert isinstance(found, dict)
        return found


async def version_of(session: aiohttp.ClientSession, url: str) -> str:
    """The store's version as it says it; "" if it says none."""
    try:
        async with session.get(
            f"{url.split(',')[0].rstrip('/')}/version", timeout=aiohttp.ClientTimeout(total=2)
        ) as answer:
            found = orjson.loads(await answer.read())
            return str(found.get("etcdserver", ""))
    except (TimeoutError, aiohttp.ClientError, orjson.JSONDecodeError, AttributeError):
        return ""


def _worker(value: str) -> str:
    return str(orjson.loads(base64.b64decode(value))["worker"])
