"""Whether the history of one key is linearizable: Wing and Gong's search, with Lowe's memory of what was tried.

A history is what clients lived: each operation with its begin, its end, and what it was told. It is linearizable if the
operations can be put in one order that keeps real time (what ended before another began comes first) and in which
each answer is the one that a single, correct object gives.

An operation whose outcome its client never learned (`ended_ns` None) stays open to the end of the history: it may take
effect at any moment after its begin, or never. One that surely was not done is left out by the caller: if it shows all
the same, nothing explains what others saw.

The cost is small for histories of some hundred operations of which a few overlap. Two cuts keep operations of unknown
outcome from doubling the search each: of those that are alike only the earliest is tried, and appends whose word no
answer shows are left out (if one took effect at all, it did so after everything that was seen). More than
`configurations_max` steps raise Undecided: a history that is neither right nor wrong is the caller's to make smaller.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

CONFIGURATIONS_MAX: Final = 1_000_000
_SHOWN: Final = 6

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on one key. `word` is what it appends ("" for a read or an addition of one)."""

    what: str
    """"read", "append" or "add"."""
    began_ns: int
    ended_ns: int | None
    """None: its outcome is not known."""
    word: str = ""
    seen: tuple[str, ...] | int | None = None
    """The list or the count that it was told: after its own effect."""
    name: str = ""
    """How it is called in what is said of it."""

    def __str__(self) -> str:
        seen = f" -> {shown(self.seen)}" if self.seen is not None else ""
        end = "never known" if self.ended_ns is None else f"{self.ended_ns / 1e9:.3f}"
        return f"{self.name or 'somebody'} {self.what} {self.word}{seen} ({self.began_ns / 1e9:.3f} to {end})"


class Model(Protocol[S]):
    """The one, correct object."""

    @property
    def initial(self) -> S: ...

    def step(self, state: S, operation: Operation) -> S | None:
        """The state after it; None if it cannot happen in this state."""
        ...

    def relevant(self, history: Sequence[Operation]) -> list[Operation]:
        """The history without operations of unknown outcome that cannot matter."""
        ...


class Lists:
    """A list to which unique words are appended; each operation is told the whole list."""

    initial: Final[tuple[str, ...]] = ()

    def step(self, state: tuple[str, ...], operation: Operation) -> tuple[str, ...] | None:
        after = (*state, operation.word) if operation.what == "append" else state
        return after if operation.seen is None or operation.seen == after else None

    def relevant(self, history: Sequence[Operation]) -> list[Operation]:
        seen = {word for operation in history if isinstance(operation.seen, tuple) for word in operation.seen}
        return [each for each in history if each.ended_ns is not None or each.word in seen]


class Counts:
    """A count to which ones are added; each operation is told the count."""

    initial: Final = 0

    def step(self, state: int, operation: Operation) -> int | None:
        after = state + 1 if operation.what == "add" else state
        return after if operation.seen is None or operation.seen == after else None

    def relevant(self, history: Sequence[Operation]) -> list[Operation]:
        return [each for each in history if each.ended_ns is not None or each.what == "add"]


class Undecided(Exception):
    """The search was given up."""


def faults(history: Sequence[Operation], model: Model[S], *, configurations_max: int = CONFIGURATIONS_MAX) -> list[str]:
    """Why this history is not linearizable; [] if it is. Raises Undecided."""
    search = _Search(sorted(model.relevant(history), key=lambda each: each.began_ns), model)
    if search.run(configurations_max):
        return []
    return [search.explain(), *_hints(history)]


class _Search(Generic[S]):
    """Depth first over (operations placed so far, state), never twice over the same."""

    def __init__(self, operations: Sequence[Operation], model: Model[S]) -> None:
        self.operations = operations
        self.model = model
        self.ends = [math.inf if each.ended_ns is None else each.ended_ns for each in operations]
        self.required = sum(1 << index for index, each in enumerate(operations) if each.ended_ns is not None)
        self.deepest: tuple[int, S] = (0, model.initial)
        self._depth = 0

    def run(self, configurations_max: int) -> bool:
        if not self.required:
            return True
        initial = self.model.initial
        tried = {(0, initial)}
        stack = [(0, initial, self.candidates(0))]
        while stack:
            placed, state, candidates = stack[-1]
            for index in candidates:
                after = self.model.step(state, self.operations[index])
                if after is None:
                    continue
                now_placed = placed | 1 << index
                if now_placed & self.required == self.required:
                    return True
                if (now_placed, after) in tried:
                    continue
                tried.add((now_placed, after))
                if len(tried) > configurations_max:
                    raise Undecided(f"{len(self.operations)} operations, {configurations_max} steps")
                if len(stack) > self._depth:
                    self._depth, self.deepest = len(stack), (now_placed, after)
                stack.append((now_placed, after, self.candidates(now_placed)))
                break
            else:
                stack.pop()
        return False

    def candidates(self, placed: int) -> Iterator[int]:
        """What can come next: all that began before the first end of what is not placed yet; soonest ended first."""
        found: list[int] = []
        alike: set[tuple[str, str]] = set()
        least_end = math.inf
        first = (~placed & (placed + 1)).bit_length() - 1
        for index in range(first, len(self.operations)):
            if placed >> index & 1:
                continue
            operation = self.operations[index]
            if operation.began_ns > least_end:
                break
            if operation.ended_ns is None:
                kind = (operation.what, operation.word)
                if kind in alike:
                    continue  # one that began earlier can stand in for it
                alike.add(kind)
            else:
                least_end = min(least_end, operation.ended_ns)
            found.append(index)
        found.sort(key=lambda index: self.ends[index])
        return iter(found)

    def explain(self) -> str:
        placed, state = self.deepest
        waiting = [str(self.operations[index]) for index in self.candidates(placed)]
        count = placed.bit_count()
        return (
            f"not linearizable: after {count} of {len(self.operations)} operations the state is {shown(state)}, "
            f"and none of these can come next: {'; '.join(waiting[:_SHOWN])}"
        )


def _hints(history: Sequence[Operation]) -> list[str]:
    """What the last list that was seen says by itself, in plain words."""
    told = [each for each in history if isinstance(each.seen, tuple) and each.ended_ns is not None]
    if not told:
        return []
    last = max(told, key=lambda each: (each.began_ns, each.ended_ns or 0))
    assert isinstance(last.seen, tuple)
    hints = []
    if len(set(last.seen)) != len(last.seen):
        hints.append(f"a word stands twice in {shown(last.seen)}")
    appended = {each.word: each for each in history if each.what == "append"}
    strange = [word for word in last.seen if word not in appended]
    if strange:
        hints.append(f"nobody's append, or one that was refused, stands in the list: {shown(tuple(strange))}")
    lost = [each for each in told if each.what == "append" and (each.ended_ns or 0) < last.began_ns]
    hints += [f"acknowledged and lost: {each}" for each in lost if each.word not in last.seen][:_SHOWN]
    return hints


def shown(value: object) -> str:
    """A list's ends, or the value itself."""
    if not isinstance(value, tuple):
        return str(value)
    words = [str(word) for word in value]
    return f"[{' '.join(words if len(words) <= 8 else [*words[:3], '…', *words[-3:]])}]"


def lost_words(history: Sequence[Operation], final: Sequence[str]) -> list[str]:
    """Acknowledged appends whose words are not in the list in the end."""
    acknowledged = [each.word for each in history if each.what == "append" and each.ended_ns is not None]
    return [word for word in acknowledged if word not in set(final)]
