"""A replay: creates the child run, brings its learner to the start, trains it from the parent's log. Without Prefect.

    ReplayRequest --> Replay, checked against the log --> child run --publish_start--> LearnStage --> versions and steps

No sampler and no teacher runs, except to evaluate, and then only after training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from rich.console import Console

from asyncopd.config.replay import Replay, first_step, parent_version
from asyncopd.config.requests import ReplayRequest, arm_name
from asyncopd.evaluate import versions_to_evaluate
from asyncopd.learner.restore import find_version, publish_start, train_to
from asyncopd.learner.stage import LearnStage
from asyncopd.local.console import bar
from flows.engines import student_skeleton
from flows.wiring import OpenRun, evaluate_stage, open_stored_run, student_of
from storage.replay import ReplayLog, read_step, replays_asked, resolved_replay
from storage.runs import create_run, list_runs, new_record


async def run_replay(root: str, run_id: str, asked: ReplayRequest, *, console: Console) -> None:
    """`asyncopd replay` without arms."""
    parent = open_stored_run(root, run_id)
    (replay,) = replays_asked(parent.log, parent.config, asked)
    child, replay = open_replay(parent, replay)
    await train_replay(parent, child, replay, console=console)
    if not asked.evaluate:
        return
    await evaluate_replay(child, first_step(parent.config, child.config, replay))
    for evaluation in child.log.evaluations():
        console.print(
            f"version {evaluation.version.number}: accuracy {100 * evaluation.accuracy:.1f} %, KL "
            f"{evaluation.kl_nats:.4f} ± {evaluation.kl_standard_error_nats:.4f} nats",
            highlight=False,
        )


def open_replay(parent: OpenRun, asked: Replay) -> tuple[OpenRun, Replay]:
    """The child run, created or found again, and the replay with its scores resolved.

    Raises:
        ConfigError: settings or a log that the replay cannot work with; nothing is created then.
    """
    find_version(parent.log, asked.first_version)
    vocab_size = parent.task.tokenizer.vocab_size
    replay, config = resolved_replay(parent.log, parent.config, asked, vocab_size=vocab_size)
    is_new = replay.child_id not in list_runs(parent.store)
    if is_new:
        create_run(parent.store, replay.child_id, new_record(config, replay.model_dump(mode="json")))
    # One that is found has the configuration it was made with, whatever defaults have changed since.
    child = open_stored_run(parent.store.url, replay.child_id)
    if is_new:
        # Engines load the student's architecture from the run they serve.
        child.log.publish_architecture(parent.log.read_architecture())
    return child, replay


async def train_replay(parent: OpenRun, child: OpenRun, replay: Replay, *, console: Console) -> None:
    """Train the child to its last step, from wherever it stopped, and say what came of it.

    Raises:
        ConfigError, NonFiniteError, ShardCorruptError: as LearnStage does.
    """
    started = time.time()
    assert isinstance(child.log, ReplayLog)
    first = first_step(parent.config, child.config, replay)
    worker = child.worker("learn")
    is_exact_start = True
    async with worker.alive():
        student = student_of(child.config, student_skeleton(child.log))
        if child.log.latest_checkpoint() is None:
            if replay.start == "weights":
                start = find_version(parent.log, replay.first_version)
                student.load(parent.log.read_policy(start).safetensors)
            else:
                is_exact_start = await _restore_parent_state(parent, replay, student.restore, console=console)
            publish_start(child.log, student, first, worker=worker.name)
        learner = child.config.learner
        stage = LearnStage(
            child.log,
            worker,
            child.config,
            student=student,
            teacher=child.log.view.name,
            vocab_size=child.task.tokenizer.vocab_size,
            learner_version=partial(
                parent_version, parent_batch_size=parent.config.learner.batch_size, batch_size=learner.batch_size
            ),
        )
        checkpoint = child.log.latest_checkpoint()
        assert checkpoint is not None
        with bar(console, child.log.run_id, learner.num_steps - checkpoint[0], "steps") as advance:
            await stage.run(on_step=lambda step: advance(1))
    said = "; ".join(
        [
            f"{child.log.run_id}: steps {replay.first_version}:{replay.last_version} of {replay.run_id} from "
            f"{start_of(replay)}, {arm_name(replay.settings) or 'no setting changed'}, scores {child.log.view.name}",
            f"{time.time() - started:.1f} s",
            *_end(parent, child),
        ]
    )
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    if not is_exact_start:
        console.print(
            f"version {replay.first_version}, trained again from the checkpoint before it, differs from the published "
            "weights: this machine or its threads round differently. --start weights begins from the published ones.",
            highlight=False,
        )


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


def start_of(replay: Replay) -> str:
    """The state that a replay starts from, in words."""
    optimizer = "its optimizer" if replay.start == "checkpoint" else "a new optimizer"
    return f"version {replay.first_version} with {optimizer}"


def _end(parent: OpenRun, child: OpenRun) -> list[str]:
    """Has the child's last version the weights of the parent's at the same place of the log? Nothing without one."""
    last = child.log.latest_policy()
    number, rest = divmod(child.config.plan.num_indices, parent.config.learner.batch_size)
    theirs = None if rest else parent.log.find_policy(number)
    if last is None or theirs is None:
        return []
    is_equal = child.log.read_policy(last).safetensors == parent.log.read_policy(theirs).safetensors
    return ["ends with the parent's weights, bit for bit" if is_equal else "ends with other weights"]


async def _restore_parent_state(
    parent: OpenRun, replay: Replay, restore: Callable[[Mapping[str, bytes]], None], *, console: Console
) -> bool:
    """Give the child's student the parent's state, trained under the parent's own settings. Was it reached exactly?"""
    student = student_of(parent.config, student_skeleton(parent.log))
    with bar(console, f"to version {replay.first_version}", replay.first_version, "steps at most") as advance:
        is_exact = await train_to(
            parent.log,
            student,
            replay.first_version,
            read_step=partial(read_step, parent.log, parent.config),
            on_step=lambda step: advance(1),
        )
    restore(student.checkpoint())
    return is_exact
