"""A comparison of estimators: replays from one start on identical rollouts, then the same held-out prompts for all.

    ReplayRequest with arms --> one child run each --> Outcome of each last version --> paired differences, compare.md

Everything is checked, and every child created, before the first is trained. Without Prefect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from asyncopd.config.requests import ReplayRequest, arm_name
from asyncopd.evaluate import Difference, Outcome, accuracy_difference, kl_difference, outcome_of
from asyncopd.local.console import bar, console_table
from asyncopd.local.processes import home
from asyncopd.report.text import table
from asyncopd.study.cells import digest
from flows.replay import open_replay, start_of, train_replay
from flows.wiring import OpenRun, evaluate_stage, open_stored_run
from storage.replay import replays_asked
from storage.stores import open_store

HEADER = ["arm", "accuracy", "difference", "paired ±", "unpaired ±", "KL nats", "difference", "paired ±", "unpaired ±"]
NOTE = (
    "All arms trained on the same rollouts from the same start, and answered the same {prompts} held-out prompts with "
    "the same random numbers. A difference is arm minus first arm with its standard error over prompts: paired (prompt "
    "by prompt), and unpaired (as if each arm had prompts of its own). It is about these trained students; other "
    "rollouts or seeds would train others."
)


async def run_comparison(root: str, run_id: str, asked: ReplayRequest, *, console: Console, out: str | None) -> None:
    """`asyncopd replay --compare …`."""
    parent = open_stored_run(root, run_id)
    opened = [open_replay(parent, arm) for arm in replays_asked(parent.log, parent.config, asked)]
    for child, arm in opened:
        await train_replay(parent, child, arm, console=console)
    children = [child for child, _ in opened]
    measured = await outcomes(children, num_prompts=asked.num_prompts, console=console)
    rows = comparison_rows([arm_name(arm) for arm in asked.compare], measured)
    _, first = opened[0]
    note = NOTE.format(prompts=len(measured[0].correct_B))
    title = f"{run_id}, steps {first.first_version} to {first.last_version}, from {start_of(first)}"
    folder = folder_of(out, f"{run_id}-compare", [child.log.run_id for child in children])
    open_store(folder).put("compare.md", f"# {title}\n\n{table(HEADER, rows)}\n\n{note}\n".encode())
    console.print(console_table(f"{len(rows)} arms on the same rollouts", HEADER, rows))
    console.print(note, highlight=False)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)


async def outcomes(children: Sequence[OpenRun], *, num_prompts: int, console: Console) -> list[Outcome]:
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


def comparison_rows(names: Sequence[str], arms: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Each arm's accuracy and KL, and its differences from the first."""

    def errors(difference: Difference, scale: float, digits: int) -> tuple[str, ...]:
        return (
            f"{scale * difference.value:+.{digits}f}",
            f"{scale * difference.paired_error:.{digits}f}",
            f"{scale * difference.unpaired_error:.{digits}f}",
        )

    none = ("", "", "")
    return [
        (
            name,
            f"{100 * arm.accuracy:.1f} %",
            *(errors(accuracy_difference(arms[0], arm), 100, 2) if number else none),
            f"{arm.kl_nats:.4f}",
            *(errors(kl_difference(arms[0], arm), 1, 4) if number else none),
        )
        for number, (name, arm) in enumerate(zip(names, arms, strict=True))
    ]


def folder_of(out: str | None, name: str, question: Any) -> str:
    """--out, or a folder beside the run's reports that the same question finds again."""
    return out or str(home() / "reports" / f"{name}-{digest(question)}")
