"""Replay without Prefect: creates the child run, brings its learner to the start, trains it from the parent's log.

    parent's log --check columns--> child run --train_to, publish_start--> LearnStage --> child's versions and steps
                                                                       (compare) --> the same prompts for every arm

No sampler and no teacher runs, except to evaluate, and then only after training.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console

from asyncopd import __version__
from asyncopd.config.requests import Replay, first_step, parent_version
from asyncopd.evaluate import Outcome, outcome_of, versions_to_evaluate
from asyncopd.learner.restore import find_version, publish_start, train_to
from asyncopd.learner.stage import LearnStage
from asyncopd.local.console import Advance, bar
from asyncopd.worker import Worker
from flows.engines import student_skeleton
from flows.wiring import OpenRun, evaluate_stage, open_stored_run, student_of
from storage.replay import ReplayLog, read_step, resolved_replay
from storage.runs import create_run, list_runs


@dataclass(frozen=True)
class Replayed:
    """A replay that was trained to its end."""

    run_id: str
    num_steps: int
    is_exact_start: bool
    """Did the start state have the published weights, bit for bit?"""
    is_equal: bool | None
    """Are the last version's weights the parent's at the same index, bit for bit? None where it has no such version."""
    seconds: float


# -- one replay ---------------------------------------------------------------------------------------------------
def open_replay(parent: OpenRun, replay: Replay, *, root: str) -> tuple[OpenRun, Replay]:
    """The child run, created or found again, and the replay with its scores resolved.

    Raises:
        ConfigError: settings or a log that the replay cannot work with; nothing is created then.
    """
    find_version(parent.log, replay.first_version)
    resolved, config = resolved_replay(parent.log, parent.config, replay, vocab_size=parent.task.tokenizer.vocab_size)
    if resolved.child_id in list_runs(parent.store):
        # With the configuration it was made with, whatever defaults have changed since.
        return open_stored_run(root, resolved.child_id), resolved
    record = {
        "config": config.model_dump(mode="json"),
        "config_hash": config.digest(),
        "code_version": __version__,
        "seed": config.seed,
        "created": time.time(),
        "parent": resolved.to_record(),
    }
    create_run(parent.store, resolved.child_id, record)
    child = open_stored_run(root, resolved.child_id)
    # Engines load the student's architecture from the run they serve.
    child.log.publish_architecture(parent.log.read_architecture())
    return child, resolved


async def train_replay(parent: OpenRun, child: OpenRun, replay: Replay, *, console: Console) -> Replayed:
    """Train the child to its last step, from wherever it stopped.

    Raises:
        ConfigError, NonFiniteError, ShardCorruptError: as LearnStage does.
    """
    started = time.time()
    assert isinstance(child.log, ReplayLog)
    first = first_step(parent.config, child.config, replay)
    worker = child.worker("learn")
    async with worker.alive():
        student = student_of(child.config, student_skeleton(child.log))
        is_exact = True
        if child.log.latest_checkpoint() is None:
            if replay.start == "weights":
                start = find_version(parent.log, replay.first_version)
                student.load(parent.log.read_policy(start).safetensors)
            else:
                is_exact = await _restore_parent_state(parent, replay, student.restore, console=console)
            publish_start(child.log, student, first, worker=worker.name)
        stage = LearnStage(
            child.log,
            worker,
            plan=child.config.plan,
            student=student,
            teacher=child.log.view.name,
            checkpoint_every=child.config.learner.checkpoint_every,
            required=child.config.loss.requirements(),
            vocab_size=child.task.tokenizer.vocab_size,
            lease_s=child.config.limits.lease_s,
            learner_version=partial(
                parent_version,
                parent_batch_size=parent.config.learner.batch_size,
                batch_size=child.config.learner.batch_size,
            ),
        )
        num_steps = child.config.learner.num_steps
        with bar(console, child.log.run_id, num_steps - first, "steps") as advance:
            await _shown(stage, worker, first, advance)
    return Replayed(child.log.run_id, num_steps - first, is_exact, ends_as_parent(parent, child), time.time() - started)


async def evaluate_replay(child: OpenRun, first: int) -> None:
    """Evaluate the first, every `evaluate.every`-th and the last version of a replay; done ones are kept."""
    last, every = child.config.learner.num_steps, child.config.evaluate.every
    numbers = [number for number in versions_to_evaluate(last, every or last) if number > first]
    worker = child.worker("evaluate")
    async with worker.alive():
        stage, sampler = evaluate_stage(child, worker)
        try:
            await stage.run([first, *numbers])
        finally:
            await sampler.close()


async def outcomes(children: Sequence[OpenRun], *, num_prompts: int, console: Console) -> list[Outcome]:
    """What the last version of each run does on the same held-out prompts, with the same random numbers.

    Args:
        num_prompts: 0 for as many as the runs evaluate with.
    """
    first = children[0]
    if num_prompts:
        asked = first.config.evaluate.model_copy(update={"num_prompts": num_prompts})
        first = replace(first, config=first.config.model_copy(update={"evaluate": asked}))
    worker = first.worker("evaluate")
    stage, sampler = evaluate_stage(first, worker)
    found = []
    try:
        with bar(console, "evaluate", len(children), "arms") as advance:
            for child in children:
                version = child.log.latest_policy()
                assert version is not None
                found.append(outcome_of(*await stage.respond(child.log.read_policy(version))))
                advance(1)
    finally:
        await sampler.close()
    return found


def ends_as_parent(parent: OpenRun, child: OpenRun) -> bool | None:
    """Does the child's last version have the weights of the parent's version at the same place of the log?"""
    last = child.log.latest_policy()
    indices = child.config.plan.num_indices
    number, rest = divmod(indices, parent.config.learner.batch_size)
    theirs = None if rest else parent.log.find_policy(number)
    if last is None or theirs is None:
        return None
    return child.log.read_policy(last).safetensors == parent.log.read_policy(theirs).safetensors


async def _restore_parent_state(
    parent: OpenRun, replay: Replay, restore: Callable[[Mapping[str, bytes]], None], *, console: Console
) -> bool:
    """Give the child's student the parent's state, trained under the parent's own settings. Was it reached exactly?"""
    student = student_of(parent.config, student_skeleton(parent.log))
    with bar(console, f"to version {replay.first_version}", replay.first_version, "steps at most") as advance:
        reached = await train_to(
            parent.log,
            student,
            replay.first_version,
            read_step=partial(read_step, parent.log, parent.config),
            on_step=lambda step: advance(1),
        )
    restore(student.checkpoint())
    return reached.is_exact


async def _shown(stage: LearnStage, worker: Worker, first: int, advance: Advance) -> None:
    """Run the stage; move the bar as its steps are done."""
    running = asyncio.create_task(stage.run())
    shown = first
    try:
        while not running.done():
            await asyncio.wait([running], timeout=0.5)
            done = max(shown, worker.status.step or 0)
            advance(done - shown)
            shown = done
    finally:
        running.cancel()
    await running
