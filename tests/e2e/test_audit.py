"""The audit logs of real processes under load and faults: nothing in them contradicts "never two leaders", and where
there were two, they say so."""

import asyncio
import json
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardlead import verify
from shardlead.core.audit import SUFFIX
from shardlead.processes import shardlead_command
from shardlead.testing import LocalCluster
from tests.e2e.conftest import COUNTER, EVEN_S, Scene, stage
from tests.e2e.test_dev_command import dev, other_terminal, post
from tests.support.load import Ledger, Load, Mix

NAMES = ("w1", "w2", "w3")
SENT_AGAIN_MAX = 100  # reads that were in work when a fault came, answered here and there
RULES = {"router.key_rules": "path:/counters/{key}"}


def lines(folder: Path, event: str) -> list[dict[str, Any]]:
    """The lines of that event in all logs; a last one may be torn."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        found += [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [line for line in found if line["event"] == event]


def command(*words: str | Path) -> tuple[int, str, str]:
    """`shardlead WORDS…`, as a user types it."""
    done = subprocess.run(shardlead_command(*map(str, words)), capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=["embedded", pytest.param("etcd", marks=[pytest.mark.etcd, pytest.mark.long])])
def audited(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Scene, Path]]:
    folder = tmp_path / "audit"
    settings = {**RULES, "worker.audit_dir": str(folder), "router.hold_timeout_s": 20}
    with stage(COUNTER, request.param, {"workers": len(NAMES), "shards": 24, "settings": settings}) as scene:
        yield scene, folder


@pytest.mark.timeout(180)
def test_faults_under_load_leave_logs_without_a_violation(audited: tuple[Scene, Path]) -> None:
    """kill -9, SIGSTOP for longer than the lease, a lost machine, a drain and a graceful restart, under load: every
    leadership that answered stands in the logs, every answer is a request in them, and no two lines collide. One
    forged line is found."""
    scene, folder = audited
    cluster = scene.cluster

    async def story() -> Ledger:
        await scene.prepare(*NAMES)
        mix = Mix(rate=100, prefix="audit", big_share=0.0, idempotent_share=0.5, timeout_s=60)
        async with Load(cluster.routers[0].address, mix) as load:
            await load.answered(50, timeout_s=20)
            cluster.workers["w1"].kill()
            await cluster.workers["w1"].exited(20)
            await cluster.wait_led(EVEN_S)
            await cluster.add_worker("w1")
            cluster.workers["w2"].stop()
            await cluster.wait_map(lambda seen: seen.is_led and "w2" not in seen.workers, "led without w2", EVEN_S)
            await load.answered(50, timeout_s=20)
            cluster.workers["w2"].cont()
            await cluster.wait_even(EVEN_S)
            code, out, err = await cluster.command("drain", "w3")
            assert code == 0, out + err
            await cluster.command("drain", "w3", "--undo")
            cluster.workers["w3"].kill_host()
            await cluster.workers["w3"].exited(20)
            await cluster.wait_led(EVEN_S)
            await cluster.restart("w1")
            await cluster.add_worker("w3")
            await cluster.wait_even(EVEN_S)
            await load.answered(50, timeout_s=20)
        return load.ledger

    ledger = scene.run(story())
    while_they_run = verify(folder)
    assert while_they_run.is_good, str(while_they_run)
    scene.run(stopped(cluster))
    report = verify(folder)
    print(f"{report}; {report.refused} refused, {report.files} logs, {report.lines} lines; {ledger.summary()}")
    assert report.is_good, str(report)

    led = {(line["shard"], line["epoch"]): line["worker"] for line in lines(folder, "lead")}
    assert report.leaderships == len(led)
    answered = [entry for entry in ledger.entries if entry.is_ok]
    for entry in answered:
        assert led.get((entry.shard, entry.epoch)) == entry.worker, f"{entry} under no leadership in the logs"
    assert report.requests == len(lines(folder, "accept"))
    assert len(answered) <= report.requests <= len(ledger.entries) + SENT_AGAIN_MAX

    code, out, err = command("verify", folder)
    assert (code, out, err) == (0, f"{report}\n", "")
    code, out, _ = command("verify", folder, "--json")
    assert (code, json.loads(out)["violations"]) == (0, [])

    log, stop = next(
        (path, json.loads(line))
        for path in sorted(folder.glob(f"*{SUFFIX}"))
        for line in path.read_text().splitlines()
        if '"event":"stop"' in line
    )
    at_ns = json.loads(log.read_text().splitlines()[-1])["at_ns"]
    forged = json.dumps({**stop, "event": "accept", "at_ns": at_ns, "admitted_ns": stop["at_ns"]})
    with log.open("a") as file:
        file.write(forged + "\n")
    code, out, _ = command("verify", folder)
    assert code == 1
    assert f"{log}:{len(log.read_text().splitlines())}: {forged}" in out


async def stopped(cluster: LocalCluster) -> None:
    """Every worker leaves gracefully, one after the other."""
    for worker in cluster.workers.values():
        worker.terminate()
        assert await worker.exited(40) == 0


def test_calm_is_counted_exactly(tmp_path: Path) -> None:
    """One worker, eight shards, forty requests, a graceful stop: these numbers, and each leadership with its end."""
    options = {"workers": 1, "shards": 8, "settings": {**RULES, "worker.audit_dir": str(tmp_path / "audit")}}
    with stage(COUNTER, "embedded", options) as scene:

        async def story() -> None:
            for number in range(40):
                async with scene.cluster.session.post(f"{scene.cluster.url}/counters/k{number}") as answer:
                    assert answer.status == 200
            await stopped(scene.cluster)

        scene.run(story())
    assert str(verify(tmp_path / "audit")) == "8 leaderships, 40 requests, 0 violations"
    assert len(lines(tmp_path / "audit", "stop")) == 8


def test_two_leaders_are_found(tmp_path: Path) -> None:
    """A living worker's lease is revoked by hand while it is frozen, and it wakes before its deadline: it believed in
    its shards when others led them. That is what fences are for, and the logs say so."""
    settings = {**RULES, "worker.audit_dir": str(tmp_path / "audit"), "router.hold_timeout_s": 40.0}
    options = {"workers": 2, "ttl_s": 30, "shards": 8, "settings": settings}  # it wakes long before its deadline
    with stage(COUNTER, "embedded", options) as scene:
        cluster = scene.cluster

        async def story() -> None:
            _, out, _ = await cluster.command("workers", "--json")
            sid = next(row["sid"] for row in json.loads(out) if row["name"] == "w1")
            cluster.workers["w1"].stop()
            revoke = {"ID": str(int(sid.partition("-")[0], 16))}
            async with cluster.session.post(f"{cluster.store_url}/v3/lease/revoke", json=revoke) as answer:
                assert answer.status == 200
            await cluster.wait_map(
                lambda seen: seen.is_led and set(seen.leaders.values()) == {"w2"}, "led by w2 alone", EVEN_S
            )
            cluster.workers["w1"].cont()
            await cluster.wait_map(lambda seen: "w1" in seen.workers, "joined by w1 again", EVEN_S)

        scene.run(story())
    report = verify(tmp_path / "audit")
    assert {violation.kind for violation in report.violations} == {"overlap"}, str(report)
    for violation in report.violations:
        before, after = (json.loads(line.text) for line in violation.lines)
        assert (before["worker"], after["worker"], after["event"]) == ("w1", "w2", "lead")
        assert before["at_ns"] > after["at_ns"]


def test_dev_writes_them(tmp_path: Path) -> None:
    """`shardlead dev --audit DIR`: the command that it prints checks them; a second cluster's logs are not mixed in."""

    async def story() -> None:
        words = ["--audit", str(tmp_path / "audit"), "--shards", "8"]
        async with dev(tmp_path, *words) as terminal:
            assert (await post(f"{terminal.url}/counters/alice"))[0] == 200
            code, out, _ = await other_terminal(terminal, tmp_path, "workers", "--json")
            os.kill(json.loads(out)[0]["pid"], signal.SIGKILL)
            await terminal.shows("(w1 died)")
            assert (await post(f"{terminal.url}/counters/alice"))[0] == 200
            assert f"verify {tmp_path / 'audit'}" in terminal.text
            terminal.process.send_signal(signal.SIGINT)
            assert await terminal.ended() == 0
        code, out, err = await other_terminal(terminal, tmp_path, "verify", "audit")
        assert (code, err) == (0, "")
        assert out.endswith(" leaderships, 2 requests, 0 violations\n")
        code, out, err = await other_terminal(terminal, tmp_path, "dev", "--port", "0", *words)
        assert (code, out) == (1, "")
        assert "has logs of an earlier cluster" in err

    asyncio.run(story())


@pytest.mark.parametrize("role", [["worker", COUNTER], ["dev", "--port", "0"]])
def test_a_folder_that_cannot_be_written_ends_the_command(tmp_path: Path, role: list[str]) -> None:
    """Exit code 2 and one line that names the flag, the folder and why; the store is not asked."""
    (tmp_path / "file").touch()
    code, out, err = command(*role, "--audit", tmp_path / "file" / "audit")
    assert (code, out) == (2, "")
    assert f"--audit: worker.audit_dir = '{tmp_path / 'file' / 'audit'}': must be a folder that can be written" in err
    assert "Traceback" not in err


def test_a_full_disk_ends_the_command(tmp_path: Path) -> None:
    """The first line is tried before anything is started."""
    done = subprocess.run(
        shardlead_command("worker", COUNTER, "--audit", str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "must be a folder that can be written (File too large)" in done.stderr
    assert list(tmp_path.iterdir()) == []
