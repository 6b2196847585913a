"""What changed between two safetensors bodies of one architecture, bit for bit: where, and by how much. No torch.

    changed words of a tensor --gaps between them, differences of their bit patterns--> bytes by significance --> zstd

A word is one element's bits as an unsigned integer, so NaN payloads and −0.0 are bits like any others. A difference is
taken modulo 2^bits and stored as ±n: one AdamW step moves most bfloat16 weights by one unit in the last place, so the
differences compress to a fraction of the new values (docs/performance.md). The object itself is a safetensors file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
from numpy.typing import NDArray

from asyncopd.errors import ShardCorruptError

FORMAT = "asyncopd-delta-1"
BLOCK = 2**22
"""Elements encoded at a time: the index arrays of a block stay in the cache, and memory does not grow with a tensor."""

Words = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Delta:
    """An encoded delta and what it was made of."""

    body: bytes
    num_changed: int
    """Elements whose bits differ."""


def encode_delta(base: bytes, new: bytes) -> Delta | None:
    """The delta that turns `base` into `new`; None when their tensors differ in name, dtype, shape or order."""
    start = _data_start(base)
    if len(base) != len(new) or base[:start] != new[:start]:
        return None
    blocks: list[list[Any]] = []
    arrays: dict[str, NDArray[np.uint8]] = {}
    old_words, new_words = dict(_tensors(base)), dict(_tensors(new))
    for name, old in old_words.items():
        for first in range(0, len(old), BLOCK):
            found = _encode_block(old[first : first + BLOCK], new_words[name][first : first + BLOCK])
            if found is not None:
                gaps, differences = found
                arrays[f"{len(blocks)}.gaps"] = _compressed(gaps)
                arrays[f"{len(blocks)}.differences"] = _compressed(differences)
                blocks.append([name, first, len(gaps), gaps.itemsize])
    metadata = {"format": FORMAT, "blocks": json.dumps(blocks)}
    return Delta(safetensors.numpy.save(arrays, metadata), sum(block[2] for block in blocks))


def apply_delta(body: bytearray, delta: bytes) -> None:
    """Turn `body`, the base, into the weights that the delta was made for, in place. The caller checks their sha256.

    Raises ShardCorruptError when the delta names a tensor that `body` lacks, or is of another format.
    """
    metadata = _header(delta)["__metadata__"]
    if metadata["format"] != FORMAT:
        raise ShardCorruptError(f"a delta has format {metadata['format']!r}, expected {FORMAT!r}; update AsyncOPD.")
    words = dict(_tensors(body))
    arrays = safetensors.numpy.load(delta)
    codec = pa.Codec("zstd")
    for number, (name, first, num_changed, gap_bytes) in enumerate(json.loads(metadata["blocks"])):
        if name not in words:
            raise ShardCorruptError(f"a delta changes tensor {name}, which its base lacks: it is of another model.")
        block = words[name][first : first + BLOCK]
        gaps = _decompressed(codec, arrays[f"{number}.gaps"], num_changed, np.dtype(f"<u{gap_bytes}"))
        differences = _decompressed(codec, arrays[f"{number}.differences"], num_changed, block.dtype)
        positions = np.cumsum(gaps, dtype=np.int64) + np.arange(num_changed)
        block[positions] += (differences >> 1) ^ np.negative(differences & 1)


def _encode_block(old: Words, new: Words) -> tuple[Words, Words] | None:
    """(gaps between changed words, their differences); None when nothing changed."""
    changed = np.flatnonzero(old != new)
    if len(changed) == 0:
        return None
    gaps = np.diff(changed, prepend=-1) - 1
    gaps = gaps.astype(np.min_scalar_type(int(gaps.max())))
    signed = (new[changed] - old[changed]).view(f"<i{old.itemsize}")
    # Sign in the lowest bit: −1 becomes 1 and +1 becomes 2, so that small steps have zeros in all higher bytes.
    differences = ((signed << 1) ^ (signed >> (8 * old.itemsize - 1))).view(old.dtype)
    return gaps, differences


def _compressed(values: NDArray[Any]) -> NDArray[np.uint8]:
    """All lowest bytes, then all second bytes, and so on (of little-endian values), through zstd level 1."""
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T)
    return np.frombuffer(pa.Codec("zstd", compression_level=1).compress(planes, asbytes=True), np.uint8)


def _decompressed(codec: pa.Codec, stored: NDArray[np.uint8], count: int, dtype: np.dtype[Any]) -> Words:
    planes = np.frombuffer(codec.decompress(stored.tobytes(), count * dtype.itemsize), np.uint8)
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T).view(dtype).reshape(count)


# -- the safetensors layout: 8 bytes of header size, JSON header, data ------------------------------------------------
def _data_start(body: bytes | bytearray) -> int:
    return 8 + int.from_bytes(body[:8], "little")


def _header(body: bytes | bytearray) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(body[8 : _data_start(body)])
    return header


def _tensors(body: bytes | bytearray) -> Iterator[tuple[str, Words]]:
    """(name, flat words) of every tensor in the order of their data; views of `body`, writable where it is."""
    start = _data_start(body)
    tensors = [(name, entry) for name, entry in _header(body).items() if name != "__metadata__"]
    for name, entry in sorted(tensors, key=lambda tensor: tensor[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        width = (end - begin) / max(1, math.prod(entry["shape"]))
        # Dtypes below a byte, and complex ones, are compared byte by byte.
        dtype = np.dtype(f"<u{int(width)}" if width in (1, 2, 4, 8) else "u1")
        yield name, np.frombuffer(body, dtype, (end - begin) // dtype.itemsize, start + begin)
