"""Scoring: a teacher is asked about every trajectory shard of a run, as it appears or, back-filled, long after.

    ScoreStage     trajectory shards --next_shard, claim--> score_through --> scores/<teacher>/
    BackfillStage  trajectory shards --(candidates recomputed beside them)--> score_through --> scores/<folder>/

    score_through  trajectories --ScoreCache.find--> known   ----------------------------+--> scores, in order
                                               `--> unknown --Scorer--> ScoreCache.add --+

Shards are scored in index order as far as they exist, and claimed, so that several processes can share the work. A
shard of scores that is there is skipped, so either goes on where it was; nothing that exists is changed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from asyncopd.errors import ConfigError
from asyncopd.ports import RunLog, ScoreCache, Scorer, ScoreRequest
from asyncopd.records import Facts
from asyncopd.schedule import Plan, num_taken
from asyncopd.types import IndexRange, TeacherScores, Trajectory
from asyncopd.worker import ShardStage, Worker


class ScoreStage(ShardStage):
    """Scores the shards of one run with one teacher."""

    def __init__(
        self,
        log: RunLog,
        worker: Worker,
        *,
        plan: Plan,
        scorer: Scorer,
        request: ScoreRequest,
        lease_s: float,
        cache: ScoreCache | None = None,
    ) -> None:
        """`cache` is asked before the teacher; None to ask the teacher for everything."""
        super().__init__(log, worker, plan, stage=f"score-{scorer.name}", lease_s=lease_s)
        self._scorer, self._request, self._cache = scorer, request, cache
        worker.tell(teacher=scorer.name, num_trajectories=0, num_tokens=0)

    async def start(self) -> None:
        """Start the teacher's engine. Raises EngineError."""
        await self._scorer.start()

    async def close(self) -> None:
        """Stop the teacher's engine."""
        await self._scorer.close()

    async def _work(self, shard: IndexRange) -> None:
        worker = self._worker
        with worker.span("orchestrate:parquet", shard.name):
            trajectories = await asyncio.to_thread(self._log.read_trajectories, shard)
        num_tokens = sum(len(trajectory.response_ids) for trajectory in trajectories)
        worker.count(num_begun=len(trajectories), num_tokens_in_flight=num_tokens)
        try:
            answers = await score_through(
                self._cache, self._scorer, trajectories, self._request, worker=worker, what=shard.name
            )
        finally:
            worker.count(num_begun=-len(trajectories), num_tokens_in_flight=-num_tokens)
        facts = answers.facts()
        with worker.span("orchestrate:parquet", shard.name):
            await asyncio.to_thread(
                self._log.publish_scores, self._scorer.name, shard, answers.scores, worker=worker.name, facts=facts
            )
        worker.count(num_trajectories=len(trajectories), num_tokens=answers.num_tokens)

    def _ready(self) -> Iterable[IndexRange] | None:
        if self._plan.order == "arrival" and num_taken(self._log.arrivals()) >= self._plan.num_indices:
            return None
        return (s for s in self._open.window(self._plan.window) if self._log.find_trajectories(s) is not None)

    def _is_done(self, shard: IndexRange) -> bool:
        return self._log.find_scores(self._scorer.name, shard) is not None

    def _what_is_missing(self, first: IndexRange) -> str:
        return f"shard {first.name} to be sampled"


@dataclass(frozen=True)
class Backfilled:
    """What a back-fill did."""

    folder: str
    num_shards: int
    """Shards that this call scored."""
    num_shards_found: int
    """Shards that were there before, or that another process scored."""
    num_tokens_asked: int
    num_tokens_cached: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BackfillStage:
    """Scores shards of one run under one folder."""

    log: RunLog
    worker: Worker
    folder: str
    """Of the scores; the scorer's answers are stored under it."""
    scorer: Scorer
    request: ScoreRequest
    cache: ScoreCache | None
    with_candidates: Callable[[IndexRange, list[Trajectory]], list[Trajectory]] | None
    """Gives a shard's trajectories the candidates to score, which are made first where nobody did; None for the
    recorded ones."""
    facts: Facts
    """Added to each manifest: the question, and the name of the candidates."""
    lease_s: float
    on_shard: Callable[[int], None]
    """Called with the number of trajectories of each finished shard."""

    async def run(self, shards: Sequence[IndexRange]) -> Backfilled:
        """Score every shard that is not scored yet, waiting for those that other processes hold.

        Raises:
            ConfigError: another teacher's scores are in the folder.
            EngineError: the teacher, or the student that candidates come from, cannot serve a shard.
        """
        started = time.time()
        counts: Counter[str] = Counter()
        waiting = list(shards)
        while waiting:
            held = []
            for shard in waiting:
                found = await asyncio.to_thread(self.log.find_scores, self.folder, shard)
                if found is not None:
                    self._check_teacher(found.facts.teacher_digests)
                    counts["found"] += 1
                elif await asyncio.to_thread(self._claim, shard):
                    answers = await self._work(shard)
                    counts.update(shards=1, asked=answers.num_tokens_asked, cached=answers.num_tokens_cached)
                    self.worker.tell(num_tokens=counts["asked"] + counts["cached"])
                else:
                    held.append(shard)
                    continue
                self.on_shard(len(shard))
            if len(held) == len(waiting):
                await asyncio.sleep(self.lease_s / 10)
            waiting = held
        return Backfilled(
            folder=self.folder,
            num_shards=counts["shards"],
            num_shards_found=counts["found"],
            num_tokens_asked=counts["asked"],
            num_tokens_cached=counts["cached"],
            seconds=time.time() - started,
        )

    def _claim(self, shard: IndexRange) -> bool:
        claim = self.log.claim(f"backfill-{self.folder}", shard, worker=self.worker.name, lease_s=self.lease_s)
        return claim is not None

    def _check_teacher(self, digests: Sequence[str]) -> None:
        if set(digests) - {self.scorer.digest}:
            raise ConfigError(
                f"run {self.log.run_id}: scores/{self.folder} holds answers of another teacher (digest "
                f"{', '.join(d[:12] for d in digests)}, this one has {self.scorer.digest[:12]}). Give it another name "
                "with --teacher name=…."
            )

    async def _work(self, shard: IndexRange) -> Answers:
        trajectories = await asyncio.to_thread(self.log.read_trajectories, shard)
        if self.with_candidates is not None:
            trajectories = await asyncio.to_thread(self.with_candidates, shard, trajectories)
        answers = await score_through(
            self.cache, self.scorer, trajectories, self.request, worker=self.worker, what=shard.name
        )
        facts = replace(answers.facts(), backfill=self.facts.backfill, candidates=self.facts.candidates)
        await asyncio.to_thread(
            self.log.publish_scores, self.folder, shard, answers.scores, worker=self.worker.name, facts=facts
        )
        return answers


@dataclass(frozen=True)
class Answers:
    """Scores of some trajectories, and what they cost."""

    scores: list[TeacherScores]
    """In the order of the trajectories."""
    num_tokens_asked: int
    """Response tokens the teacher was asked about."""
    num_tokens_cached: int
    """Response tokens whose answer was known."""
    seconds: float

    @property
    def num_tokens(self) -> int:
        return self.num_tokens_asked + self.num_tokens_cached

    def facts(self) -> Facts:
        """For the manifest of the score shard."""
        return Facts(
            num_tokens=self.num_tokens,
            num_tokens_asked=self.num_tokens_asked,
            num_tokens_cached=self.num_tokens_cached,
            seconds=self.seconds,
        )


async def score_through(
    cache: ScoreCache | None,
    scorer: Scorer,
    trajectories: Sequence[Trajectory],
    request: ScoreRequest,
    *,
    worker: Worker,
    what: str,
) -> Answers:
    """Score every trajectory, asking the teacher only about those that the cache, if there is one, does not know.

    The time it takes is a span of the worker's timeline, with `what` as detail.
    """
    started = time.time()
    found = await asyncio.to_thread(cache.find, scorer.digest, request, trajectories) if cache else {}
    known = {index: replace(scores, index=index, teacher=scorer.name) for index, scores in found.items()}
    unknown = [trajectory for trajectory in trajectories if trajectory.index not in known]
    asked = await scorer.score(unknown, request) if unknown else []
    if cache:
        answers = list(zip(unknown, asked, strict=True))
        await asyncio.to_thread(cache.add, scorer.digest, request, answers, worker=worker.name)
    num_asked = sum(len(trajectory.response_ids) for trajectory in unknown)
    num_cached = sum(len(t.response_ids) for t in trajectories if t.index in known)
    finished = time.time()
    counts = f", {num_asked} tokens asked, {num_cached} from the cache" if num_cached else ""
    worker.record("score", started, finished, what + counts)
    by_index = known | {scores.index: scores for scores in asked}
    return Answers([by_index[t.index] for t in trajectories], num_asked, num_cached, finished - started)
