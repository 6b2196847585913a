"""The evaluator: follows the policy versions of a run and measures chosen ones on held-out prompts.

RunLog --version 0, every k-th, last--> Sampler --responses--> verifier, Scorer --> Evaluation

Students are compared in pairs: prompt i is answered once by every student, with the same random numbers. What is easy
or hard about it is in both answers and cancels in their difference d_i. The standard error of the mean of d_i says how
well the difference is known for *these two students*, over prompts and draws; it says nothing about training them
again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import ShapeError
from asyncopd.ports import RunLog, Sampler, SampleRequest, Scorer, ScoreRequest, Task
from asyncopd.types import Evaluation, Example, PolicyVersion, PolicyWeights, ScoredTrajectory
from asyncopd.worker import Worker

NUM_EXAMPLES = 5
"""Responses of an evaluation that are kept as text."""


def versions_to_evaluate(num_steps: int, every: int) -> list[int]:
    """Version numbers an evaluator waits for: the first, every `every`-th and the last; none when `every` is 0."""
    return sorted({*range(0, num_steps + 1, every), num_steps}) if every else []


class EvaluateStage:
    """Evaluates one run. Prompts and random draws are the same for every version, so differences are paired."""

    def __init__(
        self,
        log: RunLog,
        worker: Worker,
        *,
        task: Task,
        sampler: Sampler,
        scorer: Scorer,
        temperature: float,
        num_prompts: int,
        max_new_tokens: int,
    ) -> None:
        """
        Args:
            sampler: with a head, and with draws from the tail; the KL estimate is exact on the head.
        """
        self._log, self._worker, self._task, self._sampler, self._scorer = log, worker, task, sampler, scorer
        self._request = ScoreRequest(top_k=0, num_teacher_draws=0, temperature=temperature, seed=0)
        self._max_new_tokens = max_new_tokens
        worker.tell(num_tokens=0)
        worker.watch(sampler)
        self._prompts = [task.prompt(index, "eval") for index in range(num_prompts)]

    async def run(self, version_numbers: Sequence[int]) -> None:
        """Wait for each version in turn and evaluate it; versions already evaluated are not evaluated again."""
        done = {evaluation.version for evaluation in await asyncio.to_thread(self._log.evaluations)}
        for number in version_numbers:
            version = await self._wait_for_version(number)
            if version in done:
                continue
            name = f"version {number}"
            with self._worker.span("evaluate", name), self._worker.doing(f"evaluates {name}"):
                evaluation = await self.evaluate(version)
            await asyncio.to_thread(self._log.publish_evaluation, evaluation)
            self._worker.tell(version=number)

    async def _wait_for_version(self, number: int) -> PolicyVersion:
        """Wait version by version: the deadline is for one of them, however many lie before `number`."""
        latest = await asyncio.to_thread(self._log.latest_policy)
        for step in range(latest.number + 1 if latest else 0, number):
            await self._worker.wait_for(partial(self._log.find_policy, step), f"version {step} to be published")
        return await self._worker.wait_for(partial(self._log.find_policy, number), f"version {number} to be published")

    async def evaluate(self, version: PolicyVersion) -> Evaluation:
        """Sample every held-out prompt once under `version`, verify and score the responses."""
        scored, correct = await self.respond(await asyncio.to_thread(self._log.read_policy, version))
        by_group: dict[str, list[bool]] = defaultdict(list)
        for prompt, right in zip(self._prompts, correct, strict=True):
            by_group[prompt.group].append(right)
        return Evaluation(
            version=version,
            num_prompts=len(self._prompts),
            accuracy_by_group={group: float(np.mean(rights)) for group, rights in sorted(by_group.items()) if group},
            finished=time.time(),
            examples=self._examples(scored, correct),
            **outcome_of(scored, correct).figures(),
        )

    def _examples(self, scored: Sequence[ScoredTrajectory], correct: Sequence[bool]) -> tuple[Example, ...]:
        decode, first = self._task.tokenizer.decode, slice(NUM_EXAMPLES)
        return tuple(
            Example(decode(each.trajectory.prompt_ids.tolist()), decode(each.trajectory.response_ids.tolist()), right)
            for each, right in zip(scored[first], correct[first], strict=True)
        )

    async def respond(self, weights: PolicyWeights) -> tuple[list[ScoredTrajectory], list[bool]]:
        """One scored response to every held-out prompt, and which of them the verifier accepts.

        Random numbers depend on the prompt alone: other weights answer the same prompts with the same numbers.
        """
        await self._sampler.refresh(weights)
        requests = [SampleRequest(prompt.index, prompt.ids, self._max_new_tokens) for prompt in self._prompts]
        trajectories = await asyncio.gather(*map(self._sampler.sample, requests))
        self._worker.count(num_tokens=sum(len(trajectory.response_ids) for trajectory in trajectories))
        scores = await self._scorer.score(trajectories, self._request)
        correct = [
            self._task.verify(p, t.response_ids.tolist()) for p, t in zip(self._prompts, trajectories, strict=True)
        ]
        return [ScoredTrajectory(t, s) for t, s in zip(trajectories, scores, strict=True)], correct


def kl_per_token(scored: ScoredTrajectory) -> NDArray[np.float64]:
    """[T] unbiased estimate of KL(p‖q) at each position of one trajectory, nats.

    Per prefix the head is summed exactly and the rest is estimated by draws from the tail, with far less variance than
    the sampled token alone has.

    Args:
        scored: with a head and at least one draw per position, drawn by law `tail`.
    """
    candidates, scores = scored.trajectory.candidates, scored.scores
    head = candidates.head_logprobs_TK.astype(np.float64)
    draws = candidates.draw_logprobs_TN.astype(np.float64)
    on_head_T = (np.exp(head) * (head - scores.head_logprobs_TK)).sum(axis=1)
    on_tail_T = np.exp(candidates.tail_logmass_T) * (draws - scores.draw_logprobs_TN).mean(axis=1)
    return np.asarray(on_head_T + on_tail_T)


@dataclass(frozen=True)
class Outcome:
    """What one student did on B held-out prompts."""

    correct_B: NDArray[np.float64]
    """[B] 1 where the verifier accepts the response, else 0."""
    kl_sum_B: NDArray[np.float64]
    """[B] KL(student‖teacher) summed over the response's tokens, nats, estimated."""
    num_tokens_B: NDArray[np.float64]
    """[B] response tokens, EOS included."""

    @property
    def accuracy(self) -> float:
        return float(self.correct_B.mean())

    @property
    def kl_nats(self) -> float:
        """KL per response token, nats: Σ KL / Σ tokens."""
        return float(self.kl_sum_B.sum() / self.num_tokens_B.sum())

    @property
    def kl_influence_B(self) -> NDArray[np.float64]:
        """[B] what each prompt adds to the ratio `kl_nats`, to first order (delta method); mean 0, nats."""
        return np.asarray((self.kl_sum_B - self.kl_nats * self.num_tokens_B) / self.num_tokens_B.mean())

    def figures(self) -> dict[str, float]:
        """What an Evaluation says of it, by field. The standard error treats responses as independent."""
        return {
            "accuracy": self.accuracy,
            "kl_nats": self.kl_nats,
            "kl_standard_error_nats": math.sqrt((self.kl_influence_B**2).sum()) / len(self.correct_B),
            "mean_response_tokens": float(self.num_tokens_B.mean()),
        }


@dataclass(frozen=True)
class Difference:
    """Second student minus first, of one figure."""

    value: float
    paired_error: float
    """Standard error, prompt by prompt."""
    unpaired_error: float
    """Standard error that two students with prompts of their own would have: what pairing saves."""


def outcome_of(scored: Sequence[ScoredTrajectory], correct: Sequence[bool]) -> Outcome:
    """The outcome of responses in the order of their prompts; every response with a head and tail draws."""
    return Outcome(
        correct_B=np.array(correct, np.float64),
        kl_sum_B=np.array([kl_per_token(s).sum() for s in scored]),
        num_tokens_B=np.array([len(s.trajectory.response_ids) for s in scored], np.float64),
    )


def accuracy_difference(first: Outcome, second: Outcome) -> Difference:
    """Of the fraction of accepted responses."""
    return _difference(second.accuracy - first.accuracy, first.correct_B, second.correct_B)


def kl_difference(first: Outcome, second: Outcome) -> Difference:
    """Of the KL per response token, nats; errors by the delta method for a ratio."""
    return _difference(second.kl_nats - first.kl_nats, first.kl_influence_B, second.kl_influence_B)


def _difference(value: float, first_B: NDArray[np.float64], second_B: NDArray[np.float64]) -> Difference:
    """Raises ShapeError when the students did not answer the same number of prompts, at least two."""
    if first_B.shape != second_B.shape or len(first_B) < 2:
        raise ShapeError(
            f"paired differences need the same prompts, at least two: found {len(first_B)} and {len(second_B)}."
        )
    return Difference(
        value=value,
        paired_error=math.sqrt((second_B - first_B).var(ddof=1) / len(first_B)),
        unpaired_error=math.sqrt((first_B.var(ddof=1) + second_B.var(ddof=1)) / len(first_B)),
    )
