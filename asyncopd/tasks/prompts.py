"""Questions with reference answers from JSONL, Parquet or a Hugging Face dataset, and the order they are asked in.

    read_questions --> split_questions --> {train, eval} --> ShuffledStream: index -> question

Everything is read once and kept in memory: the largest sets of questions in use are a few hundred megabytes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from asyncopd.errors import ConfigError
from asyncopd.models.random import derive, permutation, stream_key


@dataclass(frozen=True)
class Question:
    """One row of a data set."""

    question: str
    answer: str
    """Reference answer, final answer included."""
    where: str
    """`path:line`, for messages."""

    @property
    def question_id(self) -> str:
        """Hash of the question text: equal questions have equal ids."""
        return hashlib.sha256(self.question.encode("utf-8", errors="replace")).hexdigest()[:16]


def read_questions(source: str, *, question_field: str = "question", answer_field: str = "answer") -> list[Question]:
    """All questions of a source, in its order.

    Args:
        source: `*.jsonl`, `*.parquet`, or `hf:<dataset>[:config[:split]]`, split `train` unless named; a data set
            without configurations takes `hf:<dataset>::<split>`.
        question_field, answer_field: keys of the two texts.
    Raises:
        ConfigError: the source is missing, empty or unreadable, or a row lacks a field or holds something other than
            text there. The message names file and line.
    """
    if source.startswith("hf:"):
        rows = _hugging_face_rows(source)
    else:
        path = Path(source).expanduser()
        readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}
        if path.suffix not in readers:
            raise ConfigError(f"{source}: expected a path ending in .jsonl or .parquet, or hf:<dataset>.")
        if not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*") if p.suffix in readers) if path.parent.is_dir() else []
            raise ConfigError(
                f"{path}: no such file. In {path.parent.absolute()} there is {near or 'no data file'}. Set "
                "task.train_path and task.eval_path to where the questions are."
            )
        rows = readers[path.suffix](path)
    questions = [
        Question(_text(row, question_field, where), _text(row, answer_field, where), where) for where, row in rows
    ]
    if not questions:
        raise ConfigError(f"{source}: the data set is empty; expected one question per line or row.")
    return questions


def split_questions(
    train: Sequence[Question], evaluation: Sequence[Question] | None, *, eval_fraction: float, split_seed: int
) -> tuple[list[Question], list[Question]]:
    """Training and evaluation questions that share no question text.

    With `evaluation`, training questions that occur there are left out; without, `eval_fraction` of the distinct
    training questions is held out, chosen by `split_seed`.

    Raises:
        ConfigError: one side would be empty.
    """
    if evaluation is None:
        ids = sorted({question.question_id for question in train})
        num_eval = min(max(1, round(eval_fraction * len(ids))), len(ids) - 1)
        order = permutation(stream_key("text split", split_seed), len(ids))
        held_out = {ids[place] for place in order[:num_eval]}
        evaluation = [question for question in train if question.question_id in held_out]
    held_out = {question.question_id for question in evaluation}
    remaining = [question for question in train if question.question_id not in held_out]
    if not remaining or not evaluation:
        raise ConfigError(
            f"{train[0].where.rpartition(':')[0]}: of {len(train)} questions {len(remaining)} are left for training "
            f"and {len(evaluation)} for evaluation; expected at least one each. Add questions, or let "
            f"task.eval_path hold other questions than task.train_path."
        )
    return remaining, list(evaluation)


class ShuffledStream:
    """An endless order over `count` items: every epoch holds each once, in an order of its own. Resumable by index."""

    def __init__(self, key: int, count: int) -> None:
        self._key = key
        self._count = count

    def item(self, index: int) -> int:
        """Which item comes `index`-th."""
        epoch, place = divmod(index, self._count)
        return int(_epoch_order(self._key, self._count, epoch)[place])


# Indices are visited nearly in order, so a few epochs of a few streams are all that is ever looked at.
@lru_cache(maxsize=16)
def _epoch_order(key: int, count: int, epoch: int) -> NDArray[np.int64]:
    return permutation(derive(key, epoch), count)


def _text(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with fields, found {type(row).__name__}.")
    if field not in row:
        raise ConfigError(
            f"{where}: no field {field!r}; found {sorted(map(str, row))}. "
            f"Set task.question_field and task.answer_field to the names your data uses."
        )
    value = row[field]
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: field {field!r} is {type(value).__name__} {str(value)[:40]!r}; expected text. "
            f"Store numbers as strings."
        )
    if not value.strip():
        raise ConfigError(f"{where}: field {field!r} is blank; expected text. Fill or remove the row.")
    return value


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                # Also UnicodeDecodeError.
                raise ConfigError(
                    f"{path}:{number}: not a JSON object in UTF-8: {error}. Expected one object per line."
                ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable Parquet file: {error}") from None
    return ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def _hugging_face_rows(source: str) -> Iterator[tuple[str, Any]]:
    dataset, _, rest = source.removeprefix("hf:").partition(":")
    config, _, split = rest.partition(":")
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"{source}: reading Hugging Face data sets needs the `datasets` package. Run `pip install datasets`, or "
            f"export the set to JSONL and give its path."
        )
    # Optional and slow to import, so imported only where a run asks for it.
    library = importlib.import_module("datasets")
    try:
        rows = library.load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:
        # The library raises its own, the hub's and the HTTP client's errors; all mean the same here.
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConfigError(
            f"{source}: could not be loaded: {type(error).__name__}: {reason} Expected "
            f"hf:<dataset>[:config[:split]] that is in the local cache or that this machine can download; offline, "
            f"export it to JSONL elsewhere and give its path."
        ) from error
    return ((f"{source}:{number}", dict(row)) for number, row in enumerate(rows, start=1))
