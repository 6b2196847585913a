"""From a file, a mapping and dotted overrides to a RunConfig, or to one error that names every problem.

A run is its record and the changes recorded since (`storage/events.py`). What decides prompts, tokens, scores, losses
or their order never changes; what only decides who does the work, when, and how often it is saved or looked at, may.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from asyncopd.config.base import Kinds
from asyncopd.config.schema import RunConfig
from asyncopd.errors import ConfigError

SAFE_CHANGES: Mapping[str, str] = {
    "limits": "patience and pace, not results",
    "rollout.workers": "who samples an index does not decide its tokens",
    "rollout.shards_per_task": "how work is grouped into Prefect tasks",
    "score.workers": "who scores an index does not decide its scores",
    "score.shards_per_task": "how work is grouped into Prefect tasks",
    "evaluate.every": "looks at versions, does not change them",
    "learner.checkpoint_every": "how much a crash makes the learner train again",
    "learner.num_steps": "upwards, with a constant schedule: steps already trained keep their learning rate",
    "storage.root": "the run was copied; keys are relative to it",
    "storage.min_free_bytes": "a check at the start",
}
"""Setting, or section, and why changing it leaves the run what it is."""

Changes = dict[str, tuple[Any, Any]]
"""Dotted key -> (old value, new value)."""


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read, merge and check a configuration.

    Args:
        source: path of a YAML file (which may name another as `base:`), or the same as a mapping.
        overrides: dotted key -> value, for example `{"staleness.max_staleness": 0}`; applied last.
    Raises:
        ConfigError: the file is missing or not YAML, or one or more values cannot work; every problem is listed.
    """
    raw = _read(Path(source), seen=()) if isinstance(source, str | Path) else dict(source)
    name = str(source) if isinstance(source, str | Path) else "config"
    for key, value in (overrides or {}).items():
        raw = _with(raw, key, value)
    raw = _with_default_variants(raw)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  - {line}" for line in _explain(error, raw))
        raise ConfigError(f"{name}: the configuration cannot work:\n{problems}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """`learner.lr=1e-4` -> ("learner.lr", 0.0001); the value is YAML, and pydantic makes 1e-4 a number.

    Raises:
        ConfigError: there is no `=`, or what follows it is no YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE, for example --set staleness.max_staleness=0.")
    return key.strip(), _yaml(value, f"--set {key}")


def differences(old: RunConfig, new: RunConfig) -> Changes:
    """Every setting in which the two differ, by dotted key; None where one of them has no such setting."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def safe_changes(old: RunConfig, new: RunConfig, *, run_id: str) -> Changes:
    """What differs, if all of it may change when a run goes on. Empty when nothing differs.

    Raises:
        ConfigError: some of it may not; names every such setting and what may change instead.
    """
    changes = differences(old, new)
    refused = [f"{key}: {was!r} -> {now!r}" for key, (was, now) in changes.items() if not _is_safe(key, old, new)]
    if refused:
        raise ConfigError(
            f"run {run_id} exists and only goes on with the configuration it was started with. Different, and part of "
            f"what the run is: {'; '.join(refused)}. Leave them out to resume it, or leave the run id out to start a "
            f"new run. These may change: {', '.join(SAFE_CHANGES)} (num_steps upwards, with a constant schedule)."
        )
    return changes


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        raw = _yaml(path.read_bytes(), str(path))
    except IsADirectoryError:
        near = sorted(p.name for p in path.glob("*.yaml"))
        raise ConfigError(f"{path} is a directory; expected one YAML file. It holds {near or 'none'}.") from None
    except (OSError, ValueError) as error:
        # Not there, not ours to read, or a name that no file can have.
        near = sorted(p.name for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"{path}: no such configuration file ({error}). In {path.parent.absolute()} there is {near or 'none'}."
        ) from None
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its `base:` chain comes back to itself: {[str(p) for p in seen]}.")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}.")
    base = raw.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base: expected the name of one YAML file, found {base!r}.")
    return _merged(_read(path.parent / base, (*seen, path.resolve())), raw) if base else raw


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which keeps the last of two equal keys; this one refuses them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"`{key.value}:` stands in line {lines[key.value]} and again in line {line}; expected it once. "
                    "Make one of the two."
                )
            lines[key.value] = line
        return node


def _yaml(source: bytes | str, where: str) -> Any:
    try:
        text = source if isinstance(source, str) else source.decode("utf-8-sig")
        return yaml.load(text, _Loader)  # a safe loader
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{where}: line {line}: byte 0x{error.object[error.start]:02x} is no text in UTF-8; expected YAML in it. "
            "Save the file in UTF-8."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A date such as 2026-13-45 is a ValueError, a thousand brackets in each other a RecursionError.
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; a section that names another variant (`kind`, `engine`, `name`) replaces its base whole."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _switches_variant(old, value):
            value = _merged(old, value)
        merged[key] = value
    return merged


def _switches_variant(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(tag in new and new[tag] != old.get(tag, new[tag]) for tag in ("kind", "engine", "name"))


def _with(raw: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    head, _, rest = dotted.partition(".")
    if not rest:
        return _merged(raw, {head: value})
    inner = raw.get(head, {})
    if not isinstance(inner, Mapping):
        raise ConfigError(f"override {dotted}: {head} is {inner!r}, not a section.")
    return {**raw, head: _with(inner, rest, value)}


def _with_default_variants(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Sections that name no variant mean the default one, as leaving the whole section out does."""
    defaults = RunConfig()
    filled = dict(raw)
    for section, tag in (("task", "kind"), ("student", "kind"), ("teacher", "engine"), ("loss", "name")):
        values = filled.get(section)
        if isinstance(values, Mapping) and tag not in values:
            filled[section] = {tag: getattr(getattr(defaults, section), tag), **values}
    return filled


def _explain(error: ValidationError, raw: Mapping[str, Any]) -> Iterator[str]:
    known = sorted(set(_dotted_keys(RunConfig)))
    for problem in error.errors(include_url=False):
        key = _dotted(problem["loc"], raw)
        if problem["type"] == "extra_forbidden":
            yield f"{key}: unknown key. {_nearest(key, known)}"
        else:
            found = "" if isinstance(problem["input"], Mapping) else f" (found {problem['input']!r})"
            words = _PLAIN_WORDS.get(problem["type"])
            message = words.format(**problem.get("ctx", {})) if words else problem["msg"].removeprefix("Value error, ")
            yield f"{key}: {message}{found}" if key else message


def _nearest(key: str, known: Sequence[str]) -> str:
    """Advice for an unknown key: the sibling it resembles, else a key of that name elsewhere, else all siblings."""
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    by_leaf = {k.rpartition(".")[2]: k for k in (*known, *siblings)}
    near = [leaf] if leaf in by_leaf else []
    near = near or difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.8)
    if near:
        return f"Nearest known key: {by_leaf[near[0]]}."
    names = ", ".join(k.rpartition(".")[2] for k in siblings)
    return f"Known keys of {parent or 'a configuration'}: {names}."


# Ours for what pydantic says, by the kind of problem.
_PLAIN_WORDS = {
    "missing": "is required",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "bool_parsing": "expected true or false",
    "string_type": "expected text",
    "string_unicode": "expected text that UTF-8 can hold",
    "model_type": "expected a section with keys",
    "model_attributes_type": "expected a section with keys",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "expected one of {expected}",
    "union_tag_invalid": "{discriminator} is '{tag}'; expected one of {expected_tags}",
    "string_pattern_mismatch": "does not match the pattern {pattern}",
}


def _dotted(loc: tuple[int | str, ...], raw: Any) -> str:
    """Location in the user's words: pydantic also lists union tags there, which no file contains."""
    parts: list[str] = []
    for part in loc:
        if isinstance(raw, Mapping) and part not in raw and part != loc[-1]:
            continue
        parts.append(str(part))
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return ".".join(parts)


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        kinds = (kind for known in field.metadata if isinstance(known, Kinds) for kind in known)
        for inner in (*_models_in(field.annotation), *kinds):
            yield from _dotted_keys(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _is_safe(key: str, old: RunConfig, new: RunConfig) -> bool:
    if key == "learner.num_steps":
        grows = new.learner.num_steps > old.learner.num_steps
        return grows and old.learner.schedule == new.learner.schedule == "constant"
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE_CHANGES)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
