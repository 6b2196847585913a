"""What every TrainStep reports, measured on the sampled tokens of the step under the weights it started from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from asyncopd.losses.contract import RowLosses
from asyncopd.losses.rows import TokenRows

_AFFECTED = ("loss/clipped_fraction", "loss/masked_fraction", "loss/truncated_fraction")
"""Reported by every step, 0 where the estimator has no correction that could do it."""


class StepStatistics:
    """Collects per-token arrays over the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        self._maxima: set[str] = set()
        self._non_finite: set[int] = set()

    def add(self, rows: TokenRows, ids_TJ: Tensor, logprobs_TJ: Tensor, entropy_T: Tensor, losses: RowLosses) -> None:
        """
        Args:
            ids_TJ: [T, J] the sampled token, then the ids that the estimator asked for.
            logprobs_TJ: [T, J] log p_θ there, nats, detached.
            entropy_T: [T] entropy of p_θ, nats.
        """
        self._keep("loss", losses.loss_T)
        self._keep("log_ratio", logprobs_TJ[:, 0] - rows.behaviour_logprobs_T)
        self._keep("kl", rows.behaviour_logprobs_T - rows.teacher_logprobs_T)
        self._keep("entropy", entropy_T)
        self._maxima |= losses.maxima_T.keys()
        statistics_T = {**losses.statistics_T, **losses.maxima_T}
        if "loss/support_mass_student" not in statistics_T:
            statistics_T |= drawn_masses(rows, ids_TJ, logprobs_TJ)
        for key, values_T in statistics_T.items():
            self._keep(key, values_T)
        self._non_finite.update(rows.trajectory_T[~torch.isfinite(losses.loss_T.detach())].tolist())

    def non_finite_indices(self, accelerator: Accelerator) -> list[int]:
        """Trajectories with a token whose loss is NaN or infinite, of all ranks, sorted."""
        everyones: list[set[int]] = [self._non_finite] * accelerator.num_processes
        if accelerator.num_processes > 1:
            torch.distributed.all_gather_object(everyones, self._non_finite)
        return sorted(set().union(*everyones))

    def _keep(self, key: str, values_T: Tensor) -> None:
        self._arrays[key].append(values_T.detach().float().cpu().numpy())

    def reduced(self, accelerator: Accelerator) -> dict[str, float]:
        """Metrics over all micro-batches and ranks; docs/metrics.md has a line for each key."""
        arrays = {key: np.concatenate(parts) for key, parts in self._arrays.items()}
        if accelerator.num_processes > 1:
            gathered: list[dict[str, NDArray[np.float32]]] = [{} for _ in range(accelerator.num_processes)]
            torch.distributed.all_gather_object(gathered, arrays)
            arrays = {key: np.concatenate([part[key] for part in gathered]) for key in arrays}
        metrics: dict[str, float] = {
            "train/loss_nats": float(arrays.pop("loss").mean(dtype=np.float64)),
            # One draw per prefix from the sampling policy: unbiased for KL(p_old‖q) on its own responses.
            "train/kl_nats": float(arrays.pop("kl").mean(dtype=np.float64)),
            "train/entropy_nats": float(arrays.pop("entropy").mean(dtype=np.float64)),
        } | dict(ratio_metrics(arrays.pop("log_ratio")))
        for key, values_T in arrays.items():
            metrics[key] = float(values_T.max() if key in self._maxima else values_T.mean(dtype=np.float64))
        return dict.fromkeys(_AFFECTED, 0.0) | metrics


def drawn_masses(rows: TokenRows, ids_TJ: Tensor, logprobs_TJ: Tensor) -> dict[str, Tensor]:
    """P_S and Q_S of an estimator that has draws for a support: S is the set of ids it looked at, each counted once.

    Args:
        rows: what the log holds; log q of every id in `ids_TJ` is somewhere in it.
        ids_TJ: [T, J] ids, repeats allowed.
        logprobs_TJ: [T, J] log p_θ there, nats, detached.
    """
    known_ids_TL = torch.cat(
        [rows.response_ids_T[:, None], rows.draw_ids_TN, rows.teacher_draw_ids_TM, rows.topk_ids_TK], dim=1
    )
    known_logprobs_TL = torch.cat(
        [
            rows.teacher_logprobs_T[:, None],
            rows.draw_teacher_logprobs_TN,
            rows.teacher_draw_logprobs_TM,
            rows.topk_logprobs_TK,
        ],
        dim=1,
    )
    known_ids_TL, order_TL = known_ids_TL.sort(-1)
    ids_TJ, by_id_TJ = ids_TJ.sort(-1)
    # The first of equal ids is the one that counts.
    counts_TJ = torch.ones_like(ids_TJ, dtype=torch.bool)
    counts_TJ[:, 1:] = ids_TJ[:, 1:] != ids_TJ[:, :-1]
    found_TJ = torch.searchsorted(known_ids_TL, ids_TJ).clamp(max=known_ids_TL.shape[1] - 1)
    teacher_TJ = known_logprobs_TL.gather(-1, order_TL.gather(-1, found_TJ))
    return {
        "loss/support_mass_student": (logprobs_TJ.gather(-1, by_id_TJ).exp() * counts_TJ).sum(-1),
        "loss/support_mass_teacher": (teacher_TJ.exp() * counts_TJ).sum(-1),
    }


def ratio_metrics(log_ratio_T: NDArray[np.float32]) -> Mapping[str, float]:
    """Drift, effective sample size and percentiles of the ratio p_θ/p_old on sampled tokens.

    Drift is the k3 estimator of KL(p_old‖p_θ) under p_old's own samples: e^{-r} + r − 1 with r = log p_old − log p_θ,
    never negative. Effective sample size is (Σw)²/Σw² as a fraction of the tokens.

    Args:
        log_ratio_T: [T] log p_θ − log p_old at the sampled tokens, nats.
    """
    log_ratio = np.clip(log_ratio_T.astype(np.float64), -20, 20)
    ratio = np.exp(log_ratio)
    p01, p50, p99 = np.percentile(ratio, [1, 50, 99])
    return {
        "train/drift_nats": float((ratio - log_ratio - 1).mean()),
        "train/ess_fraction": float(ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)),
        "train/ratio_p01": float(p01),
        "train/ratio_p50": float(p50),
        "train/ratio_p99": float(p99),
        "train/ratio_max": float(ratio.max()),
    }
