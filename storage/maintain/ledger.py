"""What became of every index of a run: the states an index passes through, and the fold of a run's records into them.

    (unseen) --claim--> claimed --produce--> produced --score--> scored --train--> trained
        |                                                          ^                  |
        +---------produce: a claim is not durable                  +-----rewind-------+

    (unseen), claimed, produced, scored --drop--> dropped(reason)     by a stage before the learner, or too stale
    scored                              --hold--> held(reason)        too stale to train now, kept for a replay

A claim of an index that is further on changes nothing (its worker came too late), and neither does a drop or hold that
is told twice in the same words (by the arrival and by the step). Everything else is a violation: trained twice,
trained without scores, scored without a trajectory, trained and dropped.

Conservation: admitted = claimed + produced + scored + trained + dropped + held, each index in exactly one of them.

    claims/rollout --> claim      trajectories/ --> produce      scores/<teacher>/ --> score
    arrivals/ --> drop, hold      steps/ and rewinds/ --> train and rewind, by rewind
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from asyncopd.errors import LedgerError
from storage.run_log import StoredRunLog
from storage.run_view import RunView

State = Literal["claimed", "produced", "scored", "trained", "dropped", "held"]
STATES: tuple[State, ...] = get_args(State)
Move = Literal["claim", "produce", "score", "train", "drop", "hold", "rewind"]

_TRANSITIONS: Mapping[State | None, Mapping[Move, State]] = {
    None: {"claim": "claimed", "produce": "produced", "drop": "dropped"},
    "claimed": {"claim": "claimed", "produce": "produced", "drop": "dropped"},
    "produced": {"claim": "produced", "score": "scored", "drop": "dropped"},
    "scored": {"claim": "scored", "train": "trained", "drop": "dropped", "hold": "held"},
    "trained": {"claim": "trained", "rewind": "scored"},
    "dropped": {"claim": "dropped", "drop": "dropped"},
    "held": {"claim": "held", "hold": "held"},
}


@dataclass(frozen=True)
class IndexState:
    """Where one index is."""

    state: State
    reason: str = ""
    """Why it was dropped or held; empty otherwise."""
    step: int | None = None
    """The step that trained it; None otherwise."""


Reasons = Mapping[int, str]
"""Index -> why it was dropped or held."""


@dataclass(frozen=True)
class Event:
    """What one record says: its indices made a move, and some were left out."""

    move: Move | None
    """None: the record is only about those left out."""
    indices: Sequence[int] = ()
    """Those in `dropped` did not make the move."""
    dropped: Reasons = field(default_factory=dict)
    held: Reasons = field(default_factory=dict)
    step: int | None = None
    """Of `train`, the step; of `rewind`, the first step that is taken back: what it trained waits to be trained again.
    """

    def moves(self) -> Iterator[tuple[int, Move, str]]:
        """(index, move, reason) of everything it says."""
        if self.move is not None:
            yield from ((index, self.move, "") for index in self.indices if index not in self.dropped)
        yield from ((index, "drop", reason) for index, reason in self.dropped.items())
        yield from ((index, "hold", reason) for index, reason in self.held.items())


# -- one index ----------------------------------------------------------------------------------------------------
def moved(before: IndexState | None, move: Move, *, reason: str = "", step: int | None = None) -> IndexState:
    """The state of an index after `move`; `before` is None for an index nothing was heard of.

    Raises:
        LedgerError: an index in this state cannot make this move, or is dropped or held twice with two reasons.
    """
    after = _TRANSITIONS[before.state if before else None].get(move)
    if after is None:
        raise LedgerError(f"{move} while {_told(before)}")
    if before is not None and after == before.state:
        if move in ("drop", "hold") and reason != before.reason:
            raise LedgerError(f"{move} ({reason}) while {_told(before)}")
        return before
    return IndexState(after, reason if move in ("drop", "hold") else "", step if move == "train" else None)


def _told(state: IndexState | None) -> str:
    if state is None:
        return "nothing was heard of it"
    detail = f" by step {state.step}" if state.step is not None else f" ({state.reason})" if state.reason else ""
    return state.state + detail


# -- all of them --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Violation:
    """A move that an index cannot have made, or an index without a state."""

    index: int
    problem: str

    def __str__(self) -> str:
        return f"index {self.index}: {self.problem}"


@dataclass(frozen=True)
class Ledger:
    """The state of every index of a run at one moment."""

    states: Mapping[int, IndexState]
    admitted: frozenset[int]
    """Every index any record speaks of, whether or not it could be given a state."""
    refused: tuple[Violation, ...] = ()
    """Moves that were not possible; they changed no state."""

    @classmethod
    def fold(cls, events: Iterable[Event]) -> Ledger:
        """The ledger after `events`. A move that is not possible is kept as a violation and changes nothing.

        Args:
            events: each index's own in the order in which they happened; a rewind between the steps it parts.
        """
        states: dict[int, IndexState] = {}
        admitted: set[int] = set()
        refused: list[Violation] = []
        for event in events:
            step = event.step
            if event.move == "rewind" and step is not None:
                later = [index for index, state in states.items() if state.step is not None and state.step >= step]
                states |= {index: moved(states[index], "rewind") for index in later}
            for index, move, reason in event.moves():
                admitted.add(index)
                try:
                    states[index] = moved(states.get(index), move, reason=reason, step=step)
                except LedgerError as error:
                    at = f" by step {step}" if step is not None else ""
                    refused.append(Violation(index, str(error).replace(move, move + at, 1)))
        return cls(states, frozenset(admitted), tuple(refused))

    def counts(self) -> dict[State, int]:
        """State -> indices in it; every state is named."""
        found = Counter(state.state for state in self.states.values())
        return {state: found[state] for state in STATES}

    def reasons(self, state: Literal["dropped", "held"]) -> dict[str, int]:
        """Reason -> indices that are dropped (or held) for it."""
        return dict(Counter(s.reason for s in self.states.values() if s.state == state))

    def indices(self, state: State) -> list[int]:
        """The indices in one state, sorted."""
        return sorted(index for index, found in self.states.items() if found.state == state)

    def violations(self) -> list[Violation]:
        """Everything that cannot be: empty for a sound run, finished or not, crashed or not."""
        homeless = [Violation(index, "no state holds it") for index in sorted(self.admitted - self.states.keys())]
        return [*self.refused, *homeless]


def ledger_of(log: StoredRunLog, teacher: str | None = None) -> Ledger:
    """The state of every index of a run, finished or not.

    Args:
        teacher: whose scores count; that of the run's configuration, or else any, when None.
    Raises:
        ShardCorruptError: a manifest or step is not readable.
    """
    return Ledger.fold(events_of(RunView(log), teacher))


def events_of(view: RunView, teacher: str | None = None) -> list[Event]:
    """What the records of a run say, each index's events in the order in which they happened.

    They are read from the end of the pipeline to its start: whatever a live run adds meanwhile is further up, so that
    it never looks as if something was trained before it was scored.
    """
    view.read("run", "step", "rewind", "arrival", "scores", "trajectories", "claim")
    claimed = sorted({claim.shard for claim in view.claims() if claim.stage == "rollout"})
    events = [Event("claim", shard.indices) for shard in claimed]
    events += (Event("produce", s.indices, manifest.facts.dropped) for s, manifest in view.trajectories().items())
    configured = view.records["run"].get(view.layout.key("run"), {}).get("config", {}).get("teacher", {}).get("name")
    scores = view.scores(teacher or configured or next(iter(view.teachers()), ""))
    events += (Event("score", shard.indices, manifest.facts.dropped) for shard, manifest in scores.items())
    arrivals = sorted(view.records["arrival"].items())
    events += (Event(None, dropped=arrival.dropped, held=arrival.held) for _, arrival in arrivals)
    # By rewind: what was trained under it, then the rewind that followed. A superseded learner's late steps too.
    steps = sorted(view.records["step"].values(), key=lambda step: step.step)
    for rewind in range(len(view.rewinds) + 1):
        if rewind:
            events.append(Event("rewind", step=view.rewinds[rewind - 1].to_step))
        events += (Event("train", s.trained, s.dropped, s.held, s.step) for s in steps if s.rewind == rewind)
    return events
