"""What each role process does with a stored run, without Prefect: flows wrap it, `flows/join.py` runs it as it is.

role flow (flows/rollout.py, ...) --+                              lanes of Prefect tasks
                                    +--> roll_out, score, ... -->
flows/join.py --------------------- +                              the same lanes, plain
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from asyncopd.config import TinyModel
from asyncopd.evaluate.stage import versions_to_evaluate
from asyncopd.learner.pretrain import make_tiny_model
from asyncopd.worker import ShardStage, Worker, run_lanes, work_on_shards
from flows.wiring import (
    OpenRun,
    evaluate_stage,
    learn_stage,
    missing_models,
    rollout_stage,
    score_stage,
    task_of,
)
from storage.runs import publish_model

LaneTask = Callable[[ShardStage, int], Awaitable[int]]
"""`work_on_shards`, plain or as a Prefect task."""
TaskFactory = Callable[[str, Worker], LaneTask]


def plain_task(name: str, worker: Worker) -> LaneTask:
    """The lanes' work without Prefect around it."""
    return work_on_shards


async def roll_out(run: OpenRun, make_task: TaskFactory = plain_task) -> None:
    """Sample trajectory shards until all indices of the run are produced."""
    worker = run.worker("rollout")
    settings = run.config.rollout
    async with worker.alive():
        # The learner stores the student's architecture before it publishes version 0.
        await worker.wait_for(run.log.latest_policy, "version 0 to be published")
        stage, sampler = rollout_stage(run, worker)
        task = make_task("rollout-shards", worker)
        try:
            async with stage.following_versions():
                await run_lanes(
                    lambda: task(stage, settings.shards_per_task),
                    # One lane more than fills the engine, so that refilling never waits for a shard to be published.
                    num_lanes=-(-settings.slots // settings.shard_size) + 1,
                    shards_per_task=settings.shards_per_task,
                )
        finally:
            await sampler.close()


async def score(run: OpenRun, make_task: TaskFactory = plain_task) -> None:
    """Score trajectory shards with the run's teacher until all of them are scored."""
    worker = run.worker("score")
    shards_per_task = run.config.score.shards_per_task
    async with worker.alive():
        stage = score_stage(run, worker)
        task = make_task("score-shards", worker)
        # Two lanes: one reads or writes Parquet while the other is in the teacher.
        try:
            await run_lanes(lambda: task(stage, shards_per_task), num_lanes=2, shards_per_task=shards_per_task)
        finally:
            await stage.close()


async def learn(run: OpenRun) -> None:
    """Train the run from its newest checkpoint to its last step."""
    worker = run.worker("learn")
    async with worker.alive():
        await learn_stage(run, worker).run()


async def evaluate(run: OpenRun) -> None:
    """Evaluate version 0, every `evaluate.every`-th and the last version as they appear."""
    worker = run.worker("evaluate")
    async with worker.alive():
        await worker.wait_for(run.log.latest_policy, "version 0 to be published")
        stage, sampler = evaluate_stage(run, worker)
        try:
            await stage.run(versions_to_evaluate(run.config.learner.num_steps, run.config.evaluate.every))
        finally:
            await sampler.close()


async def pretrain(run: OpenRun) -> None:
    """Pre-train the run's tiny models that are not in the cache."""
    worker = run.worker("pretrain")
    async with worker.alive():
        for role, model in missing_models(run).items():
            await asyncio.to_thread(make_model, run, worker, role, model)


def make_model(run: OpenRun, worker: Worker, role: str, model: TinyModel) -> None:
    """Train one tiny model and publish it under its digest. Repeating it is harmless: the first one is kept."""
    settings = model.pretrain
    worker.status.update(model=role, step=0, num_steps=settings.num_steps)

    def on_step(step: int, loss: float) -> None:
        worker.status.update(step=step, loss_nats=loss)

    with worker.span("pretrain", role):
        made = make_tiny_model(
            model, task_of(run.config, settings.seed), row_capacity=run.config.learner.row_capacity, on_step=on_step
        )
    publish_model(run.store, run.config.model_digest(model), made.objects, made.facts)
