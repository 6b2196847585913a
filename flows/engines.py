"""Models and engines of a run: from its RunConfig to the samplers and scorers that the roles host, `hf` and `vllm`.

Imports vLLM only in the functions that make such an engine: it is an extra, and its import takes ten seconds.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from transformers import PreTrainedModel

from asyncopd.config import HfTeacher, ModelConfig, OpenAITeacher, OracleTeacher, RunConfig, TinyModel, VllmTeacher
from asyncopd.config.engines import EngineDtype, PretrainedModel, VllmEngine
from asyncopd.errors import ConfigError
from asyncopd.learner.pretrain import make_tiny_model
from asyncopd.models.causal_lm import load_safetensors, to_safetensors
from asyncopd.models.files import ModelFiles
from asyncopd.models.load import build_causal_lm, load_pretrained, resolved_dtype
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

logger = logging.getLogger(__name__)

VllmSettings = TypeVar("VllmSettings", bound=VllmEngine)

EVALUATION_HEAD = 8
"""Ids per position on which an evaluation sums KL(p‖q) exactly; four draws estimate the rest."""


# -- models -------------------------------------------------------------------------------------------------------
def load_model(
    config: RunConfig, store: ObjectStore, role: str, *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a role (RunConfig.models) with its weights: from the cache of pre-trained ones, or its own files."""
    model = config.models()[role]
    if not isinstance(model, TinyModel):
        return load_pretrained(ModelFiles(model, role), dtype=dtype)
    objects = read_model(store, config.model_digest(model))
    causal_lm = build_causal_lm(json.loads(objects["config.json"]), seed=0, dtype=dtype)
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


def student_skeleton(log: StoredRunLog, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The student's architecture without its weights, as the learner stored it: samplers fetch weights by version."""
    return build_causal_lm(json.loads(log.read_architecture()["config.json"]), seed=0, dtype=dtype)


# -- samplers -----------------------------------------------------------------------------------------------------
def rollout_sampler(config: RunConfig, task: Task, log: StoredRunLog) -> HfSampler | VllmSampler:
    """The sampler of a rollout worker, recording what the run's loss needs; the learner has stored the architecture."""
    cached = config.cached()
    sampling = _sampling(
        config, task, head=cached.head, num_draws=cached.num_draws, law=cached.law or "policy", seed=config.seed
    )
    if config.rollout.engine != "vllm":
        return _hf_sampler(config, log, sampling, config.rollout.dtype)
    from asyncopd.vllm.sampler import VllmSampler  # an extra that takes ten seconds to import

    settings = _vllm_settings(config.rollout.vllm, config.student)
    if not config.staleness.in_flight_updates:
        settings = settings.model_copy(update={"in_flight": "finish"})
    return VllmSampler(json.loads(log.read_architecture()["config.json"]), sampling, settings=settings)


def evaluation_sampler(config: RunConfig, task: Task, log: StoredRunLog) -> HfSampler:
    """The evaluator's sampler. Another seed than training: held-out prompts carry the same indices."""
    sampling = _sampling(config, task, head=EVALUATION_HEAD, num_draws=4, law="tail", seed=config.seed + 1)
    asked = config.evaluate.dtype if config.evaluate.dtype != "auto" else config.rollout.dtype
    return _hf_sampler(config, log, sampling, asked)


def _hf_sampler(config: RunConfig, log: StoredRunLog, sampling: SamplerSettings, asked: EngineDtype) -> HfSampler:
    skeleton = student_skeleton(log, dtype_of("student", config.student, asked)).to(_device())
    return HfSampler(skeleton, sampling, in_flight_updates=config.staleness.in_flight_updates)


def _sampling(config: RunConfig, task: Task, *, head: int, num_draws: int, law: DrawLaw, seed: int) -> SamplerSettings:
    return SamplerSettings(
        slots=config.rollout.slots,
        max_context=_max_context(config, task),
        stop_ids=tuple(sorted(task.tokenizer.stop_ids)),
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
    return _hf_scorer(config, task, store, teacher, teacher.dtype)


def evaluation_scorer(config: RunConfig, task: Task, store: ObjectStore) -> Scorer:
    """The run's teacher for its evaluations: what vLLM serves in the score process, transformers serves here."""
    teacher, asked = config.teacher, config.evaluate.dtype
    if isinstance(teacher, HfTeacher):
        return _hf_scorer(config, task, store, teacher, asked if asked != "auto" else teacher.dtype)
    if isinstance(teacher, VllmTeacher):
        return _hf_scorer(config, task, store, teacher, asked)
    return make_scorer(config, task, store)


def _hf_scorer(
    config: RunConfig, task: Task, store: ObjectStore, teacher: HfTeacher | VllmTeacher, asked: EngineDtype
) -> HfScorer:
    digest = _tokenizer_digest(teacher.model, task)
    dtype = dtype_of("teacher", teacher.model, asked)
    return HfScorer(
        load_model(config, store, "teacher", dtype=dtype).to(_device()),
        name=teacher.name,
        tokenizer_digest=digest,
        row_capacity=config.score.row_capacity,
    )


def _vllm_scorer(config: RunConfig, task: Task, store: ObjectStore, teacher: VllmTeacher) -> VllmScorer:
    """A teacher in a vLLM engine, which the role starts at once: the run's first responses are sampled meanwhile."""
    from asyncopd.vllm.scorer import VllmScorer  # an extra that takes ten seconds to import

    digest = _tokenizer_digest(teacher.model, task)
    model, folder, settings = teacher.model, None, _vllm_settings(teacher.vllm, teacher.model)
    if isinstance(model, PretrainedModel) and not (model.gguf_file or model.drop_layers):
        path = str(ModelFiles(model, "teacher.model").local_folder())
    else:
        made = load_model(config, store, "teacher")
        weights = to_safetensors(made, None if settings.dtype == "auto" else getattr(torch, settings.dtype))
        folder = ModelFolder(len(weights))
        folder.write(made.config.to_dict(), weights)
        path = str(folder.path)
    return VllmScorer(
        path,
        name=teacher.name,
        tokenizer_digest=digest,
        vocab_size=task.tokenizer.vocab_size,
        max_context=_max_context(config, task),
        max_sequences=teacher.max_sequences,
        settings=settings,
        owned_folder=folder,
    )


def _tokenizer_digest(model: ModelConfig, task: Task) -> str:
    """Of the teacher's own tokenizer; a teacher of another run, or files on another machine, may have another one."""
    if not isinstance(model, PretrainedModel):
        return task.tokenizer.digest
    files = ModelFiles(model, "teacher.model")
    if files.tokenizer.digest != task.tokenizer.digest:
        raise ConfigError(
            f"tokenizers differ: that of {files.where} has digest {files.tokenizer.digest[:12]}, the task's "
            f"{task.tokenizer.digest[:12]}. Expected a teacher with the student's tokenizer."
        )
    return files.tokenizer.digest


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
        vocab_size=task.tokenizer.vocab_size,
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


def dtype_of(role: str, model: ModelConfig, asked: EngineDtype) -> torch.dtype:
    """What an engine of this process computes in; says so where the choice was its own."""
    dtype = resolved_dtype(asked, pretrained=isinstance(model, PretrainedModel), device=_device())
    if asked == "auto":
        logger.info("%s: %s weights and activations (dtype auto).", role, str(dtype).removeprefix("torch."))
    return dtype


def _vllm_settings(settings: VllmSettings, model: ModelConfig) -> VllmSettings:
    """With `auto` resolved as everywhere else; vLLM's own `auto` is what config.json says."""
    if settings.dtype != "auto":
        return settings
    dtype = str(dtype_of("vllm", model, "auto")).removeprefix("torch.")
    return settings.model_copy(update={"dtype": dtype})
