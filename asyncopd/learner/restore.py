"""The state of a run's learner after any number of its steps: the checkpoint before, trained on from the log.

checkpoint c <= n --restore--> steps c … n−1 again, from the log --> state n, weights equal to published version n
published version n --load--> the same weights with a new optimizer

Trains a student on a log in another order of consumption and measures each step; publishes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncopd.errors import ConfigError, NonFiniteError
from asyncopd.learner.statistics import staleness_tokens
from asyncopd.learner.student import Student
from asyncopd.ports import RunLog
from asyncopd.types import PolicyVersion, PolicyWeights, ScoredTrajectory


class CheckpointedLog(RunLog, Protocol):
    """A run log that lists its checkpoints."""

    def checkpoints(self) -> Sequence[tuple[int, int]]:
        """(step, rewind) of the surviving lineage, oldest first."""
        ...


@dataclass(frozen=True)
class Reached:
    """How a student came to a state."""

    num_steps_trained: int
    """Steps trained again between the checkpoint and the state."""
    is_exact: bool
    """Are the weights those of the published version, bit for bit?"""


async def train_to(
    log: CheckpointedLog,
    student: Student,
    version: int,
    *,
    read_step: Callable[[int], Sequence[ScoredTrajectory]],
    on_step: Callable[[int], None] = lambda step: None,
) -> Reached:
    """Bring a fresh student to the state that the run's learner had after `version` steps, optimizer included.

    Args:
        student: with the settings of the run, before its first step.
        read_step: the batch that the run trained in a step.
        on_step: called with each step trained on the way.
    Raises:
        ConfigError: the run has not come that far.
    """
    published = find_version(log, version)
    earlier = [checkpoint for checkpoint in log.checkpoints() if checkpoint[0] <= version]
    if earlier:
        step, rewind = earlier[-1]
        student.restore(log.read_checkpoint(step, rewind))
    else:
        step = 0
        student.load(log.read_policy(find_version(log, 0)).safetensors)
    for number in range(step, version):
        await asyncio.to_thread(student.train, number, await asyncio.to_thread(read_step, number))
        on_step(number)
    found, expected = student.weights(), log.read_policy(published).safetensors
    return Reached(version - step, hashlib.sha256(found).digest() == hashlib.sha256(expected).digest())


def find_version(log: RunLog, number: int) -> PolicyVersion:
    """Version `number` of the surviving lineage. Raises ConfigError when the run has not published it."""
    version = log.find_policy(number)
    if version is None:
        latest = log.latest_policy()
        raise ConfigError(
            f"run {log.run_id} has not published version {number}; its latest is "
            f"{latest.number if latest else 'none'}. Start the replay from one of those."
        )
    return version


def publish_start(log: RunLog, student: Student, step: int, *, worker: str) -> None:
    """Make the student's state the child's first version and checkpoint: its learner then resumes from there."""
    version = PolicyVersion(step)
    log.publish_policy(PolicyWeights(version, student.weights()), worker=worker, facts={"step": step})
    # The checkpoint last: with it the child has begun, and asking for the replay again goes on with it.
    log.publish_checkpoint(step, 0, student.checkpoint(), worker=worker)


@dataclass(frozen=True)
class StepFigures:
    """One step of a counterfactual."""

    clock: int
    """Learner version that the step starts from."""
    num_tokens: int
    staleness_mean: float
    staleness_max: int
    metrics: Mapping[str, float]
    """As in a TrainStep."""


def train_in_order(
    student: Student,
    steps: Mapping[int, Sequence[int]],
    *,
    read: Callable[[int], ScoredTrajectory],
    on_step: Callable[[], None],
) -> list[StepFigures]:
    """One optimizer step per clock that has something to train. Ends early at a step whose loss is not finite.

    Args:
        student: in the state of the first clock.
        steps: clock -> indices to train, by ascending clock.
        read: index -> its trajectory with scores.
        on_step: called after every clock.
    """
    figures: list[StepFigures] = []
    for clock, indices in steps.items():
        if indices:
            batch = [read(index) for index in indices]
            try:
                result = student.train(clock, batch)
            except NonFiniteError:
                return figures
            ages = staleness_tokens(batch, learner_version=clock)
            mean = sum(age * count for age, count in ages.items()) / result.num_tokens
            figures.append(StepFigures(clock, result.num_tokens, mean, max(ages), result.metrics))
        on_step()
    return figures
