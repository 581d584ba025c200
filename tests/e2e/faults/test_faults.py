"""Real faults to real processes: the short form. `python -m tests faults` is the long one (README.md)."""

import asyncio
from pathlib import Path

import aiohttp
import orjson
import pytest

from tests.e2e.faults.fleet import Fleet, Plan, Store
from tests.e2e.faults.judge import History, judge_history
from tests.e2e.faults.run import run
from tests.e2e.faults.workload import Record, Workload
from tests.support.load import settled

pytestmark = pytest.mark.etcd

SEED = 1
PLAIN_S = 45.0
CASE_S = 10.0
PROOF_TTL_S = 3
NAME = "lists/proof"
LATER_WRITES = 5
SERVED_S = 30.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "seconds"), [("plain", PLAIN_S), ("auth", CASE_S), ("tls", CASE_S)])
def test_random_faults_lose_nothing(tmp_path: Path, case: str, seconds: float) -> None:
    """Whatever befalls members, workers and links: histories of all keys are linearizable, nothing acknowledged is
    lost, no two lead, every shard answers again in time, no process ends by itself, no log has an error. With tokens
    that last two seconds, and with client certificates, too."""
    outcome = run(Plan(folder=tmp_path, case=case), SEED, seconds)
    print(outcome)
    assert outcome.wrong == [], f"{outcome}"
    assert outcome.operations["ok"] > 10 * seconds, "the clients were hardly served"


@pytest.mark.timeout(120)
def test_an_unfenced_store_loses_what_a_fenced_one_keeps(tmp_path: Path) -> None:
    """A worker that is stopped between reading and writing, for longer than its lease: with a fence its late write
    counts for nothing; without one it undoes what others have acknowledged meanwhile, and the checker says so. This is
    what shows that the faults bite."""
    how, fenced = stop_in_write(tmp_path / "fenced", "Fenced")
    assert (how, fenced.wrong, fenced.lost) == ("Fenced", [], [])
    how, unfenced = stop_in_write(tmp_path / "unfenced", "Unfenced")
    assert how == "written"
    assert len(unfenced.lost) >= LATER_WRITES
    assert "not linearizable" in unfenced.wrong[0]


def stop_in_write(folder: Path, app: str) -> tuple[str, History]:
    """One worker, stopped in a write until others have written; how that write ended, and what its key's history is."""
    folder.mkdir()
    plan = Plan(folder=folder, app=f"tests.e2e.faults.apps:{app}", workers=2, routers=1, shards=4, ttl_s=PROOF_TTL_S)
    return asyncio.run(_stop_in_write(plan))


async def _stop_in_write(plan: Plan) -> tuple[str, History]:
    patience = aiohttp.ClientTimeout(total=SERVED_S)
    async with (
        Store(plan) as store,
        Fleet(plan, store) as fleet,
        aiohttp.ClientSession(timeout=patience) as session,
    ):
        workload = Workload([fleet.address("r1")], SEED, clients=0, pause_s=1.0)

        async def append() -> Record:
            return await workload.send(session, "client", NAME, "append")

        first = await append()
        assert first.outcome == "ok", first
        hold = plan.folder / f"hold-write-{first.worker}"
        hold.touch()
        stopped = fleet.workers[first.worker]
        late = asyncio.create_task(append())
        await settled((plan.folder / f"writing-{first.worker}").exists, timeout_s=10)
        stopped.stop()
        try:
            assert (await late).outcome == "info"  # its leader is gone: nobody knows
            done = 0
            async with asyncio.timeout(SERVED_S):
                while done < LATER_WRITES:
                    later = await append()
                    done += later.outcome == "ok"
                    assert later.worker != first.worker
        finally:
            hold.unlink()
            stopped.cont()
        written = plan.folder / f"written-{first.worker}"
        await settled(lambda: written.exists() and written.stat().st_size > 0, timeout_s=10)
        return written.read_text(encoding="utf-8"), judge_history(workload.records, fleet.stored())


def test_a_history_is_kept_and_read_again(tmp_path: Path) -> None:
    """What a failing run leaves is enough to judge it again."""
    record = Record(1, "c1", "lists/a", "append", "w1", 5, 9, "ok", 200, ["w1"], "w2", 3, 77)
    file = tmp_path / "history.jsonl"
    file.write_bytes(orjson.dumps(record) + b"\n")
    from tests.e2e.faults.workload import read_history

    assert read_history(file) == [record]
    assert judge_history([record], {"lists/a": ["w1"]}).wrong == []
    assert judge_history([record], {"lists/a": []}).lost == ["lists/a w1"]
