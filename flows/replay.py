"""A replay: creates the child run, brings its learner to the start, trains it from the parent's log. Without Prefect.

    ReplayRequest --> Replay, checked against the log --> child run --start--> LearnStage --> versions and steps
                      one for each arm ---------------> child runs ----------> paired differences, compare.md

    start     checkpoint c <= n --restore--> steps c … n−1 again, from the log --> weights equal to published version n
              published version n --load--> the same weights with a new optimizer

No sampler and no teacher runs, except to evaluate, and then only after training. Everything is checked, and every child
created, before the first is trained.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from asyncopd.config.requests import Replay, ReplayRequest, arm_name, first_step
from asyncopd.errors import ConfigError
from asyncopd.evaluate import Difference, Outcome, accuracy_difference, kl_difference, outcome_of, versions_to_evaluate
from asyncopd.learner.stage import LearnStage
from asyncopd.learner.student import Student
from asyncopd.local.console import bar, console_table
from asyncopd.local.processes import home
from asyncopd.records import Facts
from asyncopd.report.text import table
from asyncopd.study.cells import digest
from asyncopd.types import PolicyVersion, PolicyWeights, ScoredTrajectory
from flows.engines import student_skeleton
from flows.wiring import OpenRun, evaluate_stage, open_stored_run, student_of
from storage.replay import ReplayLog, read_step, replays_asked, resolved_replay
from storage.run_log import StoredRunLog
from storage.runs import create_run, list_runs, new_record
from storage.stores import open_store

HEADER = ["arm", "accuracy", "difference", "paired ±", "unpaired ±", "KL nats", "difference", "paired ±", "unpaired ±"]
NOTE = (
    "All arms trained on the same rollouts from the same start, and answered the same {prompts} held-out prompts with "
    "the same random numbers. A difference is arm minus first arm with its standard error over prompts: paired (prompt "
    "by prompt), and unpaired (as if each arm had prompts of its own). It is about these trained students; other "
    "rollouts or seeds would train others."
)


async def run_replay(root: str, run_id: str, asked: ReplayRequest, *, console: Console, out: str | None = None) -> None:
    """`asyncopd replay`: one child run, or, with arms, one for each and their comparison, a table in `out`."""
    parent = open_stored_run(root, run_id)
    opened = [open_replay(parent, arm) for arm in replays_asked(parent.log, parent.config, asked)]
    for child, replay in opened:
        await train_replay(parent, child, replay, console=console)
    if asked.compare:
        await _compare(opened, asked, console=console, out=out)
    elif asked.evaluate:
        ((child, replay),) = opened
        await _evaluate(child, first_step(parent.config, child.config, replay))
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
    step = first_step(parent.config, child.config, replay)
    worker = child.worker("learn")
    is_exact_start = True
    async with worker.alive():
        student = student_of(child.config, student_skeleton(child.log))
        if (checkpoint := child.log.latest_checkpoint()) is not None:
            step, _ = checkpoint
        else:
            is_exact_start = await _start(student, parent, replay, console=console)
            weights = PolicyWeights(PolicyVersion(step), student.weights())
            child.log.publish_policy(weights, worker=worker.name, facts=Facts(step=step))
            # The checkpoint last: with it the child has begun, and asking for the replay again goes on with it.
            child.log.publish_checkpoint(step, 0, student.checkpoint(), worker=worker.name)
        learner, parent_size = child.config.learner, parent.config.learner.batch_size
        stage = LearnStage(
            child.log,
            worker,
            child.config,
            student=student,
            teacher=child.log.view.name,
            vocab_size=child.task.tokenizer.vocab_size,
            # On the parent's clock, whose version numbers tokens carry, and of the last index: a larger batch reaches
            # rollouts of versions that its first index came before.
            learner_version=lambda step: ((step + 1) * learner.batch_size - 1) // parent_size,
        )
        with bar(console, child.log.run_id, learner.num_steps - step, "steps") as advance:
            await stage.run(on_step=lambda step: advance(1))
    said = "; ".join(
        [
            f"{child.log.run_id}: steps {replay.first_version}:{replay.last_version} of {replay.run_id} from "
            f"{_start_of(replay)}, {arm_name(replay.settings) or 'no setting changed'}, scores {child.log.view.name}",
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


def _start_of(replay: Replay) -> str:
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


# -- the start ----------------------------------------------------------------------------------------------------
async def _start(student: Student, parent: OpenRun, replay: Replay, *, console: Console) -> bool:
    """Give the child's student the state that the replay starts from. Was it reached exactly?"""
    version = replay.first_version
    if replay.start == "weights":
        student.load(parent.log.read_policy(find_version(parent.log, version)).safetensors)
        return True
    # Trained under the parent's own settings.
    theirs, read = (
        student_of(parent.config, student_skeleton(parent.log)),
        partial(read_step, parent.log, parent.config),
    )
    with bar(console, f"to version {version}", version, "steps at most") as advance:
        is_exact = await train_to(parent.log, theirs, version, read_step=read, on_step=lambda step: advance(1))
    student.restore(theirs.checkpoint())
    return is_exact


async def train_to(
    log: StoredRunLog,
    student: Student,
    version: int,
    *,
    read_step: Callable[[int], Sequence[ScoredTrajectory]],
    on_step: Callable[[int], None] = lambda step: None,
) -> bool:
    """Bring a fresh student to the state that the run's learner had after `version` steps, optimizer included.

    Args:
        student: with the settings of the run, before its first step.
        read_step: the batch that the run trained in a step.
        on_step: called with each step trained on the way.
    Returns:
        Are the weights those of the published version, bit for bit?
    Raises:
        ConfigError: the run has not come that far.
    """
    published = find_version(log, version)
    step = 0
    if earlier := [checkpoint for checkpoint in log.checkpoints() if checkpoint[0] <= version]:
        step, rewind = earlier[-1]
        student.restore(log.read_checkpoint(step, rewind))
    else:
        student.load(log.read_policy(find_version(log, 0)).safetensors)
    for number in range(step, version):
        await asyncio.to_thread(student.train, number, await asyncio.to_thread(read_step, number))
        on_step(number)
    return student.weights() == log.read_policy(published).safetensors


def find_version(log: StoredRunLog, number: int) -> PolicyVersion:
    """Version `number` of the surviving lineage. Raises ConfigError when the run has not published it."""
    version = log.find_policy(number)
    if version is None:
        latest = log.latest_policy()
        raise ConfigError(
            f"run {log.run_id} has not published version {number}; its latest is "
            f"{latest.number if latest else 'none'}. Start the replay from one of those."
        )
    return version


# -- what came of it ----------------------------------------------------------------------------------------------
async def _evaluate(child: OpenRun, first: int) -> None:
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


async def _compare(
    opened: Sequence[tuple[OpenRun, Replay]], asked: ReplayRequest, *, console: Console, out: str | None
) -> None:
    """Ask the last version of every arm the same held-out prompts, and tabulate the differences from the first."""
    (_, first), children = opened[0], [child for child, _ in opened]
    measured = await _outcomes(children, num_prompts=asked.num_prompts, console=console)
    rows = _comparison_rows([arm_name(arm) for arm in asked.compare], measured)
    note = NOTE.format(prompts=len(measured[0].correct_B))
    title = f"{first.run_id}, steps {first.first_version} to {first.last_version}, from {_start_of(first)}"
    folder = folder_of(out, f"{first.run_id}-compare", [child.log.run_id for child in children])
    open_store(folder).put("compare.md", f"# {title}\n\n{table(HEADER, rows)}\n\n{note}\n".encode())
    console.print(console_table(f"{len(rows)} arms on the same rollouts", HEADER, rows))
    console.print(note, highlight=False)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)


async def _outcomes(children: Sequence[OpenRun], *, num_prompts: int, console: Console) -> list[Outcome]:
    """What the last version of each run does on the same held-out prompts, with the same random numbers.

    Args:
        num_prompts: 0 for as many as the runs evaluate with.
    """
    first = children[0]
    if num_prompts:
        asked = first.config.evaluate.model_copy(update={"num_prompts": num_prompts})
        first = replace(first, config=first.config.model_copy(update={"evaluate": asked}))
    stage, sampler = evaluate_stage(first, first.worker("evaluate"))
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


def _comparison_rows(names: Sequence[str], arms: Sequence[Outcome]) -> list[list[str]]:
    """Each arm's accuracy and KL, and its differences from the first."""

    def difference(found: Difference, scale: float, digits: int) -> list[str]:
        errors = (found.paired_error, found.unpaired_error)
        return [f"{scale * found.value:+.{digits}f}", *(f"{scale * error:.{digits}f}" for error in errors)]

    rows = []
    for number, (name, arm) in enumerate(zip(names, arms, strict=True)):
        of_accuracy = difference(accuracy_difference(arms[0], arm), 100, 2) if number else [""] * 3
        of_kl = difference(kl_difference(arms[0], arm), 1, 4) if number else [""] * 3
        rows.append([name, f"{100 * arm.accuracy:.1f} %", *of_accuracy, f"{arm.kl_nats:.4f}", *of_kl])
    return rows


def folder_of(out: str | None, name: str, question: Any) -> str:
    """--out, or a folder beside the run's reports that the same question finds again."""
    return out or str(home() / "reports" / f"{name}-{digest(question)}")
