"""From a LossConfig to the estimator the learner calls: the only place where names meet functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import assert_never

from torch import Tensor

from asyncopd.config.losses import (
    Clip,
    CorrectionConfig,
    CrossEntropyConfig,
    Decoupled,
    DenseForwardKLConfig,
    DenseReverseKLConfig,
    ForwardKLConfig,
    ForwardKLDrawsConfig,
    GeneralisedJSDConfig,
    HeadTailConfig,
    LossConfig,
    M2po,
    Mask,
    NoCorrection,
    NPDConfig,
    PolicyGradientConfig,
    ReverseKLConfig,
    SkewKLConfig,
    TailName,
    Truncate,
)
from asyncopd.losses.contract import Estimator, RowLosses, StepContext
from asyncopd.losses.corrections import (
    Corrected,
    clip,
    decoupled,
    m2po,
    mask,
    no_correction,
    second_moment_threshold,
    truncate,
)
from asyncopd.losses.divergences import (
    bucket,
    drop,
    forward_kl,
    generalised_jsd,
    renormalise,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from asyncopd.losses.estimators import (
    Baseline,
    CrossEntropy,
    DrawBaseline,
    Draws,
    ExactBaseline,
    HeadTail,
    NearPolicy,
    Outcomes,
    PolicyGradient,
    PrefixWeighted,
    SupportDivergence,
    TeacherDraws,
    first_draws,
    full_support,
    sampled_token,
    student_support,
    teacher_support,
)
from asyncopd.losses.logspace import importance_log_ratio, unit_log_ratio
from asyncopd.losses.policy_gradient import (
    behaviour_advantage,
    current_advantage,
    leave_one_out_baseline,
    no_baseline,
)

__all__ = ["Estimator", "RowLosses", "StepContext", "build_estimator"]

_TAILS: dict[TailName, Outcomes] = {"bucket": bucket, "drop": drop, "renormalise": renormalise}


def build_estimator(config: LossConfig) -> Estimator:
    """The estimator that `config` names, with its prefix weight if it asks for one."""
    estimator = _unweighted(config)
    if isinstance(config, NPDConfig | CrossEntropyConfig) or config.max_prefix_weight is None:
        return estimator
    return PrefixWeighted(estimator, config.max_prefix_weight)


def _unweighted(config: LossConfig) -> Estimator:
    match config:
        case HeadTailConfig():
            return HeadTail(config.head, config.num_draws, config.teacher_top_k)
        case PolicyGradientConfig():
            return _policy_gradient(config)
        case DenseForwardKLConfig():
            # A full support has no tail to bucket: `drop` is exact there.
            return SupportDivergence(full_support, drop, forward_kl)
        case DenseReverseKLConfig():
            return SupportDivergence(full_support, drop, reverse_kl)
        case ForwardKLConfig():
            return SupportDivergence(partial(teacher_support, top_k=config.top_k), _TAILS[config.tail], forward_kl)
        case ForwardKLDrawsConfig():
            return TeacherDraws(config.num_teacher_draws)
        case ReverseKLConfig():
            support = {"teacher": teacher_support, "student": student_support}[config.support]
            return SupportDivergence(partial(support, top_k=config.top_k), _TAILS[config.tail], reverse_kl)
        case GeneralisedJSDConfig():
            divergence = partial(generalised_jsd, beta=config.beta)
            return SupportDivergence(partial(teacher_support, top_k=config.top_k), bucket, divergence)
        case SkewKLConfig():
            skew = {"forward": skew_forward_kl, "reverse": skew_reverse_kl}[config.direction]
            return SupportDivergence(
                partial(teacher_support, top_k=config.top_k), bucket, partial(skew, alpha=config.alpha)
            )
        case NPDConfig():
            return NearPolicy(config.top_k, _TAILS[config.tail], config.kl_weight)
        case CrossEntropyConfig():
            return CrossEntropy()
        case _:
            assert_never(config)


def _policy_gradient(config: PolicyGradientConfig) -> PolicyGradient:
    baselines: dict[str, Baseline] = {
        "none": DrawBaseline(no_baseline),
        "leave_one_out": DrawBaseline(leave_one_out_baseline),
        "exact": ExactBaseline(),
    }
    correct, affected_key = _correction(config.correction)
    return PolicyGradient(
        draws=sampled_token if config.num_draws == 1 else partial(first_draws, num_draws=config.num_draws),
        log_ratio={"importance": importance_log_ratio, "none": unit_log_ratio}[config.ratio],
        advantage={"current": _current, "behaviour": _behaviour}[config.advantage],
        baseline=baselines[config.baseline],
        correct=correct,
        needs_step_pass=isinstance(config.correction, M2po),
        affected_key=affected_key,
    )


def _current(student_logprobs_TN: Tensor, draws: Draws) -> Tensor:
    return current_advantage(student_logprobs_TN, draws.teacher_logprobs_TN)


def _behaviour(student_logprobs_TN: Tensor, draws: Draws) -> Tensor:
    del student_logprobs_TN
    return behaviour_advantage(draws.behaviour_logprobs_TN, draws.teacher_logprobs_TN)


def _correction(config: CorrectionConfig) -> tuple[Callable[[Tensor, Tensor, StepContext], Corrected], str]:
    match config:
        case NoCorrection():
            return lambda log_ratio, advantage, _: no_correction(log_ratio, advantage), "loss/clipped_fraction"
        case Clip():
            bounds = {"epsilon_low": config.epsilon_low, "epsilon_high": config.epsilon_high}
            dual_clip = float("inf") if config.dual_clip is None else config.dual_clip
            return lambda log_ratio, advantage, _: clip(
                log_ratio, advantage, dual_clip=dual_clip, **bounds
            ), "loss/clipped_fraction"
        case Decoupled():
            return lambda log_ratio, advantage, _: decoupled(
                log_ratio,
                advantage,
                # One optimizer step per learner step: the snapshot at its start is the student itself.
                log_ratio.detach(),
                epsilon_low=config.epsilon_low,
                epsilon_high=config.epsilon_high,
                max_behaviour_weight=config.max_behaviour_weight,
            ), "loss/masked_fraction"
        case M2po():
            return lambda log_ratio, advantage, context: m2po(
                log_ratio,
                advantage,
                threshold=second_moment_threshold(context.required_shifts_H(), budget=config.budget),
            ), "loss/clipped_fraction"
        case Truncate():
            return lambda log_ratio, advantage, _: truncate(
                log_ratio, advantage, max_ratio=config.max_ratio
            ), "loss/truncated_fraction"
        case Mask():
            return lambda log_ratio, advantage, _: mask(
                log_ratio, advantage, max_ratio=config.max_ratio
            ), "loss/masked_fraction"
        case _:
            assert_never(config)
