"""Tokenizers that need no download: a closed list of words (the walk task) and UTF-8 bytes (text with tiny models)."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, Protocol

from jinja2.sandbox import ImmutableSandboxedEnvironment

from asyncopd.errors import ConfigError
from asyncopd.ports import Tokenizer


class TextTokenizer(Tokenizer, Protocol):
    """A Tokenizer for running text, which also knows how a text and how a conversation begin."""

    def encode_prompt(self, question: str, template: str) -> list[int]:
        """Ids of `template` with the question for its `{question}`, from the very beginning: with a BOS token where
        the model was trained with one."""
        ...

    def encode_chat(self, question: str, template: str, options: Mapping[str, bool | int | str]) -> list[int]:
        """Ids of a conversation in which the user said that and the assistant is about to speak.

        Raises ConfigError where there is no chat template.
        """
        ...


class VocabTokenizer:
    """A closed list of words; text is words separated by blanks.

    Args:
        words: the word of every id, in order; distinct and without blanks.
        pad: the word that fills batches.
        eos: the word that ends a response.
    Raises:
        ConfigError: a word is repeated, empty or contains a blank, or `pad` or `eos` is not a word.
    """

    def __init__(self, words: Sequence[str], *, pad: str = "<pad>", eos: str = "<eos>") -> None:
        self._words = tuple(words)
        self._ids = {word: token_id for token_id, word in enumerate(self._words)}
        broken = [word for word in self._words if word.split() != [word]]
        if broken or len(self._ids) != len(self._words) or not {pad, eos} <= self._ids.keys():
            raise ConfigError(
                f"vocabulary of {len(self._words)} words, {len(self._ids)} of them distinct, blanks in {broken[:5]}: "
                f"expected distinct words without blanks, {pad!r} and {eos!r} among them. Rename the offending words."
            )
        self.vocab_size = len(self._words)
        self.pad_id = self._ids[pad]
        self.eos_id = self._ids[eos]
        self.stop_ids = frozenset({self.eos_id})
        self.digest = _digest("words", self._words, pad, eos)

    def encode(self, text: str) -> list[int]:
        """The ids of blank-separated words. Raises ConfigError on a word outside the vocabulary."""
        words = text.split()
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ConfigError(
                f"{unknown[0]!r} is not one of the {self.vocab_size} words of this vocabulary "
                f"({' '.join(self._words[:12])} ...). Write the text in these words, separated by blanks."
            )
        return [self._ids[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.token_text(token_id) for token_id in ids)

    def token_text(self, token_id: int) -> str:
        if 0 <= token_id < self.vocab_size:
            return self._words[token_id]
        return unknown_text(token_id)


class ByteTokenizer:
    """UTF-8 bytes: ids 0–255 are the bytes, then `<pad>` 256, `<bos>` 257, `<eos>` 258.

    Text never turns into a special token, whatever it says; bytes that are no valid UTF-8 decode to U+FFFD.
    """

    vocab_size = 259
    pad_id = 256
    bos_id = 257
    eos_id = 258
    stop_ids = frozenset({258})
    digest = hashlib.sha256(b'["bytes", 256, "<pad>", "<bos>", "<eos>"]').hexdigest()

    _SPECIALS = ("<pad>", "<bos>", "<eos>")

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`, without specials; lone surrogates become `?`."""
        return list(text.encode("utf-8", errors="replace"))

    def encode_prompt(self, question: str, template: str) -> list[int]:
        """`<bos>` and the bytes of the text."""
        return [self.bos_id, *self.encode(template.replace("{question}", question))]

    def encode_chat(self, question: str, template: str, options: Mapping[str, bool | int | str]) -> list[int]:
        """Raises ConfigError: bytes have no chat template."""
        raise ConfigError(
            "task.prompt_format chat: the byte tokenizer has no chat template. Use prompt_format plain, or set "
            "task.tokenizer to a Hugging Face tokenizer that has one."
        )

    def decode(self, ids: Sequence[int]) -> str:
        try:
            # A list: bytes(array) would be the memory of the array.
            return bytes(list(ids)).decode("utf-8", errors="replace")
        except ValueError:
            # Some id is no byte, as in any response that ends in EOS.
            return decode_mixed(ids, 256, lambda run: bytes(run).decode("utf-8", errors="replace"), self.token_text)

    def token_text(self, token_id: int) -> str:
        """The character of an ASCII byte, `<0xE2>` for the other bytes, the name of a special."""
        if 0 <= token_id < 128:
            return chr(token_id)
        if 128 <= token_id < 256:
            return f"<0x{token_id:02X}>"
        if 256 <= token_id < self.vocab_size:
            return self._SPECIALS[token_id - 256]
        return unknown_text(token_id)


def render_chat(
    template: str, turns: Sequence[Mapping[str, str]], *, where: str, chat_date: date | None, **variables: Any
) -> str:
    """A conversation as a chat template writes it, in the dialect that transformers gives templates.

    Args:
        template: a jinja program.
        turns: messages with `role` and `content`.
        where: whose template it is, for messages.
        chat_date: what it is told when it asks for today's date.
        variables: further names that it may use: `add_generation_prompt`, special tokens, task.chat_options.
    Raises:
        ConfigError: the tokenizer has no template, or it fails, or asks for a date that nobody set.
    """
    if not template:
        raise ConfigError(
            f"task.prompt_format chat: the tokenizer of {where} has no chat template. Use prompt_format plain, or an "
            "instruction-tuned model's tokenizer."
        )

    def strftime_now(form: str) -> str:
        if chat_date is None:
            raise ConfigError(
                f"the chat template of {where} asks for today's date, so prompts would change with the clock. Set "
                "task.chat_date, for example 2026-01-01."
            )
        return chat_date.strftime(form)

    def raise_exception(said: str) -> None:
        raise ValueError(said)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Jinja's own escapes characters of HTML.
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    # Marks what an assistant said, which matters to nobody here.
    template = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{%\1 if true \2%}{% endif %}", template)
    try:
        return environment.from_string(template).render(
            messages=turns, **{"strftime_now": strftime_now, "raise_exception": raise_exception, **variables}
        )
    except ConfigError:
        raise
    # Templates are programs: jinja's errors and those of what a template calls.
    except Exception as error:
        raise ConfigError(
            f"the chat template of {where} failed on a user's message: {type(error).__name__}: {error}. Check "
            "task.chat_options, or use prompt_format plain."
        ) from error


def unknown_text(token_id: int) -> str:
    """How viewers show an id that no token has."""
    return f"<?{token_id}>"


def decode_mixed(
    ids: Sequence[int], num_known: int, decode_known: Callable[[list[int]], str], other_text: Callable[[int], str]
) -> str:
    """Text of ids of which only 0 ... `num_known` − 1 can be decoded together; the others have texts of their own."""
    pieces: list[str] = []
    for is_known, group in itertools.groupby(map(int, ids), lambda token_id: 0 <= token_id < num_known):
        run = list(group)
        pieces += [decode_known(run)] if is_known else map(other_text, run)
    return "".join(pieces)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()
