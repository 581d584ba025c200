"""Rows about what only storage can hold: two who believe in all honesty that they lead."""

import asyncio
from pathlib import Path
from typing import Final

import orjson
import pytest

from shardlead.errors import Fenced
from shardlead.fencing import SqliteFence
from shardlead.store import gateway
from shardlead.store.transport import Answer
from shardlead.worker.leadership import Leadership
from tests.support.between import Sent
from tests.worker.scene import SHORT, Scene, Script, play

SCHEMA: Final = ("CREATE TABLE IF NOT EXISTS deposits (amount INTEGER)",)


def test_04_acknowledgements_of_a_deposed_store_leader_harm_no_data_and_are_found_out(tmp_path: Path) -> None:
    """etcd before 3.4.31 and 3.5.13 (#15247, #12528): a leader whose disk had stalled goes on acknowledging renewals
    after it was deposed, and the living leases that it had meanwhile are revoked. Two workers then believe that they
    lead. Here the fence refuses the old one's write in that very moment, and its audit ends its belief within a TTL,
    though every renewal goes well and no watch says anything."""

    async def act(scene: Scene) -> None:
        async with SqliteFence(tmp_path / "deposits.sqlite3", schema=SCHEMA, synchronous="NORMAL") as fence:

            async def give(lead: Leadership, amount: int) -> None:
                await fence.write(lead, lambda tx: tx.execute("INSERT INTO deposits VALUES (?)", (amount,)).rowcount)

            script, may_audit = Script(open=fence.barrier), asyncio.Event()

            async def held_up(sent: Sent) -> Answer:
                """Until we have seen what both of them can do."""
                await may_audit.wait()
                return await one.transport.forward(sent)

            one = await scene.start("w1", script, lease=SHORT, by={gateway.LEASE_KEYS: held_up})
            await scene.start("w2", script, lease=SHORT)
            await scene.assign({0: ("w1", "w2")})
            await scene.until_serving("w1", 0)
            old = scene.lead(0)
            await give(old, 100)

            async def acknowledged(sent: Sent) -> Answer:
                """By the deposed one."""
                raw = {"header": {"revision": "1"}, "ID": orjson.loads(sent.body)["ID"], "TTL": str(SHORT.ttl_s)}
                return Answer(200, orjson.dumps({"result": raw}))

            await one.transport.meddle(gateway.RENEW, acknowledged)
            one.transport.mute(scene.keys.meta, scene.keys.inbox("w1"))
            await scene.stage.store.revoke(one.lease)
            await scene.until_serving("w2", 0)
            new = scene.lead(0)
            assert old.is_valid(0.0), "the trap has not sprung"
            assert new.is_valid(0.0)
            assert len(scene.faults) == 1  # two believed to lead, which no lease can prevent here
            scene.faults.clear()
            with pytest.raises(Fenced):
                await give(old, 7)
            await give(new, 5)
            may_audit.set()
            await scene.until(lambda: not old.is_valid(0.0), within_s=SHORT.ttl_s * 1.1 + 1.0)
            total = await fence.read(lambda tx: tx.execute("SELECT sum(amount) FROM deposits").fetchone()[0])
            assert total == 105

    play("embedded", act)
