"""Scores of a run's trajectories by one teacher or by a mixture: which candidates they speak of, and what is exact.

    log q(v) = log Σ_i w_i q_i(v),   Σ_i w_i = 1            exact wherever every log q_i(v) is known

The sampled token, the head and the student's draws are asked of every teacher, so there q is exact. Top-k ids are each
teacher's own: they agree for the whole vocabulary, and then the mixture's own ranking is made from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncopd.config.recorded import CacheRequirements, check_cache
from asyncopd.errors import ConfigError, ShapeError
from asyncopd.records import Manifest
from asyncopd.types import FloatArray, IndexRange, ScoredTrajectory, TeacherScores, Trajectory
from storage.run_log import StoredRunLog

SHARDS_CHECKED = 8
"""Shards of which one row is compared with what the loss needs before training; the learner compares every batch."""


class ScoresView:
    """Trajectories with the scores of one or several teachers, read from one run's log.

    All the folders named must have scored the same candidates: the trajectories' own, or one back-filled set.
    """

    def __init__(self, log: StoredRunLog, weights: Mapping[str, float], required: CacheRequirements) -> None:
        """
        Args:
            weights: folder of scores -> weight; they add up to 1.
            required: what the loss reads; not every mixture has a top-k.
        """
        self.log, self.weights, self.required = log, dict(weights), required
        self.name = next(iter(weights)) if len(weights) == 1 else " + ".join(f"{w:g} {n}" for n, w in weights.items())

    def find(self, shard: IndexRange) -> Manifest | None:
        """A manifest of the shard's scores once every teacher has scored it."""
        found = [self.log.find_scores(name, shard) for name in self.weights]
        return None if None in found else found[0]

    def read_trajectories(self, shard: IndexRange) -> list[Trajectory]:
        """The shard's trajectories with the candidates that were scored."""
        trajectories = self.log.read_trajectories(shard)
        candidates = self._candidates(shard)
        return self.log.with_candidates(candidates, shard, trajectories) if candidates else trajectories

    def read_scores(self, shard: IndexRange) -> list[TeacherScores]:
        """The shard's scores, mixed where there are several teachers."""
        parts = [(weight, self.log.read_scores(name, shard)) for name, weight in self.weights.items()]
        if len(parts) == 1:
            return parts[0][1]
        needs_top_k = self.required.top_k > 0 or self.required.full_vocabulary
        return [
            mix([(weight, scores[row]) for weight, scores in parts], name=self.name, needs_top_k=needs_top_k)
            for row in range(len(parts[0][1]))
        ]

    def read_shard(self, shard: IndexRange) -> list[ScoredTrajectory]:
        """Trajectories and scores of a shard, joined."""
        pairs = zip(self.read_trajectories(shard), self.read_scores(shard), strict=True)
        return [ScoredTrajectory(trajectory, scores) for trajectory, scores in pairs]

    def check(self, shards: Sequence[IndexRange], *, vocab_size: int) -> None:
        """Raise ConfigError, before anything is trained, when shards or arrays that the loss needs are not there."""
        missing = [shard.name for shard in shards if self.find(shard) is None]
        run_id = self.log.run_id
        if missing:
            raise ConfigError(
                f"run {run_id}: {len(missing)} of {len(shards)} shards have no scores {self.name}, the first is "
                f"{missing[0]}. Train the run further (`asyncopd train --run-id {run_id}`), back-fill the rest "
                f"(`asyncopd backfill {run_id}`), or replay fewer steps (--steps)."
            )
        every = max(1, len(shards) // SHARDS_CHECKED)
        for shard in {*shards[::every], shards[-1]}:
            for scored in self.read_shard(shard)[:1]:
                check_cache(self.required, CacheRequirements.held_by(scored, vocab_size=vocab_size), run_id=run_id)

    def _candidates(self, shard: IndexRange) -> str | None:
        """Name of the back-filled candidates that the scores speak of; None for the trajectories' own."""
        names = {}
        for folder in self.weights:
            manifest = self.log.find_scores(folder, shard)
            if manifest is None:
                raise self.log.store.missing(self.log.layout.shard_manifest(self.log.layout.scores(folder), shard))
            names[folder] = manifest.facts.candidates
        if len(set(names.values())) > 1:
            raise ConfigError(
                f"run {self.log.run_id}: the teachers of a mixture have scored different candidates: "
                f"{ {folder: name or 'recorded' for folder, name in names.items()} }. Back-fill all of them with the "
                "same --candidates."
            )
        return next(iter(names.values()))


def mix(parts: Sequence[tuple[float, TeacherScores]], *, name: str, needs_top_k: bool) -> TeacherScores:
    """The scores of the mixture on one trajectory.

    Teacher draws come from one teacher's law, not the mixture's, and are left out; so are top-k ids that differ.

    Args:
        parts: (weight, scores) of every teacher on the same trajectory; weights add up to 1.
        name: the mixture's, written into the scores.
        needs_top_k: the loss reads `topk_logprobs`.
    Raises:
        ShapeError: the parts speak of different trajectories, or of different candidates.
        ConfigError: temperatures differ, or the loss needs top-k ids and the teachers' differ.
    """
    first = parts[0][1]
    for _, scores in parts[1:]:
        _check_same(first, scores)
    topk_ids_TK, topk_logprobs_TK = _mixed_top_k(parts, needs_top_k=needs_top_k)
    num_tokens = len(first.sampled_logprobs_T)
    digest = ",".join(f"{weight!r}*{scores.teacher_digest}" for weight, scores in parts)
    return TeacherScores(
        index=first.index,
        teacher=name,
        teacher_digest=hashlib.sha256(f"mixture {digest}".encode()).hexdigest(),
        temperature=first.temperature,
        sampled_logprobs_T=_log_mean(parts, [s.sampled_logprobs_T for _, s in parts]),
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=topk_logprobs_TK,
        head_logprobs_TK=_log_mean(parts, [s.head_logprobs_TK for _, s in parts]),
        draw_logprobs_TN=_log_mean(parts, [s.draw_logprobs_TN for _, s in parts]),
        teacher_draw_ids_TM=np.zeros((num_tokens, 0), np.int32),
        teacher_draw_logprobs_TM=np.zeros((num_tokens, 0), np.float32),
    )


def _mixed_top_k(
    parts: Sequence[tuple[float, TeacherScores]], *, needs_top_k: bool
) -> tuple[NDArray[np.int32], FloatArray]:
    """Ids in the mixture's own order with its log-probs; none where the teachers' ids differ."""
    ids_TK = np.sort(parts[0][1].topk_ids_TK, axis=1)
    if not all(np.array_equal(ids_TK, np.sort(scores.topk_ids_TK, axis=1)) for _, scores in parts[1:]):
        if needs_top_k:
            first = parts[0][1]
            raise ConfigError(
                f"index {first.index}: the loss needs the mixture's top-k, and the teachers' top-k ids differ: "
                f"{', '.join(f'{s.teacher} holds {s.topk_ids_TK.shape[1]} per token' for _, s in parts)}. The mixture "
                "is exact only at ids that all of them scored: back-fill each with --top-k all, or choose a loss that "
                "needs no top-k (head_tail, policy_gradient)."
            )
        none = len(ids_TK), 0
        return np.zeros(none, np.int32), np.zeros(none, np.float32)
    by_id = [np.take_along_axis(s.topk_logprobs_TK, np.argsort(s.topk_ids_TK, axis=1), axis=1) for _, s in parts]
    mixed_TK = _log_mean(parts, by_id)
    ranking = np.argsort(-mixed_TK, axis=1, kind="stable")
    return np.take_along_axis(ids_TK, ranking, axis=1), np.take_along_axis(mixed_TK, ranking, axis=1)


def _log_mean(parts: Sequence[tuple[float, TeacherScores]], logprobs: Sequence[FloatArray]) -> FloatArray:
    """log Σ_i w_i exp(logprobs_i), entry by entry, in float64."""
    weights = [weight for weight, _ in parts]
    weighted = [np.log(weight) + values.astype(np.float64) for weight, values in zip(weights, logprobs, strict=True)]
    return np.asarray(np.logaddexp.reduce(np.stack(weighted), axis=0), np.float32)


def _check_same(first: TeacherScores, other: TeacherScores) -> None:
    if first.temperature != other.temperature:
        raise ConfigError(
            f"index {first.index}: {first.teacher} was asked at temperature {first.temperature}, {other.teacher} at "
            f"{other.temperature}. Back-fill one of them at the other's temperature."
        )
    for name in ("sampled_logprobs_T", "head_logprobs_TK", "draw_logprobs_TN"):
        found, expected = getattr(other, name).shape, getattr(first, name).shape
        if first.index != other.index or found != expected:
            raise ShapeError(
                f"index {first.index}: {first.teacher} has {name} of shape {expected}, {other.teacher} (index "
                f"{other.index}) of {found}. Mixed teachers must have scored the same candidates of one trajectory."
            )
