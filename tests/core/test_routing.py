"""Which key a request is about, and what may follow what."""

import math
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.core.contract import SAFE_METHODS, Problem
from shardlead.core.routing import (
    LAW,
    REPEATS_MAX,
    Again,
    Answer,
    AskAgain,
    Cut,
    Facts,
    Happened,
    Hold,
    KeyRules,
    PassOn,
    Send,
    encode_key,
    is_harmless_twice,
    last_word,
    next_step,
)
from shardlead.core.shardmap import Leader
from shardlead.errors import RequestError

RULES = KeyRules.parse(["path:/orders/{key}/*", "header:X-Shard-Key", "query:customer"])


@pytest.mark.parametrize(
    ("target", "headers", "expected"),
    [
        (b"/orders/7", [], b"7"),
        (b"/orders/7/", [], b"7"),
        (b"/orders/7/lines/2?x=1", [], b"7"),
        (b"/orders/a%2Fb", [], b"a/b"),
        (b"/orders/a+b", [], b"a+b"),
        (b"/orders/a%2Bb", [], b"a+b"),
        (b"/orders/a%252Fb", [], b"a%2Fb"),  # decoded once
        (b"/orders/%C3%A9", [], "é".encode()),
        (b"/x?customer=a%2Fb", [], b"a/b"),
        (b"/x?customer=a/b", [], b"a/b"),
        (b"/x?customer=a+b", [], b"a+b"),
        (b"/x?y=1&%63ustomer=7&z", [], b"7"),
        (b"/x?customer=7&customer=7", [], b"7"),
        (b"/x?customers=7", [], None),
        (b"/x", [b"  a/b \t"], b"a/b"),
        (b"/x", [b"a%2Fb"], b"a%2Fb"),  # a header's value is taken as it is
        (b"/x", ["é".encode()], "é".encode()),
        (b"/x", [b"7", b"7"], b"7"),
        (b"/orders/7?customer=7", [b"7"], b"7"),
        (b"/x", [], None),
        (b"/orders", [], None),
        (b"/ordersX/7", [], None),
        (b"/v1/orders/7", [], None),
        (b"*", [], None),
        (b"/orders/" + b"k" * 2048, [], b"k" * 2048),
    ],
)
def test_a_key_is_found_where_the_rules_say(target: bytes, headers: list[bytes], expected: bytes | None) -> None:
    """Path, query and header name the same key by the same text; a plus is a plus everywhere."""
    assert RULES.find(target, headers) == expected


@pytest.mark.parametrize(
    ("target", "headers", "kind"),
    [
        (b"/orders/7?customer=8", [], Problem.KEY_AMBIGUOUS),
        (b"/orders/7", [b"8"], Problem.KEY_AMBIGUOUS),
        (b"/x", [b"7", b"8"], Problem.KEY_AMBIGUOUS),
        (b"/x?customer=7&customer=8", [], Problem.KEY_AMBIGUOUS),
        (b"/orders/", [], Problem.KEY_MISSING),
        (b"/orders//lines", [], Problem.KEY_MISSING),
        (b"/x?customer=", [], Problem.KEY_MISSING),
        (b"/x?customer", [], Problem.KEY_MISSING),
        (b"/x", [b""], Problem.KEY_MISSING),
        (b"/orders/7", [b""], Problem.KEY_AMBIGUOUS),
        (b"/orders/%zz", [], Problem.BAD_REQUEST),
        (b"/orders/%2", [], Problem.BAD_REQUEST),
        (b"/x?customer=%", [], Problem.BAD_REQUEST),
        (b"/orders/" + b"k" * 2049, [], Problem.KEY_TOO_LONG),
        (b"/x", [b"k" * 65_536], Problem.KEY_TOO_LONG),
    ],
)
def test_a_key_that_cannot_be_used_is_refused(target: bytes, headers: list[bytes], kind: Problem) -> None:
    """Two keys, an empty one, one too long and a broken escape are each a 400 of their own kind."""
    with pytest.raises(RequestError) as caught:
        RULES.find(target, headers)
    assert (caught.value.kind, caught.value.status) == (kind, 400)


@pytest.mark.parametrize(
    "rule", ["path:orders/{key}", "path:/orders", "path:/{key}/{key}", "cookie:x", "header:", "query", ""]
)
def test_a_rule_that_is_none_is_refused(rule: str) -> None:
    """A rule says what it looks at, and a template has one key."""
    with pytest.raises(ValueError, match=r"key"):
        KeyRules.parse([rule])


def test_templates() -> None:
    """`*` is one segment, at the end it is the rest; `{key}` may have text around it."""
    rules = KeyRules.parse(["path:/v1/*/orders/{key}", "path:/files/doc-{key}.txt"])
    assert rules.find(b"/v1/eu/orders/7", []) == b"7"
    assert rules.find(b"/v1/eu/x/orders/7", []) is None
    assert rules.find(b"/v1/eu/orders/7/lines", []) is None
    assert rules.find(b"/files/doc-7.txt", []) == b"7"
    assert rules.find(b"/files/doc-7xtxt", []) is None


@given(st.text(min_size=1, max_size=200))
def test_a_clients_text_is_the_same_key_everywhere(text: str) -> None:
    """quote() in path and query gives the key that the client's str means."""
    key = text.encode("utf-8", "surrogatepass")
    quoted = quote(key, safe="").encode()
    assert RULES.find(b"/orders/" + quoted, []) == key
    assert RULES.find(b"/x?customer=" + quoted, []) == key
    assert unquote_to_bytes(encode_key(key)) == key
    assert encode_key(key) == quoted


# --- what next

leaders = st.none() | st.builds(
    Leader,
    worker=st.just("w"),
    sid=st.just("s"),
    epoch=st.integers(1, 6),
    address=st.sampled_from(["", "127.0.0.1:1"]),
    revision=st.just(1),
)
facts = st.builds(
    Facts,
    leader=leaders,
    floor=st.integers(0, 6),
    tried=st.integers(0, 6),
    time_left_s=st.sampled_from([-1.0, 0.0, 0.5]),
    is_harmless_twice=st.booleans(),
    is_body_kept=st.booleans(),
    repeats=st.integers(0, REPEATS_MAX + 1),
)
AMBIGUOUS = {Happened.BROKEN, Happened.FORCED, Happened.UNCERTAIN, Happened.SILENT, Happened.TORN}


@given(st.sampled_from(Happened), facts)
def test_the_law_never_sends_what_must_not_be_sent(happened: Happened, known: Facts) -> None:
    """No epoch below the largest seen; nothing twice that may have been processed, unless that is harmless and not
    for ever; nothing whose body is gone; to nobody without an address."""
    step = next_step(happened, known)
    if isinstance(step, Send):
        assert step.leader is known.leader
        assert step.leader.address
        assert step.leader.epoch >= known.floor
        assert known.is_body_kept
        if happened in AMBIGUOUS:
            assert known.is_harmless_twice
            assert known.repeats < REPEATS_MAX
        if step.leader.epoch <= known.tried:
            assert LAW[happened].pause_s == 0
    if isinstance(step, Hold | AskAgain):
        assert known.time_left_s > 0, "nothing waits beyond its time"
        assert happened not in AMBIGUOUS or known.is_harmless_twice
    if isinstance(step, AskAgain):
        assert 0 < step.pause_s < math.inf
    if isinstance(step, PassOn):
        assert happened is Happened.UNCERTAIN
    if isinstance(step, Cut):
        assert happened is Happened.TORN


@given(st.sampled_from(Happened), facts)
def test_whoever_may_be_served_is_served(happened: Happened, known: Facts) -> None:
    """A request that surely was not processed is sent as soon as a leader with a larger epoch can be reached, and is
    told "unknown" never."""
    step = next_step(happened, known)
    if LAW[happened].again is Again.ALWAYS and known.is_body_kept:
        leader = known.leader
        if leader is not None and leader.address and leader.epoch >= known.floor and leader.epoch > known.tried:
            assert step == Send(leader)
        assert not (isinstance(step, Answer) and step.problem is Problem.OUTCOME_UNKNOWN)


def test_every_happening_has_its_rule() -> None:
    """The table is complete, and only what says when to come again says 503."""
    assert set(LAW) == set(Happened)
    for rule in LAW.values():
        for step in (rule.instead, rule.late):
            if isinstance(step, Answer):
                assert (step.status == 503) == bool(step.retry_after_s)


@pytest.mark.parametrize("method", sorted(SAFE_METHODS))
def test_safe_methods_are_harmless_twice(method: str) -> None:
    """RFC 9110, 9.2.1."""
    assert is_harmless_twice(method, has_idempotency_key=False, is_class_idempotent=False)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "get"])
def test_other_methods_are_not_unless_both_sides_say_so(method: str) -> None:
    """An Idempotency-Key counts only where the class removes duplicates. PUT and DELETE are idempotent by themselves,
    but a late second one may undo what came between."""
    assert not is_harmless_twice(method, has_idempotency_key=True, is_class_idempotent=False)
    assert not is_harmless_twice(method, has_idempotency_key=False, is_class_idempotent=True)
    assert is_harmless_twice(method.encode(), has_idempotency_key=True, is_class_idempotent=True)


@pytest.mark.parametrize("answer", [rule.late for rule in LAW.values()], ids=list(LAW))
def test_nobody_is_told_that_nothing_was_done_if_it_may_have_been(answer: Answer) -> None:
    """After a sending whose outcome nobody knows, a 503 of a later one is not the truth about a POST; about a GET it
    is."""
    assert last_word(answer, "POST", 0) == last_word(answer, b"GET", 1) == answer
    told = last_word(answer, b"POST", 1)
    assert told.status != 503
    assert told == answer or (answer.status, told.problem) == (503, Problem.OUTCOME_UNKNOWN)


OLD = Leader("a", "s1", 5, "127.0.0.1:1", 5)
NEW = Leader("b", "s2", 9, "127.0.0.1:2", 9)
STORIES: list[tuple[str, Happened, Facts, object]] = [
    ("arrives, led", Happened.ARRIVED, Facts(OLD), Send(OLD)),
    ("arrives, nobody leads", Happened.ARRIVED, Facts(None), Hold(0)),
    ("arrives, the view is behind a refusal", Happened.ARRIVED, Facts(OLD, floor=9, tried=5), Hold(8)),
    ("arrives while another was refused", Happened.ARRIVED, Facts(OLD, tried=5), AskAgain(5, 1.0)),
    ("draining, no successor yet", Happened.DRAINING, Facts(OLD, tried=5), AskAgain(5, 1.0)),
    ("draining, the successor is known", Happened.DRAINING, Facts(NEW, tried=5), Send(NEW)),
    ("suspended", Happened.SUSPENDED, Facts(OLD, tried=5), AskAgain(5, 0.25)),
    ("suspended for too long", Happened.SUSPENDED, Facts(OLD, tried=5, time_left_s=0), LAW[Happened.SUSPENDED].late),
    ("refused connection", Happened.NOT_OPENED, Facts(OLD, tried=5), AskAgain(5, 0.1)),
    ("GET broken", Happened.BROKEN, Facts(OLD, tried=5, is_harmless_twice=True), Send(OLD)),
    ("GET broken again", Happened.BROKEN, Facts(OLD, tried=5, is_harmless_twice=True, repeats=1), AskAgain(5, 0.03)),
    ("POST broken", Happened.BROKEN, Facts(NEW, tried=5), LAW[Happened.BROKEN].instead),
    ("POST, session ended", Happened.FORCED, Facts(NEW, tried=5), LAW[Happened.FORCED].instead),
    ("GET, session ended", Happened.FORCED, Facts(None, tried=5, is_harmless_twice=True), Hold(5)),
    ("POST, outcome unknown", Happened.UNCERTAIN, Facts(NEW, tried=5), PassOn()),
    ("GET, silent", Happened.SILENT, Facts(NEW, is_harmless_twice=True), LAW[Happened.SILENT].instead),
]


@pytest.mark.parametrize(
    ("happened", "known", "expected"), [story[1:] for story in STORIES], ids=[s[0] for s in STORIES]
)
def test_stories(happened: Happened, known: Facts, expected: object) -> None:
    """The law, told by example."""
    assert next_step(happened, known) == expected
