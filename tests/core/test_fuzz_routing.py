"""A key is found or refused whatever a client spells, and the same wherever it stands."""

import re
from typing import Final
from urllib.parse import quote

from hypothesis import given
from hypothesis import strategies as st

from shardlead.core.contract import KEY_BYTES_MAX
from shardlead.core.ring import hash_tag, slot_of
from shardlead.core.routing import KeyRules, check_key, decode_percent, encode_key, path_pattern
from shardlead.errors import RequestError
from tests.support.fuzz import bent_bytes, examples

RULES: Final = KeyRules.parse(("path:/k/{key}/*", "path:/o/*/x-{key}.json", "header:X-Key", "query:key", "query:k%2"))
PIECES: Final = (
    b"%",
    b"%2",
    b"%zz",
    b"%00",
    b"/",
    b"?",
    b"&",
    b"=",
    b"key=",
    b"\xff",
    b"/k/",
    b"+",
    b"%2F",
    b"a" * 2_100,
)
TARGETS: Final = st.sampled_from((b"/k/a", b"/k/a/b?key=a", b"/o/1/x-a.json?key=%61&other=1", b"/?key=a&key=b", b"*"))


@examples(300)
@given(
    TARGETS.flatmap(lambda target: bent_bytes(target, PIECES)),
    st.lists(st.sampled_from((b"a", b" a\t", b"", b"\xff", b"b", b"a" * 2_049)), max_size=2),
)
def test_any_target_has_a_key_or_none_or_is_refused(target: bytes, headers: list[bytes]) -> None:
    """A RequestError of 400; a key that is found can be sent on, and means the same there."""
    status = 400
    try:
        key = RULES.find(target, headers)
    except RequestError as exc:
        status = exc.status
    else:
        assert key is None or 0 < len(key) <= KEY_BYTES_MAX
        assert key is None or decode_percent(encode_key(key)) == key
        assert key is not None or not headers
    assert status == 400


@examples(200)
@given(st.binary(min_size=1, max_size=60))
def test_a_key_is_the_same_in_path_query_and_header(key: bytes) -> None:
    """Spelled as the contract spells it."""
    spelled = encode_key(key)
    assert spelled.decode("ascii") == quote(key, safe="")
    assert RULES.find(b"/k/" + spelled + b"/rest", ()) == key
    assert RULES.find(b"/o/any/x-" + spelled + b".json", ()) == key
    assert RULES.find(b"/?a=b&key=" + spelled, ()) == key
    if key == key.strip(b" \t"):
        assert RULES.find(b"/k/" + spelled + b"?key=" + spelled, (key,)) == key == check_key(key)


@examples(200)
@given(st.one_of(st.text(max_size=20), st.text(st.sampled_from("/*{}keyab."), max_size=20).map("/{key}".join)))
def test_any_template_is_a_pattern_or_a_value_error(template: str) -> None:
    """A pattern has one group, which finds what stands in its place."""
    try:
        pattern = path_pattern(template)
    except ValueError:
        return
    assert pattern.groups == 1
    closed = template.removesuffix("/*")
    path = "/".join("any" if part == "*" else part for part in closed.split("/")).replace("{key}", "77")
    fit = pattern.fullmatch(path.encode())
    assert fit is not None
    assert fit[1] == b"77"


@examples(200)
@given(st.lists(st.text(st.sampled_from("pathquery:/{}*header é\ud800"), max_size=12), max_size=3))
def test_any_rules_are_rules_or_a_value_error(rules: list[str]) -> None:
    """And rules can be asked."""
    try:
        parsed = KeyRules.parse(rules)
    except ValueError:
        return
    parsed.find(b"/a?b=c", ())


@examples(300)
@given(st.lists(st.sampled_from((b"{", b"}", b"a", b"{user}", b"{}", b"\xff")), max_size=8).map(b"".join))
def test_a_hash_tag_is_what_redis_says(key: bytes) -> None:
    """Held to a second reading: the first brace, the first closing one behind it, and something in between."""
    found = re.match(rb"[^{]*\{([^}]+)\}", key, re.DOTALL)
    tag = found[1] if found else key
    assert hash_tag(key) == tag
    assert slot_of(key, 64, hash_tags=True) == slot_of(tag, 64)
    assert 0 <= slot_of(key, 64) < 64
