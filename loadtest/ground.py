"""Where a run's cluster comes from: started here for the run, or running already.

Law: what was started here is gone when the block is left. A running cluster is only looked at.
"""

import asyncio
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from loadtest.errors import CannotBegin
from loadtest.gate import Gate
from loadtest.keys import Ring
from loadtest.options import Options
from loadtest.scenarios import Scenario
from loadtest.store import Gateway, version_of
from loadtest.verify import SETTING
from shardlead import ConfigError, ShardleadError
from shardlead.testing import LocalCluster

READY_TIMEOUT_S: Final = 60.0
EVEN_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0
ROOT: Final = Path(__file__).parents[1]


@dataclass
class Ground:
    """A cluster to put load on, all its shards led."""

    routers: tuple[str, ...]
    store_url: str
    cluster: str
    ring: Ring
    table: bytes
    leaders: Mapping[int, str]
    revision: int
    log: Sequence[Mapping[str, Any]]
    """Grows: every event since about then; those up to `revision` are part of `leaders`."""
    store_version: str
    own: LocalCluster | None = None
    gates: dict[str, list[Gate]] = field(default_factory=dict)
    audit: Path | None = None
    """Where the workers write their audit logs; None: nowhere that is known."""

    def events(self) -> list[Mapping[str, Any]]:
        """What has changed since `leaders`."""
        return [event for event in self.log if event["revision"] > self.revision]


@contextlib.asynccontextmanager
async def own_ground(options: Options, scenario: Scenario, ttl_s: int) -> AsyncIterator[Ground]:
    """A cluster of real processes on free ports. Raises CannotBegin."""
    store = options.store
    if scenario.etcd_members > 1 and store == "embedded":
        store = "etcd"
    gated = 1 if scenario.needs_gates else 0
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-", ignore_cleanup_errors=True)))
        audit = folder / "audit" if options.audit else None
        cluster = LocalCluster(
            options.application,
            workers=options.workers - gated,
            routers=options.routers,
            controllers=scenario.controllers,
            shards=options.shards,
            ttl_s=ttl_s,
            store=store,
            etcd_members=scenario.etcd_members,
            settings={
                "router.key_rules": f"path:{options.path.partition('?')[0]}",
                **({SETTING: audit} if audit else {}),
                **dict(options.settings),
            },
            environment={"PYTHONPATH": os.pathsep.join(paths)},
            folder=folder,
            ready_timeout_s=READY_TIMEOUT_S,
        )
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(
                said
            ):  # it shows every process's last lines; the error has those that count
                await stack.enter_async_context(cluster)
        except (ShardleadError, ConfigError, OSError) as exc:
            raise CannotBegin(f"the cluster did not start: {exc}") from exc
        gates: dict[str, list[Gate]] = {}
        try:
            if gated:
                targets = [url.partition("://")[2] for url in cluster.store_url.split(",")]
                found = [await stack.enter_async_context(Gate(target)) for target in targets]
                worker = await cluster.add_worker(settings={"store.endpoints": [gate.url for gate in found]})
                gates[worker.name] = found
            await cluster.wait_even(EVEN_TIMEOUT_S)
            seen = await cluster.map()
        except (ShardleadError, aiohttp.ClientError, TimeoutError) as exc:
            raise CannotBegin(f"the cluster did not become ready: {exc}") from exc
        ring, table = await Gateway(cluster.session, cluster.store_url, cluster.name).ring()
        yield Ground(
            routers=tuple(router.address for router in cluster.routers),
            store_url=cluster.store_url,
            cluster=cluster.name,
            ring=ring,
            table=table,
            leaders=seen.leaders,
            revision=seen.revision,
            log=cluster.events.all,
            store_version=await version_of(cluster.session, cluster.store_url),
            own=cluster,
            gates=gates,
            audit=audit,
        )


@contextlib.asynccontextmanager
async def running_ground(options: Options) -> AsyncIterator[Ground]:
    """A cluster that runs already: its router by --url, its records by --store and --cluster. Raises CannotBegin."""
    parts = urlsplit(options.url)
    if parts.scheme != "http" or not parts.hostname:
        raise CannotBegin(f"--url {options.url}: must be http://HOST:PORT of a router")
    address = f"{parts.hostname}:{parts.port or 80}"
    log: list[Mapping[str, Any]] = []
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(options.url, timeout=aiohttp.ClientTimeout(total=5)):
                pass  # whatever it answers, somebody is there
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise CannotBegin(f"no router answers at {options.url}: {str(exc) or type(exc).__name__}") from exc
        gateway = Gateway(session, options.store, options.cluster)
        ring, table = await gateway.ring()
        facts = await gateway.facts()
        if len(facts.leaders) < ring.shards:
            raise CannotBegin(f"only {len(facts.leaders)} of {ring.shards} shards of {options.cluster!r} have a leader")

        async def follow() -> None:
            since = facts.revision
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async for event in gateway.events(since):
                        since = max(since, event["revision"])
                        log.append(event)
                await asyncio.sleep(0.1)

        following = asyncio.create_task(follow())
        try:
            yield Ground(
                routers=(address,),
                store_url=options.store,
                cluster=options.cluster,
                ring=ring,
                table=table,
                leaders=facts.leaders,
                revision=facts.revision,
                log=log,
                store_version=await version_of(session, options.store),
            )
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def stop_gracefully(cluster: LocalCluster) -> None:
    """Routers first, then workers, so that what they write at their end is written. Bounded; never raises."""
    for group in (cluster.routers, [*cluster.workers.values(), *cluster.controllers]):
        running = [process for process in group if process.is_running]
        for process in running:
            process.cont()
            process.terminate()
        outcomes = await asyncio.gather(
            *(process.exited(STOP_TIMEOUT_S) for process in running), return_exceptions=True
        )
        for process, outcome in zip(running, outcomes, strict=True):
            if isinstance(outcome, Exception):
                print(f"loadtest: {process.name} {outcome}", file=sys.stderr)
