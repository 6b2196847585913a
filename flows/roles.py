"""The five roles of a run: what each does, the Prefect flow around it, and its process.

    python -m flows.roles ROLE ---------> body                lanes of work_on_shards: storage is all it needs
    python -m flows.roles ROLE --flow --> flow --> body       the same lanes as Prefect task runs

    pretrain   models/                                 once, before the others
    rollout    policies/ -> trajectories/              hosts one sampler
    score      trajectories/ -> scores/<teacher>/      hosts one teacher
    learn      trajectories/ + scores/ -> policies/    one model, to the last step
    evaluate   policies/ -> evals/                     chosen versions on held-out prompts

More samplers and scorers join a running run with `prefect deployment run rollout/worker -p run_id=…`, or without
Prefect with `asyncopd worker rollout RUN_ID`; they may come and go at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from prefect import Flow, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.states import Cancelled

from asyncopd.errors import REPEATS, AsyncOPDError, RunStoppedError
from asyncopd.evaluate import versions_to_evaluate
from asyncopd.local.processes import watch_parent
from asyncopd.worker import STOPPED, ShardStage, Worker, run_lanes, until_terminated, work_on_shards
from flows.preflight import missing_models
from flows.wiring import (
    OpenRun,
    evaluate_stage,
    learn_stage,
    open_stored_run,
    pretrain_model,
    rollout_stage,
    score_stage,
)

LaneTask = Callable[[ShardStage, int], Awaitable[int]]
"""`work_on_shards`, plain or as a Prefect task."""
TaskFactory = Callable[[str, Worker], LaneTask]
"""(its name, who does it) -> the lanes' work."""
RoleFlow = Flow[[str, str], Coroutine[Any, Any, State[Any] | None]]


async def roll_out(run: OpenRun, make_task: TaskFactory = lambda name, worker: work_on_shards) -> None:
    """Sample trajectory shards until all indices of the run are produced."""
    worker = run.worker("rollout")
    settings = run.config.rollout
    async with worker.alive():
        # Stored before version 0, and again by a resumed learner where it was lost.
        await worker.wait_for(run.log.find_architecture, "architecture of the student to be stored")
        await worker.wait_for(run.log.latest_policy, "version 0 to be published")
        stage, sampler = await worker.load("makes its sampler", lambda: rollout_stage(run, worker))
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


async def score_shards(run: OpenRun, make_task: TaskFactory = lambda name, worker: work_on_shards) -> None:
    """Score trajectory shards with the run's teacher until all of them are scored."""
    worker = run.worker("score")
    shards_per_task = run.config.score.shards_per_task
    async with worker.alive():
        stage = await worker.load("loads the teacher", lambda: score_stage(run, worker))
        task = make_task("score-shards", worker)
        # Two lanes: one reads or writes Parquet while the other is in the teacher.
        try:
            with worker.doing("starts the teacher's engine, which loads its weights, compiles and makes its cache"):
                await stage.start()
            await run_lanes(lambda: task(stage, shards_per_task), num_lanes=2, shards_per_task=shards_per_task)
        finally:
            await stage.close()


async def train_steps(run: OpenRun) -> None:
    """Train the run from its newest checkpoint to its last step, publishing a policy version after every step."""
    worker = run.worker("learn")
    async with worker.alive():
        stage = await worker.load("loads the student", lambda: learn_stage(run, worker))
        await stage.run()


async def evaluate_versions(run: OpenRun) -> None:
    """Evaluate version 0, every `evaluate.every`-th and the last version as they appear."""
    worker = run.worker("evaluate")
    async with worker.alive():
        await worker.wait_for(run.log.find_architecture, "architecture of the student to be stored")
        await worker.wait_for(run.log.latest_policy, "version 0 to be published")
        stage, sampler = await worker.load("loads its models", lambda: evaluate_stage(run, worker))
        try:
            await stage.run(versions_to_evaluate(run.config.learner.num_steps, run.config.evaluate.every))
        finally:
            await sampler.close()


async def pretrain_models(run: OpenRun) -> None:
    """Pre-train the run's tiny models that are not in the cache."""
    worker = run.worker("pretrain")
    async with worker.alive():
        for role, model in missing_models(run.config, run.store).items():
            await asyncio.to_thread(pretrain_model, run, worker, role, model)


def timed_task(name: str, worker: Worker) -> LaneTask:
    """`work_on_shards` as an async Prefect task whose orchestration overhead lands in the worker's timeline.

    One task run covers several shards (`shards_per_task`): it costs the client about 7 ms and the server 11–18 ms, a
    walk shard takes about 100 ms.
    """

    @task(name=name, cache_policy=NO_CACHE, persist_result=False)
    async def shards(stage: ShardStage, max_shards: int) -> tuple[int, float, float]:
        started = time.time()
        done = await work_on_shards(stage, max_shards)
        return done, started, time.time()

    async def measured(stage: ShardStage, max_shards: int) -> int:
        called = time.time()
        done, started, finished = await shards(stage, max_shards)
        worker.record("orchestrate:prefect", called, started, name)
        worker.record("orchestrate:prefect", finished, time.time(), name)
        return done

    return measured


def role_flow(role: str, body: Callable[..., Awaitable[None]], **options: Any) -> RoleFlow:
    """A role's body as a Prefect flow; `run_id` is a run that `asyncopd/train` created, `root` its storage root.

    It ends as Cancelled when the run's record says that the run was stopped.
    """

    async def run_role(run_id: str, root: str = "runs") -> State[Any] | None:
        try:
            await body(open_stored_run(root, run_id), **options)
        except RunStoppedError as stopped:
            return Cancelled(message=str(stopped))
        return None

    # Prefect names a flow's entrypoint after its function.
    run_role.__name__ = run_role.__qualname__ = role
    return flow(name=role, flow_run_name=f"{role}-{{run_id}}", description=body.__doc__)(run_role)


rollout = role_flow("rollout", roll_out, make_task=timed_task)
score = role_flow("score", score_shards, make_task=timed_task)
learn = role_flow("learn", train_steps)
evaluate = role_flow("evaluate", evaluate_versions)
pretrain = role_flow("pretrain", pretrain_models)

FLOWS = {"pretrain": pretrain, "rollout": rollout, "score": score, "learn": learn, "evaluate": evaluate}
BODIES: dict[str, Callable[[OpenRun], Awaitable[None]]] = {
    "pretrain": pretrain_models,
    "rollout": roll_out,
    "score": score_shards,
    "learn": train_steps,
    "evaluate": evaluate_versions,
}


def main() -> None:
    """Run one role to its end; errors of ours end with their message and status 1, or REPEATS."""
    parser = argparse.ArgumentParser(prog="python -m flows.roles", description="One role of a run, to its end.")
    parser.add_argument("role", choices=sorted(BODIES))
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--root", required=True, help="storage root of the run")
    parser.add_argument("--flow", action="store_true", help="as a Prefect flow run of its own")
    parser.add_argument("--watch-parent", action="store_true", help="end when stdin ends")
    arguments = parser.parse_args()
    if arguments.watch_parent:
        watch_parent()
    try:
        if arguments.flow:
            status = asyncio.run(_run_flow(arguments.role, arguments.run_id, arguments.root))
        else:
            run = open_stored_run(arguments.root, arguments.run_id)
            status = asyncio.run(until_terminated(BODIES[arguments.role](run)))
    except AsyncOPDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = REPEATS if error.repeats else 1
    sys.exit(status)


async def _run_flow(role: str, run_id: str, root: str) -> int:
    """SIGTERM cancels the flow from within the event loop, so that every `finally` runs: what is finished gets
    published, claims are released, and the process is gone within a second or two."""
    try:
        return await until_terminated(FLOWS[role](run_id, root))
    except CancelledRun:
        return STOPPED


if __name__ == "__main__":
    main()
