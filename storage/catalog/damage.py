"""Damage that a query comes upon: pages carry checksums (storage/schema.py), and readers say so in their own words.

An object's sha256 covers more, its footer too, but needs the whole object: `asyncopd maintain audit` checks that.
"""

from __future__ import annotations

from asyncopd.errors import ShardCorruptError

_SIGNS = (
    "CRC checksum verification failed",
    "could not verify page integrity",
    "Data corruption detected",
    "decompression failed",
    "Corrupted",
    "deserialize thrift",
    "Unexpected end of stream",
    "Parquet magic bytes not found",
    "Invalid Parquet",
    # A file that Arrow read into columns that do not fit together.
    "failed: Invalid: Column",
)


def is_damage(message: str) -> bool:
    """Is this what DuckDB or Arrow says of a damaged Parquet file?"""
    return any(sign.lower() in message.lower() for sign in _SIGNS)


def damaged(message: str) -> ShardCorruptError:
    """The error for the caller to raise."""
    return ShardCorruptError(
        f"a shard that the query reads is damaged: {message} `asyncopd maintain audit RUN_ID` names it and the command "
        "that sets it aside; filter by index or run to ask the others."
    )
