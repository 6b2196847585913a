"""Token ids as text, from a description small enough to be sent to another process. No torch, no transformers.

Which description belongs to a run follows from the task settings in its stored configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer as TokenizersTokenizer

from asyncopd.errors import StorageError
from asyncopd.tasks.tokenizers import ByteTokenizer, VocabTokenizer, unknown_text

_CLASSES = (
    ("special", re.compile(r"<.+>|\[[A-Z]+\]")),
    ("blank", re.compile(r"\s*")),
    ("number", re.compile(r"\s*[0-9][0-9.,]*")),
    ("word", re.compile(r"\s*[^\W\d_]+")),
    ("symbol", re.compile(r"\s*[^\w\s]+|\s*_+")),
)


@dataclass(frozen=True)
class TokenTexts:
    """How the token ids of one run read."""

    kind: Literal["words", "bytes", "file", "unknown"]
    words: tuple[str, ...] = ()
    """`words`: the word of every id."""
    classes: tuple[str, ...] = ()
    """`words`: the class of every id."""
    path: str = ""
    """`file`: a tokenizer.json."""
    reason: str = ""
    """`unknown`: why nothing can be decoded, and what to do."""


class Decoder:
    """Decodes the ids of one run. Raises StorageError where the run's tokenizer cannot be had."""

    def __init__(self, texts: TokenTexts) -> None:
        if texts.kind == "unknown":
            raise StorageError(texts.reason)
        self._texts = texts
        self._words = VocabTokenizer(texts.words) if texts.kind == "words" else ByteTokenizer()
        self._file = TokenizersTokenizer.from_file(texts.path) if texts.kind == "file" else None

    def text(self, ids: Sequence[int]) -> str:
        """The text of a sequence, specials shown."""
        if self._file is None:
            return self._words.decode(ids)
        size = self._file.get_vocab_size(with_added_tokens=True)
        if all(0 <= token_id < size for token_id in ids):
            return str(self._file.decode(list(ids), skip_special_tokens=False))
        return "".join(self.text([i]) if 0 <= i < size else unknown_text(i) for i in ids)

    def vocabulary(self) -> list[tuple[str, str]]:
        """(text, class) of every id, in order."""
        if self._texts.kind == "words":
            return list(zip(self._texts.words, self._texts.classes, strict=True))
        if self._file is None:
            texts = [self._words.token_text(token_id) for token_id in range(self._words.vocab_size)]
            return [(text, token_class(text)) for text in texts]
        size = self._file.get_vocab_size(with_added_tokens=True)
        texts = self._file.decode_batch([[token_id] for token_id in range(size)], skip_special_tokens=False)
        special = {token_id for token_id, added in self._file.get_added_tokens_decoder().items() if added.special}
        return [(text, "special" if i in special else token_class(text)) for i, text in enumerate(texts)]


def token_class(text: str) -> str:
    """`special`, `blank`, `number`, `word`, `symbol`, or `mixed` for anything else."""
    return next((name for name, pattern in _CLASSES if pattern.fullmatch(text)), "mixed")
