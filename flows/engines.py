"""Models and engines of a run: from its RunConfig to the samplers and scorers that the roles host, `hf` and `vllm`.

Imports vLLM only in the functions that make such an engine: it is an extra, and its import takes ten seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, PreTrainedModel

from asyncopd.config import HfTeacher, ModelConfig, OpenAITeacher, OracleTeacher, RunConfig, TinyModel, VllmTeacher
from asyncopd.errors import ConfigError
from asyncopd.learner.pretrain import make_tiny_model
from asyncopd.models.causal_lm import build_causal_lm, load_causal_lm, load_safetensors
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import Scorer, Task
from asyncopd.rollout.hf import HfSampler
from asyncopd.tasks.walk import WalkTask
from asyncopd.teacher.hf import HfScorer
from asyncopd.teacher.openai import OpenAIScorer
from asyncopd.teacher.oracle import OracleScorer
from asyncopd.types import DrawLaw
from asyncopd.vllm.model_folder import ModelFolder
from storage.run_log import StoredRunLog
from storage.runs import publish_model, read_model
from storage.stores.base import ObjectStore

if TYPE_CHECKING:
    from asyncopd.vllm.sampler import VllmSampler
    from asyncopd.vllm.scorer import VllmScorer

EVALUATION_HEAD = 8
"""Ids per position on which an evaluation sums KL(p‖q) exactly; four draws estimate the rest."""


# -- models -------------------------------------------------------------------------------------------------------
def load_model(config: RunConfig, store: ObjectStore, model: ModelConfig) -> PreTrainedModel:
    """A model with its weights, float32: from the cache of pre-trained ones, or from its own directory."""
    if not isinstance(model, TinyModel):
        return load_causal_lm(model.path)
    objects = read_model(store, config.model_digest(model))
    causal_lm = build_causal_lm(json.loads(objects["config.json"]), seed=0)
    load_safetensors(causal_lm, objects["model.safetensors"])
    return causal_lm


def make_model(
    config: RunConfig, store: ObjectStore, task: Task, model: TinyModel, *, on_step: Callable[[int, float], None]
) -> None:
    """Train one tiny model on `task` and publish it under its digest. Repeating it is harmless: the first is kept.

    Args:
        on_step: called with (steps done, loss in nats).
    """
    objects, facts = make_tiny_model(model, task, row_capacity=config.learner.row_capacity, on_step=on_step)
    publish_model(store, config.model_digest(model), objects, facts)


def student_skeleton(log: StoredRunLog) -> PreTrainedModel:
    """The student's architecture without its weights, as the learner stored it: samplers fetch weights by version."""
    return build_causal_lm(json.loads(log.read_architecture()["config.json"]), seed=0)


# -- samplers -----------------------------------------------------------------------------------------------------
def rollout_sampler(config: RunConfig, task: Task, log: StoredRunLog) -> HfSampler | VllmSampler:
    """The sampler of a rollout worker, recording what the run's loss needs; the learner has stored the architecture."""
    cached = config.cached()
    sampling = _sampling(
        config, task, head=cached.head, num_draws=cached.num_draws, law=cached.law or "policy", seed=config.seed
    )
    if config.rollout.engine != "vllm":
        return _hf_sampler(config, log, sampling)
    from asyncopd.vllm.sampler import VllmSampler  # an extra that takes ten seconds to import

    settings = config.rollout.vllm
    if not config.staleness.in_flight_updates:
        settings = settings.model_copy(update={"in_flight": "finish"})
    return VllmSampler(json.loads(log.read_architecture()["config.json"]), sampling, settings=settings)


def evaluation_sampler(config: RunConfig, task: Task, log: StoredRunLog) -> HfSampler:
    """The evaluator's sampler. Another seed than training: held-out prompts carry the same indices."""
    sampling = _sampling(config, task, head=EVALUATION_HEAD, num_draws=4, law="tail", seed=config.seed + 1)
    return _hf_sampler(config, log, sampling)


def _hf_sampler(config: RunConfig, log: StoredRunLog, sampling: SamplerSettings) -> HfSampler:
    in_flight_updates = config.staleness.in_flight_updates
    return HfSampler(student_skeleton(log).to(_device()), sampling, in_flight_updates=in_flight_updates)


def _sampling(config: RunConfig, task: Task, *, head: int, num_draws: int, law: DrawLaw, seed: int) -> SamplerSettings:
    return SamplerSettings(
        slots=config.rollout.slots,
        max_context=_max_context(config, task),
        eos_id=task.tokenizer.eos_id,
        seed=seed,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        head=head,
        num_draws=num_draws,
        law=law,
    )


# -- scorers ------------------------------------------------------------------------------------------------------
def make_scorer(config: RunConfig, task: Task, store: ObjectStore) -> Scorer:
    """The run's teacher."""
    teacher = config.teacher
    if isinstance(teacher, OracleTeacher):
        assert isinstance(task, WalkTask)
        return OracleScorer(task.rules, smoothing=teacher.smoothing, name=teacher.name)
    if isinstance(teacher, VllmTeacher):
        return _vllm_scorer(config, task, store, teacher)
    if isinstance(teacher, OpenAITeacher):
        return _openai_scorer(config, task, teacher)
    return _hf_scorer(config, task, store, teacher)


def evaluation_scorer(config: RunConfig, task: Task, store: ObjectStore) -> Scorer:
    """The run's teacher for its evaluations: what vLLM serves in the score process, transformers serves here."""
    if isinstance(config.teacher, VllmTeacher):
        return _hf_scorer(config, task, store, config.teacher)
    return make_scorer(config, task, store)


def _hf_scorer(config: RunConfig, task: Task, store: ObjectStore, teacher: HfTeacher | VllmTeacher) -> HfScorer:
    return HfScorer(
        load_model(config, store, teacher.model).to(_device()),
        name=teacher.name,
        tokenizer_digest=task.tokenizer.digest,
        row_capacity=config.score.row_capacity,
    )


def _vllm_scorer(config: RunConfig, task: Task, store: ObjectStore, teacher: VllmTeacher) -> VllmScorer:
    """A teacher in a vLLM engine, which starts at once: the run's first responses are sampled meanwhile."""
    from asyncopd.vllm.scorer import VllmScorer  # an extra that takes ten seconds to import

    folder = None
    if isinstance(teacher.model, TinyModel):
        made = read_model(store, config.model_digest(teacher.model))
        folder = ModelFolder(len(made["model.safetensors"]))
        folder.write(json.loads(made["config.json"]), made["model.safetensors"])
        path = str(folder.path)
    else:
        path = teacher.model.path
    scorer = VllmScorer(
        path,
        name=teacher.name,
        tokenizer_digest=task.tokenizer.digest,
        vocab_size=_vocab_size(task, teacher.model),
        max_context=_max_context(config, task),
        max_sequences=teacher.max_sequences,
        settings=teacher.vllm,
        owned_folder=folder,
    )
    scorer.start()
    return scorer


def _openai_scorer(config: RunConfig, task: Task, teacher: OpenAITeacher) -> OpenAIScorer:
    """A teacher behind HTTP."""
    variable = teacher.api_key_variable
    if variable is not None and variable not in os.environ:
        raise ConfigError(
            f"teacher.api_key_variable: ${variable} is not set in the score process. Export it where the Prefect "
            "worker runs, before `asyncopd up`."
        )
    return OpenAIScorer(
        teacher.urls,
        model=teacher.model,
        name=teacher.name,
        tokenizer=task.tokenizer,
        vocab_size=_vocab_size(task, config.student),
        max_context=_max_context(config, task),
        compare_text=teacher.compare_text,
        concurrency=teacher.concurrency,
        timeout_s=teacher.timeout_s,
        max_retries=teacher.max_retries,
        api_key=os.environ[variable] if variable else None,
    )


def _device() -> torch.device:
    """Where the hf engines of a role run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _max_context(config: RunConfig, task: Task) -> int:
    return task.max_prompt_tokens + config.rollout.max_new_tokens


def _vocab_size(task: Task, model: ModelConfig) -> int:
    """Rows of the output embedding, which may exceed what the tokenizer produces."""
    if isinstance(model, TinyModel):
        return task.tokenizer.vocab_size
    return int(AutoConfig.from_pretrained(model.path).vocab_size)
