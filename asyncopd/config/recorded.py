"""Which per-token arrays a loss needs or a log holds, and the comparison of the two. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from asyncopd.errors import ConfigError
from asyncopd.types import DrawLaw, ScoredTrajectory


@dataclass(frozen=True)
class CacheRequirements:
    """Widths of the cached per-token arrays: those a loss needs, or those a log holds.

    log p_old and log q of the sampled token are always there.
    """

    top_k: int = 0
    """Teacher's most likely ids. A wider cache serves: its first columns are the smaller top-k."""
    head: int = 0
    """Sampling student's most likely ids. A wider cache serves, except below a `tail` law."""
    num_draws: int = 0
    """Ids drawn by the sampling student. More draws serve: they are i.i.d., the first are taken."""
    law: DrawLaw | None = None
    """Law of those draws; None without draws. Draws of law `tail` avoid exactly the head they were cached with."""
    num_teacher_draws: int = 0
    """Ids drawn by the teacher."""
    full_vocabulary: bool = False
    """The teacher's log-probs of every id: top_k is the vocabulary size, whatever `top_k` says here."""

    def joined_with(
        self, *, top_k: int, head: int, num_draws: int, law: DrawLaw, num_teacher_draws: int
    ) -> CacheRequirements:
        """What to record so that this and the given widths are both served. `law` counts only where num_draws > 0.

        Raises:
            ConfigError: both ask for draws, of different laws, or a wider head than the tail draws avoid.
        """
        if self.law is not None and num_draws > 0 and law != self.law:
            raise ConfigError(
                f"recording.num_draws {num_draws} with recording.law {law!r}: the loss needs draws of law "
                f"{self.law!r}, and a log holds draws of one law. Set recording.law to {self.law!r}, "
                "or recording.num_draws to 0."
            )
        if self.law == "tail" and head > self.head:
            raise ConfigError(
                f"recording.head {head}: the loss's tail draws avoid exactly its head of {self.head}. Set loss.head to "
                f"{head}, or recording.head to at most {self.head}."
            )
        return replace(
            self,
            top_k=max(self.top_k, top_k),
            head=max(self.head, head),
            num_draws=max(self.num_draws, num_draws),
            law=self.law if self.law is not None else (law if num_draws > 0 else None),
            num_teacher_draws=max(self.num_teacher_draws, num_teacher_draws),
        )

    @classmethod
    def held_by(cls, scored: ScoredTrajectory, *, vocab_size: int) -> CacheRequirements:
        """What the arrays of one cached trajectory can serve."""
        candidates, scores = scored.trajectory.candidates, scored.scores
        num_draws = candidates.draw_ids_TN.shape[1]
        return cls(
            top_k=scores.topk_ids_TK.shape[1],
            head=candidates.head_ids_TK.shape[1],
            num_draws=num_draws,
            law=candidates.law if num_draws else None,
            num_teacher_draws=scores.teacher_draw_ids_TM.shape[1],
            full_vocabulary=scores.topk_ids_TK.shape[1] >= vocab_size,
        )


def check_cache(required: CacheRequirements, held: CacheRequirements, *, run_id: str) -> None:
    """Refuse to train from a log that lacks what the loss needs.

    Raises:
        ConfigError: names every missing column, what is held, and the command that back-fills it.
    """
    problems = list(_missing(required, held, f"Run `asyncopd backfill {run_id}"))
    if problems:
        raise ConfigError(f"run {run_id}: the log does not hold what the loss needs.\n" + "\n".join(problems))


def _missing(required: CacheRequirements, held: CacheRequirements, backfill: str) -> Iterator[str]:
    head = f"head={required.head}" if required.head else ""
    draws = f"num_draws={required.num_draws},law={required.law}" if required.num_draws else ""
    wider = f"--candidates {','.join(filter(None, (head, draws)))}"
    if required.full_vocabulary and not held.full_vocabulary:
        yield f"  - topk_logprobs holds {held.top_k} ids per token, needed is every id. {backfill} --top-k all`."
    top_k, teacher_draws = (0 if held.full_vocabulary else required.top_k), required.num_teacher_draws
    for column, unit, found, needed, option in (
        ("topk_logprobs", "ids", held.top_k, top_k, f"--top-k {top_k}"),
        ("teacher_draw_logprobs", "draws", held.num_teacher_draws, teacher_draws, f"--teacher-draws {teacher_draws}"),
        ("head_logprobs", "ids", held.head, required.head, wider),
        ("draw_logprobs", "draws", held.num_draws, required.num_draws, wider),
    ):
        if needed > found:
            yield f"  - {column} holds {found} {unit} per token, needed are {needed}. {backfill} {option}`."
    if required.law is None or required.num_draws > held.num_draws:
        return
    if required.law != held.law:
        yield f"  - draw_logprobs holds draws of law {held.law!r}, needed is {required.law!r}. {backfill} {wider}`."
    elif required.law == "tail" and required.head < held.head:
        yield (
            f"  - head_logprobs holds {held.head} ids per token, which all the draws avoid; the loss asks for a "
            f"head of {required.head}. Set loss.head to {held.head}."
        )
