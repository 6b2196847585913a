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

from api.deps import Fold, Launcher, Runs
from api.problems import ProblemError, responses
from api.schemas import BackfillRequest, ReplayRequest, Work
from asyncopd.config import parse_override
from asyncopd.config.requests import Backfill, Replay, parse_settings, split_arm
from asyncopd.errors import ConfigError
from asyncopd.local.prefect_api import create_flow_run
from storage.replay import check_backfill, check_scores, replay_of, resolved_replay, vocab_size_of
from storage.run_view import RunView

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
    child = None if arms else _child_id(replay, fold)
    flow_run = create_flow_run(
        "replay/run",
        parameters,
        name=child or f"{'compare' if arms else 'replay'}-{replay.run_id}",
        idempotency_key=_key("replay", replay.run_id, idempotency_key),
    )
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
    check_backfill(fold.config, Backfill(run_id, asked.teacher, asked.top_k, asked.num_teacher_draws, text))
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
        "backfill/run",
        parameters,
        name=f"backfill-{run_id}",
        idempotency_key=_key("backfill", run_id, idempotency_key),
    )
    return Work(parent=run_id, flow_run_id=flow_run.id)


def _replay_of(asked: ReplayRequest, fold: RunView) -> tuple[Replay, list[str]]:
    """The replay and the arms of its comparison. Raises ConfigError, or ProblemError 409 before the first step."""
    if not fold.history.steps:
        raise ProblemError(409, "nothing-to-replay", f"Run {fold.log.run_id} has trained no step yet.")
    arms = [" ".join(_assignments(arm, {})) for arm in asked.compare]
    for arm, text in zip(asked.compare, arms, strict=True):
        if parse_settings(split_arm(text))[0] != arm:
            raise ConfigError(f"compare: {arm} cannot be written as settings. Use numbers, names, lists or objects.")
    replay, _ = replay_of(
        fold.log.run_id,
        fold.config,
        num_steps=fold.history.steps[-1].step + 1,
        steps=asked.steps,
        start=asked.start,
        overrides=_assignments(asked.overrides, asked.scores),
        compare=arms,
    )
    check_scores(fold.log.run_id, replay.scores, fold.log.teachers())
    return replay, arms


def _child_id(replay: Replay, fold: RunView) -> str | None:
    """The id of the run that the flow will make; None where that takes a tokenizer the service does not load.

    Raises:
        ConfigError: the log does not hold what the replay's loss needs.
    """
    # The scores that it trains on are part of the id.
    vocab_size = vocab_size_of(fold.config)
    if vocab_size is None:
        return None
    return resolved_replay(fold.log, fold.config, replay, vocab_size=vocab_size)[0].child_id


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
