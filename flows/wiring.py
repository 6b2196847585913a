"""The composition root: from a stored run to its stages, each with the engine, task and log it works with.

Imports torch; the `asyncopd` flow therefore never imports this module, only the role processes do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from asyncopd.config import PretrainedModel, RunConfig, TinyModel
from asyncopd.evaluate import EvaluateStage
from asyncopd.learner.stage import LearnStage
from asyncopd.learner.student import Student
from asyncopd.losses import build_estimator
from asyncopd.models.files import ModelFiles
from asyncopd.ports import Sampler, ScoreRequest, Task
from asyncopd.rollout.stage import RolloutStage
from asyncopd.tasks.build import build_task
from asyncopd.tasks.tokenizers_hf import HfTokenizer
from asyncopd.teacher.stage import ScoreStage
from asyncopd.worker import Worker
from flows.engines import (
    dtype_of,
    evaluation_sampler,
    evaluation_scorer,
    load_model,
    make_model,
    make_scorer,
    rollout_sampler,
)
from flows.preflight import tokenizer_files
from storage.run_log import StoredRunLog
from storage.runs import open_run
from storage.score_cache import StoredScoreCache
from storage.stores import open_store
from storage.stores.base import ObjectStore


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
    task, tokenizer = config.task, None
    if task.kind == "text" and task.tokenizer != "bytes":
        student = config.student
        # A student's generation_config lists every id that it ends with.
        stop_ids = ModelFiles(student, "student").stop_ids if isinstance(student, PretrainedModel) else ()
        tokenizer = HfTokenizer(
            tokenizer_files(config), stop_ids=stop_ids, stop_tokens=task.stop_tokens, chat_date=task.chat_date
        )
        if task.prompt_format == "chat":
            tokenizer.check_turns(task.chat_options)
    return build_task(task, seed=seed, tokenizer=tokenizer)


def pretrain_model(run: OpenRun, worker: Worker, role: str, model: TinyModel) -> None:
    """Make the tiny model of one role, and show how far that is."""
    settings = model.pretrain
    worker.tell(model=role, step=0, num_steps=settings.num_steps)

    def on_step(step: int, loss: float) -> None:
        worker.tell(step=step, loss_nats=loss)

    with worker.span("pretrain", role):
        make_model(run.config, run.store, task_of(run.config, settings.seed), model, on_step=on_step)


# -- stages -------------------------------------------------------------------------------------------------------
def rollout_stage(run: OpenRun, worker: Worker) -> tuple[RolloutStage, Sampler]:
    """The rollout stage with its engine, which the caller closes."""
    config = run.config
    sampler = rollout_sampler(config, run.task, run.log)
    stage = RolloutStage(
        run.log,
        worker,
        plan=config.plan,
        task=run.task,
        sampler=sampler,
        max_new_tokens=config.rollout.max_new_tokens,
        responses_per_prompt=config.rollout.responses_per_prompt,
        lease_s=config.limits.lease_s,
        busy_intervals=sampler.busy_intervals,
    )
    return stage, sampler


def score_stage(run: OpenRun, worker: Worker) -> ScoreStage:
    """The scoring stage with its engine, which closes with it."""
    config, cached = run.config, run.config.cached()
    return ScoreStage(
        run.log,
        worker,
        plan=config.plan,
        scorer=make_scorer(config, run.task, run.store),
        request=ScoreRequest(
            top_k=run.task.tokenizer.vocab_size if cached.full_vocabulary else cached.top_k,
            num_teacher_draws=cached.num_teacher_draws,
            temperature=config.rollout.temperature,
            seed=config.seed,
        ),
        lease_s=config.limits.lease_s,
        cache=StoredScoreCache(run.store) if config.score.cache else None,
    )


def learn_stage(run: OpenRun, worker: Worker) -> LearnStage:
    """The learner. Stores the student's architecture, which samplers wait for, before version 0."""
    config = run.config
    causal_lm = load_model(config, run.store, "student")
    run.log.publish_architecture({"config.json": json.dumps(causal_lm.config.to_dict()).encode()})
    if config.learner.publish.kind == "delta":
        run.log.publish_deltas(full_every=config.learner.publish.full_every)
    return LearnStage(
        run.log,
        worker,
        config,
        student=student_of(config, causal_lm),
        teacher=config.teacher.name,
        vocab_size=run.task.tokenizer.vocab_size,
    )


def student_of(config: RunConfig, causal_lm: PreTrainedModel) -> Student:
    """The student that the run's learner trains, before its first step."""
    sampling = config.rollout.vllm if config.rollout.engine == "vllm" else config.rollout
    sampled = sampling.dtype if sampling.dtype != "float16" else "float32"
    asked = config.learner.publish.dtype
    compute = dtype_of("learner", config.student, config.learner.compute_dtype)
    return Student(
        causal_lm,
        build_estimator(config.loss),
        Accelerator(mixed_precision="bf16" if compute == torch.bfloat16 else "no"),
        config.learner,
        published_dtype=dtype_of("published weights", config.student, asked if asked != "auto" else sampled),
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
    )


def evaluate_stage(run: OpenRun, worker: Worker) -> tuple[EvaluateStage, Sampler]:
    """The evaluator with its engine, which the caller closes."""
    config = run.config
    sampler = evaluation_sampler(config, run.task, run.log)
    stage = EvaluateStage(
        run.log,
        worker,
        task=run.task,
        sampler=sampler,
        scorer=evaluation_scorer(config, run.task, run.store),
        temperature=config.rollout.temperature,
        num_prompts=config.evaluate.num_prompts,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return stage, sampler
