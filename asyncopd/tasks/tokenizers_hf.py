"""Hugging Face tokenizers behind `ports.Tokenizer`. Imports transformers, so only the composition root imports this."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Any

from transformers import AutoTokenizer

from asyncopd.errors import ConfigError
from asyncopd.models.files import ModelFiles
from asyncopd.tasks.tokenizers import decode_mixed, render_chat, unknown_text

logger = logging.getLogger(__name__)

# Stand for control tokens that a text merely mentions while a template is applied to it; from the private use area.
_FIRST_STAND_IN = 0xF0000


class HfTokenizer:
    """Implements `TextTokenizer`.

    Text stays text: a question that mentions `<|im_end|>` gets the ids of these letters, not the control token.

    Args:
        files: where the tokenizer lies; `digest` and `vocab_size` are those of its TokenizerFacts.
        stop_ids: ids that end a response besides the tokenizer's EOS, for example a model's generation_config's.
        stop_tokens: texts of tokens that do so too.
        chat_date: what a chat template is told when it asks for today's date.
    Raises:
        ConfigError: no tokenizer is found there, it has no EOS token, or a stop token is none of its tokens.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        stop_ids: Collection[int] = (),
        stop_tokens: Collection[str] = (),
        chat_date: date | None = None,
    ) -> None:
        source = {"gguf_file": files.settings.gguf_file} if files.gguf else {}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                files.folder or files.settings.path, revision=files.settings.revision, **source
            )
        # The tokenizers package raises Exception itself, transformers whatever comes.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"{files.role}: the tokenizer of {files.where} could not be loaded: {reason} Expected a directory with "
                "tokenizer.json, or a hub name that is in the local cache when this machine is offline."
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{files.role}: the tokenizer of {files.where} has no EOS token, without which no response ends. "
                f"Set eos_token in its tokenizer_config.json."
            )
        self._where, self._template = files.where, files.chat_template
        self.eos_id: int = self._tokenizer.eos_token_id
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.vocab_size, self.digest = files.tokenizer.num_ids, files.tokenizer.digest
        vocabulary = self._tokenizer.get_vocab()
        if unknown := sorted(set(stop_tokens) - vocabulary.keys()):
            raise ConfigError(
                f"task.stop_tokens: {unknown} are no tokens of {files.where}. Expected texts of single tokens, such as "
                f"{self._tokenizer.eos_token!r}."
            )
        named = {vocabulary[token] for token in stop_tokens}
        self.stop_ids = frozenset({self.eos_id, *files.stop_ids, *stop_ids, *named})
        self._chat_date = chat_date
        self._added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        # Control tokens are those marked as such and those that the template uses, as Qwen3's <think>. Others, such as
        # Gemma's <table> and runs of blanks, are how this tokenizer writes text. Longest first, or one that contains
        # another would be cut in two.
        controls = [str(token) for token in self._added.values() if token.special or str(token) in self._template]
        self._controls = sorted(filter(str.strip, controls), key=len, reverse=True)
        # What the tokenizer itself puts in front of a text: [BOS] for Llama, nothing for Qwen and GPT-2.
        automatic = self._tokenizer("", add_special_tokens=True)["input_ids"]
        bos_id = self._tokenizer.bos_token_id
        self._prefix_ids = [bos_id] if bos_id is not None and list(automatic[:1]) == [bos_id] else []

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are only mentioned."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))

    def encode_prompt(self, question: str, template: str) -> list[int]:
        """Ids of the template with the question in it, behind the tokenizer's BOS if it puts one there."""
        question, stand_ins = self._mentioned(question)
        # Replaced rather than formatted: templates such as "\\boxed{}" keep their braces.
        return [*self._prefix_ids, *self._pieces(template.replace("{question}", question), stand_ins)]

    def encode_chat(self, question: str, template: str, options: Mapping[str, bool | int | str]) -> list[int]:
        """Ids of one user message under the tokenizer's chat template, up to where the assistant speaks.

        Raises:
            ConfigError: the tokenizer has no chat template, or it fails, or asks for a date that nobody set.
        """
        question, stand_ins = self._mentioned(question)
        message = template.replace("{question}", question)
        rendered = self._rendered([{"role": "user", "content": message}], options, add_generation_prompt=True)
        return self._pieces(rendered, stand_ins)

    def check_turns(self, options: Mapping[str, bool | int | str]) -> None:
        """Warn when the chat template ends an assistant's turn with a token that ends no response."""
        said = "said"
        turns = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": said}]
        _, found, after = self._rendered(turns, options, add_generation_prompt=False).rpartition(said)
        ids = self._tokenizer.encode(after.strip(), add_special_tokens=False) if found else []
        if ids and ids[0] in self._added and ids[0] not in self.stop_ids:
            logger.warning(
                "%s: its chat template ends a turn with %s, which is none of the tokens that end a response (%s). "
                "Add it to task.stop_tokens, or responses will go on after their end.",
                *(self._where, self.token_text(ids[0]), ", ".join(map(self.token_text, sorted(self.stop_ids)))),
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Text with specials shown; ids no token has appear as `<?id>`."""
        return decode_mixed(ids, self.vocab_size, self._decode_known, unknown_text)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def _mentioned(self, text: str) -> tuple[str, dict[str, str]]:
        """The text with a stand-in for every control token that it mentions, and what each stands for."""
        stand_ins = {}
        free = (chr(code) for code in itertools.count(_FIRST_STAND_IN) if chr(code) not in text)
        for control in self._controls:
            if control in text:
                stand_ins[stand_in := next(free)] = control
                text = text.replace(control, stand_in)
        return text, stand_ins

    def _spelled(self, control: str) -> list[int]:
        """Ids of a control token's letters."""
        ids = self.encode(control)
        # Tokens that are not marked as control tokens are found in every text that has them whole.
        return self.encode(control[:1]) + self.encode(control[1:]) if self._added.keys() & set(ids) else ids

    def _pieces(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a text with control tokens in it, and with stand-ins for those that are only mentioned."""
        pieces = re.split(f"([{''.join(stand_ins)}])", text) if stand_ins else [text]
        return [
            token_id
            for piece in pieces
            for token_id in (
                self._spelled(stand_ins[piece])
                if piece in stand_ins
                else self._tokenizer.encode(piece, add_special_tokens=False, verbose=False)
            )
        ]

    def _decode_known(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _rendered(self, turns: Sequence[Mapping[str, str]], options: Mapping[str, Any], **asked: bool) -> str:
        variables = {**self._tokenizer.special_tokens_map, **asked, **options}
        return render_chat(self._template, turns, where=self._where, chat_date=self._chat_date, **variables)
