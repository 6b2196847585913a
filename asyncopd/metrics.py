"""Every metric of a training step: key, unit, meaning, and how it becomes one value. Nothing else can be recorded.

    values per token, response or step --Metric.reduction--> {Metric: float} --recorded()--> TrainStep.metrics

`python -m asyncopd.metrics` writes the tables of docs/metrics.md from what stands here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import ConfigError


class Reduction(Enum):
    """How the values of a step become one. All micro-batches and all ranks count as one set: how a step is split
    changes no metric."""

    TOKEN_MEAN = "token mean"
    """Mean over the trained response tokens; a long response counts for more than a short one."""
    TOKEN_MAX = "maximum over tokens"
    ALL_TOKENS = "over all tokens at once"
    """A statistic of the whole set, such as a percentile; the metric's meaning says which."""
    RESPONSE_MEAN = "mean over the step's responses"
    RESPONSE_MAX = "maximum over the step's responses"
    COUNT = "count"
    STEP = "one per step"
    PROMPT_MEAN = "mean over prompts"
    TOKEN_RATIO = "Σ over tokens / number of tokens"
    RATIO_ERROR = "that of the ratio"


@dataclass(frozen=True)
class Metric:
    """One number that a step or an evaluation reports."""

    key: str
    """`stage/quantity_unit`, as stored; the field's name for an evaluation."""
    unit: str
    """`–` for a pure number."""
    reduction: Reduction
    meaning: str

    def reduced(self, values_T: NDArray[np.float32]) -> float:
        """The metric of a whole step from one value per trained token, summed in float64.

        Raises:
            ConfigError: it is not the mean or the maximum over tokens.
        """
        if self.reduction is Reduction.TOKEN_MEAN:
            return float(values_T.mean(dtype=np.float64))
        if self.reduction is Reduction.TOKEN_MAX:
            return float(values_T.max())
        raise ConfigError(f"{self.key} reduces as {self.reduction.value!r}, which values per token do not give.")

    def over_steps(self, values: Sequence[float]) -> float:
        """One value for several steps: the largest of maxima, the sum of counts, the mean of everything else."""
        if self.reduction in (Reduction.TOKEN_MAX, Reduction.RESPONSE_MAX):
            return float(max(values))
        return float(sum(values) if self.reduction is Reduction.COUNT else np.mean(values))


def recorded(values: Mapping[Metric, float]) -> dict[str, float]:
    """What a step record stores.

    Raises:
        ConfigError: a metric is not in the table; names it and what to do.
    """
    for metric in values:
        if METRICS.get(metric.key) != metric:
            raise ConfigError(
                f"metric {metric.key!r} is not in the table of asyncopd/metrics.py, so nobody could say what it means. "
                "Define it there, then run `python -m asyncopd.metrics` for docs/metrics.md."
            )
    return {metric.key: float(value) for metric, value in values.items()}


METRICS: dict[str, Metric] = {}
"""The metrics of a training step by key. A stored step of an older version of this program may have others."""


def _metric(unit: str, reduction: Reduction, key: str, meaning: str) -> Metric:
    assert key not in METRICS, f"{key} stands twice in the table"
    METRICS[key] = Metric(key, unit, reduction, meaning)
    return METRICS[key]


_mean_nats = partial(_metric, "nats per token", Reduction.TOKEN_MEAN)
_token_fraction = partial(_metric, "fraction", Reduction.TOKEN_MEAN)
_of_all_tokens = partial(_metric, "–", Reduction.ALL_TOKENS)
_token_max = partial(_metric, "–", Reduction.TOKEN_MAX)
_count = partial(_metric, "–", Reduction.COUNT)
_response_fraction = partial(_metric, "fraction", Reduction.RESPONSE_MEAN)

LOSS = _mean_nats(
    "train/loss_nats", "value of the configured loss; for surrogates (policy gradient) only its gradient matters"
)
KL = _mean_nats(
    "train/kl_nats",
    "log p_old − log q at the sampled token: unbiased for KL(p_old‖q) on the sampler's own responses; a single "
    "step can be negative",
)
TEACHER_FLOOR = _token_fraction(
    "train/teacher_floor_fraction",
    "share of the teacher's stored log-probs at the floor of −100 nats, to which lower ones and −inf are raised; a "
    "teacher that fits and works has next to none",
)
ENTROPY = _mean_nats("train/entropy_nats", "entropy of p_θ over the whole vocabulary, of its nucleus under top-p")
OUTSIDE = _token_fraction(
    "train/outside_nucleus_fraction",
    "sampled tokens that top-p would not let the current student sample: their ratio is 0, and drift leaves them out",
)
DRIFT = _mean_nats(
    "train/drift_nats",
    "ratio − 1 − log ratio: the k3 estimate of KL(p_old‖p_θ), never negative; 0 when nothing is stale",
)
ESS = _metric(
    "fraction",
    Reduction.ALL_TOKENS,
    "train/ess_fraction",
    "effective sample size of the ratios, (Σw)²/Σw² / tokens; 1 when nothing is stale",
)
RATIO_P01 = _of_all_tokens("train/ratio_p01", "1st percentile of the ratio")
RATIO_P50 = _of_all_tokens("train/ratio_p50", "median of the ratio")
RATIO_P99 = _of_all_tokens("train/ratio_p99", "99th percentile of the ratio")
RATIO_MAX = _token_max("train/ratio_max", "largest ratio")
GRAD_NORM = _metric(
    "nats per token", Reduction.STEP, "train/grad_norm", "L2 norm of the step's gradient before clipping"
)
LR = _metric("–", Reduction.STEP, "train/lr", "learning rate of the step")
SECONDS = _metric("s", Reduction.STEP, "train/seconds", "forward, backward and optimizer")
STALENESS_MEAN = _metric(
    "versions",
    Reduction.TOKEN_MEAN,
    "train/staleness_mean_versions",
    "version the step starts from − version that sampled the token",
)
STALENESS_MAX = _metric("versions", Reduction.TOKEN_MAX, "train/staleness_max_versions", "the same")
TRAJECTORIES = _count("train/trajectories", "trajectories the step trained")
STALE_TRAJECTORIES = _count(
    "train/stale_trajectories",
    "those whose oldest token is older than `max_staleness`: 0 but in arrival order with on_stale train",
)
DROPPED_TRAJECTORIES = _count(
    "train/dropped_trajectories",
    "trajectories the step came to and left out for good; the record's `dropped` has their indices and reasons",
)
HELD_TRAJECTORIES = _count(
    "train/held_trajectories",
    "trajectories the step came to and left for a replay; the record's `held` has their indices and reasons",
)
RESPONSE_TOKENS_MEAN = _metric(
    "tokens", Reduction.RESPONSE_MEAN, "rollout/response_tokens_mean", "response length, EOS included"
)
RESPONSE_TOKENS_MAX = _metric("tokens", Reduction.RESPONSE_MAX, "rollout/response_tokens_max", "the same")
STOPPED = _response_fraction("rollout/stopped_fraction", "responses that ended with EOS rather than at the limit")
ACCURACY = _response_fraction(
    "rollout/accuracy", "responses the verifier accepts, training prompts; missing without a verifier"
)
SUPPORT_MASS_STUDENT = _token_fraction(
    "loss/support_mass_student",
    "P_S: probability p_θ puts on the ids the loss sums over; with draws for a support, on the distinct ids it "
    "looked at, the sampled token included",
)
SUPPORT_MASS_TEACHER = _token_fraction("loss/support_mass_teacher", "Q_S: probability q puts on them")
CROSS_ENTROPY = _mean_nats("loss/cross_entropy_nats", "cross-entropy part of the near-policy loss")
TOPK_KL = _mean_nats("loss/topk_kl_nats", "forward-KL part of the near-policy loss")
MAX_RATIO = _token_max("loss/max_ratio", "largest importance ratio among a token's draws")
CLIPPED = _token_fraction(
    "loss/clipped_fraction", "draws whose gradient clipping or M2PO removed; 0 without such a correction"
)
TRUNCATED = _token_fraction(
    "loss/truncated_fraction", "draws whose ratio was cut to the allowed maximum; 0 without such a correction"
)
MASKED = _token_fraction(
    "loss/masked_fraction", "draws that a mask (or the decoupled correction) took out; 0 without such a correction"
)
PREFIX_WEIGHT = _metric(
    "–", Reduction.TOKEN_MEAN, "loss/prefix_weight", "weight of the token for how likely p_θ is to reach its prefix"
)
PREFIX_TRUNCATED = _token_fraction(
    "loss/prefix_truncated_fraction", "tokens whose prefix weight was cut to the allowed maximum"
)

EVALUATION = (
    Metric(
        "accuracy",
        "fraction",
        Reduction.PROMPT_MEAN,
        "sampled responses to held-out prompts that the verifier accepts; missing without a verifier. "
        "`accuracy_by_group` is the same for each label that prompts carry, for example the noise level",
    ),
    Metric(
        "kl_nats",
        "nats per token",
        Reduction.TOKEN_RATIO,
        "KL(p‖q) of the evaluated version on its own responses: exact on its most likely ids, draws for the rest",
    ),
    Metric(
        "kl_standard_error_nats",
        "nats per token",
        Reduction.RATIO_ERROR,
        "standard error of `kl_nats`, responses being independent",
    ),
    Metric("mean_response_tokens", "tokens", Reduction.PROMPT_MEAN, "response length, EOS included"),
)
"""Fields of an Evaluation."""


def documented(page: str) -> str:
    """`page` with the tables between its `<!-- table: … -->` and `<!-- end -->` marks made anew."""
    step, loss = ([m for m in METRICS.values() if m.key.startswith("loss/") is of_loss] for of_loss in (False, True))
    for name, metrics in (("step", step), ("loss", loss), ("evaluation", EVALUATION)):
        mark = f"<!-- table: {name}; made by `python -m asyncopd.metrics` -->\n"
        before, found, after = page.partition(mark)
        assert found, f"docs/metrics.md lacks the line {mark!r}"
        page = before + mark + _table(metrics) + after[after.index("<!-- end -->") :]
    return page


def _table(metrics: Iterable[Metric]) -> str:
    lines = [f"| `{m.key}` | {m.meaning} | {m.unit} | {m.reduction.value} |" for m in metrics]
    return "\n".join(["| key | meaning | unit | reduces by |", "|---|---|---|---|", *lines, ""])


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/metrics.md")
    target.write_text(documented(target.read_text()))
