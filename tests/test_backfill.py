"""Back-fill and the score cache: more about old rollouts, beside what exists, and nothing asked twice."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pipeline
import pytest
from offline_builders import QUIET, make_run, objects, opened, replayed, weights

from asyncopd import cli
from asyncopd.config.requests import BackfillRequest
from asyncopd.errors import ConfigError, EngineError
from asyncopd.models.causal_lm import load_safetensors, to_safetensors
from asyncopd.models.sampling import CandidateRule
from asyncopd.ports import ScoreRequest
from asyncopd.rollout.candidates import CandidateSource
from asyncopd.teacher.stage import Backfilled, score_through
from asyncopd.types import Candidates, VersionRun
from flows import offline
from flows.backfill import run_backfill
from flows.engines import make_scorer, student_skeleton
from flows.wiring import OpenRun, open_stored_run
from storage.mixture import mix
from storage.run_view import RunView
from storage.score_cache import StoredScoreCache

SHARDS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return make_run(tmp_path_factory.mktemp("backfill"))


@pytest.fixture(scope="module")
def bare_run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    """A run for the test of refusals alone: what other tests back-fill would serve its replays."""
    return make_run(tmp_path_factory.mktemp("bare"))


def backfill(run: OpenRun, **asked: Any) -> Backfilled:
    root, run_id = run.config.storage.root, run.log.run_id
    return asyncio.run(run_backfill(root, run_id, BackfillRequest.of(asked), console=QUIET))


def test_a_back_fill_leaves_every_object_as_it_was(run: OpenRun) -> None:
    before = objects(run.config.storage.root, "")
    done = backfill(run, teacher={"name": "hard", "smoothing": 1e-4}, top_k=4, candidates="head=2,num_draws=2,law=tail")
    assert (done.num_shards, done.num_shards_found) == (SHARDS, 0)
    after = objects(run.config.storage.root, "")
    assert {key: after[key] for key in before} == before
    added = {key.partition("/claims/")[0].rsplit("/", 1)[0] for key in set(after) - set(before)}
    assert any(key.endswith("scores/hard%40top4-head2-draws2-tail") for key in added)
    again = backfill(
        run, teacher={"name": "hard", "smoothing": 1e-4}, top_k=4, candidates="head=2,num_draws=2,law=tail"
    )
    assert (again.num_shards, again.num_shards_found, again.num_tokens_asked) == (0, SHARDS, 0)


def test_wider_scores_agree_with_those_that_were_recorded(run: OpenRun) -> None:
    done = backfill(run, top_k=6, num_teacher_draws=3)
    assert done.folder == "oracle@top6-teacher-draws3"
    for shard in run.log.trajectory_shards():
        for wide, own in zip(
            run.log.read_scores(done.folder, shard), run.log.read_scores("oracle", shard), strict=True
        ):
            assert wide.topk_ids_TK.shape[1] == 6
            assert wide.teacher_draw_ids_TM.shape[1] == 3
            assert wide.teacher_digest == own.teacher_digest
            for name in ("sampled_logprobs_T", "head_logprobs_TK", "draw_logprobs_TN"):
                assert np.array_equal(getattr(wide, name), getattr(own, name))


def test_candidates_made_afterwards_are_those_the_sampler_recorded(run: OpenRun) -> None:
    # The run recorded head 4 and four tail draws; asking for the same again must give the same ids, from the weights
    # of every version that produced tokens.
    backfill(run, candidates="head=4,num_draws=4,law=tail")
    for shard in run.log.trajectory_shards():
        made = run.log.read_candidates("head4-draws4-tail", shard)
        for trajectory in run.log.read_trajectories(shard):
            own, other = trajectory.candidates, made[trajectory.index]
            assert np.allclose(own.head_logprobs_TK, other.head_logprobs_TK, atol=1e-4)
            assert np.allclose(own.tail_logmass_T, other.tail_logmass_T, atol=1e-4)
            # Rounding may move a uniform across the edge of an id; once in a few thousand, not more.
            assert (own.draw_ids_TN == other.draw_ids_TN).mean() > 0.97
            assert (own.head_ids_TK == other.head_ids_TK).mean() > 0.97


def test_each_token_has_candidates_from_the_version_that_produced_it(run: OpenRun) -> None:
    # A response whose first three tokens are version 0's and whose rest is version 6's, with log-probs to match.
    recorded = max(run.log.read_trajectories(run.log.trajectory_shards()[0]), key=lambda t: len(t.response_ids))
    num_tokens = len(recorded.response_ids)
    assert num_tokens > 4
    model, rows = student_skeleton(run.log), {}
    weights_by_number = {version.number: run.log.read_policy(version).safetensors for version in run.log.policies()}
    for number in (0, 6):
        load_safetensors(model, weights_by_number[number])
        rows[number] = hf_models.law_rows(model, recorded.prompt_ids, recorded.response_ids)
    rows_TV = np.concatenate([rows[0][:3], rows[6][3:]])

    def at(ids: np.ndarray) -> np.ndarray:
        return np.take_along_axis(rows_TV, ids.reshape(num_tokens, -1), axis=1)

    trajectory = replace(
        recorded,
        version_runs=(VersionRun(0, 3), VersionRun(6, num_tokens - 3)),
        behaviour_logprobs_T=at(recorded.response_ids)[:, 0].astype(np.float32),
    )
    source = CandidateSource(
        student_skeleton(run.log),
        weights_by_number.__getitem__,
        rule=CandidateRule(3, 5, "tail"),
        temperature=1.0,
        top_p=1.0,
        seed=0,
        row_capacity=128,
    )
    made = source.candidates([trajectory])[trajectory.index]
    assert np.allclose(made.head_logprobs_TK, -np.sort(-rows_TV, axis=1)[:, :3], atol=1e-4)
    assert np.allclose(made.head_logprobs_TK, at(made.head_ids_TK), atol=1e-4)
    assert np.allclose(made.draw_logprobs_TN, at(made.draw_ids_TN), atol=1e-4)
    assert np.allclose(np.exp(made.tail_logmass_T), 1 - np.exp(made.head_logprobs_TK).sum(1), atol=1e-4)
    assert not any(set(head) & set(draws) for head, draws in zip(made.head_ids_TK, made.draw_ids_TN, strict=True))


def test_policy_draws_start_with_the_emitted_token(run: OpenRun) -> None:
    backfill(run, candidates="head=0,num_draws=3,law=policy")
    for shard in run.log.trajectory_shards():
        made = run.log.read_candidates("head0-draws3-policy", shard)
        for trajectory in run.log.read_trajectories(shard):
            candidates: Candidates = made[trajectory.index]
            assert np.array_equal(candidates.draw_ids_TN[:, 0], trajectory.response_ids)
            assert np.array_equal(candidates.draw_logprobs_TN[:, 0], trajectory.behaviour_logprobs_T)
            assert candidates.draw_ids_TN.shape[1] == 3


def test_weights_that_did_not_sample_a_response_are_refused(run: OpenRun) -> None:
    other = to_safetensors(student_skeleton(run.log))  # the architecture's random initialisation
    source = CandidateSource(
        student_skeleton(run.log),
        lambda number: other,
        rule=CandidateRule(2, 2, "tail"),
        temperature=1.0,
        top_p=1.0,
        seed=0,
        row_capacity=128,
    )
    with pytest.raises(EngineError, match="not the weights that sampled it"):
        source.candidates(run.log.read_trajectories(run.log.trajectory_shards()[0]))


@pytest.mark.parametrize(
    "settings",
    [
        ("loss.name=forward_kl", "loss.top_k=5"),
        ("loss.name=dense_reverse_kl",),
        ("loss.name=forward_kl_draws", "loss.num_teacher_draws=4"),
        ("loss.name=policy_gradient", "loss.num_draws=4"),
        ("loss.name=head_tail", "loss.head=3", "loss.num_draws=6"),
    ],
)
def test_the_command_that_a_refusal_names_makes_the_replay_possible(
    bare_run: OpenRun, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    run = bare_run
    monkeypatch.setattr(subprocess, "Popen", ThisProcess)
    with pytest.raises(ConfigError) as refused:
        opened(run, *settings, last=1)
    for command in set(re.findall(r"`asyncopd (backfill [^`]*)`", str(refused.value))):
        with pytest.raises(SystemExit) as ended:
            cli.main([*shlex.split(command), "--root", run.config.storage.root])
        assert ended.value.code == 0
    child = replayed(run, *settings, last=1)
    assert weights(child)[1] != weights(run)[1]
    (scores,) = child.log.record["parent"]["scores"]
    assert scores.startswith("oracle@")


class ThisProcess:
    """The child process of a command, in this one."""

    def __init__(self, command: list[str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "flows.offline"]
        self.arguments = command[3:]

    def wait(self) -> int:
        with pytest.raises(SystemExit) as ended:
            offline.main(self.arguments)
        return int(str(ended.value.code))


def test_a_replay_trains_on_a_mixture_of_two_teachers(run: OpenRun) -> None:
    backfill(run, teacher={"name": "sharp", "smoothing": 2e-4})
    child = replayed(run, "scores={oracle: 1, sharp: 3}", last=2)
    (shard, *_) = run.log.trajectory_shards()
    view = child.log.view
    for mixed, a, b in zip(
        view.read_scores(shard), run.log.read_scores("oracle", shard), run.log.read_scores("sharp", shard), strict=True
    ):
        expected = mix([(0.25, a), (0.75, b)], name=view.name, needs_top_k=False)
        assert np.array_equal(mixed.sampled_logprobs_T, expected.sampled_logprobs_T)
    assert view.name == "0.25 oracle + 0.75 sharp"
    assert weights(child)[1] not in (weights(run)[1], weights(replayed(run, "scores=sharp", last=2))[1])


def test_teachers_that_scored_different_candidates_are_not_mixed(run: OpenRun) -> None:
    backfill(run, teacher={"name": "sharp", "smoothing": 2e-4}, candidates="head=2,num_draws=2,law=tail")
    with pytest.raises(ConfigError, match="different candidates"):
        opened(run, "scores={oracle: 1, sharp@head2-draws2-tail: 1}", "loss.name=cross_entropy", last=2)


def test_requests_that_cannot_work_are_refused(run: OpenRun) -> None:
    for asked, message in (
        ({}, "nothing to back-fill"),
        ({"teacher": {"smoothing": 1e-4}}, "under its name 'oracle'"),
        ({"top_k": 1000}, "the vocabulary has"),
        ({"candidates": "heads=4"}, "'heads=4' is not understood"),
    ):
        with pytest.raises(ConfigError, match=message):
            backfill(run, **asked)
    backfill(run, teacher={"name": "one", "smoothing": 1e-3})
    with pytest.raises(ConfigError, match="holds answers of another teacher"):
        backfill(run, teacher={"name": "one", "smoothing": 1e-4})


def test_a_teacher_under_a_second_name_is_refused_before_it_is_asked(run: OpenRun) -> None:
    # A mistyped name used to have the run's own teacher asked all over again, into a folder of its own.
    backfill(run, teacher={"name": "third", "smoothing": 3e-4})
    before = objects(run.config.storage.root, f"runs/{run.log.run_id}/scores")
    for teacher, known_as in (({"name": "orcale"}, "oracle"), ({"name": "thrid", "smoothing": 3e-4}, "third")):
        for width in (0, 6):
            with pytest.raises(ConfigError, match=rf"scores/{known_as}.* --teacher name={known_as}, or give a setting"):
                backfill(run, teacher=teacher, top_k=width)
    # The same slip with a setting forgotten: `third` is not the run's own teacher.
    with pytest.raises(ConfigError, match="scores/third holds answers of another teacher"):
        backfill(run, teacher={"name": "third"}, top_k=6)
    assert objects(run.config.storage.root, f"runs/{run.log.run_id}/scores") == before


# -- the cache ----------------------------------------------------------------------------------------------------
def counts(run: OpenRun, folder: str = "oracle") -> tuple[int, int]:
    """Tokens asked of the teacher and answered by the cache, by the manifests."""
    facts = [run.log.find_scores(folder, shard).facts for shard in run.log.trajectory_shards()]
    return sum(f.num_tokens_asked for f in facts), sum(f.num_tokens_cached for f in facts)


def test_a_second_run_over_identical_rollouts_asks_the_teacher_nothing(tmp_path: Path) -> None:
    # At τ = 0 two runs of one configuration sample the same tokens. (Not the same last bits of log p_old: those follow
    # what else was in the sampler's batch.)
    settings = {"staleness__max_staleness": 0, "score__cache": True, "learner__num_steps": 3}
    first, second = (make_run(tmp_path, run_id, **settings) for run_id in ("one", "two"))
    num_tokens = sum(step.num_tokens for step in first.log.steps())
    assert counts(first) == (num_tokens, 0)
    assert counts(second) == (0, num_tokens)
    for shard in first.log.trajectory_shards():
        for a, b in zip(first.log.read_scores("oracle", shard), second.log.read_scores("oracle", shard), strict=True):
            assert np.array_equal(a.draw_logprobs_TN, b.draw_logprobs_TN)
            assert np.array_equal(a.head_logprobs_TK, b.head_logprobs_TK)
    assert any("from the cache" in span.detail for span in RunView(second.log).read("spans").spans())

    # Another revision of the teacher, or another question, is another answer.
    assert counts_of(backfill(second, cache=True, teacher={"name": "hard", "smoothing": 1e-4})) == (num_tokens, 0)
    assert counts_of(backfill(second, cache=True, top_k=4)) == (num_tokens, 0)
    # The same question of the first run is answered, whatever the folder is called.
    assert counts_of(backfill(first, cache=True, teacher={"name": "same", "smoothing": 1e-4})) == (0, num_tokens)


def counts_of(done: Backfilled) -> tuple[int, int]:
    return done.num_tokens_asked, done.num_tokens_cached


async def test_only_unknown_trajectories_reach_the_teacher(tmp_path: Path) -> None:
    run = pipeline.new_run(pipeline.small_config(tmp_path, learner__num_steps=1, evaluate__every=0))
    await pipeline.run_all(run)
    run = open_stored_run(str(tmp_path), "small-1")
    trajectories = [t for shard in run.log.trajectory_shards() for t in run.log.read_trajectories(shard)]
    request = ScoreRequest(top_k=3, num_teacher_draws=2, temperature=1.0, seed=0)
    scorer = make_scorer(run.config, run.task, run.store)
    asker = {"worker": run.worker("score"), "what": "all"}
    first = await score_through(StoredScoreCache(run.store), scorer, trajectories[:3], request, **asker)
    # As another process: with a cache object of its own.
    second = await score_through(StoredScoreCache(run.store), scorer, trajectories, request, **asker)
    known = sum(len(t.response_ids) for t in trajectories[:3])
    assert (first.num_tokens_asked, first.num_tokens_cached) == (known, 0)
    assert second.num_tokens_cached == known
    direct = await scorer.score(trajectories, request)
    for found, expected in zip(second.scores, direct, strict=True):
        assert found.index == expected.index
        assert np.array_equal(found.topk_logprobs_TK, expected.topk_logprobs_TK)
        assert np.array_equal(found.teacher_draw_ids_TM, expected.teacher_draw_ids_TM)
    # Teacher draws follow the seed, so another seed is another question.
    other = ScoreRequest(top_k=3, num_teacher_draws=2, temperature=1.0, seed=1)
    third = await score_through(StoredScoreCache(run.store), scorer, trajectories, other, **asker)
    assert third.num_tokens_cached == 0
