"""The state of a run's learner after any number of its steps: the checkpoint before, trained on from the log.

checkpoint c <= n --restore--> steps c … n−1 again, from the log --> state n, weights equal to published version n
published version n --load--> the same weights with a new optimizer
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from asyncopd.errors import ConfigError
from asyncopd.learner.student import Student
from asyncopd.ports import RunLog
from asyncopd.records import Facts
from asyncopd.types import PolicyVersion, PolicyWeights, ScoredTrajectory


async def train_to(
    log: RunLog,
    student: Student,
    version: int,
    *,
    read_step: Callable[[int], Sequence[ScoredTrajectory]],
    on_step: Callable[[int], None] = lambda step: None,
) -> bool:
    """Bring a fresh student to the state that the run's learner had after `version` steps, optimizer included.

    Args:
        student: with the settings of the run, before its first step.
        read_step: the batch that the run trained in a step.
        on_step: called with each step trained on the way.
    Returns:
        Are the weights those of the published version, bit for bit?
    Raises:
        ConfigError: the run has not come that far.
    """
    published = find_version(log, version)
    step = 0
    if earlier := [checkpoint for checkpoint in log.checkpoints() if checkpoint[0] <= version]:
        step, rewind = earlier[-1]
        student.restore(log.read_checkpoint(step, rewind))
    else:
        student.load(log.read_policy(find_version(log, 0)).safetensors)
    for number in range(step, version):
        await asyncio.to_thread(student.train, number, await asyncio.to_thread(read_step, number))
        on_step(number)
    return student.weights() == log.read_policy(published).safetensors


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
    log.publish_policy(PolicyWeights(version, student.weights()), worker=worker, facts=Facts(step=step))
    # The checkpoint last: with it the child has begun, and asking for the replay again goes on with it.
    log.publish_checkpoint(step, 0, student.checkpoint(), worker=worker)
