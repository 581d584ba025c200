"""A controller without a worker: `shardlead controller`.

It has a session of its own, a lease without a record, and gets a new one whenever it is lost.
"""

import asyncio
import logging
import random
from typing import Final

from shardlead.clock import Clock
from shardlead.cluster.bootstrap import read_shape
from shardlead.cluster.session import Session, open_session
from shardlead.config import Settings
from shardlead.controller.controller import Controller
from shardlead.core.keyspace import Keyspace
from shardlead.errors import ClusterMissing, StoreError
from shardlead.metrics import ControllerMetrics
from shardlead.store.base import Store

log = logging.getLogger("shardlead.controller")

PAUSE_S: Final = 1.0


async def run_alone(
    store: Store, settings: Settings, *, name: str, clock: Clock, rng: random.Random, metrics: ControllerMetrics
) -> None:
    """Be a candidate, and the controller whenever the seat is ours, until cancelled. Waits for a cluster that nobody
    has created yet. Raises KeyspaceError or RingError if its shape is damaged."""
    keyspace = Keyspace(settings.cluster.name)
    is_told = False
    while True:
        try:
            session = await _open(store, keyspace, settings, name, clock, rng)
        except (ClusterMissing, StoreError) as exc:
            if not is_told:
                is_told = True
                log.warning("controller waits", extra={"reason": str(exc)})
            await asyncio.sleep(PAUSE_S * rng.uniform(0.5, 1.0))
            continue
        is_told = False
        controller = Controller(store, keyspace, session, settings.controller, clock=clock, rng=rng, metrics=metrics)
        try:
            async with asyncio.TaskGroup() as group:
                renewing = group.create_task(session.run(), name="controller session")
                await controller.run()
                renewing.cancel()
        finally:
            await asyncio.shield(session.close())


async def _open(
    store: Store, keyspace: Keyspace, settings: Settings, name: str, clock: Clock, rng: random.Random
) -> Session:
    shape = await read_shape(store, keyspace)
    if shape is None:
        raise ClusterMissing(keyspace.cluster)
    return await open_session(
        store,
        keyspace,
        settings.lease,
        clock=clock,
        rng=rng,
        name=name,
        record=None,
        meta_revision=shape.meta_revision,
    )
