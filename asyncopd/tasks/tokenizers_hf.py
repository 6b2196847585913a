"""Hugging Face tokenizers behind `ports.Tokenizer`. Imports transformers, so only the composition root imports this."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

from asyncopd.errors import ConfigError
from asyncopd.tasks.tokenizers import decode_mixed, unknown_text


class HfTokenizer:
    """Implements `TextTokenizer`.

    `digest` covers what text turns into which ids: vocabulary, merges, normalisation, added tokens. It leaves out the
    chat template and which token counts as EOS, in which a base model and its tuned sibling differ.

    Args:
        path: directory with tokenizer files, or a name the local Hugging Face cache or the hub resolves.
        revision: branch, tag or commit when `path` is a hub name.
    Raises:
        ConfigError: no tokenizer is found there, or it has no EOS token.
    """

    def __init__(self, path: str, revision: str = "main") -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"tokenizer {path!r} (revision {revision}) could not be loaded: {reason} Expected a directory with "
                f"tokenizer.json, or a hub name that is in the local cache when this machine is offline."
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(
                f"tokenizer {path!r} has no EOS token, without which no response ends. "
                f"Set eos_token in its tokenizer_config.json."
            )
        self.eos_id: int = self._tokenizer.eos_token_id
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.vocab_size = len(self._tokenizer)
        """Ids the tokenizer can produce; a model's embedding may be padded beyond it."""
        self.digest = _digest(self._tokenizer)
        # What the tokenizer itself puts in front of a text: [BOS] for Llama, nothing for Qwen and GPT-2.
        automatic = self._tokenizer("", add_special_tokens=True)["input_ids"]
        bos_id = self._tokenizer.bos_token_id
        self._prefix_ids = [bos_id] if bos_id is not None and list(automatic[:1]) == [bos_id] else []

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode_prompt(self, text: str) -> list[int]:
        return [*self._prefix_ids, *self.encode(text)]

    def encode_chat(self, message: str, options: Mapping[str, bool | int | str]) -> list[int]:
        """Ids of one user message under the tokenizer's chat template, up to where the assistant speaks.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"task.prompt_format chat: tokenizer {self._tokenizer.name_or_path!r} has no chat template. "
                f"Use prompt_format plain, or an instruction-tuned model's tokenizer."
            )
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True, **options
        )
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text with specials shown; ids no token has appear as `<?id>`."""
        return decode_mixed(ids, self.vocab_size, self._decode_known, unknown_text)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def _decode_known(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        settings: Any = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)]
    else:
        settings = json.loads(backend.to_str())
        # Set by whoever padded a batch last; no part of the mapping.
        settings.pop("padding", None)
        settings.pop("truncation", None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
