"""Questions with reference answers from JSONL, Parquet or a Hugging Face dataset, and the order they are asked in.

    read_questions --> split_questions --> {train, eval} --> ShuffledStream: index -> question

GSM8K (Cobbe et al. 2021, MIT, openai/grade-school-math) is in the package, unchanged, as `gsm8k/*.parquet`. Everything
is read once and kept in memory: the largest sets of questions in use are a few hundred megabytes.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import json
import zlib
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
from asyncopd.types import Split


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
        return hashlib.sha256(self.question.encode()).hexdigest()[:16]


def read_questions(
    source: str, split: Split = "train", *, question_field: str = "question", answer_field: str = "answer"
) -> list[Question]:
    """All questions of a source, in its order.

    Args:
        source: `gsm8k`, which comes with the package; `*.jsonl` (also `.gz`) in UTF-8; `*.parquet`; or
            `hf:<dataset>[:config[:split]]`, split `train` unless named; a data set without configurations takes
            `hf:<dataset>::<split>`.
        split: which file of `gsm8k`: `train` has 7,473 questions, `eval`, its test set, 1,319.
        question_field, answer_field: keys of the two texts. Other columns are not read.
    Raises:
        ConfigError: the source is missing, empty or unreadable, or a row lacks a field or holds something other than
            text there. The message names file and line, or row.
    """
    fields = (question_field, answer_field)
    try:
        rows = _hugging_face_rows(source, fields) if source.startswith("hf:") else _file_rows(source, split, fields)
        questions = [
            Question(_text(row, question_field, where), _text(row, answer_field, where), where) for where, row in rows
        ]
    except (OSError, EOFError, zlib.error, RuntimeError) as error:
        # No permission, a name that is too long, a broken disk, a cut or broken .gz, the home of no user.
        raise ConfigError(f"{source}: cannot be read: {error}. Expected a whole, readable file.") from None
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


def _file_rows(source: str, split: Split, fields: tuple[str, str]) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    if source == "gsm8k":
        path = Path(__file__).parent / "gsm8k" / ("train.parquet" if split == "train" else "test.parquet")
    endings = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        near = sorted(p.name for p in folder.glob("*") if p.name.endswith(endings)) or "no data file"
        found = "a directory; expected one file" if path.is_dir() else "no such file"
        raise ConfigError(
            f"{path}: {found}. In {folder.absolute()} there is {near}. Set task.train_path and task.eval_path to where "
            "the questions are, or to gsm8k."
        )
    if not path.name.endswith(endings):
        raise ConfigError(f"{source}: expected gsm8k, hf:<dataset>, or a path ending in .jsonl, .jsonl.gz or .parquet.")
    return _parquet_rows(path, fields) if path.suffix == ".parquet" else _jsonl_rows(path)


def _text(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with fields, found {type(row).__name__}.")
    _check_field(field, list(row), where)
    value = row[field]
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: field {field!r} is {type(value).__name__} {str(value)[:40]!r}; expected text. "
            f"Store numbers as strings."
        )
    if not value.strip():
        raise ConfigError(f"{where}: field {field!r} is blank; expected text. Fill or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: field {field!r} has half a character, \\u{ord(value[error.start]):04x}, at character "
            f"{error.start + 1}; expected text that UTF-8 can hold. Write the whole character, or remove the row."
        ) from None
    return value


def _check_field(field: str, names: Sequence[str], where: str) -> None:
    if (count := names.count(field)) != 1:
        raise ConfigError(
            f"{where}: {f'{count} columns are called' if count else 'no field'} {field!r}; found "
            f"{sorted(map(str, names))}. Set task.question_field and task.answer_field to the names your data uses."
        )


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                # UnicodeDecodeError is a ValueError; thousands of brackets in each other end in a RecursionError.
                raise ConfigError(
                    f"{path}:{number}: not a JSON object in UTF-8: {error}. Expected one object per line."
                ) from None


def _parquet_rows(path: Path, fields: tuple[str, str]) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        # Only the two columns: what others hold (images, times in ns) need not even be readable.
        file = pq.ParquetFile(path)
        for field in fields:
            _check_field(field, file.schema_arrow.names, str(path))
        table = file.read(columns=list(dict.fromkeys(fields)))
        for number, values in enumerate(zip(*(table[field] for field in fields), strict=True), start=1):
            yield f"{path}:{number}", {field: value.as_py() for field, value in zip(fields, values, strict=True)}
    except (pa.ArrowException, OSError, ValueError) as error:
        # A ValueError is bytes that are no UTF-8, or a value that Python cannot hold.
        reason = f"{path}:{number}: columns {fields}: {error}. Expected text in UTF-8; write the row again"
        raise ConfigError(reason if number else f"{path}: not a readable Parquet file: {error}") from None


def _hugging_face_rows(source: str, fields: tuple[str, str]) -> Iterator[tuple[str, Any]]:
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
    for field in fields:
        _check_field(field, rows.column_names, source)
    rows = rows.select_columns(list(dict.fromkeys(fields)))
    return ((f"{source}:{number}", dict(row)) for number, row in enumerate(rows, start=1))
