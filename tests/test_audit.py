"""`verify`, as a function and as a command: files, folders, torn and damaged logs, exit codes, the lines it names."""

import json
import os
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner

from shardlead import audit, cli, verify
from shardlead.core.audit import LINE_BYTES_MAX, encode
from shardlead.errors import AuditError
from tests.core.test_audit import Teller, overlap_by_a_nanosecond

GOOD: Final = "2 leaderships, 3 requests, 0 violations"


def write(path: Path, teller: Teller) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(encode, teller.lines)))
    return path


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder with the logs of two workers, one after the other."""
    one, two = Teller("one"), Teller("two")
    one.deadline(1, 1_000)
    one.lead(10, 5), one.serve(11, 5), one.accept(12, 5), one.accept(90, 5), one.stop(100, 5)
    two.deadline(2, 1_000)
    two.lead(100, 7), two.serve(101, 7), two.accept(102, 7)
    write(tmp_path / "logs" / "one.audit.jsonl", one)
    write(tmp_path / "logs" / "host2" / "two.audit.jsonl", two)
    return tmp_path / "logs"


def run(*words: str | Path) -> tuple[int, str, str]:
    """`shardlead verify WORDS…`"""
    ran = CliRunner().invoke(cli.shardlead, ["verify", *map(str, words)], standalone_mode=False)
    assert ran.exception is None, ran.exception
    return ran.return_value or 0, ran.stdout, ran.stderr


def test_good_logs(logs: Path) -> None:
    """Folders at any depth, and files, each once however often it is named; exit code 0."""
    report = verify(logs, logs / "one.audit.jsonl")
    assert (report.is_good, str(report)) == (True, GOOD)
    assert (report.files, report.lines, report.torn) == (2, 12, 0)
    assert run(logs) == (0, GOOD + "\n", "")
    assert run(logs / "one.audit.jsonl") == (0, "1 leadership, 2 requests, 0 violations\n", "")


def test_a_collision_names_both_lines(tmp_path: Path) -> None:
    """File, line and text of both, on stdout; exit code 1. --json says the same to programs."""
    _, (one, two), (stop, lead) = overlap_by_a_nanosecond()
    first = write(tmp_path / "one.audit.jsonl", one)
    second = write(tmp_path / "two.audit.jsonl", two)
    code, out, err = run(tmp_path)
    assert (code, err) == (1, "")
    counts, reason, *lines = out.splitlines()
    assert counts == "2 leaderships, 1 request, 1 violation"
    assert reason.startswith("overlap: shard 900: the guard of epoch 5 says yes until 101 ns, that of epoch 7 from 100")
    stop_text, lead_text = encode(stop).decode().strip(), encode(lead).decode().strip()
    assert lines == [f"  {first}:6: {stop_text}", f"  {second}:3: {lead_text}"]

    code, out, _ = run(tmp_path, "--json")
    page = json.loads(out)
    assert code == 1
    assert (page["leaderships"], page["requests"], page["violation_count"]) == (2, 1, 1)
    assert page["violations"][0]["kind"] == "overlap"
    assert page["violations"][0]["lines"] == [
        {"file": str(first), "line": 6, "text": stop_text},
        {"file": str(second), "line": 3, "text": lead_text},
    ]


def test_a_forged_line_is_found(logs: Path) -> None:
    """A request that the old leader accepts after its stop."""
    forged = Teller("one").accept(101, 5)
    with (logs / "one.audit.jsonl").open("ab") as file:
        file.write(encode(forged))
    code, out, _ = run(logs)
    assert code == 1
    assert "after-stop: shard 900: accepts a request under epoch 5 after its stop" in out
    assert f"one.audit.jsonl:8: {encode(forged).decode().strip()}" in out


@pytest.mark.parametrize("end", [b'{"event":"acc', b"\0\0\0\0", b"{", b'{"event":"accept"}'])
def test_a_torn_last_line_is_counted_and_passed_over(logs: Path, end: bytes) -> None:
    """A process or machine was lost while it wrote: what stands before is judged."""
    with (logs / "one.audit.jsonl").open("ab") as file:
        file.write(end)
    report = verify(logs)
    assert (report.is_good, report.torn, report.leaderships) == (True, 1, 2)
    code, out, err = run(logs)
    assert (code, out, err) == (0, GOOD + "\n", "last lines torn by a crash, passed over: 1\n")


def test_a_last_line_that_only_lacks_its_end_counts(logs: Path) -> None:
    """An editor may have taken it away."""
    path = logs / "host2" / "two.audit.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(verify(logs)) == GOOD


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"{}", b"[]", b"null", b'{"event":"dance"}', b"x" * 10_000])
def test_garbage_elsewhere_is_named_with_file_and_line(logs: Path, garbage: bytes) -> None:
    """Exit code 2, one line, no verdict."""
    path = logs / "one.audit.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], garbage, *lines[3:]]) + b"\n")
    code, out, err = run(logs)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}:4: not a line of an audit log: ")
    assert err.count("\n") == 1


def test_a_file_without_lines_costs_no_memory(tmp_path: Path) -> None:
    """Anything big that is no log is refused early."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * audit.PIECE_BYTES)
    code, _, err = run(path)
    assert (code, err) == (2, f"error: {path}:1: a line of more than {LINE_BYTES_MAX} bytes: no audit log\n")


def test_lines_are_found_however_the_pieces_fall(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log is read piece by piece; where they are cut changes nothing."""
    for size in (1, 7, 100, 1_000):
        monkeypatch.setattr(audit, "PIECE_BYTES", size)
        assert str(verify(logs)) == GOOD


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Nothing there, an empty folder, a name that can be none: exit code 2 and what is wrong."""
    assert run(tmp_path / "none")[::2] == (
        2,
        f"error: {tmp_path / 'none'}: cannot be read: No such file or directory\n",
    )
    assert run(tmp_path)[::2] == (2, f"error: {tmp_path}: there is no audit log in this folder (*.audit.jsonl)\n")
    with pytest.raises(AuditError, match="cannot be read"):
        verify("a\0b")


def test_an_empty_log_is_one(tmp_path: Path) -> None:
    """A process that was killed before it wrote its first line."""
    (tmp_path / "w1.audit.jsonl").touch()
    assert str(verify(tmp_path)) == "0 leaderships, 0 requests, 0 violations"


def test_a_copy_of_a_log_is_not_a_second_process(logs: Path) -> None:
    """A link to a file is that file; a copy is told, for a session has one process."""
    os.link(logs / "one.audit.jsonl", logs / "link.audit.jsonl")
    assert verify(logs).is_good
    (logs / "copy.audit.jsonl").write_bytes((logs / "one.audit.jsonl").read_bytes())
    assert {each.kind for each in verify(logs).violations} >= {"shared-session"}
