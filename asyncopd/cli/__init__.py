"""The `asyncopd` command. `--help` loads neither torch nor Prefect."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from asyncopd import __version__
from asyncopd.cli.follow import follow, show_report, show_status
from asyncopd.cli.maintain import add_maintain
from asyncopd.cli.plan import add_plan
from asyncopd.cli.progress import is_finished
from asyncopd.cli.query import add_export, add_sql
from asyncopd.cli.replay import add_replay
from asyncopd.cli.service import add_serve, add_worker
from asyncopd.cli.study import add_study
from asyncopd.cli_chaos import add_chaos
from asyncopd.config import RunConfig, load_config, parse_override
from asyncopd.config.resume import differences, safe_changes
from asyncopd.errors import AsyncOPDError, ConfigError, ServerAwayError, StackError
from asyncopd.local import stack
from asyncopd.local.prefect_api import FlowRun
from asyncopd.local.processes import home
from flows.preflight import preflight
from storage.run_log import StoredRunLog
from storage.runs import list_runs, missing_run, open_run
from storage.stores import open_store

STOPPED_BY_USER = 130
CANCEL_S = 30.0
"""Patience with a cancelled flow; its roles stop within ten seconds."""
SERVER_AWAY_S = 60.0
"""A server may be away this long, as while it is started again, before following a run gives up."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors of ours end with status 2 and their message, without a traceback."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        sys.exit(parsed.run(parsed))
    except AsyncOPDError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asyncopd", description="Asynchronous on-policy distillation.")
    parser.add_argument("--version", action="version", version=f"asyncopd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train through the deployment asyncopd/train, following it to its end")
    train.add_argument("config", nargs="?", help="YAML file (default configs/quickstart.yaml)")
    _add_set(train)
    train.add_argument("--run-id", help="go on with this run, or give a new one this id")
    train.add_argument("--root", help="storage root (default: the configuration's storage.root)")
    train.set_defaults(run=_train)

    up = commands.add_parser("up", help="start the local Prefect server, worker and service, and deploy prefect.yaml")
    up.set_defaults(run=_up)
    down = commands.add_parser("down", help="end the local stack and everything it started")
    down.set_defaults(run=_down)

    status = commands.add_parser("status", help="show the local stack, or what the roles of a run do now")
    status.add_argument("run_id", nargs="?")
    status.add_argument("--root", default="runs", help="storage root (default: runs)")
    status.set_defaults(run=_status)

    config = commands.add_parser("config", help="show a resolved configuration, or the schema of all of them")
    config.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    _add_set(config)
    config.add_argument("--schema", action="store_true", help="print the JSON schema instead")
    config.set_defaults(run=_config)

    add_study(commands)
    add_serve(commands)
    add_worker(commands)
    add_chaos(commands)
    add_maintain(commands)
    add_plan(commands)
    add_sql(commands)
    add_export(commands)
    add_replay(commands)
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace one value of the configuration, for example staleness.max_staleness=0; may be repeated",
    )


def _train(arguments: argparse.Namespace) -> int:
    console = Console()
    overrides = dict(parse_override(text) for text in arguments.overrides)
    if arguments.root:
        overrides["storage.root"] = arguments.root
    source = arguments.config or "configs/quickstart.yaml"
    resumes = _exists(arguments, overrides)
    config = _to_resume(arguments, overrides) if resumes else load_config(source, overrides)
    run_id = arguments.run_id or f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    parameters: dict[str, Any] = {"run_id": run_id, "config": str(Path(source)), "overrides": overrides}
    if resumes:
        parameters = {"run_id": run_id, "root": config.storage.root}
        changed = differences(_stored_config(config.storage.root, run_id), config)
        parameters["overrides"] = {key: new for key, (_, new) in changed.items()}
        if is_finished(_log_of(config, run_id), config) and (home() / "reports" / run_id).is_dir():
            show_report(home() / "reports" / run_id, console=console)
            return 0
    elif arguments.run_id and arguments.config is None and not arguments.overrides:
        _stored_config(config.storage.root, run_id)  # refuses: there is no such run
    # The flow checks the same, but a mistake should not have to wait for a server to start.
    preflight(config)
    stack.up(lambda line: console.print(f"[dim]{line}[/]", highlight=False))
    flow_run = _submit({name: value for name, value in parameters.items() if value}, console)
    try:
        state = follow(_log_of(config, run_id), config, console=console, is_over=_patiently(flow_run))
    except KeyboardInterrupt:
        return _cancel(flow_run, config, run_id, console)
    if state != "COMPLETED":
        console.print(f"[bold red]{state}[/]: ", end="")
        console.print(flow_run.message(), markup=False, highlight=False, soft_wrap=True)
        console.print(f"Logs of its roles: {home() / 'logs' / run_id}/", highlight=False, soft_wrap=True)
        console.print(_how_to_go_on(config, run_id), highlight=False, soft_wrap=True)
        return 1
    show_report(home() / "reports" / run_id, console=console)
    return 0


def _exists(arguments: argparse.Namespace, overrides: dict[str, Any]) -> bool:
    """Is there a run of the asked id?"""
    if not arguments.run_id:
        return False
    config = load_config(arguments.config or "configs/quickstart.yaml", _where(overrides))
    return arguments.run_id in list_runs(open_store(config.storage.root))


def _to_resume(arguments: argparse.Namespace, overrides: dict[str, Any]) -> RunConfig:
    """The configuration a run goes on with: the stored one and safe changes. Refuses any other change, and replays."""
    source = arguments.config or "configs/quickstart.yaml"
    stored = _stored_config(load_config(source, _where(overrides)).storage.root, arguments.run_id)
    parent = _log_of(stored, arguments.run_id).record.get("parent")
    if parent:
        raise ConfigError(
            f"run {arguments.run_id} is a replay of {parent['run_id']} and has no sampler. Repeat the "
            "`asyncopd replay` command that made it to go on with it."
        )
    asked = load_config(arguments.config or stored.model_dump(mode="json"), overrides)
    safe_changes(stored, asked, run_id=arguments.run_id)
    return asked


def _where(overrides: dict[str, Any]) -> dict[str, Any]:
    """Only the override that says where runs are."""
    return {key: value for key, value in overrides.items() if key == "storage.root"}


def _patiently(flow_run: FlowRun) -> Callable[[], str | None]:
    """The flow run's terminal state, bridging a server that is away for up to SERVER_AWAY_S."""
    last_answer = time.monotonic()

    def terminal_state() -> str | None:
        nonlocal last_answer
        try:
            state = flow_run.terminal_state()
        except ServerAwayError:
            if time.monotonic() - last_answer > SERVER_AWAY_S:
                raise
            return None  # it may be restarting; storage has what matters
        last_answer = time.monotonic()
        return state

    return terminal_state


def _submit(parameters: dict[str, Any], console: Console) -> FlowRun:
    assignments = [f"{name}={_parameter(value)}" for name, value in parameters.items()]
    shown = " ".join(f"-p {assignment!r}" if " " in assignment else f"-p {assignment}" for assignment in assignments)
    console.print(f"$ prefect deployment run asyncopd/train {shown}", markup=False, highlight=False, soft_wrap=True)
    command = stack.prefect_command(
        "--no-prompt",
        "deployment",
        "run",
        "asyncopd/train",
        "--flow-run-name",
        parameters["run_id"],
        *(part for assignment in assignments for part in ("-p", assignment)),
    )
    result = subprocess.run(
        command, env=stack.child_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    created = re.search(r"UUID: ([0-9a-f-]{36})", result.stdout)
    if result.returncode or created is None:
        raise StackError(f"`prefect deployment run` failed:\n{(result.stdout + result.stderr)[-2000:]}")
    return FlowRun(created[1])


def _parameter(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cancel(flow_run: FlowRun, config: RunConfig, run_id: str, console: Console) -> int:
    console.print("\nstopping every role …", highlight=False)
    started = time.monotonic()
    is_over = _patiently(flow_run)
    try:
        flow_run.cancel()
    except ServerAwayError as error:
        console.print(f"{error} End everything with: asyncopd down", highlight=False, soft_wrap=True)
        console.print(_how_to_go_on(config, run_id), highlight=False, soft_wrap=True)
        return STOPPED_BY_USER
    while is_over() is None:
        if time.monotonic() - started > CANCEL_S:
            console.print(
                f"the flow did not stop within {CANCEL_S:.0f} s. End it, and everything else, with: asyncopd down",
                highlight=False,
            )
            return STOPPED_BY_USER
        time.sleep(0.2)
    console.print(f"stopped after {time.monotonic() - started:.1f} s; nothing stored is lost.", highlight=False)
    console.print(_how_to_go_on(config, run_id), highlight=False, soft_wrap=True)
    return STOPPED_BY_USER


def _how_to_go_on(config: RunConfig, run_id: str) -> str:
    """The command that resumes a run, or says that the flow never came to create it."""
    root = config.storage.root
    if run_id not in list_runs(open_store(root)):
        return f"Run {run_id} was not created yet; start it again as before."
    option = "" if root == RunConfig().storage.root else f" --root {root}"
    return f"Go on with: asyncopd train --run-id {run_id}{option}"


def _up(_: argparse.Namespace) -> int:
    stack.up(lambda line: Console().print(line, highlight=False))
    stack.up_service(lambda line: Console().print(line, highlight=False))
    Console().print(f"up: {stack.api_url().removesuffix('/api')}, {stack.service_url()}", highlight=False)
    return 0


def _down(_: argparse.Namespace) -> int:
    stack.down(lambda line: Console().print(line, highlight=False))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    console = Console()
    if arguments.run_id:
        config = _stored_config(arguments.root, arguments.run_id)
        show_status(_log_of(config, arguments.run_id), config, console=console)
        return 0
    found = stack.status()
    console.print(f"server: {found['server'] or 'none'}", highlight=False)
    console.print(f"worker: {'online' if found['worker_online'] else 'none'}", highlight=False)
    console.print(f"service: {found['service'] or 'none'}", highlight=False)
    for process in found["processes"]:
        console.print(f"  {process['name']} (pid {process['pid']})", highlight=False)
    return 0 if found["server"] and found["worker_online"] else 3


def _config(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return 0
    config = load_config(arguments.config, dict(parse_override(text) for text in arguments.overrides))
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    print(f"# digest {config.digest()}")
    return 0


def _stored_config(root: str, run_id: str) -> RunConfig:
    store = open_store(root)
    if run_id not in list_runs(store):
        raise missing_run(store, run_id)
    return RunConfig.model_validate(open_run(store, run_id).config())


def _log_of(config: RunConfig, run_id: str) -> StoredRunLog:
    return StoredRunLog(open_store(config.storage.root), run_id)
