"""The loss section of a configuration: names, refusals with reasons, requirements, and what a log must hold."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from asyncopd.config.losses import CORRECTIONS, ESTIMATORS, HeadTailConfig, LossConfig
from asyncopd.config.recorded import CacheRequirements, check_cache
from asyncopd.errors import ConfigError
from asyncopd.losses import build_estimator
from asyncopd.types import Candidates, ScoredTrajectory, TeacherScores, Trajectory, VersionRun

LOSS: TypeAdapter[Any] = TypeAdapter(LossConfig)
NAMES = (
    "head_tail",
    "policy_gradient",
    "dense_reverse_kl",
    "dense_forward_kl",
    "forward_kl",
    "forward_kl_draws",
    "reverse_kl",
    "generalised_jsd",
    "skew_kl",
    "npd",
    "cross_entropy",
)


def test_these_are_all_the_names() -> None:
    assert tuple(kind.model_fields["name"].default for kind in ESTIMATORS) == NAMES
    assert tuple(kind.model_fields["name"].default for kind in CORRECTIONS) == CORRECTION_NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_alone_gives_an_estimator_and_survives_a_round_trip(name: str) -> None:
    config = LOSS.validate_python({"name": name})
    assert build_estimator(config)
    assert LOSS.validate_json(LOSS.dump_json(config)) == config


CORRECTION_NAMES = ("none", "clip", "decoupled", "m2po", "truncate", "mask")


@pytest.mark.parametrize("correction", CORRECTION_NAMES)
def test_every_correction_builds_and_only_m2po_needs_the_step_first(correction: str) -> None:
    config = LOSS.validate_python({"name": "policy_gradient", "correction": {"name": correction}})
    assert build_estimator(config).needs_step_pass == (correction == "m2po")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"name": "headtail"}, "no estimator is called 'headtail'. Nearest: 'head_tail'"),
        ({}, "estimator: `name` is missing"),
        ({"name": "policy_gradient", "num_draw": 4}, "has no option 'num_draw'. Nearest: 'num_draws'"),
        ({"name": "policy_gradient", "correction": {"name": "clipp"}}, "Nearest: 'clip'"),
        ({"name": "policy_gradient", "correction": {"name": "clip", "epsilon": 1}}, "Nearest: 'epsilon_"),
        ({"name": "head_tail", "head": 0}, "greater than or equal to 1"),
        ({"name": "policy_gradient", "num_draws": 1, "baseline": "leave_one_out"}, "there is no other draw"),
        ({"name": "policy_gradient", "baseline": "exact", "advantage": "behaviour"}, "full rows of p_old"),
        ({"name": "policy_gradient", "ratio": "none", "correction": {"name": "m2po"}}, "no ratio to correct"),
        ({"name": "policy_gradient", "ratio": "none", "correction": {"name": "clip"}}, "no ratio to correct"),
        ({"name": "policy_gradient", "ratio": "none", "baseline": "leave_one_out"}, "would change the gradient"),
        ({"name": "policy_gradient", "ratio": "none", "max_prefix_weight": 2}, "the prefixes and not the token"),
        (
            {"name": "policy_gradient", "correction": {"name": "clip", "dual_clip": 1.1}},
            "dual_clip 1.1 must exceed 1 + epsilon_high",
        ),
        ({"name": "reverse_kl", "top_k": 1, "tail": "drop"}, "mass leaks away"),
        ({"name": "reverse_kl", "top_k": 1, "tail": "renormalise"}, "the loss is 0 whatever the student does"),
        ({"name": "forward_kl", "top_k": 1, "tail": "renormalise"}, "the loss is 0 whatever the student does"),
        ({"name": "npd", "top_k": 1, "tail": "renormalise"}, "the loss is 0 whatever the student does"),
        ({"name": "npd", "max_prefix_weight": 2}, "has no option 'max_prefix_weight'"),
        ({"name": "generalised_jsd", "beta": 1.0}, "less than 1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LOSS.validate_python(section)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("section", "baseline"),
    [({"num_draws": 1}, "none"), ({"num_draws": 2}, "leave_one_out"), ({"ratio": "none"}, "none")],
)
def test_baseline_is_leave_one_out_wherever_it_exists(section: dict[str, Any], baseline: str) -> None:
    assert LOSS.validate_python({"name": "policy_gradient", **section}).baseline == baseline


@pytest.mark.parametrize(
    ("section", "needed"),
    [
        ({"name": "head_tail"}, CacheRequirements(head=4, num_draws=4, law="tail")),
        ({"name": "head_tail", "teacher_top_k": 2}, CacheRequirements(head=4, num_draws=4, law="tail", top_k=2)),
        ({"name": "policy_gradient"}, CacheRequirements(num_draws=16, law="policy")),
        ({"name": "policy_gradient", "num_draws": 1}, CacheRequirements()),
        ({"name": "policy_gradient", "num_draws": 1, "baseline": "exact"}, CacheRequirements(full_vocabulary=True)),
        ({"name": "dense_reverse_kl"}, CacheRequirements(full_vocabulary=True)),
        ({"name": "reverse_kl", "support": "student"}, CacheRequirements(head=16)),
        ({"name": "reverse_kl"}, CacheRequirements(top_k=16)),
        ({"name": "forward_kl_draws"}, CacheRequirements(num_teacher_draws=16)),
        ({"name": "npd"}, CacheRequirements(top_k=10)),
        ({"name": "cross_entropy"}, CacheRequirements()),
    ],
)
def test_requirements_name_the_arrays(section: dict[str, Any], needed: CacheRequirements) -> None:
    assert LOSS.validate_python(section).requirements() == needed


@pytest.mark.parametrize("name", NAMES)
def test_a_log_recorded_for_a_loss_serves_it(name: str) -> None:
    needed = LOSS.validate_python({"name": name}).requirements()
    check_cache(needed, needed, run_id="r1")


HELD = CacheRequirements(top_k=8, head=4, num_draws=4, law="tail")


@pytest.mark.parametrize(
    ("needed", "parts"),
    [
        (CacheRequirements(top_k=64), ("topk_logprobs holds 8", "needed are 64", "backfill r1 --top-k 64`")),
        (CacheRequirements(full_vocabulary=True), ("topk_logprobs", "every id", "backfill r1 --top-k all`")),
        (CacheRequirements(num_teacher_draws=2), ("teacher_draw_logprobs holds 0", "--teacher-draws 2`")),
        (CacheRequirements(head=6), ("head_logprobs holds 4", "--candidates head=6`")),
        (
            CacheRequirements(num_draws=16, law="policy"),
            ("draw_logprobs holds 4", "--candidates num_draws=16,law=policy`"),
        ),
        (CacheRequirements(num_draws=2, law="policy"), ("draws of law 'tail', needed is 'policy'",)),
        (CacheRequirements(head=2, num_draws=4, law="tail"), ("all the draws avoid", "Set loss.head to 4")),
    ],
)
def test_missing_columns_are_named_with_the_command_that_fills_them(
    needed: CacheRequirements, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cache(needed, HELD, run_id="r1")
    for part in ("run r1", *parts):
        assert part in str(caught.value)


def test_wider_caches_and_full_rows_serve_narrower_needs() -> None:
    check_cache(CacheRequirements(top_k=4), HELD, run_id="r1")
    check_cache(CacheRequirements(head=2), HELD, run_id="r1")
    check_cache(CacheRequirements(head=4, num_draws=2, law="tail"), HELD, run_id="r1")
    check_cache(CacheRequirements(top_k=30), CacheRequirements(full_vocabulary=True), run_id="r1")


def test_recording_more_than_the_loss_needs() -> None:
    needed = HeadTailConfig().requirements()
    joined = needed.joined_with(top_k=8, head=0, num_draws=0, law="policy", num_teacher_draws=2)
    assert joined == CacheRequirements(head=4, num_draws=4, law="tail", top_k=8, num_teacher_draws=2)
    alone = CacheRequirements().joined_with(top_k=0, head=4, num_draws=4, law="tail", num_teacher_draws=0)
    assert alone == CacheRequirements(head=4, num_draws=4, law="tail")
    with pytest.raises(ConfigError, match=r"recording\.law 'policy'"):
        needed.joined_with(top_k=0, head=0, num_draws=4, law="policy", num_teacher_draws=0)
    with pytest.raises(ConfigError, match=r"recording\.head 8"):
        needed.joined_with(top_k=0, head=8, num_draws=0, law="tail", num_teacher_draws=0)


def test_what_a_log_holds_is_read_off_its_arrays() -> None:
    ids, logprobs = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)
    one = np.zeros(1, np.float32)
    candidates = Candidates(ids, logprobs, one, np.zeros((1, 4), np.int32), np.zeros((1, 4), np.float32), "tail")
    trajectory = Trajectory(
        0, "p", np.zeros(1, np.int32), np.zeros(1, np.int32), one, (VersionRun(0, 1),), "stop", candidates
    )
    scores = TeacherScores(
        0,
        "t",
        "d",
        1.0,
        one,
        np.zeros((1, 7), np.int32),
        np.zeros((1, 7), np.float32),
        logprobs,
        np.zeros((1, 4), np.float32),
        ids,
        logprobs,
    )
    held = CacheRequirements.held_by(ScoredTrajectory(trajectory, scores), vocab_size=7)
    assert held == CacheRequirements(top_k=7, num_draws=4, law="tail", full_vocabulary=True)


def test_the_configuration_imports_without_torch() -> None:
    code = "import sys, asyncopd.config.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
