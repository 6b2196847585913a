"""Statistics of a step against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_builders import accelerator, scored_batch

from asyncopd.config import losses as c
from asyncopd.learner.statistics import StepStatistics, drawn_masses, ratio_metrics
from asyncopd.losses import TokenRows, build_estimator
from asyncopd.losses.contract import RowLosses
from asyncopd.metrics import DRIFT, ESS, SUPPORT_MASS_STUDENT, SUPPORT_MASS_TEACHER, TEACHER_FLOOR
from asyncopd.types import LOGPROB_FLOOR


@pytest.mark.parametrize(
    "config",
    [
        c.PolicyGradientConfig(num_draws=1),
        c.PolicyGradientConfig(num_draws=4),
        c.PolicyGradientConfig(num_draws=4, baseline="exact"),
        c.ForwardKLDrawsConfig(num_teacher_draws=3),
        c.CrossEntropyConfig(),
    ],
    ids=lambda config: f"{config.name}",
)
def test_support_coverage_of_draws_counts_every_distinct_id_once(config: c.LossConfig) -> None:
    rows = TokenRows.from_scored(scored_batch())
    ids_TJ = torch.cat([rows.response_ids_T[:, None], build_estimator(config).student_ids(rows)], dim=1)
    student_TV = torch.log_softmax(torch.randn(len(rows), 17, generator=torch.Generator().manual_seed(0)), -1)
    found = drawn_masses(rows, ids_TJ, student_TV.gather(-1, ids_TJ))
    for row, ids in enumerate(ids_TJ.tolist()):
        teacher = dict(zip(rows.topk_ids_TK[row].tolist(), rows.topk_logprobs_TK[row].tolist(), strict=True))
        student = sum(float(student_TV[row, i].exp()) for i in set(ids))
        assert float(found[SUPPORT_MASS_STUDENT][row]) == pytest.approx(student, rel=1e-5)
        expected = sum(np.exp(teacher[i]) for i in set(ids))
        assert float(found[SUPPORT_MASS_TEACHER][row]) == pytest.approx(expected, rel=1e-5)


def test_the_share_of_teacher_logprobs_at_the_floor_is_reported() -> None:
    batch = scored_batch()
    scores = batch[0].scores
    scores.sampled_logprobs_T[0] = scores.topk_logprobs_TK[0, -1] = LOGPROB_FLOOR
    rows = TokenRows.from_scored(batch)
    zeros_T = torch.zeros(len(rows))
    statistics = StepStatistics()
    statistics.add(rows, rows.response_ids_T[:, None], zeros_T[:, None], zeros_T, RowLosses(zeros_T))
    width = sum(a.shape[1] for a in (scores.topk_ids_TK, scores.head_logprobs_TK, scores.draw_logprobs_TN))
    with accelerator() as one:
        found = statistics.reduced(one)[TEACHER_FLOOR]
    assert found == pytest.approx(2 / (1 + width + scores.teacher_draw_ids_TM.shape[1]) / len(rows))


def test_ratio_metrics_are_neutral_without_drift_and_k3_is_never_negative() -> None:
    neutral = ratio_metrics(np.zeros(7, np.float32))
    assert neutral[DRIFT] == 0
    assert neutral[ESS] == pytest.approx(1)
    rng = np.random.default_rng(0)
    p_old, other = rng.dirichlet(np.full(30, 5.0)), rng.dirichlet(np.full(30, 5.0))
    p_new = (p_old + other) / 2
    draws = rng.choice(30, 200_000, p=p_old)
    found = ratio_metrics(np.log(p_new / p_old)[draws].astype(np.float32))
    assert found[DRIFT] == pytest.approx((p_old * np.log(p_old / p_new)).sum(), rel=0.02)
