"""The long-running learner: consumes a batch per step, in order, and publishes a policy version after every step.

for step s:  wait for the trajectories and scores of its batch (intake.py; prefetched while step s−1 trains)
             one optimizer step over all their tokens
             publish PolicyVersion s+1, then TrainStep s, then every k steps a checkpoint (while step s+1 trains)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from asyncopd.config import RunConfig
from asyncopd.config.recorded import CacheRequirements, check_cache
from asyncopd.errors import NonFiniteError, SupersededError
from asyncopd.learner.intake import ArrivalIntake, Batch, IndexIntake
from asyncopd.learner.statistics import batch_metrics, staleness_tokens
from asyncopd.learner.student import Student
from asyncopd.metrics import LR, SECONDS, recorded
from asyncopd.ports import RunLog
from asyncopd.records import Claim, Facts
from asyncopd.schedule import LEARNER_PLACE
from asyncopd.types import PolicyVersion, PolicyWeights, ScoredTrajectory, TrainStep
from asyncopd.worker import Worker


@dataclass(frozen=True)
class _Made:
    """What one step leaves behind, as it was when the step ended."""

    weights: PolicyWeights
    checkpoint: dict[str, bytes] | None
    """Where one is due."""
    record: TrainStep


class LearnStage:
    """Trains one run from its log, from the newest checkpoint to the last step."""

    def __init__(
        self,
        log: RunLog,
        worker: Worker,
        config: RunConfig,
        *,
        student: Student,
        teacher: str,
        vocab_size: int,
        learner_version: Callable[[int], int] = int,
    ) -> None:
        """
        Args:
            teacher: name of the score shards to train on.
            learner_version: step -> the version that staleness counts from. The step itself, except in a replay with
                another batch size, whose tokens carry the version numbers of the run that sampled them.
        """
        self._log, self._worker, self._student, self._plan = log, worker, student, config.plan
        intake = ArrivalIntake if self._plan.order == "arrival" else IndexIntake
        self._intake = intake(log, worker, self._plan, teacher)
        self._checkpoint_every, self._lease_s = config.learner.checkpoint_every, config.limits.lease_s
        self._required, self._vocab_size = config.loss.requirements(), vocab_size
        self._learner_version, self._rewind = learner_version, 0
        worker.tell(step=0, num_steps=self._plan.num_steps, num_tokens=0)

    async def run(self, on_step: Callable[[int], None] = lambda step: None) -> None:
        """Train every remaining step, calling `on_step` after each. A second call on a finished run returns at once.

        A run has one learner: a second one waits for the first to retire or to lose its lease, then goes on from the
        newest checkpoint. A learner that was taken for dead finds a rewind newer than its own and ends.

        Raises:
            SupersededError: another learner took over; nothing this one published since counts.
            NonFiniteError: see `optimizer_step`; the message, which becomes the run's failure record, names the step,
                its indices and the step's statistics.
            ConfigError: the log lacks cached arrays that the loss needs; names column, run and back-fill command.
            DeadlineError: shards of the next step did not come.
        """
        place = await self._worker.wait_for(self._take_place, "the learner's place, which another learner holds")
        with self._worker.doing("reads its newest checkpoint, or publishes version 0"):
            first_step = await asyncio.to_thread(self._resume, place.attempt)
        next_batch = asyncio.create_task(self._intake.batch(first_step)) if first_step < self._plan.num_steps else None
        # What a step made is written while the next one trains; only its serialisation holds the learner up.
        written: asyncio.Task[None] | None = None
        try:
            for step in range(first_step, self._plan.num_steps):
                assert next_batch is not None
                # The batch may wait for the version that is being written: its failure must end that wait.
                waiting = {next_batch} | ({written} if written else set())
                while not next_batch.done():
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if written in done:
                        await written
                batch = await next_batch
                if step + 1 < self._plan.num_steps:
                    next_batch = asyncio.create_task(self._intake.batch(step + 1))
                with self._worker.busy.working():
                    made = await self._train(step, batch)
                if written is not None:
                    await written
                written = asyncio.create_task(self._write(step, made, on_step))
        finally:
            if next_batch is not None:
                next_batch.cancel()
            if written is not None:
                await written

    def _take_place(self) -> Claim | None:
        return self._log.claim("learn", LEARNER_PLACE, worker=self._worker.name, lease_s=self._lease_s)

    def _resume(self, attempt: int) -> int:
        """Restore the newest checkpoint, or publish version 0. Returns the step to go on with.

        Args:
            attempt: of the claim; above 1 there was a learner before this one.
        """
        checkpoint = self._log.latest_checkpoint()
        step = 0
        if checkpoint is not None:
            step, rewind = checkpoint
            self._student.restore(self._log.read_checkpoint(step, rewind))
        self._rewind = self._log.current_rewind()
        if step == self._plan.num_steps:
            return step
        if attempt > 1 or self._log.latest_policy() is not None:
            # Also when nothing has to be trained again: the learner before may be asleep rather than dead, and what it
            # publishes after it wakes must belong to an older rewind than ours.
            if self._take_place() is None:
                raise SupersededError(f"{self._worker.name} lost the learner's place while it loaded; another has it.")
            self._rewind = self._log.record_rewind(step, worker=self._worker.name)
        if self._log.latest_policy() is None:
            self._publish(PolicyWeights(PolicyVersion(0), self._student.weights()))
        return step

    def _check_not_superseded(self) -> None:
        """Saves work and says why; what a superseded learner publishes counts for nothing (storage/events.py)."""
        newest = self._log.current_rewind()
        if newest != self._rewind:
            raise SupersededError(
                f"{self._worker.name} trains under rewind {self._rewind}, but rewind {newest} was recorded since: "
                f"this process stood still for more than {self._lease_s:.0f} s and another learner took over. It ends "
                "here; nothing it did counts, nothing is lost."
            )

    async def _train(self, step: int, batch: Batch) -> _Made:
        self._check_cache(batch.scored)
        started, name = time.time(), f"step {step + 1}"

        def tell(number: int, num_batches: int) -> None:
            self._worker.tell(doing=f"{name}: micro-batch {number} of {num_batches}")

        with self._worker.span("train", f"step {step}"), self._worker.doing(f"packs {name}"):
            try:
                result = await asyncio.to_thread(self._student.train, step, batch.scored, tell)
            except NonFiniteError as error:
                failure = NonFiniteError(f"step {step}, indices {batch.indices.name}: {error}")
                # The first batch under the first weights: there is no other way for it to go.
                failure.repeats = step == 0
                raise failure from error
        seconds, version = time.time() - started, PolicyVersion(step + 1, self._rewind)
        with self._worker.span("orchestrate:serialise", f"version {version.number}"):
            weights = PolicyWeights(version, await asyncio.to_thread(self._student.weights))
            is_due = (step + 1) % self._checkpoint_every == 0 or step + 1 == self._plan.num_steps
            checkpoint = await asyncio.to_thread(self._student.checkpoint) if is_due else None
        return _Made(weights, checkpoint, self._record(step, version, batch, result.metrics, seconds))

    async def _write(self, step: int, made: _Made, on_step: Callable[[int], None]) -> None:
        """Version, then record, then checkpoint: what a crash leaves is a beginning of that."""
        await asyncio.to_thread(self._check_not_superseded)
        with self._worker.span("orchestrate:publish", f"version {made.weights.version.number}"):
            await asyncio.to_thread(self._publish, made.weights)
            await asyncio.to_thread(self._log.publish_step, replace(made.record, finished=time.time()))
            if made.checkpoint is not None:
                await asyncio.to_thread(
                    self._log.publish_checkpoint, step + 1, self._rewind, made.checkpoint, worker=self._worker.name
                )
        self._worker.tell(step=step + 1)
        self._worker.count(num_tokens=made.record.num_tokens)
        on_step(step)

    def _check_cache(self, batch: Sequence[ScoredTrajectory]) -> None:
        # Every batch, not the first alone: a log that was back-filled in part is narrower further on.
        for held in {CacheRequirements.held_by(scored, vocab_size=self._vocab_size) for scored in batch}:
            check_cache(self._required, held, run_id=self._log.run_id)

    def _publish(self, weights: PolicyWeights) -> None:
        self._log.publish_policy(weights, worker=self._worker.name, facts=Facts(step=weights.version.number))

    def _record(
        self, step: int, version: PolicyVersion, batch: Batch, measured: Mapping[str, float], seconds: float
    ) -> TrainStep:
        learner_version = self._learner_version(step)
        staleness = staleness_tokens(batch.scored, learner_version)
        own = batch_metrics(batch, learner_version=learner_version, max_staleness=self._plan.max_staleness)
        own |= {SECONDS: seconds, LR: self._student.lr(step)}
        return TrainStep(
            step=step,
            rewind=self._rewind,
            indices=batch.indices,
            version=version,
            num_tokens=sum(staleness.values()),
            metrics={**measured, **recorded(own)},
            staleness_tokens=staleness,
            finished=time.time(),
            dropped=batch.dropped,
            held=batch.held,
        )
