"""`asyncopd train | status | config`: a run from its configuration to its report.

    config --preflight--> local stack --create_flow_run--> flow asyncopd/train --follow--> report
                                                  Ctrl-C --cancel--> stopped; nothing stored is lost

A mistake in the configuration is refused here, although the flow checks the same: it should not have to wait for a
server to start. Following changes nothing: several people may follow one run, and `asyncopd train --run-id` does again.
"""

from __future__ import annotations

import contextlib
import json
import math
import textwrap
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding

from asyncopd.cli import STOPPED_BY_USER, Overrides, Root
from asyncopd.cli.progress import ProgressWatch, panel, plain_line
from asyncopd.config import RunConfig, load_config, parse_override
from asyncopd.config.load import differences, safe_changes
from asyncopd.errors import ConfigError, ServerAwayError, StorageError
from asyncopd.local import stack
from asyncopd.local.console import PLAIN_EVERY_S, console_table
from asyncopd.local.processes import home
from asyncopd.local.stack import FlowRun, create_flow_run
from asyncopd.report.summary import Summary
from asyncopd.report.text import duration, headline, tables
from flows.preflight import preflight
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.runs import list_runs, open_run
from storage.stores import open_store

QUICKSTART = "configs/quickstart.yaml"
FAILED = 1
NOT_RUNNING = 3
"""Status of `asyncopd status` where no server or no worker runs."""
CANCEL_S = 30.0
"""Patience with a cancelled flow; its roles stop within ten seconds."""
SERVER_AWAY_S = 60.0
"""A server may be away this long, as while it is started again, before following a run gives up."""


def train(
    config: str | None = None,
    /,
    *,
    overrides: Overrides = (),
    run_id: str | None = None,
    root: Annotated[str | None, Parameter(help="Storage root (default: the configuration's storage.root).")] = None,
) -> int:
    """Train, or go on with a run that stopped.

    Args:
        config: YAML file (default configs/quickstart.yaml).
        run_id: Go on with this run, or give a new one this id.
    """
    console = Console()
    asked = dict(parse_override(text) for text in overrides) | ({"storage.root": root} if root else {})
    # Where runs are is known before anything else of the configuration is.
    where = load_config(config or QUICKSTART, {k: v for k, v in asked.items() if k == "storage.root"}).storage.root
    if run_id is not None and run_id in list_runs(open_store(where)):
        resolved, parameters = _to_resume(config, asked, run_id, where)
        report = home() / "reports" / run_id
        if RunView(_log_of(resolved, run_id)).is_finished(resolved) and report.is_dir():
            show_report(report, console=console)
            return 0
    else:
        resolved = load_config(config or QUICKSTART, asked)
        if run_id is not None and config is None and not overrides:
            stored_config(where, run_id)  # refuses: there is no such run
        run_id = run_id or f"{resolved.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        parameters = {"run_id": run_id, "config": str(Path(config or QUICKSTART)), "overrides": asked}
    preflight(resolved)
    for caveat in resolved.caveats:
        console.print(f"[yellow]Note.[/] {escape(caveat)}", highlight=False)
    stack.up(lambda line: console.print(f"[dim]{line}[/]", highlight=False))
    return _see_through(resolved, run_id, {name: value for name, value in parameters.items() if value}, console)


def status(run_id: str | None = None, /, *, root: Root = "runs") -> int:
    """Show what runs.

    Args:
        run_id: Of the run whose roles are shown; without it, the local stack is.
    """
    console = Console(highlight=False)
    if run_id is not None:
        config = stored_config(root, run_id)
        progress = ProgressWatch(RunView(_log_of(config, run_id)), config).look()
        Console().print(panel(progress, f"[bold]{escape(run_id)}[/]", config))
        return 0
    found = stack.status()
    console.print(f"server: {found['server'] or 'none'}")
    console.print(f"worker: {'online' if found['worker_online'] else 'none'}")
    console.print(f"service: {found['service'] or 'none'}")
    for process in found["processes"]:
        console.print(f"  {process['name']} (pid {process['pid']})")
    return 0 if found["server"] and found["worker_online"] else NOT_RUNNING


def config(config: str = QUICKSTART, /, *, overrides: Overrides = (), schema: bool = False) -> int:
    """Show a configuration.

    Args:
        config: YAML file.
        schema: Print the JSON schema instead.
    """
    if schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return 0
    resolved = load_config(config, dict(parse_override(text) for text in overrides))
    print(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), end="")
    print(f"# digest {resolved.digest()}")
    return 0


def stored_config(root: str, run_id: str) -> RunConfig:
    """The configuration a run of `root` was made with. Raises RunMissingError."""
    return RunConfig.model_validate(open_run(open_store(root), run_id).config())


def follow(
    view: RunView,
    config: RunConfig,
    *,
    console: Console,
    is_over: Callable[[], str | None],
    poll_s: float = 0.5,
    plain_every_s: float = PLAIN_EVERY_S,
) -> str:
    """Show the progress of a run until its flow is over. The run need not exist in storage yet.

    Args:
        is_over: the flow's terminal state, for example `COMPLETED`; None while it is scheduled or runs. Asked once
            per look; what it raises travels to the caller.
        plain_every_s: between lines where the console is not a terminal; the first and the last are always printed.
    Returns:
        What `is_over` answered.
    """
    watch = ProgressWatch(view, config)
    printed_s, num_failures = -math.inf, 0
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        while True:
            # Asked before looking, so that the last look sees everything the flow did.
            state = is_over()
            try:
                progress = watch.look()
            except StorageError as error:
                _print(console, f"storage does not answer, trying again: {error}")
            else:
                if live is None:
                    for failure in progress.failures[num_failures:]:
                        _print(console, f"failure: {failure}")
                    num_failures = len(progress.failures)
                    if state is not None or time.monotonic() - printed_s >= plain_every_s:
                        printed_s = time.monotonic()
                        _print(console, plain_line(progress, config))
                else:
                    title = f"[bold]{escape(view.run_id)}[/]  [dim]followed for {duration(progress.elapsed_s)}[/]"
                    live.update(panel(progress, title, config), refresh=True)
            if state is not None:
                return state
            time.sleep(poll_s)


def show_report(folder: Path, *, console: Console) -> None:
    """Print the report of a finished run from the folder that `write_report` wrote."""
    path = folder / "summary.json"
    if not path.exists():
        console.print(f"There is no report in {folder}: the flow ended before it wrote one.", markup=False)
        return
    summary = Summary.from_json(path.read_bytes())
    console.print()
    console.rule(f"[bold]{escape(summary.run_id)}", align="left")
    console.print(escape(headline(summary).replace("**", "")), highlight=False)
    for note in summary.notes:
        console.print(f"[yellow]Note.[/] {escape(note)}", highlight=False)
    for shown in tables(summary):
        console.print(Padding(console_table(*shown), (1, 0, 0, 0)))
    before, after = summary.examples[0] if summary.examples else (None, None)
    if before and after:
        width = 2 * console.width
        for when, said in (("asked", before.prompt), ("before", before.response), ("after", after.response)):
            shortened = textwrap.shorten(said, width, placeholder=" …")
            console.print(f"[dim]{when:<8}[/]{escape(shortened)}", highlight=False)
    for failure in summary.incidents.failures:
        console.print(f"[red]failure[/] {escape(failure)}", highlight=False)
    files = ("report.md", "quality.png", "timeline.png", "training.png", "staleness.png", "lengths.png", "trace.json")
    found = ", ".join(name for name in files if (folder / name).exists())
    _print(console, f"\nreport    {folder / 'report.md'}")
    _print(console, f"files     {found} (trace.json opens at https://ui.perfetto.dev)")


def _to_resume(
    source: str | None, overrides: dict[str, Any], run_id: str, root: str
) -> tuple[RunConfig, dict[str, Any]]:
    """(what a run goes on with: its stored configuration and safe changes; the flow's parameters).

    Raises:
        ConfigError: another change was asked for, or the run is a replay.
    """
    stored = stored_config(root, run_id)
    parent = _log_of(stored, run_id).record.get("parent")
    if parent:
        raise ConfigError(
            f"run {run_id} is a replay of {parent['run_id']} and has no sampler. Repeat the "
            "`asyncopd replay` command that made it to go on with it."
        )
    asked = load_config(source or stored.model_dump(mode="json"), overrides)
    safe_changes(stored, asked, run_id=run_id)
    changed = {key: new for key, (_, new) in differences(stored, asked).items()}
    return asked, {"run_id": run_id, "root": asked.storage.root, "overrides": changed}


def _see_through(config: RunConfig, run_id: str, parameters: dict[str, Any], console: Console) -> int:
    """Start the flow and follow it to its end. Returns the exit status."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()}
    shown = " ".join(f"-p {repr(f'{n}={text}') if ' ' in text else f'{n}={text}'}" for n, text in texts.items())
    _print(console, f"$ prefect deployment run asyncopd/train {shown}")
    flow_run = create_flow_run("asyncopd/train", parameters, name=run_id)
    try:
        state = follow(RunView(_log_of(config, run_id)), config, console=console, is_over=_patiently(flow_run))
    except KeyboardInterrupt:
        console.print("\nstopping every role …", highlight=False)
        _print(console, _cancel(flow_run))
        _print(console, _how_to_go_on(config, run_id))
        return STOPPED_BY_USER
    if state == "COMPLETED":
        show_report(home() / "reports" / run_id, console=console)
        return 0
    console.print(f"[bold red]{state}[/]: ", end="")
    _print(console, flow_run.message())
    _print(console, f"Logs of its roles: {home() / 'logs' / run_id}/")
    _print(console, _how_to_go_on(config, run_id))
    return FAILED


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


def _cancel(flow_run: FlowRun) -> str:
    """Stop a flow. Returns what became of it."""
    started = time.monotonic()
    is_over = _patiently(flow_run)
    try:
        flow_run.cancel()
    except ServerAwayError as error:
        return f"{error} End everything with: asyncopd down"
    while is_over() is None:
        if time.monotonic() - started > CANCEL_S:
            return f"the flow did not stop within {CANCEL_S:.0f} s. End it, and everything else, with: asyncopd down"
        time.sleep(0.2)
    return f"stopped after {time.monotonic() - started:.1f} s; nothing stored is lost."


def _how_to_go_on(config: RunConfig, run_id: str) -> str:
    """The command that resumes a run, or says that the flow never came to create it."""
    root = config.storage.root
    if run_id not in list_runs(open_store(root)):
        return f"Run {run_id} was not created yet; start it again as before."
    option = "" if root == RunConfig().storage.root else f" --root {root}"
    return f"Go on with: asyncopd train --run-id {run_id}{option}"


def _log_of(config: RunConfig, run_id: str) -> StoredRunLog:
    return StoredRunLog(open_store(config.storage.root), run_id)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
