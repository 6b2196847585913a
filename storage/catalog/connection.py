"""A DuckDB connection with the relations of a snapshot, and token ids as text. No torch, no transformers.

Whoever opens one in-process has all of DuckDB; SQL of other people goes through sandbox.py, whose child process opens
it with `locked=True`.

A Place says where the Parquet objects of shards are, in terms that a process without our stores can be given; for S3
that takes the credentials this process would use itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import and_
from typing import Any, Literal

import duckdb
import fsspec
import pyarrow.dataset as ds
import pyarrow.fs as pafs
from tokenizers import Tokenizer as TokenizersTokenizer

from asyncopd.errors import StorageError
from asyncopd.tasks.tokenizers import ByteTokenizer, VocabTokenizer, unknown_text
from storage.catalog.relations import BY_NAME, DERIVED, RECORDS, RELATIONS, ROWS, TEXT_FUNCTION, Relation


@dataclass(frozen=True)
class DataFile:
    """The rows of one complete shard."""

    key: str
    constants: Mapping[str, str]
    """Column -> its value in every row: run, shard, and what the folder says of scores, and their rows do not."""


@dataclass(frozen=True)
class Place:
    """A file system and the path of the storage root in it."""

    kind: Literal["file", "s3", "memory"]
    root: str
    s3: Mapping[str, str] = field(repr=False)
    """Arguments of pyarrow's S3FileSystem, credentials included: they go through a pipe, never through an environment.
    Empty for the other kinds."""

    def filesystem(self) -> Any:
        """The pyarrow file system; `memory` is the present process's own."""
        if self.kind == "s3":
            return pafs.S3FileSystem(**self.s3)
        if self.kind == "memory":
            return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
        return pafs.LocalFileSystem()


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


@dataclass(frozen=True)
class Snapshot:
    """What a query sees, as values that another process can be sent."""

    tables: Mapping[str, Any]
    """Record relation -> Arrow table; relations that nobody asked for are left out."""
    files: Mapping[str, tuple[DataFile, ...]]
    """`trajectory_rows` and `score_rows` -> Parquet objects of complete shards."""
    place: Place
    """Where those files are."""
    token_texts: Mapping[str, TokenTexts]
    """Run -> how its token ids read."""


def connect(
    snapshot: Snapshot, *, sql: str, memory_bytes: int, threads: int = 2, locked: bool = False
) -> duckdb.DuckDBPyConnection:
    """Open a fresh in-memory DuckDB with every relation; those that were not read are there and empty.

    Args:
        sql: the query to come; vocabulary and comments, which take longer than most queries, are made only where it
            mentions them (`vocabulary`; `documentation` or one of `duckdb_columns()` and the like).
        memory_bytes: DuckDB's limit; what pyarrow decodes on the way comes on top.
        locked: no files, no network, no extensions, no settings, for good.
    """
    connection = duckdb.connect(
        ":memory:",
        config={
            "threads": threads,
            "memory_limit": f"{memory_bytes // 2**20}MiB",
            "temp_directory": "",  # nothing is spilled; the size limit alone still makes the folder
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "python_enable_replacements": False,
        },
    )
    connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    decoder_of = cache(lambda run: Decoder(snapshot.token_texts[run]))
    sources = dict(snapshot.tables)
    if "vocabulary" in sql.lower():
        sources["vocabulary"] = _vocabulary(snapshot.token_texts, decoder_of)
    for relation in ROWS:
        sources[relation.name] = _dataset(relation, snapshot.files.get(relation.name, ()), snapshot.place)
    for relation in (*RECORDS, *ROWS):
        source = sources.get(relation.name)
        connection.register(f"{relation.name}_", relation.schema.empty_table() if source is None else source)
        connection.execute(f"CREATE VIEW {relation.name} AS SELECT * FROM {relation.name}_")
    for relation in DERIVED:
        connection.execute(f"CREATE VIEW {relation.name} AS {relation.view}")
    if any(word in sql.lower() for word in ("documentation", "duckdb_")):
        _comment(connection)
    connection.create_function(
        TEXT_FUNCTION, lambda run, ids: decoder_of(run).text(ids), ["VARCHAR", "INTEGER[]"], "VARCHAR"
    )
    if locked:
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    return connection


def _comment(connection: duckdb.DuckDBPyConnection) -> None:
    statements = []
    for relation in RELATIONS:
        statements.append(f"COMMENT ON VIEW {relation.name} IS {_quoted(relation.doc)}")
        for column in relation.fields:
            statements.append(f'COMMENT ON COLUMN {relation.name}."{column.name}" IS {_quoted(column.doc)}')
    connection.execute(";".join(statements))


def _dataset(relation: Relation, files: Sequence[DataFile], place: Place) -> Any:
    """The files as one dataset, whose `run`, `shard` and labels come from where a file lies, not from its content."""
    if not files:
        return relation.schema.empty_table()
    verified = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    layout, filesystem = ds.ParquetFileFormat(default_fragment_scan_options=verified), place.filesystem()
    fragments = [
        layout.make_fragment(
            f"{place.root}/{file.key}",
            filesystem,
            partition_expression=reduce(and_, (ds.field(name) == value for name, value in file.constants.items())),
        )
        for file in files
    ]
    return ds.FileSystemDataset(fragments, relation.schema, layout, filesystem)


def _vocabulary(token_texts: Mapping[str, TokenTexts], decoder_of: Callable[[str], Decoder]) -> Any:
    """Tokens of every run whose tokenizer can be had; the others have none."""
    return BY_NAME["vocabulary"].table(
        [
            {"run": run, "token_id": token_id, "text": text, "class": kind}
            for run, texts in token_texts.items()
            if texts.kind != "unknown"
            for token_id, (text, kind) in enumerate(decoder_of(run).vocabulary())
        ]
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# -- token ids as text -------------------------------------------------------------------------------------------------
_CLASSES = (
    ("special", re.compile(r"<.+>|\[[A-Z]+\]")),
    ("blank", re.compile(r"\s*")),
    ("number", re.compile(r"\s*[0-9][0-9.,]*")),
    ("word", re.compile(r"\s*[^\W\d_]+")),
    ("symbol", re.compile(r"\s*[^\w\s]+|\s*_+")),
)


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
