"""Where the Parquet objects of shards are, in terms that a process without our stores and credentials can be given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import fsspec
import pyarrow.fs as pafs


@dataclass(frozen=True)
class DataFile:
    """The rows of one complete shard."""

    key: str
    run: str
    shard: str
    row_group: int | None = None
    """The shard's rows where one object holds several shards; None for the whole object."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Column -> its value in every row: what the folder says of scores, and their rows do not."""


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

    def path(self, key: str) -> str:
        return f"{self.root}/{key}"
