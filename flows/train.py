"""Flow `asyncopd` (deployment `asyncopd/train`): creates or resumes a run and sees it through.

    config --preflight--> Run --> pretrain (missing models) --> rollout, score, learn, evaluate --> report, artifacts

It holds no arithmetic and loads no model: the roles are child processes that meet in storage.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import httpx
from prefect import flow, get_run_logger
from prefect.artifacts import (
    acreate_link_artifact,
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import get_run_context
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from asyncopd.config import RunConfig, load_config
from asyncopd.config.load import safe_changes
from asyncopd.errors import ConfigError
from asyncopd.local.processes import TERMINATE_GRACE_S, RoleProcesses, RoleSpec, home, record_process
from asyncopd.local.stack import prefect_environment
from asyncopd.records import RunStateName
from asyncopd.schedule import LEARNER_PLACE
from flows.preflight import missing_models, preflight
from flows.report import report_run
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.runs import LaunchLog, create_run, list_runs, new_record, open_run
from storage.stores import open_store

PROGRESS_S = 10.0
"""Between updates of the progress artifact; each costs the server 30–50 ms."""


@flow(name="asyncopd", flow_run_name="{run_id}", log_prints=True)
async def train(
    config: str | dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    run_id: str | None = None,
    root: str | None = None,
) -> str | State[Any]:
    """Train a student by on-policy distillation, or go on with a run that stopped.

    Args:
        config: path of a YAML file, or its content as a mapping. New runs default to configs/quickstart.yaml.
        overrides: dotted keys that replace values of `config`, for example {"staleness.max_staleness": 0}.
        run_id: of the run to go on with; a new run takes this id when no run has it.
        root: storage root; defaults to the configuration's `storage.root`.
    Returns:
        The run id.
    """
    record_process("flow", os.getpid())
    resolved, log = _open_or_create(config, overrides or {}, run_id, root)
    say = get_run_logger().info
    flow_run = str(get_run_context().flow_run.id)  # type: ignore[union-attr]
    say(f"run {log.run_id} in {resolved.storage.root}")
    for caveat in resolved.caveats:
        get_run_logger().warning(caveat)
    started = time.time()
    if RunView(log).is_finished(resolved):
        say("every step is trained and evaluated already")
        await _publish_report(log, resolved, started)
        return log.run_id
    await asyncio.to_thread(await_previous_learner, log, resolved)
    log.record_state("running", by=flow_run)
    try:
        if missing_models(resolved, log.store):
            await _run_roles(resolved, log, [RoleSpec("pretrain")])
        await _run_roles(resolved, log, role_specs(resolved))
    except _CancelRequested:
        _record_end(log, "stopped", _requested_end(log), flow_run)
        again = f"prefect deployment run asyncopd/train -p run_id={log.run_id} -p root={resolved.storage.root}"
        return Cancelled(message=f"cancelled; `{again}` goes on")
    except (asyncio.CancelledError, TerminationSignal):
        # Prefect ends the process of a cancelled flow run; that may come before our own look at its state.
        _record_end(log, "stopped", _requested_end(log), flow_run)
        raise
    except BaseException as error:
        # Workers that joined from elsewhere learn of the end from storage alone.
        _record_end(log, "failed", f"{type(error).__name__}: {error}"[:500], flow_run)
        raise
    _record_end(log, "completed", "", flow_run)
    await _publish_report(log, resolved, started)
    return log.run_id


def role_specs(config: RunConfig) -> list[RoleSpec]:
    """The role processes of one run on one machine."""
    return [
        RoleSpec("learn"),
        *(RoleSpec("rollout", number) for number in range(config.rollout.workers)),
        *(RoleSpec("score", number) for number in range(config.score.workers)),
        *([RoleSpec("evaluate")] if config.evaluate.every else []),
    ]


def await_previous_learner(log: StoredRunLog, config: RunConfig) -> None:
    """Wait until no learner works on the run: the last flow's own needs seconds to end, a dead one a lease.

    Raises:
        ConfigError: it goes on beating; the run is being trained by another flow.
    """
    lease_s = config.limits.lease_s
    deadline = time.monotonic() + lease_s + 2 * TERMINATE_GRACE_S
    last = None
    while (holder := log.holder("learn", LEARNER_PLACE, lease_s=lease_s)) is not None:
        last = holder
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run {log.run_id} is being trained by {holder}, which is alive. A run has one learner: wait for it, "
                "stop that flow first, or add samplers and scorers with `asyncopd worker`."
            )
        time.sleep(0.2)
    if last is not None:
        log.retire(last)  # its lease ran out before our eyes; the next learner need not watch it for another


def _record_end(log: StoredRunLog, state: RunStateName, reason: str, flow_run: str) -> None:
    """Tell every worker of the run, wherever it is; unless another flow has gone on with the run in the meantime."""
    current = log.run_state()
    if current is not None and current.by == flow_run:
        log.record_state(state, by=flow_run, reason=reason)


def _requested_end(log: StoredRunLog) -> str:
    """Why somebody stopped the run: Prefect knows one way only, so the service writes down what was meant."""
    state, request = log.run_state(), LaunchLog(log.store).find_request(log.run_id)
    if request is None or (state is not None and request.recorded <= state.recorded):
        return "cancelled"
    return "paused" if request.state == "paused" else "cancelled"


class _CancelRequested(Exception):
    """Prefect's state of this flow run is Cancelling."""


def _open_or_create(
    config: str | dict[str, Any] | None, overrides: dict[str, Any], run_id: str | None, root: str | None
) -> tuple[RunConfig, StoredRunLog]:
    if root is not None:
        overrides = {**overrides, "storage.root": root}
    where = {key: value for key, value in overrides.items() if key == "storage.root"}
    store = open_store(load_config(config or "configs/quickstart.yaml", where).storage.root)
    if run_id is not None and run_id in list_runs(store):
        log = open_run(store, run_id)
        stored = RunConfig.model_validate(log.config())
        asked = load_config(config or stored.model_dump(mode="json"), overrides)
        changes = safe_changes(stored, asked, run_id=run_id)
        preflight(asked)
        if changes:
            log.record_change(changes)
        return asked, log
    resolved = load_config(config or "configs/quickstart.yaml", overrides)
    if run_id is not None and config is None and not overrides:
        raise ConfigError(
            f"there is no run {run_id} in {resolved.storage.root}. Existing runs: {list_runs(store)[-5:] or 'none'}. "
            "Name its storage root with `root`, or give a `config` to start a new run under that id."
        )
    preflight(resolved)
    # Such as `quickstart-20261121-024605-3f2a`, which sorts by time within a name.
    run_id = run_id or f"{resolved.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    return resolved, create_run(store, run_id, new_record(resolved))


async def _run_roles(config: RunConfig, log: StoredRunLog, specs: list[RoleSpec]) -> None:
    """Run role processes to their end, while watching for cancellation and reporting progress to Prefect."""
    logger = get_run_logger()
    processes = RoleProcesses(
        specs,
        run_id=log.run_id,
        root=config.storage.root,
        log_dir=home() / "logs" / log.run_id,
        env=prefect_environment(),
        max_restarts=config.limits.max_restarts,
        hang_s=config.limits.hang_s,
        beats=lambda: _beats_here(log),
        retire=lambda pid: log.retire_process(host=socket.gethostname(), pid=pid),
        failure_of=lambda role: next((f.reason for f in reversed(log.failures()) if f.role == role), None),
        say=logger.info,
    )
    running = asyncio.create_task(processes.run())
    watching = asyncio.create_task(_watch(config, log))
    try:
        done, _ = await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        for finished in done:
            finished.result()
    finally:
        for unfinished in (running, watching):
            unfinished.cancel()
        # Also when this coroutine itself is being cancelled: stopping is synchronous on purpose.
        processes.stop()


def _beats_here(log: StoredRunLog) -> dict[int, float]:
    """pid -> time of the last heartbeat, of the run's workers on this machine that did not retire."""
    return {
        beat.status.pid: beat.beaten
        for beat in log.heartbeats().values()
        if not beat.retired and beat.status.pid is not None and beat.status.host == socket.gethostname()
    }


async def _watch(config: RunConfig, log: StoredRunLog) -> None:
    """Raise _CancelRequested within two seconds of a cancellation; keep the progress artifact up to date."""
    flow_run_id = get_run_context().flow_run.id  # type: ignore[union-attr]
    artifact = await acreate_progress_artifact(0.0, key="training-progress", description=log.run_id)
    last_update = time.monotonic()
    async with get_client() as client:
        while True:
            await asyncio.sleep(1)
            try:
                flow_run = await client.read_flow_run(flow_run_id)
                if flow_run.state is not None and flow_run.state.is_cancelling():
                    raise _CancelRequested
                if time.monotonic() - last_update > PROGRESS_S:
                    last_update = time.monotonic()
                    policy = await asyncio.to_thread(log.latest_policy)
                    done = policy.number / config.learner.num_steps if policy else 0.0
                    await aupdate_progress_artifact(artifact, round(100 * done, 1))
            except httpx.TransportError:
                continue  # the roles meet in storage; a server that is away need not stop them


async def _publish_report(log: StoredRunLog, config: RunConfig, started: float) -> None:
    """Write the report into the run's folder and show it in Prefect as artifacts."""
    folder = home() / "reports" / log.run_id
    report = await asyncio.to_thread(report_run, log, config, folder)
    get_run_logger().info(f"report: {folder / 'report.md'} ({time.time() - started:.0f} s since the flow began)")
    await acreate_progress_artifact(100.0, key="training-progress", description=log.run_id)
    await acreate_markdown_artifact(report.markdown, key="report", description=log.run_id)
    await acreate_table_artifact(report.table, key="evaluations", description=log.run_id)
    await acreate_link_artifact(folder.as_uri(), link_text=f"plots and trace of {log.run_id}", key="run-folder")
