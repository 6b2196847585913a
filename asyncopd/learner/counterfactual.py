"""Trains a student on a log in another order of consumption and measures each step; publishes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from asyncopd.errors import NonFiniteError
from asyncopd.learner.stage import staleness_tokens
from asyncopd.learner.student import Student
from asyncopd.types import ScoredTrajectory


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
