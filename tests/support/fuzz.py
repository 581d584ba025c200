"""What fuzz tests share: how many examples, messages bent out of shape, and streams cut into pieces.

A fuzz test states a law of a reader: whatever comes, it returns a value or raises the one error it names, and how the
bytes were cut changes nothing.
"""

from collections.abc import Sequence
from typing import Any, Final

import hypothesis
import orjson
from hypothesis import strategies as st

LONG_TIMES: Final = 20
_is_long = False

INTS: Final = st.one_of(
    st.integers(-2, 40),
    st.sampled_from((2**31, 2**32, 2**48, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))),
)
TEXTS: Final = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ("0", "-1", "1_0", " 7 ", "²", "9" * 30, "9" * 4_299, "9" * 5_000, "0" * 5_000, "YQ==", "YQ", "up")
    ),
)
SCALARS: Final = st.one_of(st.none(), st.booleans(), INTS, st.floats(allow_nan=False, allow_infinity=False), TEXTS)
DEPTHS: Final = (200, 340, 500, 1_000)  # orjson reads 1,024 levels; CPython calls 1,000 deep, orjson writes 254


def go_long() -> None:
    """From now on `examples` gives the long profile."""
    global _is_long  # said once, by conftest, before the first test is imported
    _is_long = True


def examples(count: int) -> hypothesis.settings:
    """So many examples in the normal suite, LONG_TIMES as many under --long."""
    return hypothesis.settings(max_examples=count * (LONG_TIMES if _is_long else 1))


def json_values(names: Sequence[str]) -> st.SearchStrategy[Any]:
    """Values of JSON whose objects have some of these names."""
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(tuple(names)), inner, max_size=5)
        ),
        max_leaves=10,
    )


def deep(levels: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@st.composite
def bent_json(draw: st.DrawFn, value: Any, names: Sequence[str]) -> Any:
    """`value` with one to three of its inner values replaced, removed, renamed or buried deep."""
    for _ in range(draw(st.integers(1, 3))):
        value = _bend(draw, value, names)
    return value


def _bend(draw: st.DrawFn, value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        name = draw(st.sampled_from(sorted(value)))
        rest = {each: item for each, item in value.items() if each != name}
        match draw(st.integers(0, 7)):
            case 0:
                return rest
            case 1:
                return {**rest, draw(st.sampled_from(tuple(names))): value[name]}
            case 2:
                return {**value, draw(st.sampled_from(tuple(names))): draw(json_values(names))}
            case _:
                return {**rest, name: _bend(draw, value[name], names)}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case _:
                return [*value[:at], _bend(draw, value[at], names), *value[at + 1 :]]
    match draw(st.integers(0, 9)):
        case 0:
            return deep(draw(st.sampled_from(DEPTHS)))
        case 1:
            return draw(json_values(names))
        case _:
            return draw(SCALARS)


@st.composite
def bent_bytes(draw: st.DrawFn, raw: bytes, pieces: Sequence[bytes] = (b"\0", b"\r", b"\n", b"\xff")) -> bytes:
    """`raw` with zero to four places overwritten, cut out, doubled or filled with one of `pieces`."""
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(len(raw), start + draw(st.integers(0, 12)))
        match draw(st.integers(0, 4)):
            case 0:
                raw = raw[:start] + raw[end:]
            case 1:
                raw = raw[:end] + raw[start:]
            case 2:
                raw = raw[:start] + draw(st.binary(max_size=4)) + raw[end:]
            case _:
                raw = raw[:start] + draw(st.sampled_from(tuple(pieces))) + raw[end if draw(st.booleans()) else start :]
    return raw


def written(value: Any) -> bytes:
    """`value` as JSON, however deep: by hand where orjson gives up."""
    try:
        return orjson.dumps(value)
    except TypeError:
        pass
    parts: list[bytes] = []
    todo: list[Any] = [value]
    while todo:
        match todo.pop():
            case bytes() as raw:
                parts.append(raw)
            case dict() as each:
                items: list[Any] = [b"{"]
                for number, (name, item) in enumerate(each.items()):
                    items += [b"," if number else b"", orjson.dumps(name), b":", item]
                todo += reversed([*items, b"}"])
            case list() as each:
                items = [b"["]
                for number, item in enumerate(each):
                    items += [b"," if number else b"", item]
                todo += reversed([*items, b"]"])
            case int() as each if not isinstance(each, bool):
                parts.append(b"%d" % each)
            case each:
                parts.append(orjson.dumps(each))
    return b"".join(parts)


@st.composite
def cut(draw: st.DrawFn, raw: bytes, cuts_max: int = 6) -> list[bytes]:
    """`raw` in pieces; now and then byte by byte."""
    if draw(st.integers(0, 9)) == 0:
        return [raw[at : at + 1] for at in range(len(raw))]
    cuts = sorted(set(draw(st.lists(st.integers(1, max(1, len(raw) - 1)), max_size=cuts_max))))
    return [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True) if start < end]
