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
    Claimed,
    Event,
    IndexState,
    Judged,
    Ledger,
    Move,
    Produced,
    Rewound,
    Scored,
    State,
    Trained,
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
    Claimed(FIRST),
    Claimed(SECOND),
    Claimed(IndexRange(8, 12)),
    Produced(FIRST, {1: "too long"}),
    Produced(SECOND),
    Scored(FIRST, {1: "too long"}),
    Scored(SECOND),
    Judged(dropped={5: "stale"}),
    Trained(0, (0, 2, 3), dropped={1: "too long"}),
]


def test_a_sound_run_has_every_index_in_one_state_and_no_violation() -> None:
    ledger = Ledger.fold(SOUND)
    assert ledger.violations() == []
    assert ledger.counts() == {"claimed": 4, "produced": 0, "scored": 3, "trained": 3, "dropped": 2, "held": 0}
    assert sum(ledger.counts().values()) == len(ledger.admitted) == 12
    assert ledger.reasons("dropped") == {"too long": 1, "stale": 1}
    assert ledger.state_of(2) == IndexState("trained", step=0)
    assert ledger.state_of(12) is None
    assert ledger.indices("trained") == [0, 2, 3]


def test_what_later_steps_trained_is_scored_again_after_a_rewind() -> None:
    events: list[Event] = [Produced(IndexRange(0, 8)), Scored(IndexRange(0, 8))]
    events += [Trained(0, range(4)), Trained(1, range(4, 8)), Rewound(1)]
    assert Ledger.fold(events).counts()["scored"] == 4
    again = Ledger.fold([*events, Trained(1, range(4, 8))])
    assert again.violations() == []
    assert again.counts()["trained"] == 8


@pytest.mark.parametrize(
    ("extra", "index", "problem"),
    [
        (Trained(1, (0,)), 0, "train by step 1 while trained by step 0"),
        (Trained(1, (5,)), 5, "train by step 1 while dropped (stale)"),
        (Trained(1, (9,)), 9, "train by step 1 while claimed"),
        (Trained(1, (20,)), 20, "train by step 1 while nothing was heard of it"),
        (Scored(IndexRange(8, 12)), 8, "score while claimed"),
        (Produced(SECOND), 4, "produce while scored"),
        (Judged(dropped={2: "stale"}), 2, "drop while trained by step 0"),
        (Judged(held={2: "stale"}), 2, "hold while trained by step 0"),
        (Judged(held={5: "stale"}), 5, "hold while dropped (stale)"),
    ],
)
def test_what_cannot_be_is_named_and_changes_no_state(extra: Event, index: int, problem: str) -> None:
    before, after = Ledger.fold(SOUND), Ledger.fold([*SOUND, extra])
    assert f"index {index}: {problem}" in [str(violation) for violation in after.violations()]
    assert after.state_of(index) == before.state_of(index)


def test_an_index_without_a_state_breaks_conservation() -> None:
    ledger = Ledger.fold([Scored(IndexRange(0, 1))])  # nobody produced it
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
                events += [Claimed(shards[next_of["claim"]])] * rng.choice([1, 1, 2])  # taken over from a dead worker
                next_of["claim"] += 1
            case "produce" if next_of["produce"] < next_of["claim"]:
                shard = shards[next_of["produce"]]
                filtered = {index: "long" for index in shard.indices if rng.random() < 0.2}
                gone |= filtered
                events.append(Produced(shard, filtered))
                next_of["produce"] += 1
            case "score" if next_of["score"] < next_of["produce"]:
                shard = shards[next_of["score"]]
                events.append(Scored(shard, {i: gone[i] for i in shard.indices if i in gone}))
                ready += [index for index in shard.indices if index not in gone]
                next_of["score"] += 1
            case "train" if ready:
                taken = tuple(ready[: rng.randint(1, 4)])
                del ready[: len(taken)]
                events.append(Trained(len(trained), taken))
                trained.append(taken)
            case "judge" if ready:
                index = ready.pop(0)
                events.append(Judged({index: "stale"}) if rng.random() < 0.5 else Judged(held={index: "stale"}))
            case "rewind" if trained and rng.random() < 0.3:
                to_step = rng.randrange(len(trained))
                events.append(Rewound(to_step))
                again = trained[to_step:]
                del trained[to_step:]
                for taken in again:  # the same indices again, from the log
                    events.append(Trained(len(trained), taken))
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
        twice = Ledger.fold([*events, Trained(10**6, (index,))])
        assert [violation.index for violation in twice.violations()] == [index]
        assert twice.counts() == ledger.counts()
