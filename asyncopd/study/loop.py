"""On-policy distillation with a fixed lag, in one process: sampler, oracle, learner and evaluator without storage.

version v published --sample--> the batch of step v + lag (version 0: of steps 0 … lag) --score--> waits its turn
step v: train the batch of step v, sampled under version max(0, v − lag)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel

from asyncopd.config.losses import LossConfig
from asyncopd.config.schema import Learner
from asyncopd.errors import NonFiniteError
from asyncopd.evaluate import kl_to_teacher
from asyncopd.learner.student import Student
from asyncopd.losses import build_estimator
from asyncopd.ports import SampleRequest, Scorer, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.study.worlds import WarmStart
from asyncopd.tasks.walk import WalkTask
from asyncopd.types import DrawLaw, PolicyVersion, PolicyWeights, ScoredTrajectory, Trajectory

SLOTS = 128
EVALUATION_SEED = 1_000_003
"""Held-out prompts and their draws are the same for every cell, so differences are paired."""


@dataclass(frozen=True)
class LoopSettings:
    """What all cells of a study have in common."""

    num_steps: int
    batch_size: int
    max_new_tokens: int
    num_prompts: int
    """Held-out prompts of an evaluation."""


@dataclass(frozen=True)
class Quality:
    """Of one student on held-out prompts."""

    accuracy: float
    kl_nats: float
    kl_standard_error_nats: float
    mean_response_tokens: float


@dataclass(frozen=True)
class Trained:
    """What a loop leaves behind."""

    safetensors: bytes
    """Weights after the last step that was taken."""
    num_steps: int
    """Steps taken: all, or up to the one whose loss was not finite."""
    metrics: list[dict[str, float]] = field(repr=False)
    """Of every step."""


async def train_lagged(
    warm: WarmStart,
    loss: LossConfig,
    settings: LoopSettings,
    *,
    lag: int,
    lr: float,
    seed: int,
    on_step: Callable[[int, bytes], None],
) -> Trained:
    """Train a student whose batches are always `lag` versions old, from the warm start.

    Args:
        lag: versions >= 0; while fewer exist, batches come from version 0.
        seed: of prompts and sampling.
        on_step: called with (steps done, weights) after every step.
    """
    causal_lm = warm.model()
    student = _student(warm, causal_lm, loss, settings, lr)
    producer = _Producer(warm, loss, settings, seed)
    pending: deque[list[ScoredTrajectory]] = deque()
    metrics: list[dict[str, float]] = []
    weights = student.weights()
    try:
        for step in range(settings.num_steps):
            first = 0 if step == 0 else step + lag
            pending += await producer.batches(step, weights, range(first, min(step + lag + 1, settings.num_steps)))
            try:
                result = await asyncio.to_thread(student.train, step, pending.popleft())
            except NonFiniteError:
                return Trained(weights, step, metrics)
            metrics.append(dict(result.metrics))
            weights = student.weights()
            on_step(step + 1, weights)
    finally:
        await producer.close()
    return Trained(weights, settings.num_steps, metrics)


async def evaluate(warm: WarmStart, safetensors: bytes, settings: LoopSettings) -> Quality:
    """Accuracy and KL to the teacher of given weights on held-out prompts."""
    task, scorer = warm.task(0), warm.scorer()
    sampler = _sampler(warm, settings, seed=EVALUATION_SEED, head=8, num_draws=4, law="tail")
    prompts = [task.prompt(index, "eval") for index in range(settings.num_prompts)]
    try:
        await sampler.refresh(PolicyWeights(PolicyVersion(0), safetensors))
        trajectories = await asyncio.gather(
            *(sampler.sample(SampleRequest(p.index, p.ids, settings.max_new_tokens)) for p in prompts)
        )
    finally:
        await sampler.close()
    request = ScoreRequest(0, 0, warm.config.rollout.temperature, 0)
    scored = await _scored(scorer, trajectories, request)
    kl_nats, standard_error = kl_to_teacher(scored)
    correct = [task.verify(p, t.response_ids.tolist()) for p, t in zip(prompts, trajectories, strict=True)]
    lengths = [len(t.response_ids) for t in trajectories]
    return Quality(float(np.mean(correct)), kl_nats, standard_error, float(np.mean(lengths)))


async def sample_prompts(
    warm: WarmStart, safetensors: bytes, settings: LoopSettings, indices: Sequence[int], *, seed: int
) -> list[Trajectory]:
    """One training response to each prompt, without candidates."""
    task = warm.task(seed)
    sampler = _sampler(warm, settings, seed=seed, head=0, num_draws=0, law="policy")
    try:
        await sampler.refresh(PolicyWeights(PolicyVersion(0), safetensors))
        return await asyncio.gather(*(sampler.sample(_request(task, settings, index)) for index in indices))
    finally:
        await sampler.close()


class _Producer:
    """Samples and scores the batches of given steps under given weights."""

    def __init__(self, warm: WarmStart, loss: LossConfig, settings: LoopSettings, seed: int) -> None:
        needs = loss.requirements()
        self._settings = settings
        self._task, self._scorer = warm.task(seed), warm.scorer()
        self._sampler = _sampler(
            warm, settings, seed=seed, head=needs.head, num_draws=needs.num_draws, law=needs.law or "policy"
        )
        self._request = ScoreRequest(
            top_k=self._task.tokenizer.vocab_size if needs.full_vocabulary else needs.top_k,
            num_teacher_draws=needs.num_teacher_draws,
            temperature=warm.config.rollout.temperature,
            seed=seed,
        )

    async def batches(self, version: int, weights: bytes, steps: range) -> list[list[ScoredTrajectory]]:
        """One batch for each of `steps`, all under one version and at once, so that the engine's batch stays full."""
        if not steps:
            return []
        size = self._settings.batch_size
        await self._sampler.refresh(PolicyWeights(PolicyVersion(version), weights))
        indices = range(steps.start * size, steps.stop * size)
        trajectories = await asyncio.gather(
            *(self._sampler.sample(_request(self._task, self._settings, index)) for index in indices)
        )
        scored = await _scored(self._scorer, trajectories, self._request)
        return [scored[start : start + size] for start in range(0, len(scored), size)]

    async def close(self) -> None:
        await self._sampler.close()


def _request(task: WalkTask, settings: LoopSettings, index: int) -> SampleRequest:
    return SampleRequest(index, task.prompt(index, "train").ids, settings.max_new_tokens)


async def _scored(scorer: Scorer, trajectories: Sequence[Trajectory], request: ScoreRequest) -> list[ScoredTrajectory]:
    scores = await scorer.score(trajectories, request)
    return [ScoredTrajectory(t, s) for t, s in zip(trajectories, scores, strict=True)]


def _sampler(
    warm: WarmStart, settings: LoopSettings, *, seed: int, head: int, num_draws: int, law: DrawLaw
) -> HfSampler:
    task = warm.task(0)
    return HfSampler(
        warm.model(),
        slots=SLOTS,
        max_context=task.max_prompt_tokens + settings.max_new_tokens,
        eos_id=task.tokenizer.eos_id,
        seed=seed,
        temperature=warm.config.rollout.temperature,
        head=head,
        num_draws=num_draws,
        law=law,
    )


def _student(
    warm: WarmStart, causal_lm: PreTrainedModel, loss: LossConfig, settings: LoopSettings, lr: float
) -> Student:
    learner, temperature = warm.config.learner, warm.config.rollout.temperature
    own = Learner(
        lr=lr,
        warmup_steps=learner.warmup_steps,
        num_steps=settings.num_steps,
        grad_clip=learner.grad_clip,
        row_capacity=learner.row_capacity,
        rows_per_micro_batch=learner.rows_per_micro_batch,
    )
    return Student(causal_lm, build_estimator(loss), Accelerator(cpu=True), own, temperature=temperature)
