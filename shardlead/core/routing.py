"""Where a request goes, and what happens to it next: the rules that routers and smart clients share.

Two things are decided here and nowhere else: which key a request is about (`KeyRules`), and what follows when
something happened to it on its way (`LAW`, `next_step`). What this module never does: read a clock, hold a
connection, or remember a request; the caller brings the facts and carries out the step.

Law: a request is sent again only if it surely was not processed, or if processing it twice does no harm. No request
is ever sent under an epoch below the largest one seen for its shard.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from shardlead.core.contract import KEY_BYTES_MAX, SAFE_METHODS, Problem, Refused
from shardlead.core.shardmap import Leader
from shardlead.errors import RequestError

# --- which key -------------------------------------------------------------------------------------------------

_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_UNRESERVED: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~"  # what quote() leaves

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case, values as they came."""


def decode_percent(raw: bytes) -> bytes:
    """Percent-decode once. A plus stays a plus: it is a space in HTML forms only, and a key must be spelled the same
    way in path, query and header. Raises RequestError for a `%` that no two hex digits follow."""
    if b"%" not in raw:
        return raw
    if _BAD_ESCAPE.search(raw):
        raise RequestError(Problem.BAD_REQUEST, "a percent sign in the target is not followed by two hex digits")
    return unquote_to_bytes(raw)


def encode_key(key: bytes) -> bytes:
    """The key as the `Shardlead-Key` header spells it: percent-encoded, nothing but unreserved characters left."""
    return quote_from_bytes(key, safe="").encode() if key.translate(None, _UNRESERVED) else key


def check_key(key: bytes) -> bytes:
    """The key, if it can be one. Raises RequestError for an empty one and one over 2,048 bytes."""
    if not key:
        raise RequestError(Problem.KEY_MISSING, "the request's key is empty")
    if len(key) > KEY_BYTES_MAX:
        raise RequestError(Problem.KEY_TOO_LONG, f"the request's key has {len(key)} bytes; {KEY_BYTES_MAX} are allowed")
    return key


def path_pattern(template: str) -> re.Pattern[bytes]:
    """A path template as a pattern over the raw path. `{key}` is one segment, `*` one segment, and `/*` at the end
    whatever follows, or nothing: `/orders/{key}/*` fits `/orders/7` and `/orders/7/lines/2`. Raises ValueError."""
    if not template.startswith("/") or template.count("{key}") != 1:
        raise ValueError(f"{template!r}: begins with / and has {{key}} once")
    is_open = template.endswith("/*")
    parts = []
    for segment in (template[:-2] if is_open else template)[1:].split("/"):
        before, key, after = segment.partition("{key}")
        if segment == "*":
            parts.append("[^/]+")
        elif key:
            parts.append(re.escape(before) + "([^/]*)" + re.escape(after))
        else:
            parts.append(re.escape(segment))
    return re.compile(("/" + "/".join(parts) + ("(?:/.*)?" if is_open else "")).encode())


@dataclass(frozen=True, slots=True)
class KeyRules:
    """Where a request's key stands. All rules that find one must find the same."""

    paths: tuple[re.Pattern[bytes], ...] = ()
    headers: frozenset[bytes] = frozenset()
    queries: tuple[bytes, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, rules: Iterable[str]) -> "KeyRules":
        """From "path:/orders/{key}/*", "header:X-Shard-Key", "query:customer". Raises ValueError."""
        paths: list[re.Pattern[bytes]] = []
        headers: list[bytes] = []
        queries: list[bytes] = []
        texts = tuple(rules)
        for text in texts:
            kind, _, rest = text.partition(":")
            if not rest:
                raise ValueError(f"{text!r}: a key rule is path:, header: or query: and where the key stands")
            match kind:
                case "path":
                    paths.append(path_pattern(rest))
                case "header":
                    headers.append(rest.strip().lower().encode("ascii"))
                case "query":
                    queries.append(rest.encode())
                case _:
                    raise ValueError(f"{text!r}: a key rule begins with path:, header: or query:")
        return cls(tuple(paths), frozenset(headers), tuple(queries), texts)

    def find(self, target: bytes, key_headers: Sequence[bytes]) -> bytes | None:
        """The request's key; None if no rule finds one.

        `target` is the request target in origin form ("/path?query"), `key_headers` the values of all its header
        fields whose names are in `headers`. Raises RequestError (400) for two different keys, an empty key, one over
        2,048 bytes, and a broken percent-encoding.
        """
        found: bytes | None = None
        for value in key_headers:
            key = value.strip(b" \t")
            found = key if found is None else _agree(found, key)
        if self.paths or self.queries:
            path, _, query = target.partition(b"?")
            for pattern in self.paths:
                fit = pattern.fullmatch(path)
                if fit is not None:
                    found = _agree(found, decode_percent(fit[1]))
            if query:
                for name in self.queries:
                    for field in query.split(b"&"):
                        raw_name, _, raw = field.partition(b"=")
                        if decode_percent(raw_name) == name:
                            found = _agree(found, decode_percent(raw))
        return found if found is None or 0 < len(found) <= KEY_BYTES_MAX else check_key(found)


def _agree(one: bytes | None, other: bytes) -> bytes:
    if one is not None and one != other:
        raise RequestError(Problem.KEY_AMBIGUOUS, "the request names two different keys")
    return other


# --- what next -------------------------------------------------------------------------------------------------


class Happened(StrEnum):
    """What has just happened to a request."""

    ARRIVED = "arrived"  # it has a key and nothing was tried; also: what it waited for may have come
    PAUSED = "paused"  # the pause of an AskAgain is over
    UNSENT = "unsent"  # a connection was awaited for it, and the leader changed before a byte was written
    NOT_OPENED = "not-opened"  # no connection to the leader could be opened
    STALE = "stale"  # refused by the guard, before the handler
    DRAINING = "draining"
    UNKNOWN = "unknown"
    SUSPENDED = "suspended"
    BROKEN = "broken"  # the connection ended after the request was sent and before any byte of an answer
    FORCED = "forced"  # the session it was sent to has ended, and no answer had begun
    UNCERTAIN = "uncertain"  # the worker says: handled, but the guard failed before the answer left
    SILENT = "silent"  # no answer began within the time allowed
    TORN = "torn"  # the answer broke off after it had begun


class Again(StrEnum):
    """Whether a request may be sent again."""

    ALWAYS = "always"  # it surely was not processed
    HARMLESS = "harmless"  # only if processing it twice does no harm
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Send:
    """Send it to this leader, now."""

    leader: Leader


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait until the view shows a reachable leader with an epoch above `above`."""

    above: int


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Wait likewise; but after `pause_s` ask the present leader again (`PAUSED`)."""

    above: int
    pause_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the client with this problem. `retry_after_s` 0: no Retry-After."""

    problem: Problem
    status: int
    detail: str
    retry_after_s: int = 0


@dataclass(frozen=True, slots=True)
class PassOn:
    """Give the client the worker's own answer."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Reset the client's connection: its answer has begun and cannot be made whole."""


Step = Send | Hold | AskAgain | Answer | PassOn | Cut

NOT_LED: Final = Answer(Problem.NOT_LED, 503, "the shard had no leader for as long as a request may wait", 1)
SUSPENDED: Final = Answer(Problem.SUSPENDED, 503, "the shard's leader is cut from the store and answers nobody", 1)
UNREACHABLE: Final = Answer(
    Problem.UPSTREAM_FAILED, 503, "the shard's leader could not be reached; nothing was sent", 1
)
SPENT: Final = Answer(Problem.NOT_LED, 503, "refused by a worker, and the body is too large to be sent again", 1)
OUTCOME_UNKNOWN: Final = Answer(
    Problem.OUTCOME_UNKNOWN,
    502,
    "sent to the shard's leader, which ended before it answered: it may have been processed",
)
TIMED_OUT: Final = Answer(
    Problem.TIMED_OUT, 504, "the shard's leader did not answer in time: the request may have been processed"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the law.

    `again`: may the request be sent again? `pause_s`: how long before the *same* epoch is asked again (a larger one
    is always asked at once; 0: the same at once). `instead`: the step if it may not. `late`: the answer if it may,
    but the time for waiting is over. `pause_repeated_s`: the pause of a request that was repeated before.
    """

    again: Again
    pause_s: float
    instead: Step
    late: Answer
    pause_repeated_s: float = 0.0


# A refusal under an epoch that stays is asked about again after a while, though the worker said to wait for a larger
# one: a worker that was only slow to open a shard must not leave it unserved. It is as safe as the first asking.
REFUSED_PAUSE_S: Final = 1.0
SUSPENDED_PAUSE_S: Final = 0.25
RECONNECT_PAUSE_S: Final = 0.1
DYING_S: Final = 0.03  # when a second connection breaks, its worker is dying, and needs so long to be dead
REPEATS_MAX: Final = 3  # of a request that may have been processed: one that kills its worker must not walk the fleet

LAW: Final[Mapping[Happened, Rule]] = {
    #                         may it be sent again?  same epoch after   if not              if the hold is over
    Happened.ARRIVED:    Rule(Again.ALWAYS,          REFUSED_PAUSE_S,   SPENT,              NOT_LED),
    Happened.PAUSED:     Rule(Again.ALWAYS,          0.0,               SPENT,              NOT_LED),
    Happened.UNSENT:     Rule(Again.ALWAYS,          0.0,               SPENT,              NOT_LED),
    Happened.NOT_OPENED: Rule(Again.ALWAYS,          RECONNECT_PAUSE_S, SPENT,              UNREACHABLE),
    Happened.STALE:      Rule(Again.ALWAYS,          REFUSED_PAUSE_S,   SPENT,              NOT_LED),
    Happened.DRAINING:   Rule(Again.ALWAYS,          REFUSED_PAUSE_S,   SPENT,              NOT_LED),
    Happened.UNKNOWN:    Rule(Again.ALWAYS,          REFUSED_PAUSE_S,   SPENT,              NOT_LED),
    Happened.SUSPENDED:  Rule(Again.ALWAYS,          SUSPENDED_PAUSE_S, SPENT,              SUSPENDED),
    Happened.BROKEN:     Rule(Again.HARMLESS,        0.0,               OUTCOME_UNKNOWN,    OUTCOME_UNKNOWN, DYING_S),
    Happened.FORCED:     Rule(Again.HARMLESS,        REFUSED_PAUSE_S,   OUTCOME_UNKNOWN,    OUTCOME_UNKNOWN),
    Happened.UNCERTAIN:  Rule(Again.HARMLESS,        REFUSED_PAUSE_S,   PassOn(),           OUTCOME_UNKNOWN),
    Happened.SILENT:     Rule(Again.NEVER,           0.0,               TIMED_OUT,          TIMED_OUT),
    Happened.TORN:       Rule(Again.NEVER,           0.0,               Cut(),              TIMED_OUT),
}  # fmt: skip
"""What may follow what. Read: after NOT_OPENED the request may always be sent again, to the same leader after 0.1 s."""

REFUSALS: Final[Mapping[bytes, Happened]] = {
    Refused.STALE.encode(): Happened.STALE,
    Refused.DRAINING.encode(): Happened.DRAINING,
    Refused.UNKNOWN.encode(): Happened.UNKNOWN,
    Refused.SUSPENDED.encode(): Happened.SUSPENDED,
}
"""The value of `Shardlead-Refused`, and what it means has happened."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a request when its next step is asked for.

    `floor`: the largest epoch seen for its shard, by the view or in a worker's answer. `tried`: the largest epoch
    that has turned down this request, or another one of its shard just now; 0: none. `is_body_kept`: all that was
    sent of the body can be sent again. `repeats`: how often it was sent again though it may have been processed.
    """

    leader: Leader | None
    floor: int = 0
    tried: int = 0
    time_left_s: float = 1.0
    is_harmless_twice: bool = False
    is_body_kept: bool = True
    repeats: int = 0


def is_harmless_twice(method: bytes | str, *, has_idempotency_key: bool, is_class_idempotent: bool) -> bool:
    """Whether processing a request twice does no harm: its method is safe, or the application removes duplicates."""
    return (has_idempotency_key and is_class_idempotent) or _is_safe(method)


def _is_safe(method: bytes | str) -> bool:
    return (method.decode("ascii", "replace") if isinstance(method, bytes) else method) in SAFE_METHODS


def last_word(answer: Answer, method: bytes | str, repeats: int) -> Answer:
    """What the client is told in the end. Every 503 of the law says that nothing was done; that can be said of a
    request that has been sent again although it may have been processed (`repeats`) only if its method is safe."""
    if not repeats or answer.status != 503 or _is_safe(method):
        return answer
    return OUTCOME_UNKNOWN


def next_step(happened: Happened, facts: Facts) -> Step:
    """The next step of a request. Never a Send under an epoch below `floor`; after ARRIVED-like waits, never a Send
    under an epoch that `tried` says was turned down, unless its pause is over."""
    rule = LAW[happened]
    if not (
        rule.again is Again.ALWAYS
        or (rule.again is Again.HARMLESS and facts.is_harmless_twice and facts.repeats < REPEATS_MAX)
    ):
        return rule.instead
    if not facts.is_body_kept:
        return rule.instead
    leader = facts.leader
    pause_s = rule.pause_repeated_s if facts.repeats and rule.pause_repeated_s else rule.pause_s
    if leader is not None and leader.address and leader.epoch >= facts.floor:
        if leader.epoch > facts.tried or not pause_s:
            return Send(leader)
        return rule.late if facts.time_left_s <= 0 else AskAgain(facts.tried, pause_s)
    return rule.late if facts.time_left_s <= 0 else Hold(max(facts.tried, facts.floor - 1))
