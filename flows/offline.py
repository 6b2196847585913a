"""Child process of `asyncopd replay | backfill | counterfactual`: work on a log that exists, without Prefect.

    cli_replay, or a Prefect flow --argv--> this process --> child run, score folder, or tables in --out

Ctrl-C and SIGTERM stop it between two writes; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from asyncopd.config import parse_override
from asyncopd.config.requests import Backfill, Replay, first_step
from asyncopd.errors import AsyncOPDError
from asyncopd.local.processes import home, watch_parent
from asyncopd.replay_text import (
    comparison_markdown,
    comparison_table,
    counterfactual_markdown,
    counterfactual_note,
    counterfactual_table,
)
from asyncopd.study.counterfactual import Cell, check_defined, settings_of
from flows.backfill import run_backfill
from flows.compare import log_of, run_cells, start_version
from flows.offline_replay import Replayed, evaluate_replay, open_replay, outcomes, train_replay
from flows.wiring import OpenRun, open_stored_run
from storage.replay import num_trained, replay_of, steps_from
from storage.stores import open_store

STOPPED_BY_USER, STOPPED = 130, 143


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command to its end; refusals end with status 2 and their message."""
    parser = argparse.ArgumentParser(prog="flows.offline", description=__doc__)
    parser.add_argument("--watch-parent", action="store_true", help="end when standard input does")
    parser.add_argument("command", choices=("replay", "backfill", "counterfactual"))
    parser.add_argument("options", type=json.loads, help="those of the command line, as JSON")
    parsed = parser.parse_args(argv)
    if parsed.watch_parent:
        watch_parent()
    try:
        sys.exit(asyncio.run(_run(parsed.command, argparse.Namespace(**parsed.options))))
    except AsyncOPDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        Console().print("\nstopped; nothing stored is lost. The same command goes on.", highlight=False)
        sys.exit(STOPPED_BY_USER)


async def _run(command: str, arguments: argparse.Namespace) -> int:
    main_task = asyncio.current_task()
    assert main_task is not None
    is_stopping = False

    def stop() -> None:
        nonlocal is_stopping
        is_stopping = True
        main_task.cancel()

    # Not on Windows, nor in a thread that is not the main one, where tests run.
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    work = {"replay": replay, "backfill": backfill, "counterfactual": counterfactual}[command]
    try:
        await work(arguments, Console())
    except asyncio.CancelledError:
        if is_stopping:
            return STOPPED
        raise
    return 0


async def replay(arguments: argparse.Namespace, console: Console) -> None:
    """`asyncopd replay`: one replay, or one per arm of a comparison."""
    parent = open_stored_run(arguments.root, arguments.run_id)
    base, arms = replay_of(
        arguments.run_id,
        parent.config,
        num_steps=num_trained(parent.log),
        steps=steps_from(arguments.steps, arguments.from_version),
        start=arguments.start,
        overrides=arguments.overrides,
        compare=arguments.compare,
    )
    if not arms:
        await _one(parent, base, arguments, console)
        return
    names = list(arguments.compare)
    # All are checked and created before the first is trained.
    opened = [open_replay(parent, arm, root=arguments.root) for arm in arms]
    for child, arm in opened:
        _say(await train_replay(parent, child, arm, console=console), arm, console)
    measured = await outcomes([child for child, _ in opened], num_prompts=arguments.prompts, console=console)
    title = f"{arguments.run_id}, steps {base.first_version} to {base.last_version}, from {_start(base)}"
    out = _out(arguments, "compare", [child.log.run_id for child, _ in opened])
    text = comparison_markdown(title, names, measured)
    open_store(str(out)).put("compare.md", text.encode())
    console.print(comparison_table(names, measured))
    console.print(text.rpartition("\n\n")[2], highlight=False)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


async def backfill(arguments: argparse.Namespace, console: Console) -> None:
    """`asyncopd backfill`: scores of another teacher, or wider ones, beside those that exist."""
    wanted = Backfill(
        run_id=arguments.run_id,
        teacher=dict(parse_override(text) for text in arguments.teacher),
        top_k=arguments.top_k,
        num_teacher_draws=arguments.teacher_draws,
        candidates=arguments.candidates,
    )
    done = await run_backfill(arguments.root, wanted, console=console, use_cache=arguments.cache)
    console.print(
        f"scores/{done.folder}: {done.num_shards} shards scored, {done.num_shards_found} were there; "
        f"{done.num_tokens_asked:,} tokens asked of the teacher, {done.num_tokens_cached:,} from the cache, "
        f"{done.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"train on them: asyncopd replay {arguments.run_id} --set scores={done.folder}", highlight=False, soft_wrap=True
    )


async def counterfactual(arguments: argparse.Namespace, console: Console) -> None:
    """`asyncopd counterfactual`: the log under other bounds, orders and policies."""
    run = open_stored_run(arguments.root, arguments.run_id)
    log = log_of(run)
    settings = settings_of(
        arguments.staleness,
        arguments.order,
        arguments.on_stale,
        recorded_staleness=log.recorded_staleness,
        lag=arguments.lag,
    )
    check_defined(settings, log)
    first, measured_from = start_version(settings, log, arguments.from_version)
    out = _out(arguments, "counterfactual", [run.config.digest(), str(first), str(measured_from), str(log.num_clocks)])
    store = open_store(str(out))
    found = [Cell.from_record(json.loads(store.get(key))) for key in store.folder("cells").keys]
    cells = await run_cells(
        run,
        log,
        settings,
        first=first,
        measured_from=measured_from,
        known={cell.setting: cell for cell in found},
        keep=lambda cell: store.put(
            f"cells/{_digest([repr(cell.setting)])}.json", json.dumps(cell.to_record()).encode()
        ),
        console=console,
    )
    lag = max(setting.lag for setting in settings)
    note = counterfactual_note(first=first, lag=lag, measured_from=measured_from, num_clocks=log.num_clocks)
    store.put(
        "counterfactual.md", counterfactual_markdown(f"Counterfactuals of {run.log.run_id}", cells, note).encode()
    )
    store.put("counterfactual.parquet", _parquet(cells))
    console.print(
        f"recorded in order {log.order} at staleness up to {log.recorded_staleness} versions", highlight=False
    )
    console.print(counterfactual_table(cells))
    console.print(note, highlight=False)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


async def _one(parent: OpenRun, asked: Replay, arguments: argparse.Namespace, console: Console) -> None:
    child, resolved = open_replay(parent, asked, root=arguments.root)
    _say(await train_replay(parent, child, resolved, console=console), resolved, console)
    if arguments.evaluate:
        await evaluate_replay(child, first_step(parent.config, child.config, resolved))
        for evaluation in child.log.evaluations():
            console.print(
                f"version {evaluation.version.number}: accuracy {100 * evaluation.accuracy:.1f} %, KL "
                f"{evaluation.kl_nats:.4f} ± {evaluation.kl_standard_error_nats:.4f} nats",
                highlight=False,
            )


def _say(done: Replayed, replay: Replay, console: Console) -> None:
    steps = f"{replay.first_version}:{replay.last_version}"
    changed = ", ".join(f"{key}={value}" for key, value in replay.settings.items()) or "no setting changed"
    scores = " + ".join(f"{weight:g} {name}" if weight != 1 else name for name, weight in replay.scores.items())
    equal = {None: "", True: "; ends with the parent's weights, bit for bit", False: "; ends with other weights"}
    console.print(
        f"{done.run_id}: steps {steps} of {replay.run_id} from {_start(replay)}, {changed}, scores "
        f"{scores}; {done.seconds:.1f} s{equal[done.is_equal]}",
        highlight=False,
        soft_wrap=True,
    )
    if not done.is_exact_start:
        console.print(
            f"version {replay.first_version}, trained again from the checkpoint before it, differs from the published "
            "weights: this machine or its threads round differently. --start weights begins from the published ones.",
            highlight=False,
        )


def _start(replay: Replay) -> str:
    optimizer = "its optimizer" if replay.start == "checkpoint" else "a new optimizer"
    return f"version {replay.first_version} with {optimizer}"


def _out(arguments: argparse.Namespace, kind: str, parts: Sequence[str]) -> Path:
    """--out, or a folder beside the run's reports that the same question finds again."""
    return Path(arguments.out or home() / "reports" / f"{arguments.run_id}-{kind}-{_digest(parts)}")


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _parquet(cells: Sequence[Cell]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**cell.to_record(), "waste": cell.waste} for cell in cells]), sink)
    return sink.getvalue()


if __name__ == "__main__":
    main()
