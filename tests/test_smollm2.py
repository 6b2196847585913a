"""A real language model through every engine: two steps of configs/smollm2.yaml, shortened."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pipeline
import pytest

from asyncopd.config import load_config
from asyncopd.metrics import DRIFT, ESS, KL
from asyncopd.tasks.prompts import read_questions
from flows.roles import roll_out, score_shards, train_steps
from flows.wiring import open_stored_run

pytestmark = pytest.mark.smollm2
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", ["smollm2", "smollm2_vllm"])
async def test_two_steps(name: str, tmp_path: Path) -> None:
    questions = [{"question": q.question, "answer": q.answer} for q in read_questions("gsm8k")[:24]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, questions)))
    changes: dict[str, Any] = {
        "storage.root": str(tmp_path / "runs"),
        "task.train_path": str(tmp_path / "train.jsonl"),
        "task.eval_path": "",
        "rollout.max_new_tokens": 12,
        "rollout.shard_size": 2,
        "learner.batch_size": 4,
        "learner.num_steps": 2,
        "learner.checkpoint_every": 2,
    }
    run = pipeline.new_run(load_config(CONFIGS / f"{name}.yaml", changes), name)
    async with asyncio.TaskGroup() as roles:
        for role in (roll_out, score_shards, train_steps):
            roles.create_task(role(open_stored_run(run.config.storage.root, name)))
    first, last = run.log.steps()
    assert list(itertools.chain(first.indices.indices, last.indices.indices)) == list(range(8))
    # Pruned, not destroyed; and the learner's student is the one that sampled.
    assert 0.3 < first.metrics[KL.key] < 2.0
    assert first.metrics[DRIFT.key] == pytest.approx(0, abs=2e-3)
    assert first.metrics[ESS.key] == pytest.approx(1, abs=2e-3)
    texts = [
        run.task.tokenizer.decode(t.response_ids.tolist()) for t in run.log.read_trajectories(run.config.plan.shard(0))
    ]
    assert all(np.mean([letter.isascii() for letter in text]) > 0.9 for text in texts), texts
    assert all(t.finish_reason in ("stop", "length") for t in run.log.read_trajectories(run.config.plan.shard(0)))
