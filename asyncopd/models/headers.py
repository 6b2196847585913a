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


def weight_shapes(folder: Path, role: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a folder's *.safetensors, from their first bytes.

    Raises:
        ConfigError: there are none, one is cut off or no safetensors file, or the index names one that is missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise ConfigError(f"{role}.path: {index} names {missing}, which are not there. Is the download complete?")
        files = [folder / name for name in named]
    if not files:
        raise ConfigError(
            f"{role}.path: {folder} holds no *.safetensors weights. Pickled weights (*.bin) are not read; convert them "
            "with `save_pretrained`."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            size = path.stat().st_size
            try:
                header = json.loads(file.read(length) if 0 < length < size else b"")
            except ValueError:
                raise ConfigError(
                    f"{role}.path: {path} ({size} bytes) is no safetensors file. Is it a pointer of Git LFS, or "
                    "cut off?"
                ) from None
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != end:
            raise ConfigError(f"{role}.path: {path} has {size} bytes; its header says {end}. Is it cut off?")
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


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


# Student, teacher and task usually name one file, or byte-equal copies of it.
@functools.lru_cache(maxsize=8)
def tokenizer_facts(path: Path, role: str) -> TokenizerFacts:
    """What a tokenizer.json says about ids.

    Raises:
        ConfigError: the tokenizers package cannot read it, or an id below the largest has no token.
    """
    try:
        settings = json.loads(Tokenizer.from_file(str(path)).to_str())
    # The library raises Exception itself.
    except Exception as error:
        raise ConfigError(
            f"{role}: {path} is not a tokenizer.json that this tokenizers package reads: {error}."
        ) from None
    vocabulary = settings["model"]["vocab"]
    # Unigram models list their pieces in the order of ids.
    ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    ids |= {token["id"] for token in settings["added_tokens"]}
    num_ids = max(ids) + 1
    if len(ids) != num_ids:
        holes = sorted(set(range(num_ids)) - ids)
        raise ConfigError(
            f"{role}: {path} leaves out {len(holes)} ids below {num_ids} ({holes[:5]} …). Expected ids without holes; "
            "add placeholder tokens for them."
        )
    kept = {key: settings[key] for key in ("normalizer", "pre_tokenizer", "model")}
    added = sorted((token["id"], token["content"]) for token in settings["added_tokens"])
    return TokenizerFacts(digest_of([kept, added]), num_ids)


def digest_of(settings: Any) -> str:
    """sha256 (hex) of anything that JSON can say."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
