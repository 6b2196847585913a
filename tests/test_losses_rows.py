"""Row by row: every estimator against a slow reference, at p = q, on every trained token, however rows are split."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from losses_reference import ReferenceRow, reference
from losses_world import as_float32, losses_at
from torch import Tensor

from asyncopd.config import losses as c
from asyncopd.errors import ConfigError, ShapeError
from asyncopd.losses import StepContext, TokenRows, build_estimator
from asyncopd.losses.corrections import second_moment_threshold
from asyncopd.metrics import SUPPORT_MASS_STUDENT
from asyncopd.types import Candidates, ScoredTrajectory, TeacherScores, Trajectory, VersionRun

VOCAB_SIZE = 14
HEAD = 3


def pg(num_draws: int = 4, **settings: object) -> c.PolicyGradientConfig:
    return c.PolicyGradientConfig.model_validate({"name": "policy_gradient", "num_draws": num_draws, **settings})


CONFIGS: dict[str, c.LossConfig] = {
    "dense_forward_kl": c.DenseForwardKLConfig(),
    "dense_reverse_kl": c.DenseReverseKLConfig(),
    **{f"forward_kl_{tail}": c.ForwardKLConfig(top_k=4, tail=tail) for tail in ("bucket", "drop", "renormalise")},
    "forward_kl_bucket_1": c.ForwardKLConfig(top_k=1),
    "forward_kl_draws": c.ForwardKLDrawsConfig(num_teacher_draws=3),
    **{
        f"reverse_kl_{support}_{tail}": c.ReverseKLConfig(support=support, top_k=3, tail=tail)
        for support in ("teacher", "student")
        for tail in ("bucket", "drop", "renormalise")
    },
    "generalised_jsd": c.GeneralisedJSDConfig(top_k=4, beta=0.3),
    "skew_forward": c.SkewKLConfig(top_k=4),
    "skew_reverse": c.SkewKLConfig(top_k=4, direction="reverse"),
    "npd": c.NPDConfig(top_k=4),
    "cross_entropy": c.CrossEntropyConfig(),
    "head_tail": c.HeadTailConfig(head=HEAD, num_draws=4),
    "head_tail_joined": c.HeadTailConfig(head=HEAD, num_draws=4, teacher_top_k=3),
    "policy_gradient_1": pg(1),
    "policy_gradient_plain": pg(baseline="none"),
    "policy_gradient_leave_one_out": pg(),
    "policy_gradient_exact": pg(baseline="exact"),
    "policy_gradient_behaviour": pg(advantage="behaviour"),
    "policy_gradient_no_ratio": pg(ratio="none"),
    "clip": pg(correction={"name": "clip"}),
    "clip_dual": pg(correction={"name": "clip", "epsilon_high": 0.28, "dual_clip": 1.5}),
    "decoupled": pg(correction={"name": "decoupled", "max_behaviour_weight": 1.5}),
    "m2po": pg(correction={"name": "m2po"}),
    "truncate": pg(correction={"name": "truncate", "max_ratio": 1.5}),
    "mask": pg(correction={"name": "mask", "max_ratio": 1.5}),
}
LEAKY = {"forward_kl_drop", "reverse_kl_teacher_drop", "reverse_kl_student_drop"}
ONLY_ZERO_IN_EXPECTATION = {"forward_kl_draws"}
NO_DIVERGENCE = {"npd", "cross_entropy", "policy_gradient_behaviour"}


def random_rows(num_rows: int, *, law: str, seed: int = 0, drift_scale: float = 0.6) -> tuple[TokenRows, Tensor]:
    """Rows at `num_rows` different prefixes, and the student's logits there [T, V]; float64."""
    rng = np.random.default_rng(seed)
    behaviour_TV = torch.log_softmax(torch.from_numpy(1.2 * rng.standard_normal((num_rows, VOCAB_SIZE))), -1)
    teacher_TV = torch.log_softmax(torch.from_numpy(1.2 * rng.standard_normal((num_rows, VOCAB_SIZE))), -1)
    logits_TV = behaviour_TV + drift_scale * torch.from_numpy(rng.standard_normal((num_rows, VOCAB_SIZE)))
    generator = torch.Generator().manual_seed(seed)
    head_TK = behaviour_TV.argsort(-1, descending=True)[:, :HEAD]
    outside_TV = behaviour_TV.exp().scatter(-1, head_TK, 0.0)
    law_TV = behaviour_TV.exp() if law == "policy" else outside_TV
    draws_TN = torch.multinomial(law_TV, 4, replacement=True, generator=generator)
    responses_T = torch.multinomial(behaviour_TV.exp(), 1, generator=generator)[:, 0]
    teacher_draws_TM = torch.multinomial(teacher_TV.exp(), 3, replacement=True, generator=generator)
    topk_TK = teacher_TV.argsort(-1, descending=True)
    rows = TokenRows(
        response_ids_T=responses_T,
        behaviour_logprobs_T=behaviour_TV.gather(-1, responses_T[:, None])[:, 0],
        teacher_logprobs_T=teacher_TV.gather(-1, responses_T[:, None])[:, 0],
        topk_ids_TK=topk_TK,
        topk_logprobs_TK=teacher_TV.gather(-1, topk_TK),
        head_ids_TK=head_TK,
        head_behaviour_logprobs_TK=behaviour_TV.gather(-1, head_TK),
        head_teacher_logprobs_TK=teacher_TV.gather(-1, head_TK),
        tail_logmass_T=outside_TV.sum(-1).log(),
        draw_ids_TN=draws_TN,
        draw_behaviour_logprobs_TN=behaviour_TV.gather(-1, draws_TN),
        draw_teacher_logprobs_TN=teacher_TV.gather(-1, draws_TN),
        teacher_draw_ids_TM=teacher_draws_TM,
        teacher_draw_logprobs_TM=teacher_TV.gather(-1, teacher_draws_TM),
        trajectory_T=torch.arange(num_rows) // 4,
    )
    return rows, logits_TV


def rows_for(config: c.LossConfig, num_rows: int, seed: int = 0) -> tuple[TokenRows, Tensor]:
    return random_rows(num_rows, law=config.requirements().law or "policy", seed=seed)


def loss_and_gradient(
    config: c.LossConfig, rows: TokenRows, logits_TV: Tensor, context: StepContext | None = None
) -> tuple[Tensor, Tensor]:
    """Loss [T] and its gradient row by row [T, V]: every row has logits of its own."""
    logits_TV = logits_TV.clone().requires_grad_()
    loss_T = losses_at(config, rows, torch.log_softmax(logits_TV, -1), context).loss_T
    return loss_T.detach(), torch.autograd.grad(loss_T.sum(), logits_TV)[0]


def full_rows(rows: TokenRows, seed: int) -> tuple[Tensor, Tensor]:
    """p_old and q [T, V] that `random_rows` started from."""
    rng = np.random.default_rng(seed)
    behaviour_TV, teacher_TV = (
        torch.softmax(torch.from_numpy(1.2 * rng.standard_normal((len(rows), VOCAB_SIZE))), -1) for _ in range(2)
    )
    return behaviour_TV, teacher_TV


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_in_value_and_gradient(name: str) -> None:
    config = CONFIGS[name]
    rows, logits_TV = rows_for(config, 24, seed=3)
    behaviour_TV, teacher_TV = full_rows(rows, seed=3)
    loss_T, gradient_TV = loss_and_gradient(config, rows, logits_TV)
    threshold = math.inf
    if name == "m2po":
        estimator = build_estimator(config)
        gathered_TJ = torch.log_softmax(logits_TV, -1).gather(-1, estimator.student_ids(rows))
        shifts_H = estimator.step_context(rows, gathered_TJ).required_shifts_H()
        threshold = second_moment_threshold(shifts_H, budget=0.04)
        assert threshold < math.inf
    for t in range(len(rows)):
        row = ReferenceRow(
            p=torch.softmax(logits_TV[t], -1).numpy(),
            p_old=behaviour_TV[t].numpy(),
            q=teacher_TV[t].numpy(),
            response=int(rows.response_ids_T[t]),
            head=rows.head_ids_TK[t].tolist(),
            draws=rows.draw_ids_TN[t].tolist(),
            teacher_draws=rows.teacher_draw_ids_TM[t].tolist(),
        )
        value, gradient = reference(config, row, m2po_threshold=threshold)
        assert float(loss_T[t]) == pytest.approx(value, abs=1e-9)
        np.testing.assert_allclose(gradient_TV[t].numpy(), gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - LEAKY - ONLY_ZERO_IN_EXPECTATION - NO_DIVERGENCE))
def test_student_that_equals_the_teacher_has_no_loss_and_no_gradient(name: str) -> None:
    # p_old differs from both: what was cached is stale, and still there is nothing to learn.
    config = CONFIGS[name]
    rows, _ = rows_for(config, 32)
    _, teacher_TV = full_rows(rows, seed=0)
    loss_T, gradient_TV = loss_and_gradient(config, as_float32(rows), teacher_TV.log().float())
    assert loss_T.abs().max() <= 1e-6
    assert gradient_TV.abs().max() <= 1e-6


def test_dropped_tail_pulls_even_a_student_that_equals_the_teacher() -> None:
    for name in LEAKY:
        rows, _ = rows_for(CONFIGS[name], 32)
        _, teacher_TV = full_rows(rows, seed=0)
        _, gradient_TV = loss_and_gradient(CONFIGS[name], rows, teacher_TV.log())
        assert gradient_TV.norm(dim=-1).min() > 1e-3, name


def scored_batch(lengths: tuple[int, ...] = (3, 1, 5), *, law: str = "policy") -> list[ScoredTrajectory]:
    """Trajectories of the given lengths over rows of `random_rows`; the first of each ends with EOS (id 0)."""
    rows, _ = random_rows(sum(lengths), law=law, seed=9)
    batch, start = [], 0
    for index, length in enumerate(lengths):
        part = rows.select(slice(start, start + length))
        start += length
        candidates = Candidates(
            head_ids_TK=part.head_ids_TK.int().numpy(),
            head_logprobs_TK=part.head_behaviour_logprobs_TK.float().numpy(),
            tail_logmass_T=part.tail_logmass_T.float().numpy(),
            draw_ids_TN=part.draw_ids_TN.int().numpy(),
            draw_logprobs_TN=part.draw_behaviour_logprobs_TN.float().numpy(),
            law=law,  # type: ignore[arg-type]
        )
        trajectory = Trajectory(
            index=100 + index,
            prompt_id=f"p{index}",
            prompt_ids=np.array([1, 2], np.int32),
            response_ids=part.response_ids_T.int().numpy(),
            behaviour_logprobs_T=part.behaviour_logprobs_T.float().numpy(),
            version_runs=(VersionRun(0, length),),
            finish_reason="stop",
            candidates=candidates,
        )
        scores = TeacherScores(
            index=100 + index,
            teacher="t",
            teacher_digest="d",
            temperature=1.0,
            sampled_logprobs_T=part.teacher_logprobs_T.float().numpy(),
            topk_ids_TK=part.topk_ids_TK.int().numpy(),
            topk_logprobs_TK=part.topk_logprobs_TK.float().numpy(),
            head_logprobs_TK=part.head_teacher_logprobs_TK.float().numpy(),
            draw_logprobs_TN=part.draw_teacher_logprobs_TN.float().numpy(),
            teacher_draw_ids_TM=part.teacher_draw_ids_TM.int().numpy(),
            teacher_draw_logprobs_TM=part.teacher_draw_logprobs_TM.float().numpy(),
        )
        batch.append(ScoredTrajectory(trajectory, scores))
    return batch


@pytest.mark.parametrize("name", CONFIGS)
def test_every_response_token_is_trained_the_first_and_the_last_too(name: str) -> None:
    # The public reference trains different tokens in different modes. Drift too small for a correction to mask a row.
    config = CONFIGS[name]
    rows = TokenRows.from_scored(scored_batch(law=config.requirements().law or "policy"))
    assert len(rows) == 3 + 1 + 5
    behaviour_TV, _ = full_rows(rows, seed=9)
    noise_TV = torch.from_numpy(np.random.default_rng(1).standard_normal((len(rows), VOCAB_SIZE)))
    logits_TV = (behaviour_TV.log() + 0.02 * noise_TV).float()
    _, gradient_TV = loss_and_gradient(config, rows, logits_TV)
    assert (gradient_TV.norm(dim=-1) > 1e-4).all()


WITHOUT_PREFIX_WEIGHT = {"npd", "cross_entropy", "policy_gradient_no_ratio"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in CONFIGS]
    + [(name, {"max_prefix_weight": 2.0}) for name in sorted(set(CONFIGS) - WITHOUT_PREFIX_WEIGHT)],
)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(name: str, settings: dict[str, float]) -> None:
    config = CONFIGS[name].model_copy(update=settings)
    rows, logits_TV = rows_for(config, 24)
    rows, logits_TV = as_float32(rows), logits_TV.float()
    whole_loss_T, whole_gradient_TV = loss_and_gradient(config, rows, logits_TV)

    # Micro-batches of whole trajectories, in another order.
    parts = [slice(16, 24), slice(0, 4), slice(4, 16)]
    estimator = build_estimator(config)
    context = StepContext.join(
        [
            estimator.step_context(
                rows.select(part),
                torch.log_softmax(logits_TV[part], -1).gather(-1, estimator.student_ids(rows.select(part))),
            )
            for part in parts
        ]
    )
    for part in parts:
        loss_T, gradient_TV = loss_and_gradient(config, rows.select(part), logits_TV[part], context)
        torch.testing.assert_close(loss_T, whole_loss_T[part], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient_TV, whole_gradient_TV[part], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_are_finite_rows_without_gradient(name: str) -> None:
    config = CONFIGS[name]
    rows, logits_TV = rows_for(config, 8)
    losses = losses_at(config, rows, torch.log_softmax(logits_TV.requires_grad_(), -1))
    assert losses.loss_T.shape == (8,)
    for metric, values_T in losses.statistics_T.items():
        assert metric.key.startswith("loss/")
        assert values_T.shape == (8,)
        assert not values_T.requires_grad
        assert torch.isfinite(values_T).all()


def test_support_masses_are_those_of_the_support() -> None:
    config = CONFIGS["head_tail_joined"]
    rows, logits_TV = rows_for(config, 8)
    losses = losses_at(config, rows, torch.log_softmax(logits_TV, -1))
    for t in range(8):
        joined = sorted({*rows.head_ids_TK[t].tolist(), *rows.topk_ids_TK[t, :3].tolist()})
        expected = torch.softmax(logits_TV[t], -1)[joined].sum()
        torch.testing.assert_close(losses.statistics_T[SUPPORT_MASS_STUDENT][t], expected)


def test_empty_tail_contributes_nothing_whatever_stands_in_its_columns() -> None:
    # Top-p sampling can leave the head with all the mass; the sampler then has nothing to draw.
    config = CONFIGS["head_tail"]
    rows, logits_TV = rows_for(config, 4)
    blank = torch.full_like(rows.tail_logmass_T, -torch.inf)
    draws = torch.full_like(rows.draw_behaviour_logprobs_TN, -torch.inf)
    emptied = TokenRows(**{**vars(rows), "tail_logmass_T": blank, "draw_behaviour_logprobs_TN": draws})
    loss_T, gradient_TV = loss_and_gradient(config, emptied, logits_TV)
    assert torch.isfinite(loss_T).all()
    assert torch.isfinite(gradient_TV).all()


def test_from_scored_concatenates_in_order_and_keeps_alignment() -> None:
    batch = scored_batch()
    rows = TokenRows.from_scored(batch)
    assert rows.response_ids_T.tolist() == [int(i) for m in batch for i in m.trajectory.response_ids]
    assert rows.trajectory_T.tolist() == [100] * 3 + [101] + [102] * 5
    assert rows.response_ids_T.dtype == torch.int64
    assert rows.topk_logprobs_TK.dtype == torch.float32
    assert rows.topk_logprobs_TK.shape == (9, VOCAB_SIZE)
    np.testing.assert_array_equal(rows.draw_teacher_logprobs_TN[3].numpy(), batch[1].scores.draw_logprobs_TN[0])


def test_batch_cached_with_two_widths_is_refused() -> None:
    wide, narrow = scored_batch((2,)), scored_batch((2,))
    scores = narrow[0].scores
    cut = TeacherScores(
        **{**vars(scores), "topk_ids_TK": scores.topk_ids_TK[:, :4], "topk_logprobs_TK": scores.topk_logprobs_TK[:, :4]}
    )
    with pytest.raises(ShapeError, match="topk_ids: index 100 was cached"):
        TokenRows.from_scored([*wide, ScoredTrajectory(narrow[0].trajectory, cut)])
    with pytest.raises(ShapeError, match="empty batch"):
        TokenRows.from_scored([])


def test_narrow_cache_is_refused_by_the_estimator_too() -> None:
    rows, _ = random_rows(2, law="policy")
    for config, message in (
        (c.ForwardKLConfig(top_k=99), "topk_ids holds 14"),
        (c.ForwardKLDrawsConfig(num_teacher_draws=9), "teacher_draw_ids holds 3"),
        (c.HeadTailConfig(head=4), "head_ids holds 3"),
        (pg(64), "draw_ids holds 4"),
    ):
        with pytest.raises(ShapeError, match=message):
            build_estimator(config).student_ids(rows)


def test_m2po_without_its_pass_over_the_step_is_refused() -> None:
    rows, logits_TV = random_rows(4, law="policy")
    with pytest.raises(ConfigError, match="pass over the whole optimizer step"):
        losses_at(CONFIGS["m2po"], rows, torch.log_softmax(logits_TV, -1), StepContext())


def test_imitation_of_the_argmax_warns() -> None:
    with pytest.warns(UserWarning, match="argmax"):
        c.ForwardKLConfig(top_k=1, tail="drop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c.ForwardKLConfig(top_k=1)
