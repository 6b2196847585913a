"""Questions in words with exact-match answers, as a Task. Relies on `prompts` for rows, on `answers` for verdicts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncopd.errors import ConfigError
from asyncopd.models.random import stream_key
from asyncopd.ports import Demonstration, Tokenizer
from asyncopd.tasks.answers import answers_match, extract_answer
from asyncopd.tasks.prompts import Question, ShuffledStream
from asyncopd.types import IntArray, Prompt, Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Item:
    """One admitted question, ready to be handed out."""

    question_id: str
    ids: IntArray
    """[P] prompt ids, read-only."""
    reference: str
    """The final answer alone."""
    answer: str
    """The whole reference answer, which demonstrations imitate."""


class TextTask:
    """Implements `ports.Task`.

    The training order is reshuffled every epoch by `seed`; the evaluation order is fixed by `split_seed`, so that all
    runs are evaluated on the same first prompts.

    Args:
        seed: order of training prompts and demonstrations.
        tokenizer: of student and teacher.
        train, evaluation: questions, sharing none (`split_questions`).
        encode_prompt: question text -> prompt ids: template, BOS and chat format applied.
        name: what reports call the task.
        answer_template: demonstration text, `{answer}` replaced by the reference answer.
        max_prompt_tokens: longest admissible prompt.
        long_prompts: refuse longer prompts (`error`) or leave them out (`drop`); `num_dropped` counts them.
        max_demo_tokens: longest demonstration, EOS included; longer ones are left out of the stream. 0 keeps all.
        split_seed: order of evaluation.
    Raises:
        ConfigError: a prompt is too long or empty, or dropping left nothing.
    """

    groups: tuple[str, ...] = ()

    def __init__(
        self,
        seed: int,
        tokenizer: Tokenizer,
        train: Sequence[Question],
        evaluation: Sequence[Question],
        *,
        encode_prompt: Callable[[str], list[int]],
        name: str = "text",
        answer_template: str = " {answer}",
        max_prompt_tokens: int = 512,
        long_prompts: Literal["error", "drop"] = "error",
        max_demo_tokens: int = 0,
        split_seed: int = 0,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self._answer_template = answer_template
        self._max_demo_tokens = max_demo_tokens
        self._items: dict[Split, list[_Item]] = {}
        self.num_dropped: dict[Split, int] = {}
        """Questions left out because their prompt is too long."""
        questions: dict[Split, Sequence[Question]] = {"train": train, "eval": evaluation}
        for split, rows in questions.items():
            self._items[split] = _admit(rows, encode_prompt, max_prompt_tokens, long_prompts)
            self.num_dropped[split] = len(rows) - len(self._items[split])
            if self.num_dropped[split]:
                logger.warning(
                    "%s: dropped %d of %d %s questions, whose prompts are longer than %d tokens.",
                    *(name, self.num_dropped[split], len(rows), split, max_prompt_tokens),
                )
        sources: dict[Split, tuple[int, int]] = {"train": (seed, 0), "eval": (split_seed, 1)}
        self._prompt_keys = {split: stream_key("text prompts", *source) for split, source in sources.items()}
        self._demo_keys = {split: stream_key("text demonstrations", *source) for split, source in sources.items()}
        self._responses: dict[Split, list[tuple[_Item, IntArray]]] = {}

    def prompt(self, index: int, split: Split) -> Prompt:
        """The `index`-th prompt; every epoch asks each question once. The ids are shared and read-only."""
        items = self._items[split]
        item = items[ShuffledStream(self._prompt_keys[split], len(items)).item(index)]
        return Prompt(index, item.question_id, item.ids, item.reference)

    def verify(self, prompt: Prompt, response_ids: Sequence[int]) -> bool:
        """True when the final answer of the response, up to its first stop id, equals the reference's.

        A response that hit its length limit is judged by what it says, as the public GSM8K harnesses do. Where the
        reference is words rather than a number, a response that says nothing else is right too.
        """
        stops = self.tokenizer.stop_ids
        text = self.tokenizer.decode(list(itertools.takewhile(lambda id_: id_ not in stops, map(int, response_ids))))
        return answers_match(extract_answer(text), prompt.reference) or answers_match(text, prompt.reference)

    def demonstration(self, index: int, split: Split) -> Demonstration:
        """The `index`-th question of the demonstration stream with its reference answer and EOS.

        Raises:
            ConfigError: no reference answer fits `max_demo_tokens`.
        """
        if split not in self._responses:
            # All answers are tokenised at the first call: which fit decides the order of the stream.
            self._responses[split] = self._admit_responses(split)
        responses = self._responses[split]
        item, response_ids = responses[ShuffledStream(self._demo_keys[split], len(responses)).item(index)]
        return Demonstration(item.ids, response_ids)

    def _admit_responses(self, split: Split) -> list[tuple[_Item, IntArray]]:
        admitted: list[tuple[_Item, IntArray]] = []
        shortest = 0
        for item in self._items[split]:
            text = self._answer_template.replace("{answer}", item.answer)
            response_ids = _read_only([*self.tokenizer.encode(text), self.tokenizer.eos_id])
            shortest = min(shortest or len(response_ids), len(response_ids))
            if self._max_demo_tokens == 0 or len(response_ids) <= self._max_demo_tokens:
                admitted.append((item, response_ids))
        if not admitted:
            raise ConfigError(
                f"task.max_demo_tokens {self._max_demo_tokens}: no {split} demonstration is that short; the shortest "
                f"has {shortest} tokens, EOS included. Raise it to {shortest} or more, or to 0 for no limit."
            )
        return admitted


def _admit(
    questions: Sequence[Question],
    encode_prompt: Callable[[str], list[int]],
    max_prompt_tokens: int,
    long_prompts: Literal["error", "drop"],
) -> list[_Item]:
    admitted: list[_Item] = []
    for question in questions:
        ids = encode_prompt(question.question)
        if 0 < len(ids) <= max_prompt_tokens:
            reference = extract_answer(question.answer) or question.answer.strip()
            admitted.append(_Item(question.question_id, _read_only(ids), reference, question.answer))
        elif long_prompts == "error" or not ids:
            raise ConfigError(
                f"{question.where}: the prompt has {len(ids)} tokens; expected 1 to {max_prompt_tokens} "
                f"(task.max_prompt_tokens). Raise the limit, or set task.long_prompts to drop."
            )
    if not admitted:
        raise ConfigError(
            f"{questions[0].where}: all {len(questions)} prompts are longer than task.max_prompt_tokens "
            f"{max_prompt_tokens}, so dropping left none. Raise the limit."
        )
    return admitted


def _read_only(ids: Sequence[int]) -> IntArray:
    array = np.array(ids, np.int32)
    array.flags.writeable = False
    return array
