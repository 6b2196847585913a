"""What the first bytes of weights, and the files of a tokenizer, say: names, shapes, ids. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from asyncopd.errors import ConfigError


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer's files say about ids."""

    digest: str
    """sha256 (hex) of what text turns into which ids: vocabulary, merges, normalisation, added tokens. It leaves out
    padding, truncation, the chat template and which id counts as EOS, in which a base model and its sibling differ."""
    num_ids: int
    """Ids that exist: 0 ... num_ids − 1."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a safetensors file is, without its numbers."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it, for example `BF16`."""
    start: int
    """Of its bytes in the file, as `stop` is the end."""
    stop: int

    def same_bytes(self, other: StoredTensor) -> bool:
        """Whether both begin and end with the same MiB."""
        return all(self._read(last) == other._read(last) for last in (False, True))

    def _read(self, last: bool) -> bytes:
        size = min(self.stop - self.start, 1 << 20)
        with self.path.open("rb") as file:
            file.seek(self.stop - size if last else self.start)
            return file.read(size)


def stored_tensors(folder: Path, role: str) -> dict[str, StoredTensor]:
    """Every tensor of a model's safetensors files by name, from their first bytes.

    Raises:
        ConfigError: there are none, one is cut off or no safetensors file, or the index names one that is missing.
    """
    index, weight_map = folder / "model.safetensors.index.json", {}
    if (single := folder / "model.safetensors").is_file():
        files = [single]
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{role}.path: {index} is no index of weights: {error!r}. Fetch it again.") from None
        if missing := [path.name for path in files if not path.is_file()]:
            raise ConfigError(f"{role}.path: {index} names {missing}, which are not there. Is the download complete?")
    else:
        found = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".gguf")
        )
        raise ConfigError(
            f"{role}.path: {folder} holds no model.safetensors and no index of several, but {found or 'no weights'}. "
            "Pickled weights (*.bin) are not read; convert them with `save_pretrained`."
        )
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            size = path.stat().st_size
            try:
                header = json.loads(file.read(length) if 0 < length < size else b"")
                header.pop("__metadata__", None)
                data = 8 + length
                end = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
                for name, entry in header.items():
                    start, stop = (data + offset for offset in entry["data_offsets"])
                    tensors[name] = StoredTensor(path, tuple(entry["shape"]), entry["dtype"], start, stop)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                pointer = first == b"version "
                raise ConfigError(
                    f"{role}.path: {path} ({size} bytes) is no safetensors file. "
                    + ("It is a pointer of Git LFS: run `git lfs pull`." if pointer else "Is it cut off?")
                ) from None
        if size != end:
            raise ConfigError(f"{role}.path: {path} has {size} bytes; its header says {end}. Is it cut off?")
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise ConfigError(
            f"{role}.path: {index} names tensors that its files do not hold: {missing[:8]}. Fetch both again."
        )
    return tensors


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs at the beginning of a GGUF file (version 2 or 3, little-endian).

    The gguf package needs five seconds for a vocabulary of 49,000; a refusal must not take that long.

    Raises:
        ConfigError: not a GGUF file, or cut off.
    """
    scalars = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{path} is no GGUF file: it does not begin with GGUF.")
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    place = 4

    def number(code: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(code, view, place)
        place += struct.calcsize(code)
        return value

    def value(kind: int) -> Any:
        nonlocal place
        if kind in scalars:
            return number(scalars[kind])
        if kind == 8:
            length = number("<Q")
            place += length
            return view[place - length : place].decode("utf-8", errors="replace")
        inner, count = number("<I"), number("<Q")
        if inner not in scalars:
            return [value(inner) for _ in range(count)]
        items = struct.unpack_from(f"<{count}{scalars[inner][1]}", view, place)
        place += count * struct.calcsize(scalars[inner])
        return list(items)

    try:
        number("<I"), number("<Q")
        return {value(8): value(number("<I")) for _ in range(number("<Q"))}
    except (struct.error, KeyError, IndexError) as error:
        raise ConfigError(f"{path}: the metadata of this GGUF file cannot be read: {error}. Is it cut off?") from None


def tokenizer_facts(path: Path, role: str) -> TokenizerFacts:
    """What a tokenizer.json says about ids.

    Raises:
        ConfigError: the tokenizers package cannot read it, or an id below the largest has no token.
    """
    try:
        return _facts_of(path.read_bytes())
    # The library raises Exception itself.
    except Exception as error:
        raise ConfigError(f"{role}: {path} cannot serve as tokenizer.json: {error}") from None


# Student, teacher and task usually name one file, or byte-equal copies of it, and reading one takes half a second.
@functools.lru_cache(maxsize=4)
def _facts_of(content: bytes) -> TokenizerFacts:
    settings = json.loads(Tokenizer.from_buffer(content).to_str())
    vocabulary = settings["model"]["vocab"]
    # Unigram models list their pieces in the order of ids.
    ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    ids |= {token["id"] for token in settings["added_tokens"]}
    num_ids = max(ids) + 1
    if len(ids) != num_ids:
        holes = sorted(set(range(num_ids)) - ids)
        raise ValueError(
            f"it leaves out {len(holes)} ids below {num_ids} ({holes[:5]} …). Expected ids without holes; add "
            "placeholder tokens for them."
        )
    kept = {key: settings[key] for key in ("normalizer", "pre_tokenizer", "model")}
    added = sorted((token["id"], token["content"]) for token in settings["added_tokens"])
    return TokenizerFacts(digest_of([kept, added]), num_ids)


def digest_of(settings: Any) -> str:
    """sha256 (hex) of anything that JSON can say."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
