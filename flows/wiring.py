"""The composition root: from a RunConfig to stores, tasks, engines and stages. The only place that names them all.

Imports torch; the `asyncopd` flow therefore never imports this module, only the role processes do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from asyncopd.config import (
    HfTeacher,
    ModelConfig,
    OpenAITeacher,
    OracleTeacher,
    RunConfig,
    TinyModel,
    VllmTeacher,
)
from asyncopd.evaluate import EvaluateStage
from asyncopd.learner.stage import LearnStage
from asyncopd.learner.student import Student
from asyncopd.losses.build import build_estimator
from asyncopd.models.causal_lm import build_causal_lm, load_causal_lm, load_safetensors
from asyncopd.ports import Sampler, Scorer, ScoreRequest, Task
from asyncopd.rollout.hf import HfSampler
from asyncopd.rollout.stage import RolloutStage
from asyncopd.tasks.build import build_task
from asyncopd.tasks.tokenizers_hf import HfTokenizer
from asyncopd.tasks.walk import WalkTask
from asyncopd.teacher.hf import HfScorer
from asyncopd.teacher.oracle import OracleScorer
from asyncopd.teacher.stage import ScoreStage
from asyncopd.types import DrawLaw
from asyncopd.worker import Worker
from flows.engines import openai_scorer, vllm_sampler, vllm_scorer
from storage.run_log import StoredRunLog
from storage.runs import find_model, open_run, read_model
from storage.score_cache import StoredScoreCache
from storage.stores import open_store
from storage.stores.base import ObjectStore

if TYPE_CHECKING:
    from asyncopd.vllm.sampler import VllmSampler

EVALUATION_HEAD = 8
"""Ids per position on which an evaluation sums KL(p‖q) exactly; four draws estimate the rest."""


@dataclass(frozen=True)
class OpenRun:
    """A stored run with what every role needs of it."""

    store: ObjectStore
    log: StoredRunLog
    config: RunConfig
    task: Task

    def worker(self, role: str) -> Worker:
        limits = self.config.limits
        return Worker(
            self.log, role, poll_s=limits.poll_s, deadline_s=limits.deadline_s, heartbeat_s=limits.heartbeat_s
        )


def open_stored_run(root: str, run_id: str) -> OpenRun:
    """Open a run that the `asyncopd` flow created. Its configuration is the stored one with its recorded changes."""
    torch.set_num_threads(1)
    store = open_store(root)
    log = open_run(store, run_id)
    config = RunConfig.model_validate(log.config())
    return OpenRun(store, log, config, task_of(config, config.seed))


def task_of(config: RunConfig, seed: int) -> Task:
    """The task of a run, its streams seeded by `seed`; loads a Hugging Face tokenizer where the task names one."""
    tokenizer = None
    if config.task.kind == "text" and config.task.tokenizer != "bytes":
        tokenizer = HfTokenizer(config.task.tokenizer)
    return build_task(config.task, seed=seed, tokenizer=tokenizer)


# -- models -------------------------------------------------------------------------------------------------------
def load_model(run: OpenRun, model: ModelConfig) -> PreTrainedModel:
    """A model with its weights, float32: from the cache of pre-trained ones, or from its own directory."""
    if not isinstance(model, TinyModel):
        return load_causal_lm(model.path)
    objects = read_model(run.store, run.config.model_digest(model))
    causal_lm = build_causal_lm(json.loads(objects["config.json"]), seed=0)
    load_safetensors(causal_lm, objects["model.safetensors"])
    return causal_lm


def student_skeleton(run: OpenRun) -> PreTrainedModel:
    """The student's architecture without its weights, as the learner stored it: samplers fetch weights by version."""
    return build_causal_lm(json.loads(run.log.read_architecture()["config.json"]), seed=0)


def _device() -> torch.device:
    """Where the hf engines of a role run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- stages -------------------------------------------------------------------------------------------------------
def hf_sampler(run: OpenRun, *, head: int, num_draws: int, law: DrawLaw, seed: int, slots: int) -> HfSampler:
    config = run.config
    return HfSampler(
        student_skeleton(run).to(_device()),
        slots=slots,
        max_context=run.task.max_prompt_tokens + config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        head=head,
        num_draws=num_draws,
        law=law,
        seed=seed,
        eos_id=run.task.tokenizer.eos_id,
        in_flight_updates=config.staleness.in_flight_updates,
    )


def rollout_stage(run: OpenRun, worker: Worker) -> tuple[RolloutStage, Sampler]:
    """The rollout stage with its engine, which the caller closes."""
    config, cached = run.config, run.config.cached()
    law = cached.law or "policy"
    sampler: HfSampler | VllmSampler
    if config.rollout.engine == "vllm":
        architecture = json.loads(run.log.read_architecture()["config.json"])
        sampler = vllm_sampler(config, run.task, architecture, head=cached.head, num_draws=cached.num_draws, law=law)
    else:
        sampler = hf_sampler(
            run,
            head=cached.head,
            num_draws=cached.num_draws,
            law=law,
            seed=config.seed,
            slots=config.rollout.slots,
        )
    stage = RolloutStage(
        run.log,
        worker,
        plan=config.plan,
        task=run.task,
        sampler=sampler,
        max_new_tokens=config.rollout.max_new_tokens,
        lease_s=config.limits.lease_s,
        busy_intervals=sampler.busy_intervals,
    )
    return stage, sampler


def scorer_of(run: OpenRun) -> Scorer:
    """The run's teacher."""
    teacher = run.config.teacher
    if isinstance(teacher, OracleTeacher):
        assert isinstance(run.task, WalkTask)
        return OracleScorer(run.task.rules, smoothing=teacher.smoothing, name=teacher.name)
    if isinstance(teacher, VllmTeacher):
        tiny = isinstance(teacher.model, TinyModel)
        made = read_model(run.store, run.config.model_digest(teacher.model)) if tiny else None
        return vllm_scorer(run.config, run.task, teacher, made)
    if isinstance(teacher, OpenAITeacher):
        return openai_scorer(run.config, run.task, teacher)
    return _hf_scorer(run, teacher)


def _evaluating_scorer(run: OpenRun) -> Scorer:
    """The run's teacher for its evaluations: what vLLM serves in the score process, transformers serves here."""
    teacher = run.config.teacher
    return _hf_scorer(run, teacher) if isinstance(teacher, VllmTeacher) else scorer_of(run)


def _hf_scorer(run: OpenRun, teacher: HfTeacher | VllmTeacher) -> HfScorer:
    return HfScorer(
        load_model(run, teacher.model).to(_device()),
        name=teacher.name,
        tokenizer_digest=run.task.tokenizer.digest,
        row_capacity=run.config.score.row_capacity,
    )


def score_stage(run: OpenRun, worker: Worker) -> ScoreStage:
    config, cached = run.config, run.config.cached()
    cache = StoredScoreCache(run.store) if config.score.cache else None
    top_k = run.task.tokenizer.vocab_size if cached.full_vocabulary else cached.top_k
    request = ScoreRequest(
        top_k=top_k,
        num_teacher_draws=cached.num_teacher_draws,
        temperature=config.rollout.temperature,
        seed=config.seed,
    )
    return ScoreStage(
        run.log,
        worker,
        plan=config.plan,
        scorer=scorer_of(run),
        request=request,
        lease_s=config.limits.lease_s,
        cache=cache,
    )


def student_of(config: RunConfig, causal_lm: PreTrainedModel) -> Student:
    """The student that the run's learner trains, before its first step."""
    return Student(
        causal_lm,
        build_estimator(config.loss),
        Accelerator(mixed_precision="bf16" if config.learner.compute_dtype == "bfloat16" else "no"),
        lr=config.learner.lr,
        warmup_steps=config.learner.warmup_steps,
        num_steps=config.learner.schedule_steps or config.learner.num_steps,
        schedule=config.learner.schedule,
        weight_decay=config.learner.weight_decay,
        grad_clip=config.learner.grad_clip,
        row_capacity=config.learner.row_capacity,
        rows_per_micro_batch=config.learner.rows_per_micro_batch,
        temperature=config.rollout.temperature,
        publish_dtype=config.learner.publish.dtype,
    )


def learn_stage(run: OpenRun, worker: Worker) -> LearnStage:
    """The learner. Stores the student's architecture, which samplers wait for, before version 0."""
    config = run.config
    causal_lm = load_model(run, config.student)
    run.log.publish_architecture({"config.json": json.dumps(causal_lm.config.to_dict()).encode()})
    if config.learner.publish.kind == "delta":
        run.log.publish_deltas(full_every=config.learner.publish.full_every)
    return LearnStage(
        run.log,
        worker,
        plan=config.plan,
        student=student_of(config, causal_lm),
        teacher=config.teacher.name,
        checkpoint_every=config.learner.checkpoint_every,
        required=config.loss.requirements(),
        vocab_size=run.task.tokenizer.vocab_size,
        lease_s=config.limits.lease_s,
    )


def evaluate_stage(run: OpenRun, worker: Worker) -> tuple[EvaluateStage, HfSampler]:
    """The evaluator with its engine, which the caller closes."""
    config = run.config
    # Another seed than training: held-out prompts carry the same indices.
    sampler = hf_sampler(
        run, head=EVALUATION_HEAD, num_draws=4, law="tail", seed=config.seed + 1, slots=config.rollout.slots
    )
    stage = EvaluateStage(
        run.log,
        worker,
        task=run.task,
        sampler=sampler,
        scorer=_evaluating_scorer(run),
        temperature=config.rollout.temperature,
        num_prompts=config.evaluate.num_prompts,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return stage, sampler


def missing_models(run: OpenRun) -> Mapping[str, TinyModel]:
    """The tiny models of a run that no earlier run has pre-trained, by role."""
    return {
        role: model
        for role, model in run.config.models().items()
        if isinstance(model, TinyModel) and find_model(run.store, run.config.model_digest(model)) is None
    }
