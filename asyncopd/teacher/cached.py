"""Scoring with a cache in front of the teacher: only what nobody asked before reaches it.

trajectories --ScoreCache.find--> known   ----------------------------+--> scores, in order
                             `--> unknown --Scorer--> ScoreCache.add --+
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from asyncopd.ports import ScoreCache, Scorer, ScoreRequest
from asyncopd.records import Facts
from asyncopd.types import TeacherScores, Trajectory


@dataclass(frozen=True)
class Answers:
    """Scores of some trajectories, and what they cost."""

    scores: list[TeacherScores]
    """In the order of the trajectories."""
    num_tokens_asked: int
    """Response tokens the teacher was asked about."""
    num_tokens_cached: int
    """Response tokens whose answer was known."""

    @property
    def num_tokens(self) -> int:
        return self.num_tokens_asked + self.num_tokens_cached

    def facts(self) -> Facts:
        """For the manifest of the score shard."""
        return Facts(
            num_tokens=self.num_tokens, num_tokens_asked=self.num_tokens_asked, num_tokens_cached=self.num_tokens_cached
        )

    def described(self, what: str) -> str:
        """Detail of the span in which they were made."""
        if not self.num_tokens_cached:
            return what
        return f"{what}, {self.num_tokens_asked} tokens asked, {self.num_tokens_cached} from the cache"


async def score_through(
    cache: ScoreCache | None, scorer: Scorer, trajectories: Sequence[Trajectory], request: ScoreRequest, *, worker: str
) -> Answers:
    """Score every trajectory, asking the teacher only about those that the cache, if there is one, does not know."""
    found = await asyncio.to_thread(cache.find, scorer.digest, request, trajectories) if cache else {}
    known = {index: replace(scores, index=index, teacher=scorer.name) for index, scores in found.items()}
    unknown = [trajectory for trajectory in trajectories if trajectory.index not in known]
    asked = await scorer.score(unknown, request) if unknown else []
    answers = list(zip(unknown, asked, strict=True))
    if cache:
        await asyncio.to_thread(cache.add, scorer.digest, request, answers, worker=worker)
    by_index = known | {scores.index: scores for scores in asked}
    return Answers(
        scores=[by_index[trajectory.index] for trajectory in trajectories],
        num_tokens_asked=sum(len(trajectory.response_ids) for trajectory in unknown),
        num_tokens_cached=sum(len(t.response_ids) for t in trajectories if t.index in known),
    )
