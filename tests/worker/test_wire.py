"""The contract's words: keys survive their spelling, and answers spell what the router reads."""

from urllib.parse import quote

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.core import contract
from shardlead.core.contract import Refused
from shardlead.errors import RequestError
from shardlead.worker.admission import Turned
from shardlead.worker.wire import application_error, key_of, outcome_unknown, refusal


@given(st.binary(min_size=1, max_size=contract.KEY_BYTES_MAX))
def test_any_key_survives_its_spelling(key: bytes) -> None:
    """The router's quote(key, safe="") is read back to the same bytes."""
    assert key_of(quote(key, safe="")) == key


@given(st.text(alphabet=[chr(code) for code in range(0x21, 0x7F) if chr(code) != "%"], min_size=1, max_size=50))
def test_what_needs_no_escape_may_stand_unescaped(text: str) -> None:
    """Other clients' encoders leave more characters alone; they mean the same key."""
    assert key_of(text) == text.encode() == key_of(quote(text, safe=""))


@given(st.text(max_size=50))
def test_what_is_no_spelling_is_refused(text: str) -> None:
    """Any other text is a RequestError, nothing else."""
    try:
        key = key_of(text)
    except RequestError:
        return
    assert 0 < len(key) <= len(text)


@pytest.mark.parametrize("reason", list(Refused))
def test_a_refusal_says_reason_epoch_and_leader(reason: Refused) -> None:
    """Suspended is a 503 that asks for patience, everything else a 421."""
    answer = refusal(3, Turned(reason, 1182, "w2 10.0.0.2:9000 1190"))
    is_suspended = reason is Refused.SUSPENDED
    assert answer.status == (503 if is_suspended else 421)
    assert answer.headers[contract.REFUSED] == reason.value
    assert answer.headers[contract.EPOCH] == "1182"
    assert answer.headers[contract.LEADER] == "w2 10.0.0.2:9000 1190"
    assert ("Retry-After" in answer.headers) is is_suspended
    assert answer.content_type == contract.PROBLEM_JSON
    assert isinstance(answer.body, bytes)
    assert orjson.loads(answer.body)["shard"] == 3


def test_no_leader_is_no_header() -> None:
    """An unknown leader is left out, not empty."""
    assert contract.LEADER not in refusal(3, Turned(Refused.STALE, 1)).headers


def test_an_unknown_outcome_is_marked_and_advises() -> None:
    """Only the runtime's own 502 has the header; the advice depends on what the class can take."""
    for is_idempotent, advice in ((True, b"Idempotency-Key"), (False, b"look before")):
        answer = outcome_unknown(3, is_idempotent=is_idempotent)
        assert (answer.status, answer.headers[contract.OUTCOME]) == (502, contract.OUTCOME_IS_UNKNOWN)
        assert isinstance(answer.body, bytes)
        assert advice in answer.body
    assert contract.OUTCOME not in application_error(3).headers
