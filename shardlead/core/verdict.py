"""The verdict on audit logs: what the processes' testimonies say together, held against the law of `core.audit`.

    verdict = Verdict()
    for name in files:
        log = verdict.begin(name)
        log.take(line_number, byte_offset, raw_line)        for each line, in order
        verdict.add(log.end())
    findings = verdict.finish()

Each violation has a kind, and is named by the two lines that cannot both be true:

    overlap          two guard intervals of a shard overlap on one machine
    epoch-order      they do not, but the later one has the lower epoch
    shared-epoch     an epoch of a shard has two sessions
    shared-session   a session stands in two logs
    interleaved      a request was accepted under an epoch by a process that was told of a later one, after a third
                     had been led between the two (across machines: epochs are the clock)
    file-order       epochs of a shard go back in one log
    before-lead      serve, accept or stop before the leadership's `lead`, or without one
    before-serve     a request admitted before `serve`, or after its own answer
    after-stop       serve or accept after the leadership's `stop`
    after-newer      serve or accept under an epoch after a newer one of that shard, in one process
    after-deadline   accept when the session's deadline had passed
    time             the clock of a process goes back

Law: pure. All that is kept grows with leaderships and sessions, never with requests; the findings are the same
whatever the order of the files.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from shardlead.core.testimony import Collision, Collisions, LogReader, Place, Span, Tenure, Testimony


@dataclass(frozen=True, slots=True)
class Findings:
    """What all lines say together. `violations` counts all; `collisions` are the first of them."""

    leaderships: int
    requests: int
    refused: int
    violations: int
    collisions: tuple[Collision, ...]


class Verdict:
    """On all logs of one cluster."""

    def __init__(self) -> None:
        self._collisions = Collisions()
        self._files = 0
        self._sessions: dict[str, Place] = {}
        self._tenures: dict[int, list[tuple[str, Tenure]]] = defaultdict(list)  # by shard, each with its boot
        self._requests = self._refused = 0

    def begin(self, name: str) -> LogReader:
        """A reader for the next file; `name` is for messages."""
        self._files += 1
        return LogReader(self._files - 1, name, self._collisions)

    def add(self, testimony: Testimony) -> None:
        """A file has been read to its end."""
        for sid, place in testimony.sessions.items():
            first = self._sessions.setdefault(sid, place)
            if first is not place:
                text = f"session {sid} stands in two logs: it has one process"
                self._collisions.add("shared-session", text, first, place)
        for tenure in testimony.tenures:
            self._tenures[tenure.shard].append((testimony.boot_id, tenure))
        self._requests += testimony.requests
        self._refused += testimony.refused

    def finish(self) -> Findings:
        """The verdict, once every file was added."""
        for shard in sorted(self._tenures):
            by_epoch = sorted(self._tenures[shard], key=lambda pair: (pair[1].epoch, pair[1].lead_ns, pair[1].sid))
            self._judge_epochs([tenure for _, tenure in by_epoch])
            by_boot: dict[str, list[Tenure]] = defaultdict(list)
            for boot_id, tenure in by_epoch:
                by_boot[boot_id].append(tenure)
            for tenures in by_boot.values():
                self._judge_times(tenures)
        return Findings(
            sum(map(len, self._tenures.values())),
            self._requests,
            self._refused,
            self._collisions.count,
            tuple(self._collisions.kept),
        )

    def _judge_epochs(self, tenures: Sequence[Tenure]) -> None:
        """Everywhere; `tenures` of one shard by epoch. No clock is asked."""
        later: Tenure | None = None  # the first of the next larger epoch
        following: Tenure | None = None
        for tenure in reversed(tenures):
            if following is not None and following.epoch > tenure.epoch:
                later = following
            elif following is not None and following.sid != tenure.sid:
                text = f"shard {tenure.shard}: epoch {tenure.epoch} has two sessions, {tenure.sid} and {following.sid}"
                self._collisions.add("shared-epoch", text, tenure.place, following.place)
            following = tenure
            accepted = tenure.accepted
            if later is None or accepted is None or later.place.file == tenure.place.file:
                continue  # in one file the order of its lines has been looked at
            if tenure.known_epoch >= later.epoch:
                text = (
                    f"shard {tenure.shard}: a request is accepted under epoch {tenure.epoch} by a process that has "
                    f"been given epoch {tenure.known_epoch}, and so after epoch {later.epoch} was led"
                )
                self._collisions.add("interleaved", text, accepted, later.place)

    def _judge_times(self, tenures: Sequence[Tenure]) -> None:
        """Of one machine; `tenures` of one shard by epoch."""
        known: tuple[Span, Tenure] | None = None  # of lower epochs, the interval that ends last
        for tenure in tenures:
            if not tenure.spans:
                continue
            begin_ns, last = tenure.spans[0].begin_ns, tenure.spans[-1]
            if known is not None and begin_ns < known[0].end_ns:
                self._collide(tenure, begin_ns, last, *known)
            if known is None or last.end_ns > known[0].end_ns:
                known = last, tenure

    def _collide(self, tenure: Tenure, begin_ns: int, last: Span, span: Span, other: Tenure) -> None:
        evidence = span.ended_by
        if (accepted := other.accepted) is not None and other.accepted_ns > begin_ns:
            evidence = accepted  # it did not only say yes, it acted on it
        if span.begin_ns <= last.end_ns:
            text = (
                f"shard {tenure.shard}: the guard of epoch {other.epoch} says yes until {span.end_ns} ns, that of "
                f"epoch {tenure.epoch} from {begin_ns} ns on: {span.end_ns - begin_ns} ns too early"
            )
            self._collisions.add("overlap", text, evidence, tenure.place)
        elif other.place.file != tenure.place.file:  # in one file the order of its lines has been looked at
            text = f"shard {tenure.shard}: epoch {other.epoch} is led after epoch {tenure.epoch}, on one machine"
            self._collisions.add("epoch-order", text, other.place, tenure.place)
