"""Slow float64 versions of every estimator, written from the mathematics with numpy loops: value and gradient by hand.

Nothing here shares a line with asyncopd/losses. A row is what the mathematics needs: full rows of p_θ, p_old and q at
one prefix, and what was drawn. Gradients are with respect to the student's logits: ∇ log p_v = e_v − p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncopd.config import losses as c

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReferenceRow:
    p: Array
    p_old: Array
    q: Array
    response: int
    head: list[int]
    draws: list[int]
    teacher_draws: list[int]


def reference(config: c.LossConfig, row: ReferenceRow, *, m2po_threshold: float = math.inf) -> tuple[float, Array]:
    """Value and gradient of `config`'s loss on one row."""
    match config:
        case c.ForwardKLConfig() | c.DenseForwardKLConfig() | c.GeneralisedJSDConfig() | c.SkewKLConfig():
            return _on_support(config, row, _teacher_top(row, getattr(config, "top_k", len(row.q))))
        case c.ReverseKLConfig(support="student"):
            return _on_support(config, row, row.head[: config.top_k])
        case c.ReverseKLConfig() | c.DenseReverseKLConfig():
            return _on_support(config, row, _teacher_top(row, getattr(config, "top_k", len(row.q))))
        case c.ForwardKLDrawsConfig():
            drawn = row.teacher_draws[: config.num_teacher_draws]
            value = sum(math.log(row.q[v] / row.p[v]) for v in drawn) / len(drawn)
            return value, -sum(_score(row.p, v) for v in drawn) / len(drawn)
        case c.CrossEntropyConfig():
            return -math.log(row.p[row.response]), -_score(row.p, row.response)
        case c.NPDConfig():
            kl, kl_gradient = _on_support(config, row, _teacher_top(row, config.top_k))
            share = config.kl_weight
            value = -(1 - share) * math.log(row.p[row.response]) + share * kl
            return value, -(1 - share) * _score(row.p, row.response) + share * kl_gradient
        case c.HeadTailConfig():
            return _head_tail(config, row)
        case c.PolicyGradientConfig():
            return _policy_gradient(config, row, m2po_threshold)
    raise AssertionError(config)


def _score(p: Array, v: int) -> Array:
    """∇ log p_v."""
    return np.eye(len(p))[v] - p


def _teacher_top(row: ReferenceRow, k: int) -> list[int]:
    return sorted(range(len(row.q)), key=lambda v: -row.q[v])[:k]


def _on_support(config: c.LossConfig, row: ReferenceRow, support: list[int]) -> tuple[float, Array]:
    """Group the vocabulary into outcomes, take the divergence of the groups, spread its slope over their members."""
    p, q = row.p, row.q
    tail = getattr(config, "tail", "bucket")
    groups = [[v] for v in support]
    rest = [v for v in range(len(p)) if v not in support]
    if tail == "bucket" and rest:
        groups.append(rest)
    p_mass = q_mass = 1.0
    if tail == "renormalise":
        p_mass, q_mass = sum(p[v] for v in support), sum(q[v] for v in support)
    value, slope = 0.0, np.zeros(len(p))
    for group in groups:
        term, term_slope = _outcome(config, sum(p[v] for v in group) / p_mass, sum(q[v] for v in group) / q_mass)
        value += term
        slope[group] = term_slope
    if tail == "renormalise":
        inside = np.isin(np.arange(len(p)), support)
        conditional = np.where(inside, p / p_mass, 0.0)
        return value, conditional * (slope - conditional @ slope)
    return value, p * (slope - p @ slope)


def _outcome(config: c.LossConfig, p: float, q: float) -> tuple[float, float]:
    """A divergence's term for an outcome of probability p (student) and q (teacher), and its derivative by p."""
    match config:
        case c.ForwardKLConfig() | c.DenseForwardKLConfig() | c.NPDConfig():
            return q * math.log(q / p), -q / p
        case c.ReverseKLConfig() | c.DenseReverseKLConfig():
            return p * math.log(p / q), math.log(p / q) + 1
        case c.GeneralisedJSDConfig(beta=beta):
            m = beta * q + (1 - beta) * p
            value = beta * q * math.log(q / m) + (1 - beta) * p * math.log(p / m)
            return value, (1 - beta) * (-beta * q / m + math.log(p / m) + 1 - (1 - beta) * p / m)
        case c.SkewKLConfig(direction="forward", alpha=alpha):
            m = alpha * q + (1 - alpha) * p
            return q * math.log(q / m), -q * (1 - alpha) / m
        case c.SkewKLConfig(alpha=alpha):
            m = alpha * p + (1 - alpha) * q
            return p * math.log(p / m), math.log(p / m) + 1 - alpha * p / m
    raise AssertionError(config)


def _head_tail(config: c.HeadTailConfig, row: ReferenceRow) -> tuple[float, Array]:
    p, q, p_old = row.p, row.q, row.p_old
    sampler_head = row.head[: config.head]
    head = sampler_head + [v for v in _teacher_top(row, config.teacher_top_k) if v not in sampler_head]
    gap = np.log(p) - np.log(q)
    b = sum(p[v] * gap[v] for v in head) / sum(p[v] for v in head)
    value, gradient = b, np.zeros(len(p))
    for v in head:
        value += p[v] * (gap[v] - b)
        gradient += p[v] * (gap[v] - b) * _score(p, v)
    tail_mass = 1.0 - sum(p_old[v] for v in sampler_head)
    drawn = row.draws[: config.num_draws]
    for v in drawn:
        if v not in head:
            weight = tail_mass / len(drawn) * p[v] / p_old[v]
            value += weight * (gap[v] - b)
            gradient += weight * (gap[v] - b) * _score(p, v)
    return value, gradient


def _policy_gradient(config: c.PolicyGradientConfig, row: ReferenceRow, m2po_threshold: float) -> tuple[float, Array]:
    drawn = [row.response] if config.num_draws == 1 else row.draws[: config.num_draws]
    ratio = [row.p[v] / row.p_old[v] if config.ratio == "importance" else 1.0 for v in drawn]
    denominator = row.p if config.advantage == "current" else row.p_old
    advantage = [math.log(row.q[v] / denominator[v]) for v in drawn]
    value, gradient = 0.0, np.zeros(len(row.p))
    for j, v in enumerate(drawn):
        if config.baseline == "leave_one_out":
            others = [ratio[i] * advantage[i] for i in range(len(drawn)) if i != j]
            b = sum(others) / len(others)
        elif config.baseline == "exact":
            b = -sum(row.p * np.log(row.p / row.q))
        else:
            b = 0.0
        objective, weight = _corrected(config.correction, ratio[j], advantage[j] - b, m2po_threshold)
        value -= (objective + b) / len(drawn)
        gradient -= weight * (advantage[j] - b) * _score(row.p, v) / len(drawn)
    return value, gradient


def _corrected(
    correction: c.CorrectionConfig, ratio: float, advantage: float, m2po_threshold: float
) -> tuple[float, float]:
    """What is maximised for one draw, and the factor in front of A ∇log p_θ."""
    if isinstance(correction, c.Clip):
        if advantage > 0 and ratio > 1 + correction.epsilon_high:
            return (1 + correction.epsilon_high) * advantage, 0.0
        if advantage < 0 and ratio < 1 - correction.epsilon_low:
            return (1 - correction.epsilon_low) * advantage, 0.0
        if advantage < 0 and correction.dual_clip is not None and ratio > correction.dual_clip:
            return correction.dual_clip * advantage, 0.0
    if isinstance(correction, c.Decoupled) and ratio > correction.max_behaviour_weight:
        return 0.0, 0.0
    if isinstance(correction, c.M2po):
        outwards = (advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)
        if outwards and abs(math.log(ratio)) > m2po_threshold:
            return math.exp(math.copysign(m2po_threshold, math.log(ratio))) * advantage, 0.0
    if isinstance(correction, c.Truncate):
        return min(ratio, correction.max_ratio) * advantage, min(ratio, correction.max_ratio)
    if isinstance(correction, c.Mask) and not 1 / correction.max_ratio <= ratio <= correction.max_ratio:
        return 0.0, 0.0
    return ratio * advantage, ratio
