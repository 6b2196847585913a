"""The learner stops before it harms a run: arrays the log does not hold, losses that are not finite."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pipeline
import pytest

from asyncopd.config import RunConfig
from asyncopd.errors import ConfigError, NonFiniteError
from asyncopd.types import IndexRange, TeacherScores
from flows.wiring import OpenRun, open_stored_run
from storage.run_log import StoredRunLog


async def rolled_out(config: RunConfig, run_id: str = "small-1") -> OpenRun:
    """A run whose version 0 has sampled everything, scored; nothing is trained."""
    run = pipeline.new_run(config, run_id)
    learner = asyncio.create_task(pipeline.train_steps(open_stored_run(config.storage.root, run_id)))
    while run.log.latest_policy() is None:
        await asyncio.sleep(0.01)
    learner.cancel()
    await asyncio.gather(learner, return_exceptions=True)
    assert run.log.steps() == []
    await asyncio.gather(pipeline.roll_out(run), pipeline.score_shards(run))
    return run


def frozen(root: Path, **overrides: object) -> RunConfig:
    """τ covers the whole run, so that version 0 may sample all of it."""
    return pipeline.small_config(root, staleness__max_staleness=4, evaluate__every=0, **overrides)


@pytest.mark.parametrize(
    ("loss", "column", "option"),
    [
        ({"name": "forward_kl", "top_k": 8}, "topk_logprobs holds 0 ids", "--top-k 8"),
        ({"name": "dense_reverse_kl"}, "topk_logprobs holds 0 ids", "--top-k all"),
        ({"name": "policy_gradient", "num_draws": 4}, "draws of law 'tail'", "num_draws=4,law=policy"),
    ],
)
async def test_a_log_without_the_arrays_of_the_loss_is_refused_before_training(
    tmp_path: Path, loss: dict[str, object], column: str, option: str
) -> None:
    run = await rolled_out(frozen(tmp_path))
    # The same log, read by a learner of another loss, as replaying it is.
    replayed = RunConfig.model_validate({**run.config.model_dump(mode="json"), "loss": loss})
    with pytest.raises(ConfigError) as caught:
        await pipeline.train_steps(OpenRun(run.store, run.log, replayed, run.task))
    message = str(caught.value)
    assert column in message
    assert f"asyncopd backfill {run.log.run_id}" in message
    assert option in message
    assert run.log.steps() == []
    assert run.log.latest_policy().number == 0
    assert message in run.log.failures()[-1].reason


async def test_a_non_finite_step_is_recorded_with_its_indices_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await rolled_out(frozen(tmp_path))
    bad = 13
    read_scores = StoredRunLog.read_scores

    def poisoned(log: StoredRunLog, teacher: str, shard: IndexRange) -> Sequence[TeacherScores]:
        return [
            replace(score, head_logprobs_TK=score.head_logprobs_TK * np.float32(np.nan))
            if score.index == bad
            else score
            for score in read_scores(log, teacher, shard)
        ]

    monkeypatch.setattr(StoredRunLog, "read_scores", poisoned)
    with pytest.raises(NonFiniteError, match="step 1, indices 000008-000015") as caught:
        await pipeline.train_steps(run)
    assert not caught.value.repeats
    reason = run.log.failures()[-1].reason
    assert reason.startswith("NonFiniteError: step 1, indices 000008-000015")
    assert "Indices with a non-finite loss: 13." in reason
    assert "train/drift_nats" in reason
    assert "train/ratio_max" in reason
    assert [step.step for step in run.log.steps()] == [0]
    assert run.log.latest_policy().number == 1

    # Of the first step there can be no other outcome, so the learner is not started again.
    first = await rolled_out(frozen(tmp_path / "first"))
    bad = 2
    with pytest.raises(NonFiniteError, match="step 0, indices 000000-000007") as caught:
        await pipeline.train_steps(first)
    assert caught.value.repeats

    # Once the cause is gone, the run goes on where it stood.
    monkeypatch.undo()
    await pipeline.train_steps(run)
    assert [step.step for step in run.log.steps()] == [0, 1, 2, 3]


async def test_every_step_reports_every_promised_metric(tmp_path: Path) -> None:
    promised = {
        "train/loss_nats",
        "train/kl_nats",
        "train/drift_nats",
        "train/ess_fraction",
        "train/ratio_p01",
        "train/ratio_p50",
        "train/ratio_p99",
        "train/ratio_max",
        "train/entropy_nats",
        "train/grad_norm",
        "loss/clipped_fraction",
        "loss/masked_fraction",
        "loss/truncated_fraction",
        "loss/support_mass_student",
        "loss/support_mass_teacher",
    }
    losses: list[dict[str, object]] = [{"name": "head_tail"}, {"name": "policy_gradient", "num_draws": 1}]
    for number, loss in enumerate(losses):
        config = frozen(tmp_path / str(number), loss=loss, learner__num_steps=1)
        run = pipeline.new_run(config)
        await pipeline.run_all(run)
        (step,) = run.log.steps()
        assert promised <= step.metrics.keys()
        assert all(np.isfinite(value) for value in step.metrics.values())
        assert sum(step.staleness_tokens.values()) == step.num_tokens > 0
        for side in ("student", "teacher"):
            assert 0 < step.metrics[f"loss/support_mass_{side}"] <= 1 + 1e-6
