"""What every TrainStep reports: of its tokens, under the weights it started from, and of its trajectories.

micro-batches of all ranks --StepStatistics--> per-token arrays --each metric's reduction--> one value per step
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from asyncopd import metrics as m
from asyncopd.learner.intake import Batch
from asyncopd.losses.contract import RowLosses
from asyncopd.losses.rows import TokenRows
from asyncopd.types import LOGPROB_FLOOR, ScoredTrajectory

T = TypeVar("T")

_ALWAYS = (m.CLIPPED, m.MASKED, m.TRUNCATED)
"""Reported by every step, 0 where the estimator has no correction that could do it."""


class StepStatistics:
    """Collects per-token arrays over the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self._arrays: dict[m.Metric, list[NDArray[np.float32]]] = defaultdict(list)
        self._log_ratios: list[NDArray[np.float32]] = []
        self._non_finite: set[int] = set()

    def add(self, rows: TokenRows, ids_TJ: Tensor, logprobs_TJ: Tensor, entropy_T: Tensor, losses: RowLosses) -> None:
        """
        Args:
            ids_TJ: [T, J] the sampled token, then the ids that the estimator asked for.
            logprobs_TJ: [T, J] log p_θ there, nats, detached.
            entropy_T: [T] entropy of p_θ, nats.
        """
        outside_T = logprobs_TJ[:, 0] <= LOGPROB_FLOOR
        log_ratio_T = logprobs_TJ[:, 0] - rows.behaviour_logprobs_T
        self._log_ratios.append(_on_cpu(torch.where(outside_T, -torch.inf, log_ratio_T)))
        stored = (rows.topk_logprobs_TK, rows.head_teacher_logprobs_TK, rows.draw_teacher_logprobs_TN)
        teacher_TL = torch.cat([rows.teacher_logprobs_T[:, None], *stored, rows.teacher_draw_logprobs_TM], dim=1)
        own = {
            m.LOSS: losses.loss_T,
            # One draw per prefix from the sampling policy: unbiased for m.KL(p_old‖q) on its own responses.
            m.KL: rows.behaviour_logprobs_T - rows.teacher_logprobs_T,
            m.ENTROPY: entropy_T,
            m.OUTSIDE: outside_T.float(),
            m.TEACHER_FLOOR: (teacher_TL <= LOGPROB_FLOOR).float().mean(-1),
        }
        masses = {} if m.SUPPORT_MASS_STUDENT in losses.statistics_T else drawn_masses(rows, ids_TJ, logprobs_TJ)
        for metric, values_T in {**own, **losses.statistics_T, **masses}.items():
            self._arrays[metric].append(_on_cpu(values_T))
        self._non_finite.update(rows.trajectory_T[~torch.isfinite(losses.loss_T.detach())].tolist())

    def non_finite_indices(self, accelerator: Accelerator) -> list[int]:
        """Trajectories with a token whose loss is NaN or infinite, of all ranks, sorted."""
        return sorted(set().union(*of_all_ranks(self._non_finite, accelerator)))

    def reduced(self, accelerator: Accelerator) -> dict[m.Metric, float]:
        """Over all micro-batches and ranks, as each metric's reduction says."""
        mine = {metric: np.concatenate(parts) for metric, parts in self._arrays.items()}
        everyones = of_all_ranks((mine, np.concatenate(self._log_ratios)), accelerator)
        arrays = {metric: np.concatenate([theirs[metric] for theirs, _ in everyones]) for metric in mine}
        reduced = {metric: metric.reduced(values_T) for metric, values_T in arrays.items()}
        ratios = ratio_metrics(np.concatenate([log_ratios for _, log_ratios in everyones]))
        return {**dict.fromkeys(_ALWAYS, 0.0), **reduced, **ratios}


def _on_cpu(values_T: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = values_T.detach().float().cpu().numpy()
    return values


def of_all_ranks(value: T, accelerator: Accelerator) -> list[T]:
    """The value of every rank, by rank.

    Arrays should be on the CPU: an unpickled GPU tensor would come back on the device of the rank that sent it.
    """
    everyones = [value] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(everyones, value)
    return everyones


def drawn_masses(rows: TokenRows, ids_TJ: Tensor, logprobs_TJ: Tensor) -> dict[m.Metric, Tensor]:
    """P_S and Q_S of an estimator that has draws for a support: S is the set of ids it looked at, each counted once.

    Args:
        rows: what the log holds; log q of every id in `ids_TJ` is somewhere in it.
        ids_TJ: [T, J] ids, repeats allowed.
        logprobs_TJ: [T, J] log p_θ there, nats, detached.
    """
    known = (
        (rows.response_ids_T[:, None], rows.teacher_logprobs_T[:, None]),
        (rows.draw_ids_TN, rows.draw_teacher_logprobs_TN),
        (rows.teacher_draw_ids_TM, rows.teacher_draw_logprobs_TM),
        (rows.topk_ids_TK, rows.topk_logprobs_TK),
    )
    known_ids_TL, order_TL = torch.cat([ids for ids, _ in known], 1).sort(-1)
    known_logprobs_TL = torch.cat([logprobs for _, logprobs in known], 1)
    ids_TJ, by_id_TJ = ids_TJ.sort(-1)
    # The first of equal ids is the one that counts.
    counts_TJ = torch.ones_like(ids_TJ, dtype=torch.bool)
    counts_TJ[:, 1:] = ids_TJ[:, 1:] != ids_TJ[:, :-1]
    found_TJ = torch.searchsorted(known_ids_TL, ids_TJ).clamp(max=known_ids_TL.shape[1] - 1)
    teacher_TJ = known_logprobs_TL.gather(-1, order_TL.gather(-1, found_TJ))
    return {
        m.SUPPORT_MASS_STUDENT: (logprobs_TJ.gather(-1, by_id_TJ).exp() * counts_TJ).sum(-1),
        m.SUPPORT_MASS_TEACHER: (teacher_TJ.exp() * counts_TJ).sum(-1),
    }


def ratio_metrics(log_ratio_T: NDArray[np.float32]) -> dict[m.Metric, float]:
    """Drift, effective sample size and percentiles of the ratio p_θ/p_old on sampled tokens.

    Drift is the k3 estimator of m.KL(p_old‖p_θ) under p_old's own samples: e^{-r} + r − 1 with r = log p_old − log p_θ,
    never negative. Effective sample size is (Σw)²/Σw² as a fraction of the tokens.

    Args:
        log_ratio_T: [T] log p_θ − log p_old at the sampled tokens, nats; −inf where the token can no longer be sampled
            (top-p), for which drift would be infinite: it is that of the others.
    """
    log_ratio = np.clip(log_ratio_T.astype(np.float64), -20, 20)
    ratio = np.exp(log_ratio)
    inside = ~np.isneginf(log_ratio_T)
    percentiles = map(float, np.percentile(ratio, [1, 50, 99]))
    return {
        m.DRIFT: float((ratio - log_ratio - 1)[inside].mean()) if inside.any() else 0.0,
        m.ESS: float(ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)),
        **dict(zip((m.RATIO_P01, m.RATIO_P50, m.RATIO_P99), percentiles, strict=True)),
        m.RATIO_MAX: float(ratio.max()),
    }


def batch_metrics(batch: Batch, *, learner_version: int, max_staleness: int) -> dict[m.Metric, float]:
    """What a step reports about its trajectories, trained or not."""
    trajectories = [scored.trajectory for scored in batch.scored]
    lengths = [len(trajectory.response_ids) for trajectory in trajectories]
    staleness = staleness_tokens(batch.scored, learner_version)
    metrics: dict[m.Metric, float] = {
        m.STALENESS_MEAN: sum(s * n for s, n in staleness.items()) / sum(lengths),
        m.STALENESS_MAX: max(staleness),
        m.TRAJECTORIES: len(trajectories),
        m.STALE_TRAJECTORIES: sum(learner_version - t.version_oldest > max_staleness for t in trajectories),
        m.DROPPED_TRAJECTORIES: len(batch.dropped),
        m.HELD_TRAJECTORIES: len(batch.held),
        m.RESPONSE_TOKENS_MEAN: sum(lengths) / len(lengths),
        m.RESPONSE_TOKENS_MAX: max(lengths),
        m.STOPPED: float(np.mean([t.finish_reason == "stop" for t in trajectories])),
    }
    verified = [t.correct for t in trajectories if t.correct is not None]
    return metrics | ({m.ACCURACY: float(np.mean(verified))} if verified else {})


def staleness_tokens(batch: Sequence[ScoredTrajectory], learner_version: int) -> dict[int, int]:
    """Staleness in versions -> number of response tokens: learner version at consumption − version that made them."""
    counts: Counter[int] = Counter()
    for scored in batch:
        for run in scored.trajectory.version_runs:
            counts[learner_version - run.version] += run.length
    return dict(sorted(counts.items()))
