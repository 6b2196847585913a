"""The state machine of an index, every transition, and the fold from a run's records to all of them."""

from __future__ import annotations

import random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncopd.errors import LedgerError
from asyncopd.types import IndexRange
from storage.maintain.ledger import (
    STATES,
    Event,
    IndexState,
    Ledger,
    Move,
    State,
    moved,
)

LEGAL: dict[tuple[State | None, Move], State] = {
    (None, "claim"): "claimed",
    (None, "produce"): "produced",
    (None, "drop"): "dropped",
    ("claimed", "claim"): "claimed",
    ("claimed", "produce"): "produced",
    ("claimed", "drop"): "dropped",
    ("produced", "claim"): "produced",
    ("produced", "score"): "scored",
    ("produced", "drop"): "dropped",
    ("scored", "claim"): "scored",
    ("scored", "train"): "trained",
    ("scored", "drop"): "dropped",
    ("scored", "hold"): "held",
    ("trained", "claim"): "trained",
    ("trained", "rewind"): "scored",
    ("dropped", "claim"): "dropped",
    ("dropped", "drop"): "dropped",
    ("held", "claim"): "held",
    ("held", "hold"): "held",
}
"""Written a second time, from the diagram rather than from the code."""


def state(name: State | None) -> IndexState | None:
    if name is None:
        return None
    return IndexState(name, "stale" if name in ("dropped", "held") else "", 3 if name == "trained" else None)


@pytest.mark.parametrize("move", get_args(Move))
@pytest.mark.parametrize("before", [None, *STATES])
def test_every_transition_is_allowed_or_refused_as_the_diagram_says(before: State | None, move: Move) -> None:
    expected = LEGAL.get((before, move))
    if expected is None:
        with pytest.raises(LedgerError, match=f"{move} while {before or 'nothing was heard of it'}"):
            moved(state(before), move, reason="stale", step=4)
        return
    after = moved(state(before), move, reason="stale", step=4)
    assert after.state == expected
    if before != expected:
        assert after.reason == ("stale" if move in ("drop", "hold") else "")
        assert after.step == (4 if move == "train" else None)


def test_an_index_dropped_for_two_reasons_is_refused() -> None:
    with pytest.raises(LedgerError, match=r"drop \(too long\) while dropped \(stale\)"):
        moved(IndexState("dropped", "stale"), "drop", reason="too long")


FIRST, SECOND = IndexRange(0, 4), IndexRange(4, 8)
SOUND: list[Event] = [
    Event("claim", FIRST.indices),
    Event("claim", SECOND.indices),
    Event("claim", range(8, 12)),
    Event("produce", FIRST.indices, {1: "too long"}),
    Event("produce", SECOND.indices),
    Event("score", FIRST.indices, {1: "too long"}),
    Event("score", SECOND.indices),
    Event(None, dropped={5: "stale"}),
    Event("train", (0, 2, 3), step=0, dropped={1: "too long"}),
]


def test_a_sound_run_has_every_index_in_one_state_and_no_violation() -> None:
    ledger = Ledger.fold(SOUND)
    assert ledger.violations() == []
    assert ledger.counts() == {"claimed": 4, "produced": 0, "scored": 3, "trained": 3, "dropped": 2, "held": 0}
    assert sum(ledger.counts().values()) == len(ledger.admitted) == 12
    assert ledger.reasons("dropped") == {"too long": 1, "stale": 1}
    assert ledger.states.get(2) == IndexState("trained", step=0)
    assert ledger.states.get(12) is None
    assert ledger.indices("trained") == [0, 2, 3]


def test_what_later_steps_trained_is_scored_again_after_a_rewind() -> None:
    events: list[Event] = [Event("produce", range(8)), Event("score", range(8))]
    events += [Event("train", range(4), step=0), Event("train", range(4, 8), step=1), Event("rewind", step=1)]
    assert Ledger.fold(events).counts()["scored"] == 4
    again = Ledger.fold([*events, Event("train", range(4, 8), step=1)])
    assert again.violations() == []
    assert again.counts()["trained"] == 8


@pytest.mark.parametrize(
    ("extra", "index", "problem"),
    [
        (Event("train", (0,), step=1), 0, "train by step 1 while trained by step 0"),
        (Event("train", (5,), step=1), 5, "train by step 1 while dropped (stale)"),
        (Event("train", (9,), step=1), 9, "train by step 1 while claimed"),
        (Event("train", (20,), step=1), 20, "train by step 1 while nothing was heard of it"),
        (Event("score", range(8, 12)), 8, "score while claimed"),
        (Event("produce", SECOND.indices), 4, "produce while scored"),
        (Event(None, dropped={2: "stale"}), 2, "drop while trained by step 0"),
        (Event(None, held={2: "stale"}), 2, "hold while trained by step 0"),
        (Event(None, held={5: "stale"}), 5, "hold while dropped (stale)"),
    ],
)
def test_what_cannot_be_is_named_and_changes_no_state(extra: Event, index: int, problem: str) -> None:
    before, after = Ledger.fold(SOUND), Ledger.fold([*SOUND, extra])
    assert f"index {index}: {problem}" in [str(violation) for violation in after.violations()]
    assert after.states.get(index) == before.states.get(index)


def test_an_index_without_a_state_breaks_conservation() -> None:
    ledger = Ledger.fold([Event("score", range(1))])  # nobody produced it
    assert sum(ledger.counts().values()) != len(ledger.admitted)
    assert "index 0: no state holds it" in map(str, ledger.violations())


def crashing_run(seed: int, num_shards: int) -> list[Event]:
    """Events of a run whose workers and learner die at random, in an order in which they could have happened."""
    rng = random.Random(seed)
    shards = [IndexRange(4 * n, 4 * n + 4) for n in range(num_shards)]
    events: list[Event] = []
    ready: list[int] = []  # scored and neither trained, dropped nor held
    trained: list[tuple[int, ...]] = []
    next_of = {"claim": 0, "produce": 0, "score": 0}
    gone: dict[int, str] = {}
    for _ in range(20 * num_shards):
        match rng.choice(["claim", "produce", "score", "train", "judge", "rewind"]):
            case "claim" if next_of["claim"] < num_shards:
                num_claims = rng.choice([1, 1, 2])  # taken over from a dead worker
                events += [Event("claim", shards[next_of["claim"]].indices)] * num_claims
                next_of["claim"] += 1
            case "produce" if next_of["produce"] < next_of["claim"]:
                shard = shards[next_of["produce"]]
                filtered = {index: "long" for index in shard.indices if rng.random() < 0.2}
                gone |= filtered
                events.append(Event("produce", shard.indices, filtered))
                next_of["produce"] += 1
            case "score" if next_of["score"] < next_of["produce"]:
                shard = shards[next_of["score"]]
                events.append(Event("score", shard.indices, {i: gone[i] for i in shard.indices if i in gone}))
                ready += [index for index in shard.indices if index not in gone]
                next_of["score"] += 1
            case "train" if ready:
                taken = tuple(ready[: rng.randint(1, 4)])
                del ready[: len(taken)]
                events.append(Event("train", taken, step=len(trained)))
                trained.append(taken)
            case "judge" if ready:
                index = ready.pop(0)
                events.append(Event(None, **{rng.choice(["dropped", "held"]): {index: "stale"}}))
            case "rewind" if trained and rng.random() < 0.3:
                to_step = rng.randrange(len(trained))
                events.append(Event("rewind", step=to_step))
                again = trained[to_step:]
                del trained[to_step:]
                for taken in again:  # the same indices again, from the log
                    events.append(Event("train", taken, step=len(trained)))
                    trained.append(taken)
    return events


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_conservation_holds_after_every_event_of_a_crashing_run(seed: int, num_shards: int) -> None:
    events = crashing_run(seed, num_shards)
    for end in {len(events), *random.Random(seed).choices(range(len(events) + 1), k=5)}:
        ledger = Ledger.fold(events[:end])
        assert ledger.violations() == []
        assert sum(ledger.counts().values()) == len(ledger.admitted)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.data())
def test_training_anything_twice_is_always_found(seed: int, num_shards: int, data: st.DataObject) -> None:
    events = crashing_run(seed, num_shards)
    ledger = Ledger.fold(events)
    trained = ledger.indices("trained")
    if trained:
        index = data.draw(st.sampled_from(trained))
        twice = Ledger.fold([*events, Event("train", (index,), step=10**6)])
        assert [violation.index for violation in twice.violations()] == [index]
        assert twice.counts() == ledger.counts()
