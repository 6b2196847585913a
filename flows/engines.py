"""The part of the composition root that makes vLLM engines and teachers behind HTTP.

Imports vLLM only in the functions that make an engine: it is an extra, and its import takes ten seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from asyncopd.config import ModelConfig, OpenAITeacher, RunConfig, TinyModel, VllmTeacher
from asyncopd.errors import ConfigError
from asyncopd.ports import Task
from asyncopd.teacher.openai import OpenAIScorer
from asyncopd.types import DrawLaw
from asyncopd.vllm.model_folder import ModelFolder

if TYPE_CHECKING:
    from asyncopd.vllm.sampler import VllmSampler

    # As above.
    from asyncopd.vllm.scorer import VllmScorer


def vllm_sampler(
    config: RunConfig, task: Task, architecture: Mapping[str, Any], *, head: int, num_draws: int, law: DrawLaw
) -> VllmSampler:
    """A sampler of the student whose `architecture` the learner stored."""
    # vLLM is an extra, and its import takes ten seconds.
    from asyncopd.vllm.sampler import VllmSampler

    settings = config.rollout.vllm
    if not config.staleness.in_flight_updates:
        settings = settings.model_copy(update={"in_flight": "finish"})
    return VllmSampler(
        architecture,
        slots=config.rollout.slots,
        max_context=_max_context(config, task),
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        head=head,
        num_draws=num_draws,
        law=law,
        seed=config.seed,
        eos_id=task.tokenizer.eos_id,
        settings=settings,
    )


def vllm_scorer(
    config: RunConfig, task: Task, teacher: VllmTeacher, made_here: Mapping[str, bytes] | None
) -> VllmScorer:
    """A teacher in a vLLM engine, which starts at once: the run's first responses are sampled meanwhile.

    Args:
        made_here: objects of a model that was pre-trained here, which is written to a folder first.
    """
    # As above.
    from asyncopd.vllm.scorer import VllmScorer

    folder = None
    if made_here is not None:
        folder = ModelFolder(len(made_here["model.safetensors"]))
        folder.write(json.loads(made_here["config.json"]), made_here["model.safetensors"])
    path = str(folder.path) if folder else teacher.model.path  # type: ignore[union-attr]
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


def openai_scorer(config: RunConfig, task: Task, teacher: OpenAITeacher) -> OpenAIScorer:
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


def _max_context(config: RunConfig, task: Task) -> int:
    return task.max_prompt_tokens + config.rollout.max_new_tokens


def _vocab_size(task: Task, model: ModelConfig) -> int:
    """Rows of the output embedding, which may exceed what the tokenizer produces."""
    if isinstance(model, TinyModel):
        return task.tokenizer.vocab_size
    return int(AutoConfig.from_pretrained(model.path).vocab_size)
