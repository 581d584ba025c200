"""The checker that judges histories: what it must find, what it must let pass, and a slow, plain one beside it."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.linearizable import Counts, Lists, Model, Operation, Undecided, faults, lost_words


def append(word: str, began: int, ended: int | None, *seen: str) -> Operation:
    return Operation("append", began, ended, word, tuple(seen) if ended is not None else None)


def read(began: int, ended: int, *seen: str) -> Operation:
    return Operation("read", began, ended, "", tuple(seen))


def add(began: int, ended: int | None, seen: int | None = None) -> Operation:
    return Operation("add", began, ended, "", seen)


def look(began: int, ended: int, seen: int) -> Operation:
    return Operation("read", began, ended, "", seen)


GOOD_LISTS = {
    "nothing happened": [],
    "one after the other": [append("a", 0, 1, "a"), append("b", 2, 3, "a", "b"), read(4, 5, "a", "b")],
    "at the same time, either order": [append("a", 0, 9, "b", "a"), append("b", 1, 8, "b"), read(2, 7, "b")],
    "an unknown one that never took effect": [append("a", 0, None), read(5, 6), append("b", 7, 8, "b")],
    "an unknown one that took effect at once": [append("a", 0, None), read(5, 6, "a")],
    "an unknown one that took effect late": [
        append("a", 0, None),
        read(5, 6),
        append("b", 7, 8, "b"),
        read(9, 10, "b"),
        read(11, 12, "b", "a"),
    ],
    "touching ends may go either way": [append("a", 0, 5, "b", "a"), append("b", 5, 6, "b")],
}

BAD_LISTS = {
    "a stale read": [append("a", 0, 1, "a"), read(2, 3)],
    "a lost write": [append("a", 0, 1, "a"), append("b", 2, 3, "b"), read(4, 5, "b")],
    "a word applied twice": [append("a", 0, 1, "a"), read(2, 3, "a", "a")],
    "an unknown one applied twice": [append("a", 0, None), read(2, 3, "a"), read(4, 5, "a", "a")],
    "an unknown one applied before it was sent": [read(0, 1, "a"), append("a", 2, None)],
    "a read that goes back": [append("a", 0, None), read(2, 3, "a"), read(4, 5)],
    "a word of nobody": [read(0, 1, "x")],
    "two leaders, two lists": [append("a", 0, 1, "a"), append("b", 2, 3, "a", "b"), append("c", 4, 5, "a", "c")],
}


@pytest.mark.parametrize("name", GOOD_LISTS)
def test_a_good_list_history_passes(name: str) -> None:
    """What one correct list could have answered is linearizable."""
    assert faults(GOOD_LISTS[name], Lists()) == []


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_history_is_found(name: str) -> None:
    """What no correct list could have answered is not, and the reason is said."""
    assert "not linearizable" in faults(BAD_LISTS[name], Lists())[0]


def test_what_was_lost_is_named() -> None:
    """An acknowledged word that the last reader did not see is named, with the operation that appended it."""
    history = BAD_LISTS["a lost write"]
    assert any("acknowledged and lost" in text and "append a" in text for text in faults(history, Lists()))
    assert lost_words(history, ("b",)) == ["a"]


def test_counts_pass_and_are_found() -> None:
    """A count that skips an unknown addition or takes it late is right; one that goes back, is told twice or counts an
    addition twice is not."""
    assert faults([add(0, 1, 1), add(2, None), look(4, 5, 1), add(6, 7, 3), look(8, 9, 3)], Counts()) == []
    assert faults([add(0, 1, 1), add(2, 3, 1)], Counts())
    assert faults([add(0, 1, 1), look(2, 3, 0)], Counts())
    assert faults([add(0, None), look(2, 3, 2)], Counts())
    assert faults([look(0, 1, 1), add(2, None)], Counts())


def test_many_unknown_additions_cost_little() -> None:
    """Forty additions that nobody knows the outcome of do not make two to the fortieth cases."""
    history = [add(number, None) for number in range(40)]
    history += [look(100 + 2 * number, 101 + 2 * number, number // 2) for number in range(40)]
    assert faults(history, Counts(), configurations_max=20_000) == []
    assert faults([*history, look(1_000, 1_001, 3)], Counts(), configurations_max=20_000)


def test_a_search_that_grows_too_large_says_so() -> None:
    """Undecided is neither yes nor no."""
    history = [Operation("append", 0, 100, f"w{number}", None) for number in range(12)]
    with pytest.raises(Undecided):
        faults([*history, read(200, 201)], Lists(), configurations_max=100)


# --- beside a plain one ----------------------------------------------------------------------------------------------


def is_linearizable(history: Sequence[Operation], model: Model[Any]) -> bool:
    """Every subset of the unknown, in every order."""
    known = [each for each in history if each.ended_ns is not None]
    unknown = [each for each in history if each.ended_ns is None]
    for count in range(len(unknown) + 1):
        for taken in itertools.combinations(unknown, count):
            if any(_fits(order, model) for order in itertools.permutations([*known, *taken])):
                return True
    return False


def _fits(order: Sequence[Operation], model: Model[Any]) -> bool:
    state = model.initial
    latest_begin = -1
    for operation in order:
        latest_begin = max(latest_begin, operation.began_ns)
        if operation.ended_ns is not None and operation.ended_ns < latest_begin:
            return False  # something that began after its end stands before it
        state = model.step(state, operation)
        if state is None:
            return False
    return True


@st.composite
def histories(draw: st.DrawFn, is_list: bool) -> list[Operation]:
    """Up to six operations; answers are drawn from what could have been, and now and then from what could not."""
    count = draw(st.integers(1, 6))
    operations = []
    words: list[str] = []
    for number in range(count):
        began = draw(st.integers(0, 12))
        is_known = draw(st.integers(0, 3)) > 0
        ended = began + draw(st.integers(0, 6)) if is_known else None
        is_read = draw(st.booleans())
        word = ""
        if is_list and not is_read:
            word = f"w{number}"
            words.append(word)
        what = "read" if is_read else "append" if is_list else "add"
        operations.append((what, began, ended, word))
    order = draw(st.permutations(words))
    history = []
    for what, began, ended, word in operations:
        seen: tuple[str, ...] | int | None = None
        if ended is not None:
            if not is_list:
                seen = draw(st.integers(0, count))
            elif what == "append" and draw(st.integers(0, 5)):
                seen = tuple(order[: order.index(word) + 1])
            else:
                seen = tuple(order[: draw(st.integers(0, len(order)))])
        history.append(Operation(what, began, ended, word, seen))
    return history


@settings(max_examples=400)
@given(histories(is_list=True))
def test_lists_as_a_plain_search_says(history: list[Operation]) -> None:
    """On small random histories of lists the checker says what trying every order says."""
    assert (faults(history, Lists()) == []) == is_linearizable(history, Lists())


@settings(max_examples=400)
@given(histories(is_list=False))
def test_counts_as_a_plain_search_says(history: list[Operation]) -> None:
    """The same for counts."""
    assert (faults(history, Counts()) == []) == is_linearizable(history, Counts())
