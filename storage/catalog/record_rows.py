"""Values of the run log as rows of the record relations."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from asyncopd.types import Evaluation, IndexRange, Manifest, PolicyVersion, TrainStep

Row = dict[str, Any]


def time_of(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def range_row(shard: IndexRange) -> Row:
    return {"shard": shard.name, "index_start": shard.start, "index_stop": shard.stop}


def policy_row(version: PolicyVersion, manifest: Manifest) -> Row:
    (promise,) = manifest.objects.values()
    return {
        "version": version.number, "rewind": version.rewind, "created": time_of(manifest.created),
        "worker": manifest.worker, "size_bytes": promise["size_bytes"], "sha256": promise["sha256"],
    }  # fmt: skip


def step_row(step: TrainStep) -> Row:
    indices = sorted(step.indices.indices)
    return {
        "step": step.step, "rewind": step.rewind, "version": step.version.number, "index_start": indices[0],
        "index_stop": indices[-1] + 1, "indices": indices, "num_tokens": step.num_tokens,
        "num_dropped": len(step.dropped), "finished": time_of(step.finished),
        "metrics": [(name, None if value is None else float(value)) for name, value in step.metrics.items()],
        "staleness_tokens": list(step.staleness_tokens.items()),
    }  # fmt: skip


def evaluation_row(evaluation: Evaluation) -> Row:
    accuracy = evaluation.accuracy
    return {
        "version": evaluation.version.number, "rewind": evaluation.version.rewind,
        "num_prompts": evaluation.num_prompts, "accuracy": None if accuracy != accuracy else accuracy,
        "accuracy_by_group": list(evaluation.accuracy_by_group.items()), "kl_nats": evaluation.kl_nats,
        "kl_standard_error_nats": evaluation.kl_standard_error_nats,
        "mean_response_tokens": evaluation.mean_response_tokens, "finished": time_of(evaluation.finished),
    }  # fmt: skip


def shard_row(teacher: str, shard: IndexRange, manifest: Manifest) -> Row:
    facts = manifest.facts
    return {
        "stage": "score" if teacher else "rollout", "teacher": teacher, **range_row(shard),
        "num_rows": facts.get("num_rows"), "num_tokens": facts.get("num_tokens"),
        "num_dropped": len(facts.get("dropped", {})), "seconds": facts.get("seconds"), "worker": manifest.worker,
        "published": time_of(manifest.created),
        "size_bytes": sum(promise["size_bytes"] for promise in manifest.objects.values()),
    }  # fmt: skip


def dropped_of_shards(shards: Iterable[tuple[str, IndexRange, Manifest]]) -> list[Row]:
    """Scores repeat what was dropped at rollout; it counts once, where it was decided."""
    rows: dict[tuple[int, str], Row] = {}
    at_rollout: set[int] = set()
    for teacher, _, manifest in sorted(shards, key=lambda found: found[0]):
        for index, reason in manifest.facts.get("dropped", {}).items():
            if not teacher:
                at_rollout.add(index)
            elif index in at_rollout:
                continue
            stage = "score" if teacher else "rollout"
            rows[index, teacher] = {"index": index, "stage": stage, "teacher": teacher, "reason": reason}
    return list(rows.values())


def dropped_of_steps(steps: Iterable[TrainStep]) -> list[Row]:
    return [
        {"index": index, "stage": "learn", "teacher": "", "reason": reason}
        for step in steps
        for index, reason in {**step.dropped, **step.held}.items()
    ]
