"""How a run's token ids read, from its stored task settings: what decoders, in the child that answers, are made from.

Apart from them so that the child loads neither configuration nor hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from pydantic import TypeAdapter, ValidationError

from asyncopd.config.tasks import TaskConfig, WalkConfig
from asyncopd.tasks.walk_rules import FIRST_NOISE_ID, WalkRules
from storage.catalog.decoders import TokenTexts

_TASK: TypeAdapter[Any] = TypeAdapter(TaskConfig)


def token_texts_of(record: Mapping[str, Any]) -> TokenTexts:
    """How the ids of the run with this record read; kind `unknown`, with a reason, where that cannot be told here."""
    settings = (record.get("config") or {}).get("task")
    try:
        config = _TASK.validate_python(settings)
    except ValidationError as error:
        return _unknown(f"its stored task settings are not readable ({error.error_count()} problems)")
    if isinstance(config, WalkConfig):
        return _walk_texts(config)
    if config.tokenizer == "bytes":
        return TokenTexts("bytes")
    path = Path(config.tokenizer) / "tokenizer.json"
    if not path.is_file():
        cached = (
            try_to_load_from_cache(config.tokenizer, "tokenizer.json") if not Path(config.tokenizer).is_dir() else None
        )
        if not isinstance(cached, str):
            return _unknown(
                f"tokenizer {config.tokenizer!r} is neither a directory with tokenizer.json nor in the cache"
            )
        path = Path(cached)
    return TokenTexts("file", path=str(path.absolute()))


def _walk_texts(config: WalkConfig) -> TokenTexts:
    rules = WalkRules(config.p, config.noise_levels)

    def class_of(token_id: int) -> str:
        if token_id < FIRST_NOISE_ID:
            return "special"
        if token_id < rules.first_operation_id:
            return "noise"
        return "operation" if token_id < rules.first_state_id else "state"

    ids = range(rules.vocab_size)
    return TokenTexts(
        "words", tuple(rules.tokenizer.token_text(i) for i in ids), tuple(class_of(token_id) for token_id in ids)
    )


def _unknown(why: str) -> TokenTexts:
    return TokenTexts(
        "unknown",
        reason=f"token ids of this run cannot be shown as text: {why}. Ask for ids, or make the tokenizer available.",
    )
