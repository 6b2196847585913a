"""Runs as the service shows them: read from storage as they grow, never held longer than they stay true.

    RunReader --one RunView for each run--> Run

Every method that reads blocks: routes are plain functions, which FastAPI calls in threads, and streams call them in
threads. `held` does not.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection

from api.problems import no_run
from api.schemas import Latest, Progress, Run, Worker
from asyncopd.errors import StorageError
from asyncopd.metrics import DRIFT, KL, LOSS
from asyncopd.report.measure import staleness_of, trained_per_s
from storage.history import (
    NUM_TOKENS,
    RECENT_STEPS,
    History,
    RunStatus,
    activity,
    doing,
    eta_s,
    is_silent,
    role_of,
    status_of,
)
from storage.layout import RunLayout
from storage.records import from_json
from storage.run_view import RunView
from storage.runs import LaunchLog, list_runs, open_run
from storage.stores.base import ObjectStore

MAX_STEPS = 100_000
"""Steps kept in memory, over all runs; 10,000 are about 30 MB."""
QUEUED = "waiting for a worker to start the flow"
SPARKLINE_POINTS = 60
FRESH_S = 0.25
"""A history this young is not read again: fifty requests a second cost four looks."""
TERMINAL: frozenset[RunStatus] = frozenset({"paused", "cancelled", "succeeded", "failed"})
"""States in which no flow works on the run."""


class RunReader:
    """All runs of one storage root."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.launches = LaunchLog(store)
        self._views: OrderedDict[str, RunView] = OrderedDict()
        self._created: dict[str, float] = {}
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """Ids of every run and of every launch whose flow has not created its run yet, sorted."""
        return sorted({*list_runs(self.store), *self.launches.launches()})

    def exists(self, run_id: str) -> bool:
        return self.find(run_id) is not None or self.launches.find_launch(run_id) is not None

    def view(self, run_id: str) -> RunView:
        """A run that exists in storage, read up to now. Raises ProblemError 404 otherwise."""
        view = self.find(run_id)
        if view is None:
            raise no_run(run_id, " yet: it is queued, and its flow creates it" if self.exists(run_id) else "")
        return view.refresh()

    def held(self, run_id: str) -> RunView | None:
        """A run that is in memory, as it was last read. Reads nothing."""
        with self._lock:
            if run_id in self._views:
                self._views.move_to_end(run_id)
            return self._views.get(run_id)

    def find(self, run_id: str) -> RunView | None:
        """The same, not refreshed; None where there is no such run."""
        if (held := self.held(run_id)) is not None:
            return held
        try:
            record = RunLayout(run_id).key("run")
        except StorageError:
            return None  # nothing can have such an id
        if not self.store.exists(record):
            return None
        # A replay reads the shards of the run that was sampled.
        view = RunView(open_run(self.store, run_id), fresh_s=FRESH_S)
        with self._lock:
            view = self._views.setdefault(run_id, view)
            while len(self._views) > 1 and sum(len(v.history.steps) for v in self._views.values()) > MAX_STEPS:
                self._views.popitem(last=False)
        return view

    def created(self, run_id: str) -> float:
        """When a run was created, or its launch stored; Unix seconds, 0 where nobody wrote it down."""
        if run_id not in self._created:
            # The launch first: a run must not change its place in the list when its flow creates it.
            launch = self.launches.find_launch(run_id)
            body = None if launch else self.store.find(RunLayout(run_id).key("run"))
            if launch:
                self._created[run_id] = float(launch["recorded"])
            elif body is not None:
                self._created[run_id] = float(from_json(body, run_id, dict).get("created") or 0.0)
            else:
                return 0.0
        return self._created[run_id]

    def newest(self, prefix: str = "") -> list[str]:
        """Ids that begin with `prefix`, newest first; reads no more than when each was created."""
        found = [run_id for run_id in self.ids() if run_id.startswith(prefix)]
        return sorted(found, key=lambda run_id: (self.created(run_id), run_id), reverse=True)

    def run(self, run_id: str) -> Run:
        """A run, or a launch that is still queued. Raises ProblemError 404."""
        view = self.find(run_id)
        if view is None:
            return self._queued(run_id)
        history, num_steps = view.refresh().history, view.config.learner.num_steps
        steps, record = history.steps, view.log.record
        status = status_of(history, num_steps, self.launches.find_request(run_id))
        failure = history.failures[-1] if history.failures and status == "failed" else None
        return Run(
            id=run_id,
            name=view.config.name,
            status=status,
            phase=_phase(history, status, num_steps),
            created=self.created(run_id),
            updated=steps[-1].finished if steps else None,
            config_hash=record.get("config_hash"),
            parent=record.get("parent"),
            progress=Progress(
                steps=len(steps),
                total_steps=num_steps - history.first_step,
                tokens=int(history.columns.values(NUM_TOKENS).sum()),
            ),
            latest=_latest(history),
            eta_s=eta_s(history, view.config.plan) if status == "running" else None,
            notes=view.config.caveats,
            workers=_workers(history, view.alive_workers()) if status not in TERMINAL else [],
            sparkline=[step.metrics.get(LOSS.key) for step in steps[:: max(1, -(-len(steps) // SPARKLINE_POINTS))]],
            error=f"{failure.role}: {failure.reason}" if failure else None,
            flow_run_id=self.launches.find_flow_run(run_id) or (history.states[-1].by if history.states else None),
        )

    def status(self, run_id: str, history: History) -> RunStatus:
        """The state of a run of which `history` is known, or of a queued launch. Raises ProblemError 404."""
        view = self.held(run_id)
        if view is None:
            return self._queued(run_id).status
        return status_of(history, view.config.learner.num_steps, self.launches.find_request(run_id))

    def is_abandoned(self, run_id: str) -> bool:
        """Did a flow say that it runs, and is it gone without having said more?"""
        view = self.find(run_id)
        if view is None:
            return False
        history = view.refresh().history
        is_said_to_run = bool(history.states) and not history.is_over
        return is_said_to_run and is_silent(history, self.launches.find_request(run_id))

    def _queued(self, run_id: str) -> Run:
        launch = self.launches.find_launch(run_id)
        if launch is None:
            raise no_run(run_id)
        request = self.launches.find_request(run_id)
        cancelled = request is not None and request.state == "cancelled"
        flow_run_id = self.launches.find_flow_run(run_id)
        phase = QUEUED if flow_run_id else f"stored, but Prefect has not heard of it: launch it again as {run_id}"
        return Run(
            id=run_id,
            name=launch["config"]["name"],
            status="cancelled" if cancelled else "queued",
            phase="cancelled before it began" if cancelled else phase,
            created=launch["recorded"],
            progress=Progress(steps=0, total_steps=launch["config"]["learner"]["num_steps"], tokens=0),
            latest=Latest(),
            sparkline=[],
            flow_run_id=flow_run_id,
        )


def _phase(history: History, status: RunStatus, num_steps: int) -> str:
    if status != "running":
        return {"succeeded": "finished", "queued": QUEUED}.get(status, status)
    if is_silent(history):
        return "without a sign of life: its processes may be gone; resume goes on with it"
    workers = history.workers
    if not workers:
        return "trained; its flow is about to end" if history.is_trained(num_steps) else "starting its roles"
    if all(role_of(beat) == "pretrain" for beat in workers):
        return f"making its models: {' · '.join(map(doing, workers))}"
    return f"training: {' · '.join(map(doing, workers))}"


def _workers(history: History, alive: Collection[str]) -> list[Worker]:
    return [
        Worker(
            worker=beat.worker,
            role=role_of(beat),
            activity=activity(beat.status),
            waiting_for=beat.status.waiting_for,
            tokens_per_s=beat.status.tokens_per_s,
            num_begun=beat.status.num_begun or 0,
            num_tokens_in_flight=beat.status.num_tokens_in_flight or 0,
        )
        for beat in history.workers
        if beat.worker in alive
    ]


def _latest(history: History) -> Latest:
    accuracy = history.evaluations[-1].accuracy if history.evaluations else None
    if not history.steps:
        return Latest(accuracy=accuracy)
    metrics, staleness = history.steps[-1].metrics, staleness_of(history.steps[-RECENT_STEPS:])
    return Latest(
        loss_nats=metrics.get(LOSS.key),
        kl_nats=metrics.get(KL.key),
        drift_nats=metrics.get(DRIFT.key),
        accuracy=accuracy,
        staleness_mean_versions=staleness.mean_versions,
        staleness_max_versions=staleness.max_versions,
        tokens_per_s=trained_per_s(history.steps[-RECENT_STEPS - 1 :]),
    )
