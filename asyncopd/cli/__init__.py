"""The `asyncopd` command: which commands there are, and how an error becomes an exit status.

A command is named by import path, and only the one that runs is imported: `--help` loads neither torch nor Prefect.
A function is the command, its keyword arguments are the options, and its `Args:` their help.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console

from asyncopd import __version__
from asyncopd.errors import AsyncOPDError
from asyncopd.local.processes import past_proxies

REFUSED = 2
"""Exit status of a command line that cannot be understood, and of everything that is refused."""
STOPPED_BY_USER = 130

Root = Annotated[str, Parameter(help="Storage root.")]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one value of the configuration, e.g. staleness.max_staleness=0; may be repeated.",
    ),
]

COMMANDS = {
    "Runs": {
        "train:train": "Train through the deployment asyncopd/train, following it to its end.",
        "train:status": "Show the local stack, or what the roles of a run do now.",
        "train:config": "Show a resolved configuration, or the schema of all of them.",
        "service:worker": "Join a running run with one more process.\n\nIt claims work beside the others, may be "
        "killed at any time, and ends when nothing is left to do or the run is stopped. A second learner waits until "
        "the first is gone.",
    },
    "Questions to stored runs": {
        "replay:replay": "Train again from a run's log, with no sampler and no teacher, into a run of its own "
        "(docs/replay.md).",
        "replay:backfill": "Ask another teacher, or ask for more, about rollouts that exist; what exists stays as it "
        "is.",
        "replay:counterfactual": "One log under other staleness bounds and orders: loss, drift, ESS and waste.",
        "query:sql": "Ask the run log in SQL (docs/queries.md).",
        "models:export_model": "Write a version of the student as a folder that transformers and vLLM load, tokenizer "
        "included.",
        "query:export": "Write selected trajectories as a dataset.\n\nEvery row has its run, index, policy versions "
        "and teacher.",
    },
    "Before a run": {
        "plan:plan": "Predict throughput, overlap and staleness of a fleet, and its best split (docs/capacity.md).",
        "models:check_model": "Whether the engines agree about a model, and what training takes (docs/models.md).\n\n"
        "Status 1 when they do not, 2 when no run would take it.",
    },
    "This machine": {
        "service:up": "Start the local Prefect server, worker and service, and deploy prefect.yaml.",
        "service:down": "End the local stack and everything it started.",
        "service:serve": "Run the service: REST, live events and the page.",
    },
}
"""Group -> module below `asyncopd.cli` and function -> help; its first line is the one in the list of commands."""

FAMILIES = {
    ("Before a run", "study", "Measure which estimator to use (docs/estimators.md)."): {
        "plan:estimators": "Bias and variance of every estimator's gradient against drift, at equal teacher cost (1 "
        "minute).",
        "plan:staleness": "Accuracy and KL to the teacher against lag, for estimators, learning rates and seeds.",
    },
    ("Questions to stored runs", "maintain", "Verify, clean and mend stored runs (docs/maintenance.md)."): {
        "maintain:audit": "Verify every object of a run; status 1 when something is wrong.",
        "maintain:collect": "Remove garbage and what the run's retention policy lets go.",
        "maintain:quarantine": "Set a corrupt object aside, and say what follows.",
    },
    ("This machine", "token", "Create, list or revoke tokens of the service."): {
        "service:create": "Make a token; it is shown once.",
        "service:list_": "Names, scopes and ages.",
        "service:revoke": "Refuse a token from now on.",
    },
}
"""(group, command, help) -> its subcommands, as in COMMANDS."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors of ours end with status 2 and their message, without a traceback."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.update(past_proxies())
    try:
        status = _app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        path = " ".join(("asyncopd", *(error.command_chain or ())))
        _refuse(path, f"{error} See {path} --help.")
    except AsyncOPDError as error:
        _refuse(type(error).__name__, str(error))
    # A command answers with its status. Help and version have none; help that nobody asked for is a refusal.
    asked = {"--help", "-h", "--version"} & set(tokens)
    sys.exit(status if status is not None else 0 if asked else REFUSED)


def _refuse(subject: str, message: str) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]{subject}[/]: ", end="")
    console.print(message, markup=False)
    sys.exit(REFUSED)


def _app() -> App:
    # Without negatives: no --no-json and no --empty-set.
    style = Parameter(negative=(), show_default=_shown)
    app = App(
        "asyncopd",
        help="Asynchronous on-policy distillation.",
        version=f"asyncopd {__version__}",
        help_format="plaintext",
        default_parameter=style,
    )
    groups = {title: Group.create_ordered(title) for title in COMMANDS}
    for title, commands in COMMANDS.items():
        _add(app, commands, group=groups[title])
    for (title, name, about), commands in FAMILIES.items():
        family = App(name, help=about, group=groups[title])
        _add(family, commands)
        app.command(family)
    return app


def _add(app: App, commands: dict[str, str], **options: Any) -> None:
    for place, (path, about) in enumerate(commands.items()):
        name = path.partition(":")[2].rstrip("_").replace("_", "-")
        app.command(f"asyncopd.cli.{path}", name=name, help=about, sort_key=place, **options)


def _shown(default: Any) -> str | None:
    """A default as help shows it; None leaves it out."""
    if default is None or default is False or default == ():
        return None
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
