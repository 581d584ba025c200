"""What one audit log says: the leaderships of one process, their guard intervals, and what it contradicts itself in.

    log = LogReader(file, name, collisions)
    log.take(line_number, byte_offset, raw_line)        for each line, in order
    testimony = log.end()

Law: that of `core.audit`, as far as one process can break it. Pure, and one pass; what is kept grows with leaderships
and sessions, never with requests. A line that is none of ours raises AuditError with file and line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, assert_never

from shardlead.core.audit import FORMAT, Accept, Begin, Deadline, Lead, Reject, Serve, Stop, decode
from shardlead.errors import AuditError

VIOLATIONS_MAX: Final = 100
ORPHANS_MAX: Final = 1_000  # leaderships of one file whose `lead` has not been seen


class Place(NamedTuple):
    """Where a line stands: its text is not kept."""

    file: int
    line: int
    offset: int


@dataclass(frozen=True, slots=True)
class Collision:
    """Two lines that cannot both be true (one, where the other is missing), and why."""

    kind: str  # stable, see `core.verdict`
    text: str
    places: tuple[Place, ...]


@dataclass(slots=True)
class Collisions:
    """All are counted, the first VIOLATIONS_MAX are kept."""

    count: int = 0
    kept: list[Collision] = field(default_factory=list)

    def add(self, kind: str, text: str, *places: Place) -> None:
        self.count += 1
        if len(self.kept) < VIOLATIONS_MAX:
            self.kept.append(Collision(kind, text, places))


class Span(NamedTuple):
    """A time in which a guard may have said yes, and the line by which it is known to have ended."""

    begin_ns: int
    end_ns: int
    ended_by: Place


@dataclass(slots=True)
class Tenure:
    """One leadership. `spans` is its guard interval, in pieces where its session was suspended meanwhile."""

    shard: int
    epoch: int
    sid: str
    place: Place
    lead_ns: int
    served_ns: int = -1
    accepted_at: tuple[int, int] | None = None  # line and offset of the last request that its guard let pass
    accepted_ns: int = -1
    known_epoch: int = 0  # the largest epoch of any shard that its process had been given by then
    stopped: Place | None = None
    stop_ns: int = -1
    spans: Sequence[Span] = ()

    @property
    def accepted(self) -> Place | None:
        """The last request that its guard is known to have let pass."""
        return Place(self.place.file, *self.accepted_at) if self.accepted_at is not None else None


@dataclass(frozen=True, slots=True)
class Testimony:
    """What one process's log says."""

    boot_id: str
    tenures: Sequence[Tenure]
    sessions: dict[str, Place]  # where each sid stands first
    requests: int
    refused: int


@dataclass(slots=True)
class _Session:
    """The times in which a session's guard may have said yes."""

    first: Place
    place: Place  # of its last deadline
    deadline_ns: int = -1
    spans: list[Span] = field(default_factory=list)

    def moved(self, at_ns: int, deadline_ns: int, place: Place) -> None:
        """From `at_ns` on the guard says yes until `deadline_ns`."""
        self.place, self.deadline_ns = place, deadline_ns
        last = self.spans[-1] if self.spans else None
        if last is not None and at_ns <= last.end_ns:
            self.spans[-1] = Span(last.begin_ns, max(at_ns, deadline_ns), place)
        elif deadline_ns > at_ns:
            self.spans.append(Span(at_ns, deadline_ns, place))


class LogReader:
    """One log, line by line; `name` is for messages, `file` for places."""

    def __init__(self, file: int, name: str, collisions: Collisions) -> None:
        self._file = file
        self._name = name
        self._collisions = collisions
        self._boot_id = self._worker = ""
        self._has_origin = False
        self._number = self._offset = 0  # of the line that is taken, then of the last one
        self._last_ns = -1
        self._known_epoch = 0
        self._requests = self._refused = 0
        self._newest: dict[int, Tenure] = {}  # by shard
        self._all: dict[tuple[int, int], Tenure] = {}
        self._sessions: dict[str, _Session] = {}
        self._orphans: dict[tuple[int, int], Place] = {}  # (shard, epoch) that lines speak of before its `lead`

    def take(self, number: int, offset: int, raw: bytes) -> None:
        """The next line. Raises AuditError if it is none of ours, or not of this process."""
        try:
            line = decode(raw)
        except ValueError as exc:
            raise AuditError(f"{self._name}:{number}", f"not a line of an audit log: {exc}") from exc
        if line.boot_id != self._boot_id or line.worker != self._worker:
            self._check_origin(number, line.boot_id, line.worker)
        if line.at_ns < self._last_ns:
            before = self._place()
            text = f"the time goes back by {self._last_ns - line.at_ns} ns within one process"
            self._collisions.add("time", text, before, Place(self._file, number, offset))
        else:
            self._last_ns = line.at_ns
        self._number, self._offset = number, offset
        if isinstance(line, Accept):
            self._accept(line)
            return
        match line:
            case Reject():
                self._refused += 1
            case Deadline(at_ns=at_ns, sid=sid, deadline_ns=deadline_ns):
                self._session(sid).moved(at_ns, deadline_ns, self._place())
            case Lead():
                self._lead(line)
            case Serve():
                self._serve(line)
            case Stop():
                self._stop(line)
            case Begin():
                if line.format > FORMAT:
                    raise AuditError(f"{self._name}:{number}", "written by a newer shardlead: verify it with that one")
            case _:
                assert_never(line)

    def end(self) -> Testimony:
        """The file has been read to its end."""
        for (shard, epoch), place in self._orphans.items():
            text = f"shard {shard}: epoch {epoch} was never led by this process"
            self._collisions.add("before-lead", text, place)
        for tenure in self._all.values():
            tenure.spans = self._spans(tenure)
        sessions = {sid: session.first for sid, session in self._sessions.items()}
        return Testimony(self._boot_id, tuple(self._all.values()), sessions, self._requests, self._refused)

    # --- inside

    def _place(self) -> Place:
        return Place(self._file, self._number, self._offset)

    def _check_origin(self, number: int, boot_id: str, worker: str) -> None:
        if self._has_origin:
            raise AuditError(
                f"{self._name}:{number}",
                f"a log is one process's, worker {self._worker} on boot {self._boot_id}, but this line is of {worker} "
                f"on {boot_id}: give each process's file for itself",
            )
        self._boot_id, self._worker, self._has_origin = boot_id, worker, True

    def _session(self, sid: str) -> _Session:
        session = self._sessions.get(sid)
        if session is None:
            place = self._place()
            session = self._sessions[sid] = _Session(place, place)
        return session

    def _lead(self, line: Lead) -> None:
        place, at = self._place(), (line.shard, line.epoch)
        self._session(line.sid)
        before = self._newest.get(line.shard)
        if before is not None and before.epoch >= line.epoch:
            text = f"shard {line.shard}: epoch {line.epoch} after epoch {before.epoch} in one process"
            self._collisions.add("file-order", text, before.place, place)
        if (orphan := self._orphans.pop(at, None)) is not None:
            text = f"shard {line.shard}: epoch {line.epoch} is spoken of before it is led"
            self._collisions.add("before-lead", text, orphan, place)
        self._known_epoch = max(self._known_epoch, line.epoch)
        tenure = self._all.setdefault(at, Tenure(line.shard, line.epoch, line.sid, place, line.at_ns))
        self._newest[line.shard] = tenure

    def _spoken_of(self, line: Serve | Accept | Stop) -> Tenure | None:
        """The leadership that a line is about; None, and it is noted, if this session was never given it."""
        tenure = self._newest.get(line.shard)
        if tenure is None or tenure.epoch != line.epoch:
            tenure = self._all.get((line.shard, line.epoch))
        if tenure is None:
            if len(self._orphans) < ORPHANS_MAX:
                self._orphans.setdefault((line.shard, line.epoch), self._place())
            else:
                self._collisions.add("before-lead", f"shard {line.shard}: never led by this process", self._place())
            return None
        if tenure.sid != line.sid:
            text = f"shard {line.shard}: epoch {line.epoch} is of session {tenure.sid}, not of {line.sid}"
            self._collisions.add("shared-epoch", text, tenure.place, self._place())
            return None
        return tenure

    def _is_over(self, tenure: Tenure, does: str) -> bool:
        """Whether that leadership had ended already; it is noted."""
        newest = self._newest[tenure.shard]
        if tenure.stopped is not None:
            text = f"shard {tenure.shard}: {does} under epoch {tenure.epoch} after its stop"
            self._collisions.add("after-stop", text, tenure.stopped, self._place())
        elif newest is not tenure:
            text = f"shard {tenure.shard}: {does} under epoch {tenure.epoch} after epoch {newest.epoch} was led"
            self._collisions.add("after-newer", text, newest.place, self._place())
        else:
            return False
        return True

    def _serve(self, line: Serve) -> None:
        tenure = self._spoken_of(line)
        if tenure is None or self._is_over(tenure, "serves"):
            return
        if tenure.served_ns < 0:
            tenure.served_ns = line.at_ns

    def _accept(self, line: Accept) -> None:
        """Nearly all lines are these, and nearly all of them are good: speed shapes the first half."""
        self._requests += 1
        tenure = self._newest.get(line.shard)
        if (
            tenure is not None
            and tenure.epoch == line.epoch
            and tenure.sid == line.sid
            and tenure.stopped is None
            and 0 <= tenure.served_ns <= line.admitted_ns <= line.at_ns
            and not 0 <= self._sessions[line.sid].deadline_ns <= line.at_ns
        ):
            tenure.accepted_at = self._number, self._offset
            tenure.accepted_ns = line.at_ns
            tenure.known_epoch = self._known_epoch
        else:
            self._accept_wrong(line)

    def _accept_wrong(self, line: Accept) -> None:
        """Name what is wrong with it."""
        tenure = self._spoken_of(line)
        if tenure is None or self._is_over(tenure, "accepts a request"):
            return
        session = self._sessions[tenure.sid]
        if 0 <= session.deadline_ns <= line.at_ns:
            text = f"shard {line.shard}: a request is accepted under epoch {line.epoch} past its session's deadline"
            self._collisions.add("after-deadline", text, session.place, self._place())
        else:
            text = f"shard {line.shard}: a request is admitted under epoch {line.epoch} before it serves"
            self._collisions.add("before-serve", text, tenure.place, self._place())

    def _stop(self, line: Stop) -> None:
        tenure = self._spoken_of(line)
        if tenure is not None and tenure.stopped is None:
            tenure.stopped, tenure.stop_ns = self._place(), line.at_ns

    def _spans(self, tenure: Tenure) -> list[Span]:
        """Its guard interval, cut by its session's deadlines, and by the file's last line where it has no stop."""
        end_ns, ended_by = self._last_ns, self._place()
        if tenure.stopped is not None:
            end_ns, ended_by = tenure.stop_ns, tenure.stopped
        session = self._sessions[tenure.sid]
        if session.deadline_ns < 0:  # no word of it: it bounds nothing
            return [Span(tenure.lead_ns, end_ns, ended_by)]
        found = []
        for span in session.spans:
            begin_ns = max(span.begin_ns, tenure.lead_ns)
            if begin_ns > min(span.end_ns, end_ns):
                continue
            found.append(
                Span(begin_ns, end_ns, ended_by)
                if end_ns <= span.end_ns
                else Span(begin_ns, span.end_ns, span.ended_by)
            )
        return found
