"""What `shardlead.testing` gives to users: the fixture. (On uvloop here; all other tests of clusters use asyncio's.)"""

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = 'pytest_plugins = ["shardlead.testing"]\n'
TEST = """
import asyncio
import uvloop

async def story(shardlead_cluster):
    cluster = shardlead_cluster("shardlead.demo:Counter", workers=2, shards=8,
                                settings={"router.key_rules": "path:/counters/{key}"})
    async with cluster:
        async with cluster.session.post(f"{cluster.url}/counters/a") as answer:
            first = await answer.json()
        cluster.workers[first["worker"]].kill()
        await cluster.wait_gone(first["worker"], timeout_s=5)
        await cluster.wait_led(timeout_s=5)
        async with cluster.session.get(f"{cluster.url}/counters/a") as answer:
            second = await answer.json()
    assert (second["value"], first["worker"] != second["worker"]) == (1, True)
    assert (cluster.folder / "logs" / "w1.log").read_text()
    assert cluster.events.since(0, "worker")

def test_a_users_cluster(shardlead_cluster):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story(shardlead_cluster))
"""


def test_the_fixture_gives_clusters_to_users(tmp_path: Path) -> None:
    """With one line in a conftest a user's test starts a cluster, hurts it and looks at its logs and events."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_mine.py").write_text(TEST)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
