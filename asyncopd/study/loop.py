"""On-policy distillation with a fixed lag, in one process: sampler, oracle, learner and evaluator without storage.

version v published --sample--> the batch of step v + lag (version 0: of steps 0 … lag) --score--> waits its turn
step v: train the batch of step v, sampled under version max(0, v − lag)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from asyncopd.config import OracleTeacher, RunConfig
from asyncopd.config.losses import LossConfig
from asyncopd.errors import NonFiniteError
from asyncopd.evaluate import outcome_of
from asyncopd.learner.student import Student
from asyncopd.losses import build_estimator
from asyncopd.models.causal_lm import load_safetensors
from asyncopd.models.load import build_causal_lm
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.tasks.build import build_task
from asyncopd.tasks.walk import WalkTask
from asyncopd.teacher.oracle import OracleScorer
from asyncopd.types import DrawLaw, PolicyVersion, PolicyWeights, Prompt, ScoredTrajectory, Trajectory

SLOTS = 128
EVALUATION_SEED = 1_000_003
"""Held-out prompts and their draws are the same for every cell, so differences are paired."""

Respond = Callable[[int, bytes, Sequence[Prompt]], Awaitable[list[Trajectory]]]
"""(version, its weights, prompts) -> one response to each, all at once."""


@dataclass(frozen=True)
class WarmStart:
    """A configuration with the initial student it stands for."""

    config: RunConfig
    architecture: str
    """JSON of the transformers configuration."""
    safetensors: bytes

    def model(self, safetensors: bytes | None = None) -> PreTrainedModel:
        """A fresh copy of the student, with other weights if given."""
        causal_lm = build_causal_lm(json.loads(self.architecture), seed=0)
        load_safetensors(causal_lm, self.safetensors if safetensors is None else safetensors)
        return causal_lm

    def identity(self) -> dict[str, Any]:
        """Of student and teacher, for the settings of a study's cells."""
        teacher = self.config.teacher.model_dump(mode="json")
        return {"student": self.config.model_digest(self.config.student), "teacher": teacher}

    def task(self, seed: int) -> WalkTask:
        task = build_task(self.config.task, seed=seed)
        assert isinstance(task, WalkTask)
        return task

    def scorer(self) -> OracleScorer:
        assert isinstance(self.config.teacher, OracleTeacher)
        return OracleScorer(self.task(0).rules, smoothing=self.config.teacher.smoothing)


@dataclass(frozen=True)
class LoopSettings:
    """What all cells of a study have in common."""

    num_steps: int
    batch_size: int
    max_new_tokens: int
    num_prompts: int
    """Held-out prompts of an evaluation."""


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
    learner, temperature = warm.config.learner, warm.config.rollout.temperature
    own = learner.model_copy(update={"lr": lr, "num_steps": settings.num_steps})
    student = Student(warm.model(), build_estimator(loss), Accelerator(cpu=True), own, temperature=temperature)
    top_k = task.tokenizer.vocab_size if needs.full_vocabulary else needs.top_k
    request = ScoreRequest(top_k, needs.num_teacher_draws, temperature, seed)
    pending: deque[ScoredTrajectory] = deque()
    metrics: list[dict[str, float]] = []
    weights = student.weights()
    law = needs.law or "policy"
    async with _sampler(warm, settings, seed=seed, head=needs.head, num_draws=needs.num_draws, law=law) as respond:
        for step in range(settings.num_steps):
            # All batches of one version at once, so that the engine's batch stays full.
            first = 0 if step == 0 else step + lag
            indices = range(first * size, min(step + lag + 1, settings.num_steps) * size)
            if prompts := [task.prompt(index, "train") for index in indices]:
                trajectories = await respond(step, weights, prompts)
                scores = await scorer.score(trajectories, request)
                pending += [ScoredTrajectory(t, s) for t, s in zip(trajectories, scores, strict=True)]
            batch = [pending.popleft() for _ in range(size)]
            try:
                result = await asyncio.to_thread(student.train, step, batch)
            except NonFiniteError:
                return Trained(weights, step, metrics)
            metrics.append(dict(result.metrics))
            weights = student.weights()
            on_step(step + 1, weights)
    return Trained(weights, settings.num_steps, metrics)


async def evaluate(warm: WarmStart, safetensors: bytes, settings: LoopSettings) -> dict[str, float]:
    """What a cell's row says of given weights on held-out prompts: accuracy, KL to the teacher, length."""
    task = warm.task(0)
    prompts = [task.prompt(index, "eval") for index in range(settings.num_prompts)]
    async with _sampler(warm, settings, seed=EVALUATION_SEED, head=8, num_draws=4, law="tail") as respond:
        trajectories = await respond(0, safetensors, prompts)
    scores = await warm.scorer().score(trajectories, ScoreRequest(0, 0, warm.config.rollout.temperature, 0))
    scored = [ScoredTrajectory(t, s) for t, s in zip(trajectories, scores, strict=True)]
    correct = [task.verify(p, t.response_ids.tolist()) for p, t in zip(prompts, trajectories, strict=True)]
    return outcome_of(scored, correct).figures()


async def sample_prompts(
    warm: WarmStart, safetensors: bytes, settings: LoopSettings, num_prompts: int, *, seed: int
) -> list[Trajectory]:
    """One training response to each of the first prompts, without candidates."""
    task = warm.task(seed)
    async with _sampler(warm, settings, seed=seed, head=0, num_draws=0, law="policy") as respond:
        return await respond(0, safetensors, [task.prompt(index, "train") for index in range(num_prompts)])


@contextlib.asynccontextmanager
async def _sampler(
    warm: WarmStart, settings: LoopSettings, *, seed: int, head: int, num_draws: int, law: DrawLaw
) -> AsyncIterator[Respond]:
    """The study's sampler, closed at the end."""
    task = warm.task(0)
    sampling = SamplerSettings(
        slots=SLOTS,
        max_context=task.max_prompt_tokens + settings.max_new_tokens,
        stop_ids=tuple(task.tokenizer.stop_ids),
        seed=seed,
        temperature=warm.config.rollout.temperature,
        head=head,
        num_draws=num_draws,
        law=law,
    )
    sampler = HfSampler(warm.model(), sampling)

    async def respond(version: int, weights: bytes, prompts: Sequence[Prompt]) -> list[Trajectory]:
        await sampler.refresh(PolicyWeights(PolicyVersion(version), weights))
        requests = [SampleRequest(prompt.index, prompt.ids, settings.max_new_tokens) for prompt in prompts]
        return await asyncio.gather(*map(sampler.sample, requests))

    try:
        yield respond
    finally:
        await sampler.close()
