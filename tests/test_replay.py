"""Replay: the same log again, bit for bit, or with other settings, into a run of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import offline_builders as builders
import pytest
from offline_builders import NUM_STEPS, make_run, objects, opened, replayed, weights
from service_world import client_of, prefect_stand_in, settings_of

from asyncopd import cli
from asyncopd.config.requests import Replay, ReplayRequest, replays_of
from asyncopd.errors import ConfigError, StorageError
from asyncopd.schedule import Arrival
from asyncopd.types import IndexRange, TrainStep
from flows import offline
from flows.replay import train_replay
from flows.wiring import OpenRun
from storage.maintain.ledger import ledger_of
from storage.replay import ReplayLog


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return make_run(tmp_path_factory.mktemp("replay"))


def test_a_replay_with_nothing_changed_makes_every_version_bit_for_bit_and_copies_no_shard(parent: OpenRun) -> None:
    root = parent.config.storage.root
    before = objects(root, "runs/parent")
    child = replayed(parent)
    assert weights(child) == weights(parent)
    assert list(weights(child)) == list(range(NUM_STEPS + 1))
    for own, theirs in zip(child.log.steps(), parent.log.steps(), strict=True):
        assert (own.indices, own.staleness_tokens, own.num_tokens) == (
            theirs.indices,
            theirs.staleness_tokens,
            theirs.num_tokens,
        )
        assert own.metrics["train/loss_nats"] == theirs.metrics["train/loss_nats"]
    assert not [key for key in objects(root, f"runs/{child.log.run_id}") if key.startswith(("traj", "scores"))]
    assert objects(root, "runs/parent") == before


def test_the_service_names_the_run_that_the_flow_will_make(
    parent: OpenRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its id was the digest of what was asked, the flow's that of what it trains on: nobody found the run.
    client = client_of(settings_of(parent.config.storage.root, tmp_path))
    with prefect_stand_in() as prefect:
        monkeypatch.setenv("PREFECT_API_URL", prefect.url)
        asked = client.post("/v1/runs/parent/replay", json={"steps": "2:4", "overrides": {"learner.lr": 0.001}})
        lacks = client.post("/v1/runs/parent/replay", json={"overrides": {"loss.name": "forward_kl"}})
    child, _ = opened(parent, "learner.lr=0.001", first=2, last=4)
    assert asked.json()["run_id"] == child.log.run_id
    assert (lacks.status_code, len(prefect.flow_runs)) == (422, 1)
    assert "asyncopd backfill parent --top-k" in lacks.json()["detail"]


def test_a_replay_records_its_parent_steps_and_changed_settings(parent: OpenRun) -> None:
    child = replayed(parent, "learner.lr=3.0e-3", first=4, last=5)
    record = child.log.record
    assert record["parent"] == {
        "run_id": "parent",
        "first_version": 4,
        "last_version": 5,
        "start": "checkpoint",
        "settings": {"learner.lr": 0.003},
        "scores": {"oracle": 1.0},
    }
    assert record["config"]["learner"]["lr"] == 0.003
    assert record["config_hash"] != parent.log.record["config_hash"]
    assert list(weights(child)) == [4, 5]
    assert weights(child)[4] == weights(parent)[4]
    assert weights(child)[5] != weights(parent)[5]


@pytest.mark.parametrize("first", [3, 4, 5])
def test_a_fork_between_checkpoints_has_the_parents_optimizer_too(parent: OpenRun, first: int) -> None:
    # Checkpoints are after steps 4 and 6: version 3 is reached from the start, 5 from checkpoint 4.
    child = replayed(parent, first=first)
    assert weights(child) == {number: sha for number, sha in weights(parent).items() if number >= first}


def test_a_start_from_weights_has_a_new_optimizer(parent: OpenRun) -> None:
    child = replayed(parent, first=4, last=5, start="weights")
    assert weights(child)[4] == weights(parent)[4]
    assert weights(child)[5] != weights(parent)[5]


def test_half_the_steps_follow_the_whole_runs_schedule(parent: OpenRun) -> None:
    # A bug this guards against: learner.num_steps 3 would end the cosine at step 3.
    child = replayed(parent, last=3)
    assert weights(child) == {number: sha for number, sha in weights(parent).items() if number <= 3}
    assert [s.metrics["train/lr"] for s in child.log.steps()] == [s.metrics["train/lr"] for s in parent.log.steps()[:3]]


def test_weight_decay_changes_a_replay_from_a_checkpoint_that_holds_another(parent: OpenRun) -> None:
    # The optimizer's state has the parent's weight decay in it, which used to win.
    child = replayed(parent, "learner.weight_decay=0.5", first=4)
    assert weights(child)[5] != weights(parent)[5]


def test_another_loss_trains_on_the_same_rollouts(parent: OpenRun) -> None:
    child = replayed(parent, "loss.name=policy_gradient", "loss.num_draws=1")
    assert weights(child)[0] == weights(parent)[0]
    assert weights(child)[1] != weights(parent)[1]
    assert child.config.loss.name == "policy_gradient"
    for own, theirs in zip(child.log.steps(), parent.log.steps(), strict=True):
        assert own.metrics["train/kl_nats"] == theirs.metrics["train/kl_nats"]  # of the recorded log-probs alone


def test_a_replay_of_a_replay_reads_the_run_that_was_sampled(parent: OpenRun) -> None:
    first = replayed(parent, "loss.name=policy_gradient", "loss.num_draws=1")
    again = replayed(first)
    assert isinstance(again.log, ReplayLog)
    assert again.log.source.run_id == "parent"
    assert weights(again) == weights(first)


@pytest.fixture(scope="module", params=["drop", "train"])
def as_arrived(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    """A run of order arrival; at τ = 0 whatever was generated ahead is too stale for the step it reaches."""
    return make_run(
        tmp_path_factory.mktemp("arrival"),
        staleness__order="arrival",
        staleness__on_stale=request.param,
        staleness__max_staleness=0,
    )


def test_a_run_of_order_arrival_is_replayed_bit_for_bit_and_so_is_its_replay(as_arrived: OpenRun) -> None:
    root, parent_id = as_arrived.config.storage.root, as_arrived.log.run_id
    before = objects(root, f"runs/{parent_id}")
    child = replayed(as_arrived)
    assert weights(child) == weights(as_arrived)
    assert list(weights(child)) == list(range(NUM_STEPS + 1))
    for own, theirs in zip(child.log.steps(), as_arrived.log.steps(), strict=True):
        assert (own.indices, own.dropped, own.held) == (theirs.indices, theirs.dropped, theirs.held)
        assert (own.staleness_tokens, own.num_tokens) == (theirs.staleness_tokens, theirs.num_tokens)
    assert weights(replayed(child)) == weights(as_arrived)
    assert ledger_of(child.log).violations() == []
    assert objects(root, f"runs/{parent_id}") == before
    # The order was its own: not one that index order would have taken.
    if as_arrived.config.staleness.on_stale == "drop":
        assert any(step.dropped for step in child.log.steps())


@pytest.mark.parametrize("first", [3, 5])
def test_a_fork_of_a_run_of_order_arrival_has_the_parents_optimizer_too(as_arrived: OpenRun, first: int) -> None:
    # Version 3 is trained again from the start, 5 from checkpoint 4, both from the batches as they arrived.
    child = replayed(as_arrived, first=first)
    assert weights(child) == {number: sha for number, sha in weights(as_arrived).items() if number >= first}


def test_another_batch_size_takes_the_same_trajectories_in_the_order_of_their_arrival(as_arrived: OpenRun) -> None:
    child = replayed(as_arrived, "learner.batch_size=16")
    taken = [index for step in as_arrived.log.steps() for index in step.trained]
    assert [list(step.trained) for step in child.log.steps()] == [taken[:16], taken[16:32], taken[32:]]
    for step, (first, second) in zip(child.log.steps(), _pairs(as_arrived.log.steps()), strict=True):
        assert _total(step) == _total(first) + first.num_tokens + _total(second)


def test_more_than_a_run_of_order_arrival_came_to_is_refused_and_never_decided_by_a_replay(as_arrived: OpenRun) -> None:
    with pytest.raises(ConfigError, match=r"took \d+ trajectories as they arrived; 10 steps of 8 need 80"):
        opened(as_arrived, last=10)
    child = replayed(as_arrived, first=5)
    num_arrivals = len(as_arrived.log.arrivals())
    with pytest.raises(StorageError, match="is a replay and trains what"):
        child.log.record_arrival(Arrival(num_arrivals, IndexRange(800, 804), 0))
    assert len(child.log.arrivals()) == num_arrivals


def test_a_stopped_replay_goes_on_to_the_same_weights(parent: OpenRun) -> None:
    child, replay = opened(parent, "learner.checkpoint_every=2", "learner.warmup_steps=1")

    async def stopped() -> None:
        training = asyncio.create_task(train_replay(parent, child, replay, console=builders.QUIET))
        while child.log.find_step(2) is None:
            await asyncio.sleep(0.001)
        training.cancel()
        await asyncio.wait([training])
        assert training.cancelled()

    asyncio.run(stopped())
    assert child.log.find_step(NUM_STEPS - 1) is None
    resumed = replayed(parent, "learner.checkpoint_every=2", "learner.warmup_steps=1")
    assert resumed.log.run_id == child.log.run_id
    # The same replay in one go: another id, because one of its settings is written out.
    through = replayed(parent, "learner.checkpoint_every=2", "learner.warmup_steps=1", "learner.lr=1e-3")
    assert weights(resumed) == weights(through)
    assert [step.step for step in resumed.log.steps()] == list(range(NUM_STEPS))


def test_another_batch_size_trains_each_index_once_and_counts_staleness_in_the_parents_versions(
    parent: OpenRun,
) -> None:
    child = replayed(parent, "learner.batch_size=16")
    steps = child.log.steps()
    assert [step.indices for step in steps] == [IndexRange(16 * s, 16 * s + 16) for s in range(3)]
    # Two of the parent's batches to a step: the first of them is a version staler than it was.
    for step, (first, second) in zip(steps, _pairs(parent.log.steps()), strict=True):
        assert min(step.staleness_tokens) >= 0
        assert sum(n for n in step.staleness_tokens.values()) == first.num_tokens + second.num_tokens
        assert _total(step) == _total(first) + first.num_tokens + _total(second)
    assert child.config.learner.schedule_steps == 3
    with pytest.raises(ConfigError, match=r"version 5 lies after index 40.*steps of 16"):
        opened(parent, "learner.batch_size=16", last=5)


def _pairs(steps: list[TrainStep]) -> list[tuple[TrainStep, TrainStep]]:
    return list(zip(steps[::2], steps[1::2], strict=True))


def _total(step: TrainStep) -> int:
    """Staleness summed over tokens."""
    return sum(staleness * count for staleness, count in step.staleness_tokens.items())


def test_what_made_the_log_cannot_be_changed(parent: OpenRun) -> None:
    for setting in ("rollout.temperature=0.5", "task.p=17", "seed=3", "learner.num_steps=2"):
        with pytest.raises(ConfigError, match=setting.partition("=")[0]):
            opened(parent, setting)


def test_a_log_without_the_arrays_of_the_loss_is_refused_before_anything_is_made(parent: OpenRun) -> None:
    before = set(objects(parent.config.storage.root, "runs"))
    with pytest.raises(ConfigError, match=r"(?s)run parent.*topk_logprobs holds 0 .*backfill parent --top-k 5`"):
        opened(parent, "loss.name=forward_kl", "loss.top_k=5")
    with pytest.raises(ConfigError, match=r"`asyncopd backfill parent --candidates num_draws=16,law=policy`"):
        opened(parent, "loss.name=policy_gradient")
    with pytest.raises(ConfigError, match=r"has no scores other; it has oracle"):
        opened(parent, "scores=other")
    assert set(objects(parent.config.storage.root, "runs")) == before


def test_steps_that_the_parent_has_not_trained_are_refused(parent: OpenRun) -> None:
    with pytest.raises(ConfigError, match="has not published version 9"):
        opened(parent, first=9, last=10)
    with pytest.raises(ConfigError, match=r"12 of 20 shards have no scores oracle|8 of 20 shards"):
        opened(parent, last=10)
    for text in ("3", "4:4", "5:2", "0:99", "a:b"):
        with pytest.raises(ConfigError, match=f"steps '?{text}'?: expected FIRST:LAST"):
            replays_of(ReplayRequest.of({"steps": text}), "parent", num_steps=NUM_STEPS)


def test_nothing_can_be_written_into_the_shards_of_a_replay(parent: OpenRun) -> None:
    child = replayed(parent)
    with pytest.raises(StorageError, match="is a replay and reads the shards of parent"):
        child.log.publish_trajectories(IndexRange(0, 4), [], worker="w")


def test_settings_and_arms_are_parsed() -> None:
    arms = ["loss.name=npd  loss.top_k=4 scores={a: 1, b: 3}", "scores=hard"]
    asked = ReplayRequest.of({"overrides": ["learner.lr=0.5", "scores=own"], "compare": arms})
    assert asked.compare[0] == {"loss.name": "npd", "loss.top_k": 4, "scores": {"a": 1, "b": 3}}
    first, second = replays_of(asked, "r", num_steps=4)
    assert first.settings == {"learner.lr": 0.5, "loss.name": "npd", "loss.top_k": 4}
    assert (first.scores, second.scores) == ({"a": 0.25, "b": 0.75}, {"hard": 1.0})
    with pytest.raises(ConfigError, match="weights above 0"):
        ReplayRequest.of({"overrides": ["scores={a: 0}"]})
    assert Replay.model_validate_json(first.model_dump_json()) == first


def test_a_replay_has_the_id_it_always_had() -> None:
    # Ids of a release whose replays are stored: asking again must find that run, not make another.
    replay = Replay(run_id="walk-1", first_version=0, last_version=200, scores={"oracle": 1.0})
    assert replay.child_id == "walk-1-replay-e1b78307"
    settings = {"learner.lr": 1e-05, "loss.name": "npd"}
    other = Replay(run_id="r", first_version=4, last_version=9, start="weights", settings=settings, scores={"a": 0.25})
    assert other.child_id == "r-replay-d7305b8b"


def test_a_comparison_prints_paired_differences_between_its_arms(
    parent: OpenRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["loss.name=head_tail", "loss.name=policy_gradient loss.num_draws=1", "learner.lr=1e-3"]
    asked = ReplayRequest.of(
        {"from_version": 4, "overrides": ["learner.lr=1e-2"], "compare": arms, "num_prompts": 24},
    )
    with pytest.raises(SystemExit) as ended:
        offline.main(asked.command(parent.config.storage.root, "parent", out=str(tmp_path))[3:])
    assert ended.value.code == 0
    lines = [line for line in (tmp_path / "compare.md").read_text().splitlines() if line.startswith("|")]
    rows = [line.split("|")[1:-1] for line in lines[2:]]
    assert [row[0].strip() for row in rows] == arms
    for row in rows[1:]:
        paired, unpaired = float(row[7]), float(row[8])
        assert 0 < paired < unpaired
    assert "the same 24 held-out prompts" in capsys.readouterr().out.replace("\n", " ")


def test_a_replay_can_be_evaluated_later_and_is_the_same_run(
    parent: OpenRun, capsys: pytest.CaptureFixture[str]
) -> None:
    child = replayed(parent, "learner.lr=2e-3", first=5)
    asked = ReplayRequest.of({"steps": "5:", "overrides": ["learner.lr=2e-3"], "evaluate": True})
    with pytest.raises(SystemExit) as ended:
        offline.main(asked.command(parent.config.storage.root, "parent")[3:])
    assert ended.value.code == 0
    assert [e.version.number for e in child.log.evaluations()] == [5, 6]
    assert "version 6: accuracy" in capsys.readouterr().out


def test_a_replay_is_not_resumed_as_a_training_run(parent: OpenRun, capsys: pytest.CaptureFixture[str]) -> None:
    child = replayed(parent)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--run-id", child.log.run_id, "--root", parent.config.storage.root])
    assert ended.value.code == 2
    assert "is a replay of parent" in capsys.readouterr().err
