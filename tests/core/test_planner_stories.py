"""The planner's stories: what is given, what happens, what is then so. They stand in stories/planner/*.txt.

A line is `given`, `when`, `then` or `and` and a phrase; the phrases are the methods below, found by their patterns.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardlead.core.planner import Hold, Limits, Reason
from tests.core.world import QUIET_S, World

STORIES = Path(__file__).parent / "stories" / "planner"

Step = Callable[..., None]
PHRASES: list[tuple[re.Pattern[str], Step]] = []


def phrase(pattern: str) -> Callable[[Step], Step]:
    def keep(step: Step) -> Step:
        PHRASES.append((re.compile(pattern), step))
        return step

    return keep


class Teller:
    """The world of one story."""

    def __init__(self) -> None:
        self.world = World(0)
        self.moved_before = 0

    # --- given

    @phrase(r"(\d+) shards")
    def shards(self, count: str) -> None:
        self.world = World(int(count), self.world.limits)

    @phrase(r"limits (.+)")
    def limits(self, text: str) -> None:
        values: dict[str, Any] = {}
        for item in text.split(", "):
            name, value = item.split(" ")
            values[name] = float(value) if name.endswith(("_s", "_share")) else int(value)
        self.world.limits = replace(self.world.limits, **values)

    @phrase(r"workers? ([\w, ]+?)(?: in zone (\w+))?(?: of capacity ([\d.]+))?(?: joins?)?")
    def workers(self, names: str, zone: str | None, capacity: str | None) -> None:
        for name in names.split(", "):
            self.world.join(name, zone=zone or "", capacity=float(capacity or 1))

    @phrase(r"(\w+) leads ([\d, ]+) without assignment")
    def leads(self, name: str, shards: str) -> None:
        for shard in shards.split(", "):
            self.world.lead(int(shard), name)

    # --- when

    @phrase(r"all is carried out")
    def carried_out(self) -> None:
        self.world.moved.clear()
        self.world.settle()

    @phrase(r"the controller looks")
    def look(self) -> None:
        self.world.look()

    @phrase(r"the workers obey")
    def obey(self) -> None:
        self.world.obey()

    @phrase(r"(\w+) dies")
    def dies(self, name: str) -> None:
        self.world.die(name)

    @phrase(r"([\w, ]+) die at once")
    def die_at_once(self, names: str) -> None:
        self.world.die_at_once(*names.split(", "))

    @phrase(r"(\w+) begins to stop")
    def begin_stop(self, name: str) -> None:
        self.world.begin_stop(name)

    @phrase(r"(\w+) has stopped")
    def finish_stop(self, name: str) -> None:
        self.world.finish_stop(name)

    @phrase(r"operators cordon (\w+)")
    def cordon(self, name: str) -> None:
        self.world.cordoned.add(name)

    @phrase(r"operators drain (\w+)")
    def drain(self, name: str) -> None:
        self.world.drained.add(name)

    @phrase(r"operators release (\w+)")
    def release(self, name: str) -> None:
        self.world.cordoned.discard(name)
        self.world.drained.discard(name)

    @phrase(r"operators pin (\d+) to (\w+)")
    def pin(self, shard: str, name: str) -> None:
        self.world.pins[int(shard)] = name

    @phrase(r"operators unpin (\d+)")
    def unpin(self, shard: str) -> None:
        del self.world.pins[int(shard)]

    @phrase(r"operators freeze")
    def freeze(self) -> None:
        self.world.is_frozen = True

    @phrase(r"operators thaw")
    def thaw(self) -> None:
        self.world.is_frozen = False

    @phrase(r"membership has just changed")
    def unrest(self) -> None:
        self.world.still_for_s = self.world.waited_s = 0.0

    @phrase(r"(\d+) s of a cold start have passed")
    def waited(self, seconds: str) -> None:
        self.world.waited_s = float(seconds)

    @phrase(r"membership has been still")
    def still(self) -> None:
        self.world.still_for_s = QUIET_S

    @phrase(r"a worker that has stopped is expected back for ([\d.]+) s more")
    def expected(self, seconds: str) -> None:
        self.world.return_in_s = float(seconds)

    @phrase(r"nobody is expected back")
    def unexpected(self) -> None:
        self.world.return_in_s = 0.0

    @phrase(r"nobody counts as departed")
    def nobody_departed(self) -> None:
        self.world.departed.clear()

    @phrase(r"membership has been still for ([\d.]+) s")
    def still_for(self, seconds: str) -> None:
        self.world.still_for_s = float(seconds)

    @phrase(r"([\w, ]+) counts? as departed")
    def departed(self, names: str) -> None:
        self.world.departed |= set(names.split(", "))

    @phrase(r"(\w+) is shunned")
    def shunned(self, name: str) -> None:
        self.world.shunned.add(name)

    @phrase(r"(\w+) is trusted again")
    def trusted(self, name: str) -> None:
        self.world.shunned.discard(name)

    @phrase(r"shards ([\d, ]+) are troubled")
    def troubled(self, shards: str) -> None:
        self.world.troubled = {int(shard) for shard in shards.split(", ")}

    # --- then

    @phrase(r"the counts are ((?!even).+)")
    def counts(self, text: str) -> None:
        expected = {name: int(count) for name, count in (item.split(" ") for item in text.split(", "))}
        assert expected == self.world.counts()

    @phrase(r"the counts are even")
    def counts_even(self) -> None:
        counts = self.world.counts()
        assert max(counts.values()) - min(counts.values()) <= 1

    @phrase(r"(\d+) shards? (?:has|have) moved")
    def moved(self, count: str) -> None:
        assert int(count) == sum(self.world.moved.values())

    @phrase(r"no shard has moved twice")
    def once(self) -> None:
        assert max(self.world.moved.values(), default=0) <= 1

    @phrase(r"(\d+) has no leader")
    def leaderless(self, shard: str) -> None:
        assert int(shard) not in self.world.leaders

    @phrase(r"every shard has a leader")
    def all_led(self) -> None:
        assert set(range(self.world.shards)) == set(self.world.leaders)

    @phrase(r"(\d+) is led by (\w+)")
    def led_by(self, shard: str, name: str) -> None:
        assert name == self.world.leaders[int(shard)].worker

    @phrase(r"the order of (\d+) is ([\w, ]+)")
    def order(self, shard: str, names: str) -> None:
        assert tuple(names.split(", ")) == self.world.order(int(shard))

    @phrase(r"the copies of (\d+) stand with ([\w, ]+)")
    def copies(self, shard: str, names: str) -> None:
        assert set(names.split(", ")) == set(self.world.copies[int(shard)])

    @phrase(r"the plan moves (\d+) for (.+)")
    def plan_moves(self, count: str, reason: str) -> None:
        assert int(count) == sum(move.reason is Reason(reason) for move in self.world.last.moves)

    @phrase(r"the plan begins (\d+) moves?")
    def plan_begins(self, count: str) -> None:
        assert int(count) == sum(move.is_new for move in self.world.last.moves)

    @phrase(r"the plan moves (\d+) from (\w+|nobody) to (\w+) for (.+)")
    def plan_moves_one(self, shard: str, source: str, target: str, reason: str) -> None:
        found = [move for move in self.world.last.moves if move.shard == int(shard)]
        assert [(source.replace("nobody", ""), target, Reason(reason))] == [
            (move.source, move.target, move.reason) for move in found
        ]

    @phrase(r"the plan writes (\d+)")
    def plan_writes(self, count: str) -> None:
        assert int(count) == len(self.world.last.writes)

    @phrase(r"the plan holds (\d+) since (.+)")
    def plan_holds(self, count: str, hold: str) -> None:
        assert [int(count)] == [held.count for held in self.world.last.held if held.hold is Hold(hold)]

    @phrase(r"the plan holds nothing")
    def plan_holds_nothing(self) -> None:
        assert self.world.last.held == ()

    @phrase(r"after (\w+)'s death the counts would be (.+)")
    def after_death(self, name: str, text: str) -> None:
        expected = {other: int(count) for other, count in (item.split(" ") for item in text.split(", "))}
        assert expected == self.world.counts_after_death(name)

    @phrase(r"each has a successor in another zone")
    def zones(self) -> None:
        zone = {name: member.record.zone for name, member in self.world.members.items()}
        for shard in range(self.world.shards):
            first, *others = self.world.order(shard)
            assert any(zone[other] != zone[first] for other in others), self.world.order(shard)


def stories() -> Iterator[tuple[str, list[str]]]:
    for path in sorted(STORIES.glob("*.txt")):
        for block in path.read_text().split("\n\n"):
            title, *lines = block.strip().splitlines()
            yield f"{path.stem}: {title.removeprefix('# ')}", lines


@pytest.mark.parametrize("lines", [pytest.param(lines, id=title) for title, lines in stories()])
def test_story(lines: list[str]) -> None:
    """What the story says comes true, line by line."""
    teller = Teller()
    for line in lines:
        _, text = line.split(" ", 1)
        for pattern, step in PHRASES:
            match = pattern.fullmatch(text)
            if match:
                try:
                    step(teller, *match.groups())
                except AssertionError as exc:
                    raise AssertionError(f"{line}\n{exc}\n{teller.world.last}") from exc
                break
        else:
            pytest.fail(f"no phrase is like: {line}")


def test_limits_are_those_of_the_settings() -> None:
    """The planner's defaults are the controller's, so that stories tell of the real thing."""
    from shardlead.config import ControllerSettings

    settings = ControllerSettings()
    assert Limits() == Limits(
        moves_in_flight_max=settings.moves_in_flight_max,
        moves_per_worker_max=settings.moves_per_worker_max,
        settle_s=settings.settle_s,
        first_wait_max_s=settings.first_wait_max_s,
        brake_share=settings.brake_share,
        successors=settings.successors,
    )
