"""What is asked of a teacher about rollouts that exist, and under which names answers are stored. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from asyncopd.config.load import load_config
from asyncopd.config.schema import RunConfig, TeacherConfig
from asyncopd.errors import ConfigError
from asyncopd.types import DrawLaw


@dataclass(frozen=True)
class CandidateRequest:
    """Candidates to recompute from the student that sampled."""

    head: int
    num_draws: int
    law: DrawLaw

    @property
    def name(self) -> str:
        """Of the folder that holds them, for example `head4-draws4-tail`."""
        return f"head{self.head}-draws{self.num_draws}-{self.law}"


@dataclass(frozen=True)
class Backfill:
    """One back-fill of one run."""

    run_id: str
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of the section `teacher` that differ from the run's own."""
    top_k: int | Literal["all"] = 0
    """At least this many of the teacher's most likely ids; what the run recorded is the least."""
    num_teacher_draws: int = 0
    """At least this many ids drawn from the teacher."""
    candidates: str = ""
    """`head=K,num_draws=N,law=LAW`; empty for the recorded ones."""


def teacher_of(config: RunConfig, backfill: Backfill) -> TeacherConfig:
    """The teacher to ask: the run's own, with the given settings changed.

    Raises:
        ConfigError: settings that cannot work, or another teacher under the name of the run's own.
    """
    if not backfill.teacher:
        return config.teacher
    raw: dict[str, Any] = config.model_dump(mode="json")
    settings = dict(backfill.teacher)
    if settings.get("engine", raw["teacher"]["engine"]) != raw["teacher"]["engine"]:
        raw["teacher"] = {"engine": settings.pop("engine")}
    changed = load_config(raw, {f"teacher.{key}": value for key, value in settings.items()}).teacher
    if changed != config.teacher and changed.name == config.teacher.name:
        raise ConfigError(
            f"--teacher: {backfill.teacher} is another teacher than the run's own, under its name {changed.name!r}. "
            "Give it a name, for example --teacher name=other; names tell score folders apart."
        )
    return changed


def widths(config: RunConfig, backfill: Backfill, *, vocab_size: int) -> tuple[int, int]:
    """(top-k, teacher draws) to ask for: never less than the run recorded, so that a back-fill serves its loss too."""
    cached = config.cached()
    recorded = vocab_size if cached.full_vocabulary else cached.top_k
    top_k = vocab_size if backfill.top_k == "all" else max(recorded, backfill.top_k)
    if top_k > vocab_size:
        raise ConfigError(f"--top-k {backfill.top_k}: the vocabulary has {vocab_size} ids. Use --top-k all.")
    return top_k, max(cached.num_teacher_draws, backfill.num_teacher_draws)


def candidates_of(config: RunConfig, backfill: Backfill) -> CandidateRequest | None:
    """The candidates to recompute; None for the recorded ones.

    Raises:
        ConfigError: `backfill.candidates` is not understood.
    """
    if not backfill.candidates:
        return None
    cached = config.cached()
    values: dict[str, Any] = {"head": cached.head, "num_draws": cached.num_draws, "law": cached.law or "policy"}
    for part in backfill.candidates.split(","):
        name, _, value = part.partition("=")
        if name not in values or not (value in ("policy", "tail") if name == "law" else value.isdigit()):
            raise ConfigError(
                f"--candidates {backfill.candidates!r}: {part!r} is not understood; expected head=K, num_draws=N and "
                "law=policy or law=tail, joined by commas, for example --candidates head=4,num_draws=4,law=tail."
            )
        values[name] = value if name == "law" else int(value)
    return CandidateRequest(**values)


def folder_of(
    config: RunConfig,
    teacher: TeacherConfig,
    *,
    top_k: int,
    num_teacher_draws: int,
    candidates: CandidateRequest | None,
) -> str:
    """Folder of the scores: the teacher's name, `@`, and what was asked beyond what the run records.

    Raises:
        ConfigError: the run has those scores already.
    """
    cached = config.cached()
    parts = [f"top{top_k}"] if top_k > cached.top_k and not cached.full_vocabulary else []
    parts += [f"teacher-draws{num_teacher_draws}"] if num_teacher_draws > cached.num_teacher_draws else []
    parts += [candidates.name] if candidates else []
    if not parts and teacher.name == config.teacher.name:
        raise ConfigError(
            "there is nothing to back-fill: the run has its own teacher's scores with these widths already. Ask for "
            "more with --top-k, --teacher-draws or --candidates, or for another teacher with --teacher."
        )
    return "@".join([teacher.name, *(["-".join(parts)] if parts else [])])
