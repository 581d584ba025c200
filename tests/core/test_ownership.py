"""The life of one shard, told in stories and walked at random."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from shardlead.core import ownership
from shardlead.core.model import Want
from shardlead.core.ownership import (
    Cancel,
    Claim,
    Claiming,
    ClaimLost,
    Close,
    Closed,
    Command,
    Confirmed,
    Drain,
    Due,
    Event,
    Failed,
    FencedOff,
    GivenUp,
    Gone,
    HandOver,
    Idle,
    Open,
    Opened,
    Passed,
    Refused,
    Remint,
    Renewed,
    Send,
    Serve,
    Serving,
    State,
    Suspended,
    Wait,
    WaitOver,
    Wanted,
    Won,
    WorkEnded,
    epoch_led,
    step,
)

STORIES = Path(__file__).parent / "stories" / "ownership"
WORDS = {**vars(ownership), "WANT7": Want(target="w2", target_sid="s2", target_lease=2, epoch_seen=7)}


def stories() -> Iterator[tuple[str, list[str]]]:
    for path in sorted(STORIES.glob("*.txt")):
        for block in path.read_text().split("\n\n"):
            title, *lines = block.strip().splitlines()
            yield f"{path.stem}: {title.removeprefix('# ')}", lines


def read(text: str) -> object:
    return eval(text, WORDS)  # a story's words are constructors of core.ownership; the files are ours


@pytest.mark.parametrize("lines", [pytest.param(lines, id=title) for title, lines in stories()])
def test_story(lines: list[str]) -> None:
    """Each line's event leads to the state and the commands that stand beside it."""
    state = read(lines[0])
    for line in lines[1:]:
        event, rest = line.split("->")
        after, commands = rest.split("|")
        expected = (read(after.strip()), (read(commands.strip()),) if commands.strip() else ())
        actual = step(state, read(event.strip()))  # type: ignore[arg-type]  # as the story says
        assert expected == actual, line
        state = actual[0]


def answers(command: Command, epoch: int, rng: random.Random) -> Event:
    """How the world may answer a command; `epoch` is the newest the store has given so far."""
    active = rng.random() < 0.8
    match command:
        case Claim():
            return _one_of(rng, [Won(epoch + 1, active, rng.random() < 0.3), ClaimLost(), Won(epoch + 1, active)])
        case Wait():
            return WaitOver(active)
        case Open():
            return _one_of(rng, [Opened(), Opened(), Opened(), Failed("open"), FencedOff("newer")])
        case Drain() | Cancel():
            return WorkEnded()
        case Close():
            return Closed()
        case Send(_, HandOver()):
            return _one_of(rng, [Passed(), Refused("gone", rng.random() < 0.5), Gone("other")])
        case Send(_, Remint()):
            return _one_of(rng, [Passed(epoch + 1, active, must_wait=rng.random() < 0.3), Gone("other")])
        case Send():
            return _one_of(rng, [Passed(), Passed(), Gone("other"), Renewed(epoch + 1)])
        case _:
            raise AssertionError(command)


def _one_of(rng: random.Random, events: list[Event]) -> Event:
    return rng.choice(events)


def disturbances(state: State, rng: random.Random) -> Event:
    """What may happen at any time, whatever the shard is doing."""
    want = Want(target="w2", target_sid="s2", target_lease=2, epoch_seen=rng.choice([epoch_led(state), 1]))
    return _one_of(
        rng,
        [
            Due(),
            Suspended(rng.random() < 0.5),
            Confirmed(),
            Gone("lost"),
            GivenUp("stop"),
            Wanted(want, 5),
            FencedOff("newer"),
            Failed("run"),
            Won(epoch_led(state)) if epoch_led(state) else ClaimLost(),
        ],
    )


@pytest.mark.parametrize("first_seed", range(0, 300, 30))
def test_any_walk_keeps_the_law(first_seed: int) -> None:
    """Whatever happens in whatever order, at any state: see `walk`. Together the walks reach every state."""
    reached = {kind for seed in range(first_seed, first_seed + 30) for kind in walk(seed)}
    assert reached == set(get_args(State))


def walk(seed: int) -> set[type]:
    """Whatever happens in whatever order: one object at a time, opened and closed once, and an epoch that was given
    up in a transaction is never served again (I14)."""
    rng = random.Random(seed)
    state: State = Idle()
    pending: list[Command] = []
    newest = 0
    open_epochs: list[int] = []
    given_up: set[int] = set()
    reached: set[type] = {Idle}
    for _ in range(200):
        if pending and rng.random() < 0.6:
            command = pending.pop(rng.randrange(len(pending)))
            event = answers(command, newest, rng)
            if not fits(state, command):
                continue  # a shell's task that finds itself overtaken says nothing
            if isinstance(event, Closed):
                assert len(open_epochs) == 1
                open_epochs.pop()
            newest = max(newest, getattr(event, "epoch", 0), getattr(event, "new_epoch", 0))
        elif given_up and isinstance(state, Idle | Claiming) and rng.random() < 0.1:
            event = Won(max(given_up))  # a look at the key that was answered before it went
        else:
            event = disturbances(state, rng)
            if isinstance(event, Failed) and not isinstance(state, Serving):
                continue
        before = state
        state, commands = step(state, event)
        reached.add(type(state))
        for command in commands:
            match command:
                case Open(epoch):
                    assert not open_epochs, f"{before} {event}: a second object"
                    assert epoch not in given_up
                    open_epochs.append(epoch)
                case Serve():
                    assert isinstance(state, Serving)
                    assert open_epochs == [state.epoch]
                case Send(epoch):
                    assert not open_epochs, f"{before} {event}: sent while the object is open"
                    given_up.add(epoch)
                case _:
                    pass
        pending.extend(command for command in commands if not isinstance(command, Serve))
        assert epoch_led(state) not in given_up or epoch_led(state) == 0
    return reached


def fits(state: State, command: Command) -> bool:
    """Whether the command is still what the state waits for; as worker.objects asks before it reports an end."""
    match command:
        case Claim():
            return isinstance(state, Claiming)
        case Wait():
            return isinstance(state, ownership.Waiting)
        case Open(epoch):
            return state == ownership.Opening(epoch)
        case Drain():
            return isinstance(state, ownership.Draining)
        case Cancel():
            return isinstance(state, ownership.Stopping)
        case Close():
            return isinstance(state, ownership.Closing)
        case Send(epoch, goal):
            return state == ownership.Passing(epoch, goal)
        case Serve():
            return False
