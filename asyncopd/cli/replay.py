"""`asyncopd replay | backfill | counterfactual`: the options, and the child process. Loads no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from asyncopd.config import RunConfig, parse_override
from asyncopd.config.requests import Backfill
from asyncopd.errors import ConfigError
from storage.replay import (
    check_backfill,
    check_counterfactual,
    check_scores,
    num_trained,
    replay_of,
    resolved_replay,
    steps_from,
    vocab_size_of,
)
from storage.runs import open_run
from storage.stores import open_store

COMMANDS = {
    "replay": "train again from a run's log, with no sampler and no teacher, into a run of its own (docs/replay.md)",
    "backfill": "ask another teacher, or ask for more, about rollouts that exist; what exists stays as it is",
    "counterfactual": "one log under other staleness bounds and orders: loss, drift, ESS and waste",
}
STOPPED_BY_USER = 130
STOP_S = 20.0
"""Patience with a child after Ctrl-C; it ends within a step."""


def add_replay(commands: Any) -> None:
    """Add the three commands to the parser's commands."""
    options = {"replay": _replay_options, "backfill": _backfill_options, "counterfactual": _counterfactual_options}
    for name, description in COMMANDS.items():
        parser = commands.add_parser(name, help=description, description=description)
        parser.add_argument("run_id")
        parser.add_argument("--root", default=RunConfig().storage.root, help="storage root (default: %(default)s)")
        options[name](parser)
        parser.set_defaults(run=_run, command=name)


def _replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        default=":",
        metavar="FIRST:LAST",
        help="optimizer steps of the run, counted from 0, LAST not included: 40:100 starts from policy version 40 and "
        "ends with version 100 (default: all it trained)",
    )
    parser.add_argument(
        "--from-version", type=int, metavar="N", help="fork at policy version N: the same as --steps N:"
    )
    parser.add_argument(
        "--start",
        choices=("checkpoint", "weights"),
        default="checkpoint",
        help="checkpoint: the run's exact state, optimizer included (steps after the checkpoint before it are trained "
        "again on the way). weights: the published weights and a new optimizer. Default: %(default)s",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a changed setting (loss.*, learner.*, …), or scores=FOLDER, or scores={FOLDER: WEIGHT, …} for a mixture",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="one arm of a comparison on identical rollouts; give at least two",
    )
    parser.add_argument("--evaluate", action="store_true", help="evaluate the first and last version after training")
    parser.add_argument(
        "--prompts",
        type=int,
        default=0,
        metavar="N",
        help="how many held-out prompts each arm of a comparison answers (default: the run's evaluate.num_prompts)",
    )
    parser.add_argument("--out", help="folder of a comparison's table (default: beside the run's reports)")


def _backfill_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a changed setting of the run's teacher; another teacher has another name and something else that "
        "differs: --teacher name=hard --teacher smoothing=1e-4",
    )
    parser.add_argument("--top-k", type=_top_k, default=0, metavar="K", help="most likely ids per token, or `all`")
    parser.add_argument("--teacher-draws", type=int, default=0, metavar="M", help="ids per token drawn by the teacher")
    parser.add_argument(
        "--candidates",
        default="",
        metavar="head=K,num_draws=N,law=LAW",
        help="recompute the sampling student's candidates from its published weights",
    )
    parser.add_argument("--cache", action="store_true", help="share answers with other runs of the storage root")


def _counterfactual_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--staleness",
        type=staleness_list,
        default="0:64",
        metavar="LIST",
        help="bounds in policy versions: 0,2,8, or 0:64 for 0, 1, 2, 4 … 64 (the default)",
    )
    orders, policies = _some_of("index", "arrival"), _some_of("train", "drop", "hold")
    parser.add_argument("--order", type=orders, default="index,arrival", help="default: %(default)s")
    parser.add_argument("--on-stale", type=policies, default="train,drop,hold", help="default: %(default)s")
    parser.add_argument(
        "--lag", type=int, metavar="N", help="optimizer steps of delay for all bounds (default: as much as each allows)"
    )
    parser.add_argument(
        "--from-version", type=int, metavar="N", help="policy version every setting starts from (default: largest lag)"
    )
    parser.add_argument("--out", help="folder of tables and cells (default: beside the run's reports)")


def _top_k(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of ids, or all")
    return text if text == "all" else int(text)


def staleness_list(text: str) -> list[int]:
    """`0,2,8` as it stands; `0:64` as 0, 1, 2, 4, … 64."""
    if not re.fullmatch(r"\d+:\d+|\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected bounds in versions, like 0,2,8, or FIRST:LAST, like 0:64")
    first, colon, last = text.partition(":")
    if not colon:
        return [int(part) for part in text.split(",")]
    if int(first) > int(last):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:LAST with FIRST <= LAST")
    powers = [2**n for n in range(int(last).bit_length())]
    return sorted({int(first), *(p for p in powers if int(first) <= p <= int(last)), int(last)})


def _some_of(*choices: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(choices):
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(choices)}")
        return chosen

    return parse


def offline_command(command: str, options: Mapping[str, Any], *, watch_parent: bool = False) -> list[str]:
    """The child process that does the work of `command`.

    Args:
        options: those of the command line, by name; what is left out has its default.
    """
    parser = argparse.ArgumentParser()
    add_replay(parser.add_subparsers())
    defaults = vars(parser.parse_args([command, str(options["run_id"])]))
    merged = {name: value for name, value in {**defaults, **options}.items() if name not in ("run", "command")}
    flags = ["--watch-parent"] if watch_parent else []
    return [sys.executable, "-m", "flows.offline", *flags, command, json.dumps(merged)]


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    command = offline_command(arguments.command, vars(arguments))
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal sent it to the child too, which stops after its step and says how to go on.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            return process.wait(STOP_S)
        process.kill()
        return STOPPED_BY_USER


def _check(arguments: argparse.Namespace) -> None:
    """Refuse here what needs no model: the child loads torch, which takes seconds, before it can say so."""
    log = open_run(open_store(arguments.root), arguments.run_id)
    config = RunConfig.model_validate(log.config())
    if arguments.command == "replay":
        replay, arms = replay_of(
            arguments.run_id,
            config,
            num_steps=num_trained(log),
            steps=steps_from(arguments.steps, arguments.from_version),
            start=arguments.start,
            overrides=arguments.overrides,
            compare=arguments.compare,
        )
        vocab_size = vocab_size_of(config)
        for asked in arms or [replay]:
            check_scores(arguments.run_id, asked.scores, log.teachers())
            if vocab_size is not None:
                resolved_replay(log, config, asked, vocab_size=vocab_size)
    elif arguments.command == "backfill":
        teacher = dict(parse_override(text) for text in arguments.teacher)
        check_backfill(
            config, Backfill(arguments.run_id, teacher, arguments.top_k, arguments.teacher_draws, arguments.candidates)
        )
        if not log.trajectory_shards():
            raise ConfigError(f"run {arguments.run_id} has no trajectories yet; train it before back-filling.")
    else:
        check_counterfactual(log)


# Until these are functions of their own: what cyclopts is asked goes to the parser above.
Tokens = Annotated[str, Parameter(allow_leading_hyphen=True)]


def replay(*tokens: Tokens) -> int:
    return _parsed("replay", tokens)


def backfill(*tokens: Tokens) -> int:
    return _parsed("backfill", tokens)


def counterfactual(*tokens: Tokens) -> int:
    return _parsed("counterfactual", tokens)


def _parsed(command: str, tokens: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="asyncopd")
    add_replay(parser.add_subparsers())
    return _run(parser.parse_args([command, *tokens]))
