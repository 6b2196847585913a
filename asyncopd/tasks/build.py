"""From settings to a Task. A Hugging Face tokenizer is handed in, because making one imports transformers."""

from __future__ import annotations

from asyncopd.config.tasks import TaskConfig, TextConfig, WalkConfig
from asyncopd.errors import ConfigError
from asyncopd.ports import Task
from asyncopd.tasks.prompts import read_questions, split_questions
from asyncopd.tasks.text import TextTask
from asyncopd.tasks.tokenizers import ByteTokenizer, TextTokenizer
from asyncopd.tasks.walk import WalkTask


def build_task(config: TaskConfig, seed: int, tokenizer: TextTokenizer | None = None) -> Task:
    """The Task that `config` describes; reads the data files of a text task.

    Args:
        config: WalkConfig or TextConfig.
        seed: of the order of training prompts and demonstrations.
        tokenizer: required for a text task unless `config.tokenizer` is `bytes`; a walk has its own.
    Raises:
        ConfigError: data or tokenizer cannot serve; see `read_questions`, `split_questions` and `TextTask`.
    """
    if isinstance(config, WalkConfig):
        return WalkTask(
            seed,
            p=config.p,
            noise_levels=config.noise_levels,
            noise_weights=config.noise_weights,
            eval_fraction=config.eval_fraction,
            split_seed=config.split_seed,
            max_demo_tokens=config.max_demo_tokens,
        )
    if config.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    if tokenizer is None:
        raise ConfigError(
            f"task.tokenizer {config.tokenizer!r}: no tokenizer was handed in. "
            f"Hand an HfTokenizer to build_task, or set task.tokenizer to bytes."
        )
    return _build_text(config, seed, tokenizer)


def _build_text(config: TextConfig, seed: int, tokenizer: TextTokenizer) -> TextTask:
    fields = {"question_field": config.question_field, "answer_field": config.answer_field}
    train, evaluation = split_questions(
        read_questions(config.train_path, "train", **fields),
        read_questions(config.eval_path, "eval", **fields) if config.eval_path else None,
        eval_fraction=config.eval_fraction,
        split_seed=config.split_seed,
    )

    def encode_prompt(question: str) -> list[int]:
        if config.prompt_format == "chat":
            return tokenizer.encode_chat(question, config.template, config.chat_options)
        return tokenizer.encode_prompt(question, config.template)

    return TextTask(
        seed,
        tokenizer,
        train,
        evaluation,
        encode_prompt=encode_prompt,
        name=config.name,
        answer_template=config.answer_template,
        max_prompt_tokens=config.max_prompt_tokens,
        long_prompts=config.long_prompts,
        max_demo_tokens=config.max_demo_tokens,
        split_seed=config.split_seed,
    )
