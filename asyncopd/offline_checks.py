"""What can be checked of a replay, back-fill or re-ordering without loading a model. A mistake should not wait for one.

options of the command line, or of a request --> these --> Replay, Backfill     or ConfigError, at once
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncopd.config import RunConfig
from asyncopd.config.backfill import Backfill, candidates_of, folder_of, teacher_of
from asyncopd.config.replay import (
    Replay,
    Start,
    parse_settings,
    parse_steps,
    replay_config,
    split_arm,
    with_settings,
)
from asyncopd.errors import ConfigError
from storage.replay_log import ReplayLog
from storage.run_log import StoredRunLog


def check_scores(run_id: str, wanted: Iterable[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a folder of scores that the run with the shards does not have."""
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(
            f"run {run_id} has no scores {', '.join(unknown)}; it has {', '.join(known) or 'none'}. "
            f"Make them with `asyncopd backfill {run_id}`."
        )


def replay_of(
    run_id: str,
    config: RunConfig,
    *,
    num_steps: int,
    steps: str = ":",
    start: Start = "checkpoint",
    overrides: Sequence[str] = (),
    compare: Sequence[str] = (),
) -> tuple[Replay, list[Replay]]:
    """The replay that is asked for, and the arms of its comparison.

    Args:
        config: of the run `run_id`, which has trained `num_steps` steps.
        overrides: KEY=VALUE texts, and `compare`, texts of several, as the command line takes them.
    Raises:
        ConfigError: nothing to replay, one arm only, or settings that cannot work.
    """
    if not num_steps:
        raise ConfigError(f"run {run_id} has not trained a step yet; there is nothing to replay.")
    if len(compare) == 1:
        raise ConfigError(
            f"--compare {compare[0]!r}: a comparison needs at least two arms; give --compare once for each."
        )
    first, last = parse_steps(steps, num_steps=num_steps)
    replay = Replay(run_id, first, last, start, *parse_settings(list(overrides)))
    arms = [with_settings(replay, *parse_settings(split_arm(text))) for text in compare]
    for asked in (replay, *arms):
        replay_config(config, asked)
    return replay, arms


def check_backfill(config: RunConfig, backfill: Backfill) -> None:
    """Raise ConfigError for what the work would refuse; the vocabulary's size is known only there."""
    cached = config.cached()
    is_all = backfill.top_k == "all"
    folder_of(
        config, teacher_of(config, backfill),
        top_k=cached.top_k + 1 if is_all else max(cached.top_k, int(backfill.top_k)),
        num_teacher_draws=max(cached.num_teacher_draws, backfill.num_teacher_draws),
        candidates=candidates_of(config, backfill),
    )  # fmt: skip


def check_counterfactual(log: StoredRunLog) -> None:
    """Raise ConfigError for a run that cannot be re-ordered."""
    if isinstance(log, ReplayLog):
        raise ConfigError(
            f"run {log.run_id} is a replay: nothing arrived while it trained. Ask about {log.source.run_id}."
        )
    if not num_trained(log):
        raise ConfigError(f"run {log.run_id} has not trained a step yet; there is nothing to re-order.")


def num_trained(log: StoredRunLog) -> int:
    """Steps of the surviving lineage, by its newest version."""
    latest = log.latest_policy()
    return latest.number if latest is not None else 0


def steps_from(steps: str, from_version: int | None) -> str:
    """FIRST:LAST, where `--from-version` says FIRST."""
    return steps if from_version is None else f"{from_version}:{steps.partition(':')[2]}"
