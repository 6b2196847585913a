"""Settings of the two tasks, `walk` and `text`: frozen pydantic values with a reason beside every default.

Nothing here follows the run's seed except the order of training prompts: which questions are held out is decided by
`split_seed`, so that a model pre-trained under one seed is never evaluated on its own training questions under another.
"""

from __future__ import annotations

import math
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from asyncopd.config.base import Frozen


class WalkConfig(Frozen):
    """Walks on Z_p: exact verifier, closed-form teacher, heavy-tailed lengths; needs no download and no GPU."""

    kind: Literal["walk"] = "walk"
    p: int = Field(31, ge=5, le=101)
    """Number of states. 31 gives shortest paths of up to 5 operations; the oracle's tables grow with p³."""
    noise_levels: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.05, 0.35, 0.65, 0.85)
    """ε of every noise level: how often the demonstrator takes any operation rather than one on a shortest path. The
    prompt tells the level. The noisy levels make the length heavy-tailed: mean 11 tokens, 99th percentile 69."""
    noise_weights: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 0.28, 0.15, 0.07)
    """Share of prompts of each level; adds up to 1. The two noisiest levels are
    22 % of the prompts and 46 % of the tokens."""
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of (start, goal) pairs held out for evaluation, at every noise level. 0.1 holds out 93 of 930."""
    split_seed: int = 0
    """Decides which pairs are held out and the order they are evaluated in; independent of the run's seed."""
    max_demo_tokens: int = Field(192, ge=3)
    """Longest demonstration, EOS included; a longer walk is drawn again for the same question. 192 fits the
    quickstart's context of 256 and cuts 2 walks in 10 000: by so little demonstrations differ from the closed form."""

    @property
    def max_prompt_tokens(self) -> int:
        """Noise level, start and goal."""
        return 3

    @model_validator(mode="after")
    def _levels_and_weights_pair_up(self) -> Self:
        levels, weights = self.noise_levels, self.noise_weights
        if not levels or len(levels) != len(weights) or len(set(levels)) != len(levels):
            raise ValueError(
                f"noise_levels {levels} and noise_weights {weights} must have equal lengths and the levels be distinct."
            )
        if not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            raise ValueError(f"noise_weights {weights} add up to {sum(weights):g}; expected shares of 1.")
        return self


class TextConfig(Frozen):
    """Questions with reference answers, from GSM8K, a file or a Hugging Face dataset. Field defaults are GSM8K's."""

    kind: Literal["text"] = "text"
    name: str = Field("text", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """What reports call the task, for example `gsm8k`."""
    train_path: str = Field(min_length=1)
    """`gsm8k` (its 7,473 training questions come with the package), `*.jsonl`, `*.jsonl.gz`, `*.parquet`, or
    `hf:<dataset>[:config[:split]]` (needs `pip install datasets`)."""
    eval_path: str = ""
    """The same for evaluation questions, where `gsm8k` is its 1,319 test questions; training questions that occur there
    are left out. Empty: hold out `eval_fraction` of `train_path` instead."""
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of distinct training questions held out when `eval_path` is empty."""
    split_seed: int = 0
    """Decides which questions are held out and the order they are evaluated in; independent of the run's seed."""
    question_field: str = "question"
    """Column or key of the question text."""
    answer_field: str = "answer"
    """Column or key of the reference answer text, final answer included."""
    template: str = "Question: {question}\nAnswer:"
    """Prompt text; `{question}` is replaced, other braces stay. No blank at the end: tokenizers glue it to the next
    word."""
    prompt_format: Literal["plain", "chat"] = "plain"
    """`plain` continues the prompt text. `chat` sends it as the user's message through the tokenizer's chat template,
    which instruction-tuned models expect."""
    chat_options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Arguments of the chat template, for example `{enable_thinking: false}` for Qwen3."""
    answer_template: str = " {answer}"
    """Demonstration text after the prompt; `{answer}` is replaced by the reference. The blank separates it from
    `Answer:`; chat models want `{answer}`."""
    tokenizer: str = Field("bytes", min_length=1)
    """`bytes` (259 ids, no download, for tiny models), `student` for that of the student's own files, or directory or
    hub name of a Hugging Face tokenizer."""
    tokenizer_revision: str = "main"
    """Branch, tag or commit when `tokenizer` is a hub name."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response besides those that tokenizer and generation_config.json name, for example
    `["<|im_end|>"]`."""
    chat_date: date | None = None
    """What a chat template that asks for today's date is told: prompts must not change overnight."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Longest admissible prompt. Even cut into pieces of four letters no GSM8K question has 300; as `bytes`, with the
    default template, the longest has 1010."""
    long_prompts: Literal["error", "drop"] = "error"
    """What happens to a longer prompt. `error` refuses to start, because dropping changes the benchmark; `drop` leaves
    it out and counts it."""
    max_demo_tokens: int = Field(0, ge=0)
    """Leave demonstrations longer than this (EOS included) out of the pre-training stream, as byte-level models with a
    short context need. 0 keeps all."""

    @model_validator(mode="after")
    def _texts_can_be_made(self) -> Self:
        for field, place_holder in (("template", "{question}"), ("answer_template", "{answer}")):
            if place_holder not in getattr(self, field):
                raise ValueError(f"{field} {getattr(self, field)!r} lacks {place_holder}, where the text is put in.")
        if self.prompt_format == "chat" and self.tokenizer == "bytes":
            raise ValueError("prompt_format chat needs a tokenizer with a chat template; tokenizer bytes has none.")
        if self.chat_options and self.prompt_format != "chat":
            raise ValueError(f"chat_options {self.chat_options} have no effect with prompt_format plain; remove them.")
        return self


TaskConfig = Annotated[WalkConfig | TextConfig, Field(discriminator="kind")]
