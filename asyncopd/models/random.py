"""Counter-based random numbers: a draw is a hash of its address, so no generator state exists or has to be resumed.

SplitMix64, written out because its results must never change: NumPy does not promise that its distributions keep
their streams from one release to the next, and building a NumPy generator costs more than a whole prompt here.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def stream_key(name: str, *parts: int) -> int:
    """Key of the stream called `name` for these integers (a seed, usually): 64 bits, equal on every machine."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    for part in parts:
        key = derive(key, part)
    return key


def derive(key: int, part: int) -> int:
    """The key of sub-stream `part` of `key`; any integer is a part."""
    return _mix(_mix((key + _GOLDEN) & _MASK) ^ (part & _MASK))


def uniform(key: int, counter: int) -> float:
    """The `counter`-th draw of a stream: uniform in [0, 1), 53 bits."""
    return (_mix((key + (counter + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def uniforms(keys: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 of the broadcast shape of `keys` and `counters`: `uniform(key, counter)` for each."""
    x = keys + (counters + 1).astype(np.uint64) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    x = x ^ (x >> np.uint64(31))
    return np.asarray((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def permutation(key: int, count: int) -> NDArray[np.int64]:
    """[count] int64, a random order of 0 .. count − 1."""
    return np.argsort(uniforms(np.array([key], np.uint64), np.arange(count)), kind="stable").astype(np.int64)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)
