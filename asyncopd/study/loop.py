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

from asyncopd.config.losses import LossConfig
from asyncopd.config.schema import Learner
from asyncopd.errors import NonFiniteError
from asyncopd.evaluate import kl_to_teacher
from asyncopd.learner.student import Student
from asyncopd.losses import build_estimator
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest, Scorer, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.study.worlds import WarmStart
from asyncopd.types import DrawLaw, PolicyVersion, PolicyWeights, Prompt, ScoredTrajectory, Trajectory

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
    on_step: Callable[[int, bytes], None] = lambda done, weights: None,
) -> Trained:
    """Train a student whose batches are always `lag` versions old, from the warm start.

    Args:
        lag: versions >= 0; while fewer exist, batches come from version 0.
        seed: of prompts and sampling.
        on_step: called with (steps done, weights) after every step.
    """
    needs, task, scorer, size = loss.requirements(), warm.task(seed), warm.scorer(), settings.batch_size
    student = _student(warm, loss, settings, lr)
    sampler = _sampler(warm, settings, seed=seed, head=needs.head, num_draws=needs.num_draws, law=needs.law or "policy")
    request = ScoreRequest(
        top_k=task.tokenizer.vocab_size if needs.full_vocabulary else needs.top_k,
        num_teacher_draws=needs.num_teacher_draws,
        temperature=warm.config.rollout.temperature,
        seed=seed,
    )
    pending: deque[ScoredTrajectory] = deque()
    metrics: list[dict[str, float]] = []
    weights = student.weights()
    try:
        for step in range(settings.num_steps):
            # All batches of one version at once, so that the engine's batch stays full.
            first = 0 if step == 0 else step + lag
            indices = range(first * size, min(step + lag + 1, settings.num_steps) * size)
            prompts = [task.prompt(index, "train") for index in indices]
            trajectories = await _respond(sampler, step, weights, prompts, settings)
            pending += await _scored(scorer, trajectories, request)
            batch = [pending.popleft() for _ in range(size)]
            try:
                result = await asyncio.to_thread(student.train, step, batch)
            except NonFiniteError:
                return Trained(weights, step, metrics)
            metrics.append(dict(result.metrics))
            weights = student.weights()
            on_step(step + 1, weights)
    finally:
        await sampler.close()
    return Trained(weights, settings.num_steps, metrics)


async def evaluate(warm: WarmStart, safetensors: bytes, settings: LoopSettings) -> Quality:
    """Accuracy and KL to the teacher of given weights on held-out prompts."""
    task = warm.task(0)
    sampler = _sampler(warm, settings, seed=EVALUATION_SEED, head=8, num_draws=4, law="tail")
    prompts = [task.prompt(index, "eval") for index in range(settings.num_prompts)]
    try:
        trajectories = await _respond(sampler, 0, safetensors, prompts, settings)
    finally:
        await sampler.close()
    scored = await _scored(warm.scorer(), trajectories, ScoreRequest(0, 0, warm.config.rollout.temperature, 0))
    kl_nats, standard_error = kl_to_teacher(scored)
    correct = [task.verify(p, t.response_ids.tolist()) for p, t in zip(prompts, trajectories, strict=True)]
    lengths = [len(t.response_ids) for t in trajectories]
    return Quality(float(np.mean(correct)), kl_nats, standard_error, float(np.mean(lengths)))


async def sample_prompts(
    warm: WarmStart, safetensors: bytes, settings: LoopSettings, num_prompts: int, *, seed: int
) -> list[Trajectory]:
    """One training response to each of the first prompts, without candidates."""
    task = warm.task(seed)
    sampler = _sampler(warm, settings, seed=seed, head=0, num_draws=0, law="policy")
    try:
        prompts = [task.prompt(index, "train") for index in range(num_prompts)]
        return await _respond(sampler, 0, safetensors, prompts, settings)
    finally:
        await sampler.close()


async def _respond(
    sampler: HfSampler, version: int, weights: bytes, prompts: Sequence[Prompt], settings: LoopSettings
) -> list[Trajectory]:
    """One response to each prompt, all at once under these weights."""
    if not prompts:
        return []
    await sampler.refresh(PolicyWeights(PolicyVersion(version), weights))
    requests = [SampleRequest(prompt.index, prompt.ids, settings.max_new_tokens) for prompt in prompts]
    return await asyncio.gather(*map(sampler.sample, requests))


async def _scored(scorer: Scorer, trajectories: Sequence[Trajectory], request: ScoreRequest) -> list[ScoredTrajectory]:
    scores = await scorer.score(trajectories, request) if trajectories else []
    return [ScoredTrajectory(t, s) for t, s in zip(trajectories, scores, strict=True)]


def _sampler(
    warm: WarmStart, settings: LoopSettings, *, seed: int, head: int, num_draws: int, law: DrawLaw
) -> HfSampler:
    task = warm.task(0)
    sampling = SamplerSettings(
        slots=SLOTS,
        max_context=task.max_prompt_tokens + settings.max_new_tokens,
        eos_id=task.tokenizer.eos_id,
        seed=seed,
        temperature=warm.config.rollout.temperature,
        head=head,
        num_draws=num_draws,
        law=law,
    )
    return HfSampler(warm.model(), sampling)


def _student(warm: WarmStart, loss: LossConfig, settings: LoopSettings, lr: float) -> Student:
    learner, temperature = warm.config.learner, warm.config.rollout.temperature
    own = Learner(
        lr=lr,
        warmup_steps=learner.warmup_steps,
        num_steps=settings.num_steps,
        grad_clip=learner.grad_clip,
        row_capacity=learner.row_capacity,
        rows_per_micro_batch=learner.rows_per_micro_batch,
    )
    return Student(warm.model(), build_estimator(loss), Accelerator(cpu=True), own, temperature=temperature)
