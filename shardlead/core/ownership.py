"""The life of one shard at one worker: states, what may happen in each, and what is to be done about it.

    Idle ──due──▸ Claiming ──won──▸ (Waiting ▸) Opening ──opened──▸ Serving
      ▴                                ▴ ▴                            │ wanted, given up
      │                     reminted ──┘ │ confirmed                  ▾
      │                                Paused ◂──suspended, idle── Draining ──work ended──▸ Closing
      └──────────── handed over, resigned, gone ◂── Passing ◂──closed────────────────────────┘
    Opening, Serving, Draining ──suspended while busy, session lost, leadership gone──▸ Stopping ──work ended──▸ Closing

Law: protocol.md A.3 and A.5. A leadership is served under one epoch by one object, opened after its barrier and
closed exactly once. Once a transaction that gives an epoch up was *sent* (Passing), that epoch is dead here for ever,
whatever became of the transaction. The same epoch goes on after a suspension only where nothing was running and
nothing was cancelled. `step` is a pure function; an event that a state cannot have raises AssertionError.
"""

from dataclasses import dataclass, replace
from typing import assert_never

from shardlead.core.model import Want

# --- what is done with a leadership that ends --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HandOver:
    """T5: pass it to the worker that wants it."""

    want: Want
    want_revision: int


@dataclass(frozen=True, slots=True)
class Resign:
    """T4: give it up, with an offer to the next worker. `is_failure`: the shard could not be served here."""

    reason: str
    is_failure: bool = False


@dataclass(frozen=True, slots=True)
class Remint:
    """T5s: keep it under a new epoch, with a fresh object."""

    reason: str


@dataclass(frozen=True, slots=True)
class Drop:
    """It is known to be gone: there is nothing to send."""

    reason: str


Goal = HandOver | Resign | Remint | Drop

# --- states ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Idle:
    """Not led here and nothing of it runs here. Epochs up to `dead_epoch` were ours and never come back."""

    dead_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Claiming:
    """A claim (T1) is under way, or its outcome is not known yet; it is repeated until it is."""

    dead_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """Led, but the former leader's last effects may still be on their way: an unfenced class waits."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Opening:
    """The application's object is being made: barrier first, then load."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Serving:
    epoch: int


@dataclass(frozen=True, slots=True)
class Draining:
    """New requests are refused, running ones end."""

    epoch: int
    goal: Goal


@dataclass(frozen=True, slots=True)
class Stopping:
    """Everything of it was cancelled and is ending: the right to work has gone."""

    epoch: int
    goal: Goal


@dataclass(frozen=True, slots=True)
class Closing:
    """The object's close() runs."""

    epoch: int
    goal: Goal


@dataclass(frozen=True, slots=True)
class Passing:
    """The transaction that ends this epoch was sent, perhaps more than once; its outcome is awaited."""

    epoch: int
    goal: HandOver | Resign | Remint


@dataclass(frozen=True, slots=True)
class Paused:
    """Led, as far as we know, by a session that is suspended. With `is_open` the object stands, idle and untouched."""

    epoch: int
    is_open: bool


State = Idle | Claiming | Waiting | Opening | Serving | Draining | Stopping | Closing | Passing | Paused

# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Due:
    """It is this worker's turn to claim."""


@dataclass(frozen=True, slots=True)
class Won:
    """The shard is ours under `epoch`: a claim was acknowledged, a handoff's offer seen, an audit found our key.

    `must_wait`: the former tenure did not end cleanly and the class is unfenced. `is_active`: the session is."""

    epoch: int
    is_active: bool = True
    must_wait: bool = False


@dataclass(frozen=True, slots=True)
class ClaimLost:
    """Another leads it, or the claim was given up."""


@dataclass(frozen=True, slots=True)
class WaitOver:
    is_active: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    pass


@dataclass(frozen=True, slots=True)
class Failed:
    """open() or run() raised or took too long, or healthy() said no."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """A warm target asks for it, having seen our epoch."""

    want: Want
    want_revision: int


@dataclass(frozen=True, slots=True)
class GivenUp:
    """This worker lets it go without a target (it stops, and nobody wants the shard; or it cannot serve it, which is a
    failure)."""

    reason: str
    is_failure: bool = False


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """No request, no background work and no thread of this leadership runs any more."""


@dataclass(frozen=True, slots=True)
class Closed:
    pass


@dataclass(frozen=True, slots=True)
class Passed:
    """The transaction of `Passing` was applied (for a re-mint: with this new epoch; `must_wait` as in `Won`)."""

    new_epoch: int = 0
    is_active: bool = True
    must_wait: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The handoff was refused though the shard is still ours: its target is gone or wants it no more.

    `may_keep`: this worker may lead it again; else (it stops) it resigns."""

    reason: str
    may_keep: bool


@dataclass(frozen=True, slots=True)
class Renewed:
    """While it is given up: a re-mint that was sent before has been applied, and the shard is ours under this newer
    epoch, which nobody has served."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Suspended:
    """The session's deadline passed. `is_busy`: something of this shard was running."""

    is_busy: bool


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The session is active again and T3 found our epoch on the shard."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The leadership has ended in the store: key missing or another's, or the whole session lost."""

    reason: str


@dataclass(frozen=True, slots=True)
class FencedOff:
    """The resource has registered a newer epoch than ours."""

    reason: str


Event = (
    Due
    | Won
    | ClaimLost
    | WaitOver
    | Opened
    | Failed
    | Wanted
    | GivenUp
    | WorkEnded
    | Closed
    | Passed
    | Refused
    | Renewed
    | Suspended
    | Confirmed
    | Gone
    | FencedOff
)

# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """Send T1 until its outcome is known."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Let TTL + delta pass, then say WaitOver."""


@dataclass(frozen=True, slots=True)
class Open:
    """Make a fresh object for `epoch`: construct, open() within its time-out; then say Opened or Failed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Admit requests, start run()."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Admit no more; when running requests have ended (bounded), end run(); then say WorkEnded."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Revoke the lead at once and cancel everything of it; when all has ended say WorkEnded."""


@dataclass(frozen=True, slots=True)
class Close:
    """Call close() within its time-out, exactly once an object; then say Closed."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send the goal's transaction, again and again until it is decided."""

    epoch: int
    goal: HandOver | Resign | Remint


Command = Claim | Wait | Open | Serve | Drain | Cancel | Close | Send
Step = tuple[State, tuple[Command, ...]]


def step(state: State, event: Event) -> Step:
    """The next state and what is to be done. Raises AssertionError for an event that cannot happen in `state`."""
    match state:
        case Idle() | Claiming():
            return _outside(state, event)
        case Waiting() | Opening() | Paused():
            return _before_service(state, event)
        case Serving():
            return _in_service(state, event)
        case Draining() | Stopping() | Closing():
            return _ending(state, event)
        case Passing():
            return _passing(state, event)
        case _:
            assert_never(state)


def epoch_led(state: State) -> int:
    """The epoch under which this worker holds the shard, 0 where it holds none or has given it up."""
    match state:
        case Idle() | Claiming() | Passing():
            return 0
        case Draining(epoch, goal) | Stopping(epoch, goal) | Closing(epoch, goal):
            return 0 if isinstance(goal, Drop) else epoch
        case Waiting(epoch) | Opening(epoch) | Serving(epoch) | Paused(epoch):
            return epoch
        case _:
            assert_never(state)


def is_ending(state: State) -> bool:
    """Whether a leadership is on its way out here: its work ends, or its last transaction is under way."""
    return isinstance(state, Draining | Stopping | Closing | Passing)


def _outside(state: Idle | Claiming, event: Event) -> Step:
    dead_epoch = state.dead_epoch
    match event:
        case Due():
            return (state, ()) if isinstance(state, Claiming) else (Claiming(dead_epoch), (Claim(),))
        case Won(epoch) if epoch <= dead_epoch:
            # our own release, seen late or applied late: the key, if it stands, is ours to delete and not to serve
            return Passing(epoch, Resign("an epoch that was given up")), (
                Send(epoch, Resign("an epoch that was given up")),
            )
        case Won(epoch, is_active, must_wait):
            return _begin(epoch, is_active, must_wait)
        case ClaimLost() | Gone():
            return Idle(dead_epoch), ()  # a claim of a session that is over is over with it
        case Suspended() | Confirmed() | Wanted() | GivenUp() | Failed() | FencedOff():
            return state, ()  # told to all shards, or about an object that has ended since
        case _:
            raise AssertionError(f"{event} in {state}")


def _begin(epoch: int, is_active: bool, must_wait: bool = False) -> Step:
    if must_wait:
        return Waiting(epoch), (Wait(),)
    if is_active:
        return Opening(epoch), (Open(epoch),)
    return Paused(epoch, is_open=False), ()


def _before_service(state: Waiting | Opening | Paused, event: Event) -> Step:
    epoch = state.epoch
    match state, event:
        case _, Won(seen_epoch):
            if seen_epoch <= epoch:
                return state, ()
            raise AssertionError(f"{event} in {state}: only this worker could have made a newer epoch")
        case Waiting(), WaitOver(is_active):
            return _begin(epoch, is_active)
        case Opening(), Opened():
            return Serving(epoch), (Serve(),)
        case Opening(), Failed(reason):
            return Closing(epoch, Resign(reason, is_failure=True)), (Close(),)
        case Opening(), Suspended():
            return Stopping(epoch, Remint("suspended while opening")), (Cancel(),)
        case Opening(), FencedOff(reason):
            return Stopping(epoch, Remint(reason)), (Cancel(),)
        case Opening(), Gone(reason):
            return Stopping(epoch, Drop(reason)), (Cancel(),)
        case Paused(is_open=True), Confirmed():
            return Serving(epoch), (Serve(),)
        case Paused(is_open=False), Confirmed():
            return Opening(epoch), (Open(epoch),)
        case Paused(is_open=True), Gone(reason):
            return Stopping(epoch, Drop(reason)), (Cancel(),)
        case Waiting() | Paused(), Gone():
            return Idle(epoch), ()
        case Waiting() | Paused(is_open=False), GivenUp(reason, is_failure):
            goal = Resign(reason, is_failure)
            return Passing(epoch, goal), (Send(epoch, goal),)
        case _, Suspended() | Confirmed() | Wanted() | GivenUp() | Due() | ClaimLost() | Failed() | FencedOff():
            return state, ()  # wants and stops come again with the next look at the world
        case Waiting() | Paused(), WaitOver() | Opened():
            return state, ()
        case _:
            raise AssertionError(f"{event} in {state}")


def _in_service(state: Serving, event: Event) -> Step:
    epoch = state.epoch
    match event:
        case Wanted(want, want_revision):
            if want.epoch_seen != epoch:
                return state, ()  # asked of an earlier leadership
            return Draining(epoch, HandOver(want, want_revision)), (Drain(),)
        case GivenUp(reason, is_failure):
            return Draining(epoch, Resign(reason, is_failure)), (Drain(),)
        case Failed(reason):
            return Draining(epoch, Resign(reason, is_failure=True)), (Drain(),)
        case Suspended(is_busy):
            if is_busy:
                return Stopping(epoch, Remint("work was cancelled when the session was suspended")), (Cancel(),)
            return Paused(epoch, is_open=True), ()
        case FencedOff(reason):
            return Stopping(epoch, Remint(reason)), (Cancel(),)
        case Gone(reason):
            return Stopping(epoch, Drop(reason)), (Cancel(),)
        case Won(seen_epoch) if seen_epoch <= epoch:
            return state, ()
        case Due() | ClaimLost() | Confirmed():
            return state, ()
        case _:
            raise AssertionError(f"{event} in {state}")


def _ending(state: Draining | Stopping | Closing, event: Event) -> Step:
    epoch, goal = state.epoch, state.goal
    match state, event:
        case Draining() | Stopping(), WorkEnded():
            return Closing(epoch, goal), (Close(),)
        case Closing(), Closed():
            if isinstance(goal, Drop):
                return Idle(epoch), ()
            return Passing(epoch, goal), (Send(epoch, goal),)
        case Draining(), Gone(reason):
            return Stopping(epoch, Drop(reason)), (Cancel(),)
        case Draining(), Suspended() | FencedOff():
            return Stopping(epoch, goal), (Cancel(),)
        case _, Gone(reason):
            return replace(state, goal=Drop(reason)), ()
        case _, GivenUp(reason, is_failure) if isinstance(goal, Remint):
            return replace(state, goal=Resign(reason, is_failure)), ()
        case _, Won(seen_epoch) if seen_epoch <= epoch:
            return state, ()
        case Closing(), WorkEnded():
            return state, ()
        case (
            _,
            Due() | ClaimLost() | Wanted() | GivenUp() | Suspended() | Confirmed() | Failed() | Opened() | FencedOff(),
        ):
            return state, ()  # what was begun is finished
        case _:
            raise AssertionError(f"{event} in {state}")


def _passing(state: Passing, event: Event) -> Step:
    epoch, goal = state.epoch, state.goal
    match event:
        case Passed(new_epoch, is_active, must_wait):
            if isinstance(goal, Remint):
                assert new_epoch > epoch, f"re-mint of {epoch} gave {new_epoch}"
                return _begin(new_epoch, is_active, must_wait)
            return Idle(epoch), ()
        case Refused(reason, may_keep):
            assert isinstance(goal, HandOver), f"{event} in {state}"
            instead: Remint | Resign = Remint(reason) if may_keep else Resign(reason)
            return Passing(epoch, instead), (Send(epoch, instead),)
        case GivenUp(reason, is_failure) if isinstance(goal, Remint):
            instead = Resign(reason, is_failure)
            return Passing(epoch, instead), (Send(epoch, instead),)
        case Renewed(new_epoch):
            # first the state, then the transaction: who still sees the key finds the epoch dead
            assert isinstance(goal, Resign), f"{event} in {state}"
            assert new_epoch > epoch, f"{event} in {state}"
            return Passing(new_epoch, goal), (Send(new_epoch, goal),)
        case Gone():
            return Idle(epoch), ()
        case Won(seen_epoch) if seen_epoch <= epoch:
            return state, ()
        case (
            Due()
            | ClaimLost()
            | Wanted()
            | GivenUp()
            | Suspended()
            | Confirmed()
            | Failed()
            | FencedOff()
            | WorkEnded()
            | Closed()
        ):
            return state, ()
        case _:
            raise AssertionError(f"{event} in {state}")
