"""The contract between router (or smart client) and worker: header names, refusals, problem types.

Law: design.md, Worker. These answers are the runtime's alone: `Shardlead-*` headers are stripped from what clients
send and from what applications answer, so a refusal can be believed.
"""

from enum import StrEnum
from typing import Final

SHARD: Final = "Shardlead-Shard"
EPOCH: Final = "Shardlead-Epoch"
KEY: Final = "Shardlead-Key"  # percent-encoded as by quote(key, safe="")
REFUSED: Final = "Shardlead-Refused"
LEADER: Final = "Shardlead-Leader"  # "<worker> <address> <epoch>" of the leader the worker knows of, if any
OUTCOME: Final = (
    "Shardlead-Outcome"  # "unknown" on the runtime's own 502 outcome-unknown (handled, then the guard failed)
)
OUTCOME_IS_UNKNOWN: Final = "unknown"
RESERVED_PREFIX: Final = "shardlead-"

KEY_BYTES_MAX: Final = 2_048
RESEND_BODY_BYTES_MAX: Final = 65_536  # a router keeps this much of a body to send it again; beyond it: 100-continue

STATUS_MISDIRECTED: Final = 421
PROBLEM_BASE: Final = "https://shardlead.dev/problems/"
PROBLEM_JSON: Final = "application/problem+json"

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, 9.2.1: may be sent again
IDEMPOTENCY_KEY: Final = "Idempotency-Key"


class Refused(StrEnum):
    """Why a worker's runtime refused a request *before its handler ran*; so it may be sent again, whatever its
    method. All but SUSPENDED answer 421; the router waits for a larger epoch. SUSPENDED answers 503; the router
    asks again with the same epoch."""

    STALE = "stale"  # another epoch, or led elsewhere
    DRAINING = "draining"
    UNKNOWN = "unknown"  # this worker knows nothing of that shard
    SUSPENDED = "suspended"


class Problem(StrEnum):
    """The stable end of a problem's `type` (RFC 9457)."""

    KEY_MISSING = "key-missing"
    KEY_AMBIGUOUS = "key-ambiguous"
    KEY_TOO_LONG = "key-too-long"
    BAD_REQUEST = "bad-request"
    NOT_LED = "not-led"  # held for as long as allowed, and still no leader
    OVERLOADED = "overloaded"  # a bound on held requests or connections
    NOT_READY = "not-ready"  # no view of the cluster yet
    OUTCOME_UNKNOWN = "outcome-unknown"  # sent, and whether it was processed is not known
    UPSTREAM_FAILED = "upstream-failed"
    MISDIRECTED = "misdirected"
    SUSPENDED = "suspended"
    OPENING_FAILED = "opening-failed"
    APPLICATION_ERROR = "application-error"
    TOO_LARGE = "too-large"
    TIMED_OUT = "timed-out"
