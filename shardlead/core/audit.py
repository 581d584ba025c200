"""The audit log's lines, and what they prove: what a worker writes down so that "never two leaders" can be checked.

A log is a file of JSON lines, one file for each worker process, which begins with `begin`. Each line has its event,
the machine's boot (`boot_id`), the time since it (`at_ns`, the clock that deadlines are measured with) and the worker:

    deadline   sid, deadline_ns       the session's guard says yes until then; 0: it says no from here on
    lead       sid, shard, epoch      the leadership was acknowledged: from here on its guard may say yes
    serve      sid, shard, epoch      its object is open: requests are admitted (again, after a suspension)
    accept     … admitted_ns          a request was admitted then, and its answer passed the guard at `at_ns`
    reject     … why                  a request was refused, before its handler or where its answer met the guard
    stop       … why                  from here on no guard says yes for this epoch

When a line is written. `deadline` before the new deadline counts, `lead` before the leadership exists, `accept` before
the first byte of the answer leaves, `stop` before the right to work is taken away, and each is handed to the kernel at
once: a process that is killed loses nothing that it has shown to anybody, a machine that is lost may lose its last
seconds. `at_ns` is read *before* the guard is asked: a guard that says yes says it for that time, too, though the
process may have stood still in between.

The guard interval of a leadership begins with `lead` (its barrier is written behind the guard already) and is cut
where its session's deadline had passed or was taken back. It ends with `stop`. A leadership without one:

    the process went on       its guard said yes until the deadline last written, for a deadline counts only once it is
                              written; the process wrote other lines meanwhile, so that it was there to be asked
    the process was killed    its guard says nothing any more. Nobody wrote that down, and the parent revokes the lease
                              of a dead process at once: its deadline is no bound, another leads long before it. What
                              it is known to have said ends with the last line of its file
    the process is frozen     as killed, while it is; awake again it asks the clock, finds the deadline passed and
                              writes so
    the disk was full         the log ends with the first line that could not be written, and is never continued

In one rule: without `stop` an interval ends with the file's last line or the session's last deadline, whichever comes
first. It is never longer than what the guard would have said, so that what is found is no false alarm; and it holds
every answer, because none leaves before its line.

The law that `core.verdict` holds the lines against:

    of one machine    guard intervals of a shard never overlap (by a nanosecond), and follow each other as their epochs
                      do. Clocks of two machines, or of one before and after a boot, are never compared
    everywhere        no epoch of a shard has two sessions; no session has two processes
                      in a file, epochs of a shard grow; `lead` before `serve` before `accept` before `stop`; no accept
                      when the deadline had passed, or after a newer `lead`; time does not go back
                      across machines, epochs are the clock, for all shards take them from one store: a process that
                      was told of epoch 9 of any shard lives after another's epoch 7, and accepts nothing under 5

Not proved: what reached the client; pieces of a streamed answer after its first; background work and `Worker.admit`
beyond their intervals; what a machine that stood still as a whole believed, for its clock stood still with it. And an
end that somebody else put to a lease early (`etcdctl lease revoke`, an etcd that revokes live leases) is found, though
fenced storage bears it: there *were* two guards that said yes.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

FORMAT: Final = 1
SUFFIX: Final = ".audit.jsonl"
"""How the names of audit logs end."""
LINE_BYTES_MAX: Final = 8_192  # ours have at most a few hundred
WHY_CHARS_MAX: Final = 200

Nanoseconds = Annotated[int, Meta(ge=0)]
Shard = Annotated[int, Meta(ge=0)]
Epoch = Annotated[int, Meta(ge=1)]


class Line(msgspec.Struct, frozen=True, gc=False, kw_only=True, tag_field="event", tag=str.lower):
    """What every line has."""

    boot_id: str
    at_ns: Nanoseconds
    worker: str


class Begin(Line, frozen=True, gc=False, kw_only=True):
    """The first line of a process."""

    format: int
    pid: int


class Deadline(Line, frozen=True, gc=False, kw_only=True):
    """The guard of this session says yes until `deadline_ns`; 0: no longer."""

    sid: str
    deadline_ns: Nanoseconds


class Lead(Line, frozen=True, gc=False, kw_only=True):
    sid: str
    shard: Shard
    epoch: Epoch


class Serve(Line, frozen=True, gc=False, kw_only=True):
    sid: str
    shard: Shard
    epoch: Epoch


class Accept(Line, frozen=True, gc=False, kw_only=True):
    sid: str
    shard: Shard
    epoch: Epoch
    admitted_ns: Nanoseconds


class Reject(Line, frozen=True, gc=False, kw_only=True):
    """`epoch` is what the caller said, which may be anything; `sid` this worker's session, "" for none."""

    sid: str
    shard: Shard
    epoch: Nanoseconds
    why: str


class Stop(Line, frozen=True, gc=False, kw_only=True):
    sid: str
    shard: Shard
    epoch: Epoch
    why: str = ""


AnyLine = Begin | Deadline | Lead | Serve | Accept | Reject | Stop

_decoder: Final = msgspec.json.Decoder(AnyLine)
_encoder: Final = msgspec.json.Encoder()


def encode(line: AnyLine) -> bytes:
    """The line as it is written, its end included."""
    return _encoder.encode(line) + b"\n"


def decode(raw: bytes) -> AnyLine:
    """The line that was written; fields that are not known are passed over. Raises ValueError, with the reason."""
    try:
        line: AnyLine = _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError(str(exc) or type(exc).__name__) from exc
    return line
