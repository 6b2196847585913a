"""`/v1/runs/{id}/replay | backfill`: work on a log that exists, through deployments `replay/run` and `backfill/run`.

Everything is checked here that can be checked without loading a model: a mistake should not have to wait for a worker.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header

from api.fold import RunFold
from api.problems import ProblemError, responses
from api.schemas import BackfillRequest, ReplayRequest, Work
from api.security import Launcher
from api.state import Fold, Runs
from asyncopd.config import parse_override
from asyncopd.config.backfill import Backfill, candidates_of, folder_of, teacher_of
from asyncopd.config.replay import Replay, parse_settings, parse_steps, replay_config, split_arm, with_settings
from asyncopd.errors import ConfigError
from asyncopd.flow_runs import create_flow_run

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["replays"], dependencies=[Launcher])
IdempotencyKey = Annotated[
    str | None,
    Header(max_length=200, description="Repeating a request with one key starts it once.", examples=["a-uuid"]),
]


@router.post("/replay", status_code=202, operation_id="replay_run", responses=responses(404, 409, 413))
def replay_run(asked: ReplayRequest, fold: Fold, runs: Runs, idempotency_key: IdempotencyKey = None) -> Work:
    """Train again from this run's log, with no sampler and no teacher, into a run of its own."""
    replay, arms = _replay_of(asked, fold)
    parameters = {
        "run_id": replay.run_id,
        "root": runs.store.url,
        "steps": f"{replay.first_version}:{replay.last_version}",
        "start": asked.start,
        "overrides": _assignments(asked.overrides, asked.scores),
        "compare": arms,
        "evaluate": asked.evaluate,
        "prompts": asked.num_prompts,
    }
    child = None if arms else replay.child_id
    flow_run = create_flow_run(
        "replay/run", parameters, name=child or f"compare-{replay.run_id}",
        idempotency_key=_key("replay", replay.run_id, idempotency_key),
    )  # fmt: skip
    if child is not None:
        # So that cancelling the replay finds what to cancel.
        runs.launches.record_flow_run(child, flow_run.id)
    return Work(parent=replay.run_id, run_id=child, flow_run_id=flow_run.id)


@router.post("/backfill", status_code=202, operation_id="backfill_run", responses=responses(404, 409, 413))
def backfill_run(asked: BackfillRequest, fold: Fold, runs: Runs, idempotency_key: IdempotencyKey = None) -> Work:
    """Score this run's trajectories again, beside what exists."""
    run_id = fold.log.run_id
    candidates = asked.candidates
    text = f"head={candidates.head},num_draws={candidates.num_draws},law={candidates.law}" if candidates else ""
    _check_backfill(fold, Backfill(run_id, asked.teacher, asked.top_k, asked.num_teacher_draws, text))
    parameters = {
        "run_id": run_id,
        "root": runs.store.url,
        "teacher": _assignments(asked.teacher, {}),
        "top_k": asked.top_k,
        "teacher_draws": asked.num_teacher_draws,
        "candidates": text,
        "cache": asked.cache,
    }
    flow_run = create_flow_run(
        "backfill/run", parameters, name=f"backfill-{run_id}",
        idempotency_key=_key("backfill", run_id, idempotency_key),
    )  # fmt: skip
    return Work(parent=run_id, flow_run_id=flow_run.id)


def _replay_of(asked: ReplayRequest, fold: RunFold) -> tuple[Replay, list[str]]:
    """The replay and the arms of its comparison. Raises ConfigError, or ProblemError 409 before the first step."""
    if not fold.steps:
        raise ProblemError(409, "nothing-to-replay", f"Run {fold.log.run_id} has trained no step yet.")
    if str(fold.config.staleness.order) != "index":
        raise ConfigError(
            f"run {fold.log.run_id} consumed its rollouts in order {fold.config.staleness.order!r}; only runs in index "
            "order can be replayed."
        )
    if len(asked.compare) == 1:
        raise ConfigError("compare: one arm compares nothing. Give at least two, or none for a single replay.")
    first, last = parse_steps(asked.steps, num_steps=fold.steps[-1].step + 1)
    settings, scores = parse_settings(_assignments(asked.overrides, asked.scores))
    replay = Replay(fold.log.run_id, first, last, asked.start, settings, scores)
    replay_config(fold.config, replay)
    arms = [" ".join(_assignments(arm, {})) for arm in asked.compare]
    for arm, text in zip(asked.compare, arms, strict=True):
        if parse_settings(split_arm(text))[0] != arm:
            raise ConfigError(f"compare: {arm} cannot be written as settings. Use numbers, names, lists or objects.")
        replay_config(fold.config, with_settings(replay, arm, {}))
    return replay, arms


def _check_backfill(fold: RunFold, backfill: Backfill) -> None:
    """Raise ConfigError for what the flow would refuse; the vocabulary's size is known only there."""
    cached = fold.config.cached()
    is_all = backfill.top_k == "all"
    folder_of(
        fold.config, teacher_of(fold.config, backfill),
        top_k=cached.top_k + 1 if is_all else max(cached.top_k, int(backfill.top_k)),
        num_teacher_draws=max(cached.num_teacher_draws, backfill.num_teacher_draws),
        candidates=candidates_of(fold.config, backfill),
    )  # fmt: skip


def _assignments(settings: Mapping[str, Any], scores: Mapping[str, float]) -> list[str]:
    """KEY=VALUE texts as the flows take them. Raises ConfigError for a key or value that would not arrive as it is."""
    texts = []
    for key, value in {**settings, **({"scores": dict(scores)} if scores else {})}.items():
        text = f"{key}={_yaml(value)}"
        if (key == "scores" and key in settings) or parse_override(text) != (key, value):
            raise ConfigError(
                f"{key!r}: {value!r} is no setting; expected a dotted key, for example loss.name, and a number, name, "
                "list or object."
            )
        texts.append(text)
    return texts


def _yaml(value: Any) -> str:
    text = json.dumps(value, separators=(",", ": "))
    # YAML reads 1e-05 as text, 1.0e-05 as a number.
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text


def _key(kind: str, run_id: str, given: str | None) -> str | None:
    return None if given is None else hashlib.sha256(f"{kind} {run_id} {given}".encode()).hexdigest()
