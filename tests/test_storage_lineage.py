"""Versions, steps and checkpoints when the learner goes back: what is superseded stays readable but does not count."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_builders import make_evaluation, make_step, make_weights, memory_log, reopened

import storage.policies
from asyncopd.errors import ObjectMissingError, StorageError
from asyncopd.records import Facts, Rewind
from asyncopd.types import PolicyVersion
from storage.events import possible_rewinds, survives, surviving
from storage.manifests import find_manifest
from storage.run_log import StoredRunLog
from storage.stores.base import MemoryStore


def train(log: StoredRunLog, first: int, last: int, rewind: int = 0) -> None:
    """Publish states first..last, each with the step that made it."""
    for number in range(first, last + 1):
        log.publish_policy(make_weights(number, rewind), worker="learner")
        if number:
            log.publish_step(make_step(number - 1, rewind))


# -- without rewinds ----------------------------------------------------------------------------------------------
def test_nothing_is_published_yet() -> None:
    log = memory_log()
    assert log.latest_policy() is None
    assert log.find_policy(0) is None
    assert log.find_step(0) is None
    assert log.latest_checkpoint() is None
    assert (log.policies(), log.steps(), log.checkpoints(), log.evaluations()) == ([], [], [], [])
    with pytest.raises(ObjectMissingError, match=r"policies/000000.r0.json does not exist"):
        log.read_policy(PolicyVersion(0))
    with pytest.raises(ObjectMissingError, match=r"checkpoints/000000.r0.json does not exist"):
        log.read_checkpoint(0, 0)


def test_a_poll_sees_each_version_as_it_is_published() -> None:
    learner = memory_log()
    sampler = reopened(learner)
    for number in range(4):
        train(learner, number, number)
        assert sampler.latest_policy() == PolicyVersion(number)
    assert sampler.find_policy(2) == PolicyVersion(2)
    assert sampler.find_policy(4) is None
    assert sampler.read_policy(PolicyVersion(2)) == make_weights(2)


def test_a_poll_without_news_costs_two_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    log = memory_log()
    train(log, 0, 2)
    log.latest_policy()
    calls: list[str] = []
    for name in ("exists", "find", "list", "folder"):
        original: Callable[..., object] = getattr(MemoryStore, name)

        def counted(self: MemoryStore, key: str, original: Callable[..., object] = original) -> object:
            calls.append(original.__name__)
            return original(self, key)

        monkeypatch.setattr(MemoryStore, name, counted)
    log.latest_policy()
    assert calls == ["find", "exists"]


def test_a_gap_in_the_numbers_is_found_by_the_next_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = memory_log()
    train(log, 0, 0)
    assert log.latest_policy() == PolicyVersion(0)
    train(log, 5, 5)
    monkeypatch.setattr(storage.policies, "RELIST_S", 0.0)
    assert log.latest_policy() == PolicyVersion(5)


def test_publishing_weights_again_keeps_the_first_and_refuses_others() -> None:
    log = memory_log()
    log.publish_policy(make_weights(1), worker="a", facts=Facts(step=1))
    before = log.store.list("runs")
    log.publish_policy(make_weights(1), worker="b")
    assert log.store.list("runs") == before
    assert find_manifest(log.store, log.layout.key("policy", state=PolicyVersion(1))).facts == Facts(step=1)
    with pytest.raises(StorageError, match=r"policies/000001.r0.json was published by a.*now b brings"):
        log.publish_policy(make_weights(1, body=b"other"), worker="b")
    assert log.read_policy(PolicyVersion(1)) == make_weights(1)


def test_publishing_a_step_again_is_harmless_and_another_one_is_refused() -> None:
    log = memory_log()
    step = make_step(3, metrics={"learn/loss_nats": math.nan, "learn/grad_norm": math.inf})
    log.publish_step(step)
    log.publish_step(step)
    found = log.find_step(3)
    assert found is not None
    assert math.isnan(found.metrics["learn/loss_nats"])
    assert found.metrics["learn/grad_norm"] == math.inf
    assert (found.indices, found.staleness_tokens, found.dropped) == (
        step.indices,
        step.staleness_tokens,
        step.dropped,
    )
    with pytest.raises(StorageError, match=r"steps/000003.r0.json exists with another content"):
        log.publish_step(make_step(3, metrics={"learn/loss_nats": 1.0}))


def test_the_first_checkpoint_of_a_state_is_kept() -> None:
    log = memory_log()
    log.publish_checkpoint(2, 0, {"model": b"first", "optimizer": b"o"}, worker="a")
    before = log.store.list("runs")
    log.publish_checkpoint(2, 0, {"model": b"second"}, worker="b")
    assert log.read_checkpoint(2, 0) == {"model": b"first", "optimizer": b"o"}
    assert log.store.list("runs") == before


def test_a_checkpoint_without_a_manifest_does_not_count() -> None:
    log = memory_log()
    log.publish_checkpoint(2, 0, {"model": b"m"}, worker="a")
    log.publish_checkpoint(4, 0, {"model": b"m"}, worker="a")
    log.store.delete(log.layout.checkpoint_manifest(4, 0))
    assert log.latest_checkpoint() == (2, 0)


# -- with rewinds -------------------------------------------------------------------------------------------------
def test_a_rewind_supersedes_what_came_after_its_checkpoint() -> None:
    log = memory_log()
    sampler = reopened(log)
    train(log, 0, 7)
    for step in (0, 4, 6):
        log.publish_checkpoint(step, 0, {"model": b"m"}, worker="w")
    for number in (4, 5):
        log.publish_evaluation(make_evaluation(number))
    assert sampler.latest_policy() == PolicyVersion(7)

    assert log.current_rewind() == 0
    assert log.record_rewind(4, worker="w") == log.current_rewind() == sampler.current_rewind() == 1
    assert sampler.latest_policy() == PolicyVersion(4)
    assert sampler.find_policy(5) is None
    assert sampler.find_policy(4) == PolicyVersion(4)
    assert sampler.find_step(4) is None, "step 4 made state 5"
    assert sampler.find_step(3) == make_step(3)
    assert sampler.latest_checkpoint() == (4, 0)
    assert [evaluation.version.number for evaluation in sampler.evaluations()] == [4]
    assert sampler.read_policy(PolicyVersion(7)) == make_weights(7), "superseded weights stay readable"

    train(log, 5, 6, rewind=1)
    assert sampler.latest_policy() == PolicyVersion(6, 1)
    assert sampler.find_policy(5) == PolicyVersion(5, 1)
    assert sampler.find_step(4) == make_step(4, 1)
    assert [(version.number, version.rewind) for version in sampler.policies()] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
        (5, 1),
        (6, 1),
    ]
    assert [(step.step, step.rewind) for step in sampler.steps()] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]


def test_a_second_rewind_reaches_behind_the_first() -> None:
    log = memory_log()
    train(log, 0, 6)
    log.record_rewind(4, worker="w")
    train(log, 5, 8, rewind=1)
    assert log.record_rewind(2, worker="w") == 2
    assert log.latest_policy() == PolicyVersion(2)
    assert log.find_policy(4) is None
    train(log, 3, 3, rewind=2)
    assert log.latest_policy() == PolicyVersion(3, 2)


def test_a_superseded_learner_that_still_runs_is_ignored() -> None:
    log = memory_log()
    sampler = reopened(log)
    train(log, 0, 5)
    log.record_rewind(3, worker="w")
    train(log, 4, 4, rewind=1)
    train(log, 6, 9, rewind=0)
    assert sampler.latest_policy() == PolicyVersion(4, 1)
    assert sampler.find_policy(6) is None
    assert log.latest_policy() == PolicyVersion(4, 1)


def test_a_version_that_its_checkpoint_preceded_is_found_under_the_rewind() -> None:
    # Killed between checkpoint 3 and version 3: the resumed learner publishes version 3 itself.
    log = memory_log()
    train(log, 0, 2)
    log.publish_checkpoint(3, 0, {"model": b"m"}, worker="w")
    log.record_rewind(3, worker="w")
    log.publish_policy(make_weights(3, 1), worker="w")
    assert log.find_policy(3) == log.latest_policy() == PolicyVersion(3, 1)


def test_rewinds_are_numbered_without_gaps() -> None:
    log = memory_log()
    other = reopened(log)
    assert [log.record_rewind(5, worker="a"), other.record_rewind(3, worker="b"), log.record_rewind(1, worker="a")] == [
        1,
        2,
        3,
    ]
    assert [(rewind.number, rewind.to_step, rewind.worker) for rewind in reopened(log).rewinds()] == [
        (1, 5, "a"),
        (2, 3, "b"),
        (3, 1, "a"),
    ]
    with pytest.raises(StorageError, match="cannot rewind run to step -1"):
        log.record_rewind(-1, worker="a")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4), st.sets(st.tuples(st.integers(0, 7), st.integers(0, 4))))
def test_looking_up_one_number_agrees_with_the_listing(to_steps: list[int], published: set[tuple[int, int]]) -> None:
    rewinds = [Rewind(number, to_step, "w", 0.0) for number, to_step in enumerate(to_steps, start=1)]
    versions = [PolicyVersion(*version) for version in published if version[1] <= len(rewinds)]
    listed = {version.number: version for version in surviving(versions, rewinds)}
    for number in range(8):
        candidates = [PolicyVersion(number, rewind) for rewind in possible_rewinds(number, rewinds)]
        assert all(survives(number, candidate.rewind, rewinds) for candidate in candidates)
        assert next((found for found in candidates if found in versions), None) == listed.get(number)
