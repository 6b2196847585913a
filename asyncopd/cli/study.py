"""`asyncopd study estimators|staleness`: the options, and the child process that does the work. Loads no torch."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

STUDIES = {
    "estimators": "bias and variance of every estimator's gradient against drift, at equal teacher cost (1 minute)",
    "staleness": "accuracy and KL to the teacher against lag, for estimators, learning rates and seeds",
}


def add_study(commands: Any) -> None:
    """Add `study` and its subcommands to the parser's commands."""
    study = commands.add_parser("study", help="measure which estimator to use (docs/estimators.md)")
    studies = study.add_subparsers(required=True, metavar="STUDY")
    for name, description in STUDIES.items():
        parser = studies.add_parser(name, help=description, description=description)
        parser.add_argument(
            "--out", required=True, metavar="DIR", help="cells, tables and plot; finished cells are reused"
        )
        parser.add_argument("--root", default="runs", help="storage root whose cache of pre-trained models is used")
        if name == "staleness":
            parser.add_argument("--quick", action="store_true", help="63 short cells, under 10 minutes on two cores")
            parser.add_argument("--workers", type=int, choices=(1, 2), default=2, help="processes (default 2)")
        parser.set_defaults(run=_run, study=name)


def study_command(study: str, *, out: str, root: str, quick: bool = False, workers: int = 2) -> list[str]:
    """The child process of a study."""
    options = ["--quick"] if quick else []
    return [
        sys.executable,
        "-m",
        "asyncopd.study",
        study,
        "--out",
        out,
        "--models",
        root,
        "--workers",
        str(workers),
        *options,
    ]


def _run(arguments: argparse.Namespace) -> int:
    command = study_command(
        arguments.study,
        out=arguments.out,
        root=arguments.root,
        quick=getattr(arguments, "quick", False),
        workers=getattr(arguments, "workers", 2),
    )
    try:
        return subprocess.call(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except KeyboardInterrupt:
        return 130
