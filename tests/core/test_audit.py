"""The audit log's law: good histories pass, and each way to break it is found and named by the right two lines."""

import random
from collections.abc import Sequence
from typing import Any, Final

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.core.audit import Accept, AnyLine, Begin, Deadline, Lead, Reject, Serve, Stop, decode, encode
from shardlead.core.testimony import VIOLATIONS_MAX
from shardlead.core.verdict import Findings, Verdict
from shardlead.errors import AuditError
from tests.core.histories import STEPS, Fleet
from tests.support.fuzz import bent_json, examples, json_values, written

BOOT: Final = "boot-a"


def judged(files: Sequence[Sequence[AnyLine]]) -> Findings:
    """The verdict on these logs."""
    verdict = Verdict()
    for number, lines in enumerate(files):
        log = verdict.begin(f"log{number}")
        offset = 0
        for at, line in enumerate(lines, 1):
            raw = encode(line)
            log.take(at, offset, raw[:-1])
            offset += len(raw)
        verdict.add(log.end())
    return verdict.finish()


def cited(findings: Findings, files: Sequence[Sequence[AnyLine]]) -> list[tuple[str, tuple[AnyLine, ...]]]:
    """Each violation's kind and lines."""
    return [
        (each.kind, tuple(files[place.file][place.line - 1] for place in each.places)) for each in findings.collisions
    ]


# --- good histories --------------------------------------------------------------------------------------------------


@examples(300)
@given(STEPS)
def test_a_fleet_that_kept_the_law_is_found_good(steps: list[tuple[int, int, int]]) -> None:
    """Claims, handoffs, re-mints, kills with the lease revoked at once, lost machines, freezes, suspensions, lost
    sessions and stops, on two machines: every leadership and every request is counted, and nothing is found."""
    fleet = Fleet().play(steps)
    findings = judged(fleet.files)
    assert cited(findings, fleet.files) == []
    assert (findings.leaderships, findings.requests) == (fleet.leaderships, fleet.requests)


@examples(100)
@given(STEPS, st.randoms())
def test_the_order_of_the_files_is_nothing(steps: list[tuple[int, int, int]], rng: random.Random) -> None:
    """The same logs in another order get the same verdict."""
    fleet = Fleet().play(steps)
    files = list(fleet.files)
    rng.shuffle(files)
    assert judged(files) == judged(fleet.files)


@examples(100)
@given(STEPS, st.data())
def test_a_log_that_ends_early_is_no_false_alarm(steps: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Each log cut after any of its lines (a kill, a full disk, a copy made while it was written) is true as far as it
    goes."""
    fleet = Fleet().play(steps)
    files = [lines[: data.draw(st.integers(0, len(lines)))] for lines in fleet.files]
    assert cited(judged(files), files) == []


# --- planted violations ----------------------------------------------------------------------------------------------


class Teller:
    """Writes one process's lines by hand."""

    def __init__(self, name: str, boot: str = BOOT, sid: str = "") -> None:
        self.name, self.boot, self.sid = name, boot, sid or f"sid of {name}"
        self.lines: list[AnyLine] = [Begin(boot_id=boot, at_ns=0, worker=name, format=1, pid=1)]

    def _say(self, line: AnyLine) -> AnyLine:
        self.lines.append(line)
        return line

    def _facts(self, at_ns: int, shard: int, epoch: int) -> dict[str, Any]:
        facts = {"boot_id": self.boot, "at_ns": at_ns, "worker": self.name, "sid": self.sid}
        return {**facts, "shard": shard, "epoch": epoch}

    def deadline(self, at_ns: int, deadline_ns: int) -> AnyLine:
        line = Deadline(boot_id=self.boot, at_ns=at_ns, worker=self.name, sid=self.sid, deadline_ns=deadline_ns)
        return self._say(line)

    def lead(self, at_ns: int, epoch: int, shard: int = 900) -> AnyLine:
        return self._say(Lead(**self._facts(at_ns, shard, epoch)))

    def serve(self, at_ns: int, epoch: int, shard: int = 900) -> AnyLine:
        return self._say(Serve(**self._facts(at_ns, shard, epoch)))

    def accept(self, at_ns: int, epoch: int, shard: int = 900, admitted_ns: int = -1) -> AnyLine:
        admitted_ns = at_ns if admitted_ns < 0 else admitted_ns
        return self._say(Accept(**self._facts(at_ns, shard, epoch), admitted_ns=admitted_ns))

    def stop(self, at_ns: int, epoch: int, shard: int = 900) -> AnyLine:
        return self._say(Stop(**self._facts(at_ns, shard, epoch)))


Planted = tuple[str, list[Teller], tuple[AnyLine, ...]]


def overlap_by_a_nanosecond() -> Planted:
    """One stops a nanosecond after another leads."""
    one, two = Teller("one"), Teller("two")
    one.deadline(1, 1_000)
    one.lead(10, 5), one.serve(11, 5), one.accept(12, 5)
    stop = one.stop(101, 5)
    two.deadline(2, 1_000)
    lead = two.lead(100, 7)
    return "overlap", [one, two], (stop, lead)


def overlap_without_a_stop() -> Planted:
    """One that has no stop goes on: its renewal shows that it was there when another led."""
    one, two = Teller("one"), Teller("two")
    one.deadline(1, 500)
    one.lead(10, 5)
    renewal = one.deadline(200, 700)
    two.deadline(2, 1_000)
    lead = two.lead(100, 7)
    return "overlap", [one, two], (renewal, lead)


def overlap_that_was_acted_on() -> Planted:
    """A request that was accepted meanwhile says more than the stop that follows."""
    one, two = Teller("one"), Teller("two")
    one.deadline(1, 1_000)
    one.lead(10, 5), one.serve(11, 5)
    accept = one.accept(150, 5)
    one.stop(200, 5)
    two.deadline(2, 1_000)
    lead = two.lead(100, 7)
    return "overlap", [one, two], (accept, lead)


def overlap_after_a_suspension() -> Planted:
    """A session that was suspended, and comes back under the same epoch when another has led meanwhile."""
    one, two = Teller("one"), Teller("two")
    one.deadline(1, 100)
    one.lead(10, 5)
    one.deadline(110, 0)
    one.deadline(200, 400)
    stop = one.stop(300, 5)
    two.deadline(2, 1_000)
    lead = two.lead(150, 7)
    two.stop(250, 7)
    return "overlap", [one, two], (stop, lead)


def epochs_against_the_clock() -> Planted:
    """On one machine the later leadership has the lower epoch."""
    one, two = Teller("one"), Teller("two")
    one.deadline(1, 1_000)
    low = one.lead(500, 5)
    one.stop(600, 5)
    two.deadline(2, 1_000)
    high = two.lead(100, 7)
    two.stop(200, 7)
    return "epoch-order", [one, two], (low, high)


def shared_epoch() -> Planted:
    """Two sessions, on two machines, led under one epoch."""
    one, two = Teller("one"), Teller("two", "boot-b")
    first, second = one.lead(10, 5), two.lead(900, 5)
    return "shared-epoch", [one, two], (first, second)


def shared_session() -> Planted:
    """Two processes speak for one session."""
    one, two = Teller("one", sid="s"), Teller("two", sid="s")
    first, second = one.deadline(1, 100), two.deadline(2, 100)
    return "shared-session", [one, two], (first, second)


def accept_after_stop() -> Planted:
    one = Teller("one")
    one.lead(10, 5), one.serve(11, 5)
    stop = one.stop(20, 5)
    return "after-stop", [one], (stop, one.accept(21, 5, admitted_ns=15))


def serve_after_stop() -> Planted:
    one = Teller("one")
    one.lead(10, 5)
    stop = one.stop(20, 5)
    return "after-stop", [one], (stop, one.serve(21, 5))


def accept_of_an_old_epoch_after_a_new_one() -> Planted:
    """In one process, whose former session's leadership was never stopped."""
    one = Teller("one", sid="first")
    one.deadline(1, 15)
    one.lead(10, 5), one.serve(11, 5)
    one.sid = "second"
    one.deadline(18, 100)
    lead = one.lead(20, 7)
    one.sid = "first"
    return "after-newer", [one], (lead, one.accept(22, 5))


def epochs_that_interleave_across_machines() -> Planted:
    """Clocks of two machines do not compare, epochs do: who was given epoch 9 of any shard lives after another's 7."""
    one, two = Teller("one"), Teller("two", "boot-b")
    one.lead(10, 5), one.serve(11, 5), one.accept(12, 5)
    one.lead(20, 9, shard=901)
    accept = one.accept(30, 5)
    lead = two.lead(1, 7)
    return "interleaved", [one, two], (accept, lead)


def serve_before_lead() -> Planted:
    one = Teller("one")
    serve = one.serve(10, 5)
    return "before-lead", [one], (serve, one.lead(11, 5))


def serve_without_lead() -> Planted:
    one = Teller("one")
    return "before-lead", [one], (one.serve(10, 5),)


def accept_before_serve() -> Planted:
    one = Teller("one")
    lead = one.lead(10, 5)
    return "before-serve", [one], (lead, one.accept(11, 5))


def admission_before_serve() -> Planted:
    one = Teller("one")
    lead = one.lead(10, 5)
    one.serve(20, 5)
    return "before-serve", [one], (lead, one.accept(21, 5, admitted_ns=19))


def admission_after_the_answer() -> Planted:
    one = Teller("one")
    lead = one.lead(10, 5)
    one.serve(20, 5)
    return "before-serve", [one], (lead, one.accept(21, 5, admitted_ns=22))


def accept_at_the_deadline() -> Planted:
    """The guard says yes before the deadline, not at it."""
    one = Teller("one")
    deadline = one.deadline(1, 100)
    one.lead(10, 5), one.serve(11, 5), one.accept(99, 5)
    return "after-deadline", [one], (deadline, one.accept(100, 5))


def accept_when_suspended() -> Planted:
    one = Teller("one")
    one.deadline(1, 100)
    one.lead(10, 5), one.serve(11, 5)
    suspended = one.deadline(50, 0)
    return "after-deadline", [one], (suspended, one.accept(60, 5))


def epochs_that_go_back_in_a_file() -> Planted:
    one = Teller("one")
    first = one.lead(10, 7)
    one.stop(11, 7)
    return "file-order", [one], (first, one.lead(12, 5))


def another_session_speaks_for_an_epoch() -> Planted:
    one = Teller("one")
    lead = one.lead(10, 5)
    one.sid = "another"
    return "shared-epoch", [one], (lead, one.serve(11, 5))


def time_that_goes_back() -> Planted:
    one = Teller("one")
    return "time", [one], (one.deadline(10, 50), one.deadline(9, 60))


PLANTS: Final = (
    overlap_by_a_nanosecond,
    overlap_without_a_stop,
    overlap_that_was_acted_on,
    overlap_after_a_suspension,
    epochs_against_the_clock,
    shared_epoch,
    shared_session,
    accept_after_stop,
    serve_after_stop,
    accept_of_an_old_epoch_after_a_new_one,
    epochs_that_interleave_across_machines,
    serve_before_lead,
    serve_without_lead,
    accept_before_serve,
    admission_before_serve,
    admission_after_the_answer,
    accept_at_the_deadline,
    accept_when_suspended,
    epochs_that_go_back_in_a_file,
    another_session_speaks_for_an_epoch,
    time_that_goes_back,
)


@pytest.mark.parametrize("plant", PLANTS)
@examples(20)
@given(steps=STEPS, rng=st.randoms())
def test_a_violation_is_found_in_any_history(plant: Any, steps: list[tuple[int, int, int]], rng: random.Random) -> None:
    """Planted beside a good history, in any order of files, it is the one that is found, by its two lines."""
    kind, tellers, lines = plant()
    files = [*Fleet(revision=1_000).play(steps).files, *(teller.lines for teller in tellers)]
    rng.shuffle(files)
    found = cited(judged(files), files)
    assert [(each, {id(line) for line in places}) for each, places in found] == [(kind, {id(line) for line in lines})]


def test_many_violations_are_counted_and_some_are_kept() -> None:
    """A log that is wrong in every line costs no more memory than one that is wrong in a hundred."""
    one = Teller("one")
    one.lead(1, 5)
    for at_ns in range(2, 3_000):
        one.accept(at_ns, 5)
        one.serve(at_ns, at_ns + 10, shard=at_ns)
    findings = judged([one.lines])
    assert len(findings.collisions) == VIOLATIONS_MAX
    assert findings.violations == 2 * 2_998


# --- the decoder -----------------------------------------------------------------------------------------------------

NAMES: Final = (
    *("event", "boot_id", "at_ns", "worker", "sid", "shard", "epoch", "admitted_ns", "deadline_ns", "why", "format"),
    *("pid", "lead", "serve", "stop", "accept", "reject", "deadline", "begin"),
)


def is_read_or_refused(lines: Sequence[bytes]) -> None:
    """Whatever stands in a log: findings, or an AuditError that names file and line."""
    verdict = Verdict()
    log = verdict.begin("some.log")
    refusals = []
    for number, raw in enumerate(lines, 1):
        try:
            log.take(number, 0, raw)
        except AuditError as exc:
            refusals.append((exc.where, bool(exc.reason)))
            break
    assert refusals in ([], [(f"some.log:{number}", True)]) if lines else not refusals
    verdict.add(log.end())
    verdict.finish()


@examples(300)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_read_or_refused(lines: list[bytes]) -> None:
    """Bytes that are no line at all."""
    is_read_or_refused(lines)


@examples(300)
@given(STEPS.filter(len), st.data())
def test_bent_lines_are_read_or_refused(steps: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Lines of a good history, some of them with values replaced, removed, renamed or buried, or cut anywhere."""
    lines = [encode(line)[:-1] for line in Fleet().play(steps).files[0]]
    for at in data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=1, max_size=4)):
        if data.draw(st.booleans()):
            lines[at] = written(data.draw(bent_json(orjson.loads(lines[at]), NAMES)))
        else:
            lines[at] = lines[at][: data.draw(st.integers(0, len(lines[at])))]
    is_read_or_refused(lines)


@examples(200)
@given(json_values(NAMES))
def test_any_json_is_read_or_refused(value: Any) -> None:
    """JSON that is no line, and JSON that is one by chance."""
    is_read_or_refused([written(value)])


def test_every_kind_of_line_comes_back_as_it_was_written() -> None:
    """encode and decode are each other's inverse; a field of a later version is passed over."""
    facts: dict[str, Any] = {"boot_id": "b", "at_ns": 2**63 - 1, "worker": "w", "sid": "s", "shard": 0, "epoch": 2**53}
    lines: list[AnyLine] = [
        Begin(boot_id="b", at_ns=1, worker="w", format=1, pid=7),
        Deadline(boot_id="b", at_ns=1, worker="w", sid="s", deadline_ns=0),
        Lead(**facts),
        Serve(**facts),
        Accept(**facts, admitted_ns=0),
        Reject(**facts, why='"\n\u2028'),
        Stop(**facts, why="é"),
    ]
    assert [decode(encode(line)) for line in lines] == lines
    assert all(encode(line).count(b"\n") == 1 for line in lines)
    assert decode(encode(lines[2]).replace(b'"shard"', b'"later":[],"shard"')) == lines[2]


def test_a_log_of_two_processes_is_refused() -> None:
    """Concatenated logs have no order between them."""
    one, two = Teller("one"), Teller("two")
    one.deadline(1, 5)
    with pytest.raises(AuditError, match=r"log0:3: a log is one process's.*each process's file for itself"):
        judged([[*one.lines, *two.lines]])


def test_a_log_of_a_later_format_is_refused() -> None:
    """Its lines may mean something else."""
    begin = Begin(boot_id="b", at_ns=1, worker="w", format=2, pid=7)
    with pytest.raises(AuditError, match="log0:1: written by a newer shardlead"):
        judged([[begin]])
