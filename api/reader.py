"""Runs as the service shows them: read from storage, folded as they grow, never held longer than they stay true.

    storage --RunFold.refresh (one look serves everybody)--> steps, states, evaluations --> Run, Metrics, ...

Every method blocks; routes are plain functions, which FastAPI calls in threads, and streams call them in threads.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from api.problems import ProblemError
from api.schemas import Latest, Progress, Run, RunStatus
from asyncopd.config import RunConfig
from asyncopd.errors import StorageError
from asyncopd.types import Evaluation, IndexRange, Span, TrainStep
from storage.launches import LaunchLog, WishRecord
from storage.layout import RunLayout
from storage.objects import ObjectStore
from storage.records import Failure, RunState, from_json
from storage.run_log import StoredRunLog
from storage.runs import list_runs, open_run

MAX_STEPS = 100_000
"""Steps kept in memory, over all runs; 10,000 are about 30 MB."""
FRESH_S = 0.25
"""A fold this young is not read again: fifty requests a second cost four looks."""
SPARKLINE_POINTS = 60
SILENT_S = 30.0
TERMINAL: frozenset[RunStatus] = frozenset({"paused", "cancelled", "succeeded", "failed"})
"""States in which no flow works on the run."""


class RunFold:
    """One run's history in memory, extended by what is new at every look."""

    def __init__(self, log: StoredRunLog) -> None:
        self.log = log
        self.config = RunConfig.model_validate(log.config())
        self.steps: list[TrainStep] = []
        self.states: list[RunState] = []
        self.evaluations: list[Evaluation] = []
        self.failures: list[Failure] = []
        self.num_rewinds = 0
        self._spans: dict[str, list[Span]] = {}
        self._shard_tokens: dict[str, dict[IndexRange, tuple[float, int]]] = {"generated": {}, "scored": {}}
        self._looked = 0.0
        self._lock = threading.Lock()

    def refresh(self) -> RunFold:
        """Read what is new, unless that was done a moment ago."""
        with self._lock:
            if time.monotonic() - self._looked > FRESH_S:
                self._read()
                self._looked = time.monotonic()
        return self

    def shard_tokens(self) -> dict[str, list[tuple[float, int]]]:
        """`generated` and `scored` -> (Unix time of publication, tokens) of every shard; each manifest is read once."""
        teacher = self.config.teacher.name
        log = self.log
        for stage, shards, find in (
            ("generated", log.trajectory_shards(), log.find_trajectories),
            ("scored", log.score_shards(teacher), partial(log.find_scores, teacher)),
        ):
            known = self._shard_tokens[stage]
            for shard in shards:
                if shard not in known and (manifest := find(shard)) is not None:
                    known[shard] = (manifest.created, int(manifest.facts["num_tokens"]))
        return {stage: list(known.values()) for stage, known in self._shard_tokens.items()}

    def spans(self) -> list[Span]:
        """All spans of all workers, by start; each object is read once, a worker's last one again."""
        keys = self.log.span_keys()
        with self._lock:
            last = {key.rsplit(".", 2)[0]: key for key in keys}
            # A worker that failed to write its newest object writes it again, with more in it.
            for key in keys:
                if key not in self._spans or (key == last[key.rsplit(".", 2)[0]] and not self.is_over):
                    self._spans[key] = self.log.read_spans(key)
            return sorted((span for spans in self._spans.values() for span in spans), key=lambda span: span.start)

    @property
    def first_step(self) -> int:
        """Number of its first step: not 0 in a replay that begins later."""
        return self.steps[0].step if self.steps else 0

    @property
    def is_over(self) -> bool:
        """Has the flow recorded the end of the run?"""
        return bool(self.states) and self.states[-1].state != "running"

    def _read(self) -> None:
        # The states first: what is read after the last of them is complete.
        states = self.log.run_states()
        if self.is_over and len(states) == len(self.states):
            return
        rewinds = self.log.rewinds()
        steps = self.steps
        for rewind in rewinds[self.num_rewinds :]:
            steps = [step for step in steps if step.step < rewind.to_step or step.rewind >= rewind.number]
        # A new list each time, so that readers in other threads keep a consistent one.
        steps = list(steps) if steps else self.log.steps()
        # A replay's first step has its parent's number.
        while (step := self.log.find_step(steps[-1].step + 1 if steps else 0)) is not None:
            steps.append(step)
        self.steps, self.num_rewinds, self.states = steps, len(rewinds), states
        self.evaluations = self.log.evaluations()
        self.failures = self.log.failures()


class RunReader:
    """All runs of one storage root."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.launches = LaunchLog(store)
        self._folds: OrderedDict[str, RunFold] = OrderedDict()
        self._created: dict[str, float] = {}
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """Ids of every run and of every launch whose flow has not created its run yet, sorted."""
        return sorted({*list_runs(self.store), *self.launches.launches()})

    def exists(self, run_id: str) -> bool:
        return self.find_fold(run_id) is not None or self.launches.find_launch(run_id) is not None

    def fold(self, run_id: str) -> RunFold:
        """A run that exists in storage, read up to now. Raises ProblemError 404 otherwise."""
        fold = self.find_fold(run_id)
        if fold is None:
            state = "is queued; its flow has not created it yet" if self.exists(run_id) else "does not exist"
            raise ProblemError(404, "no-such-run", f"Run {run_id!r} {state}. GET /v1/runs lists runs.")
        return fold.refresh()

    def find_fold(self, run_id: str) -> RunFold | None:
        """The same, not refreshed; None where there is no such run."""
        with self._lock:
            if run_id in self._folds:
                self._folds.move_to_end(run_id)
                return self._folds[run_id]
        try:
            record = RunLayout(run_id).record
        except StorageError:
            return None  # nothing can have such an id
        if not self.store.exists(record):
            return None
        # A replay reads the shards of the run that was sampled.
        fold = RunFold(open_run(self.store, run_id))
        with self._lock:
            fold = self._folds.setdefault(run_id, fold)
            while len(self._folds) > 1 and sum(len(f.steps) for f in self._folds.values()) > MAX_STEPS:
                self._folds.popitem(last=False)
        return fold

    def created(self, run_id: str) -> float:
        """When a run was created, or its launch stored; Unix seconds, 0 where nobody wrote it down."""
        if run_id not in self._created:
            body = self.store.find(RunLayout(run_id).record)
            if body is not None:
                self._created[run_id] = float(from_json(body, run_id, dict).get("created") or 0.0)
            else:
                launch = self.launches.find_launch(run_id)
                return float(launch["recorded"]) if launch else 0.0
        return self._created[run_id]

    def newest(self, prefix: str = "") -> list[str]:
        """Ids that begin with `prefix`, newest first; reads no more than when each was created."""
        found = [run_id for run_id in self.ids() if run_id.startswith(prefix)]
        return sorted(found, key=lambda run_id: (self.created(run_id), run_id), reverse=True)

    def run(self, run_id: str) -> Run:
        """A run, or a launch that is still queued. Raises ProblemError 404."""
        fold = self.find_fold(run_id)
        if fold is not None:
            fold.refresh()
            wish = self.launches.find_wish(run_id)
            return run_of(fold, wish, self.launches.find_flow_run(run_id))
        launch = self.launches.find_launch(run_id)
        if launch is None:
            raise ProblemError(404, "no-such-run", f"Run {run_id!r} does not exist. GET /v1/runs lists runs.")
        wish = self.launches.find_wish(run_id)
        cancelled = wish is not None and wish.wish == "cancelled"
        return Run(
            id=run_id,
            name=launch["config"]["name"],
            status="cancelled" if cancelled else "queued",
            phase="cancelled before it began" if cancelled else "waiting for a worker to start the flow",
            created=launch["recorded"],
            progress=Progress(steps=0, total_steps=launch["config"]["learner"]["num_steps"], tokens=0),
            latest=Latest(),
            sparkline=[],
            flow_run_id=self.launches.find_flow_run(run_id),
        )


def run_of(fold: RunFold, wish: WishRecord | None, flow_run_id: str | None) -> Run:
    """A run as it is shown."""
    record, steps = fold.log.record, fold.steps
    status = status_of(fold, wish)
    failure = fold.failures[-1] if fold.failures and status == "failed" else None
    return Run(
        id=fold.log.run_id,
        name=fold.config.name,
        status=status,
        phase=_phase(fold, status),
        created=record.get("created", 0.0),
        updated=steps[-1].finished if steps else None,
        config_hash=record.get("config_hash"),
        parent=record.get("parent"),
        progress=Progress(
            steps=len(steps),
            total_steps=fold.config.learner.num_steps - fold.first_step,
            tokens=sum(step.num_tokens for step in steps),
        ),
        latest=_latest(fold),
        sparkline=[step.metrics.get("train/loss_nats") for step in _thinned(steps, SPARKLINE_POINTS)],
        error=f"{failure.role}: {failure.reason}" if failure else None,
        flow_run_id=flow_run_id or (fold.states[-1].by if fold.states else None),
    )


def status_of(fold: RunFold, wish: WishRecord | None) -> RunStatus:
    """What the flow recorded, and what a user asked since."""
    state = fold.states[-1] if fold.states else None
    if state is None:
        if fold.steps and fold.steps[-1].step + 1 >= fold.config.learner.num_steps:
            return "succeeded"
        # A replay has no flow of its own that would record its state.
        return "running" if fold.steps else "queued"
    if state.state == "completed":
        return "succeeded"
    if state.state == "failed":
        return "failed"
    if state.state == "stopped":
        return "paused" if wish is not None and wish.wish == "paused" else "cancelled"
    if wish is not None and wish.recorded > state.recorded and wish.wish != "running":
        return "pausing" if wish.wish == "paused" else "cancelling"
    return "running"


def _phase(fold: RunFold, status: RunStatus) -> str:
    if status != "running":
        return {"succeeded": "finished", "queued": "created, not started"}.get(status, status)
    beats = [beat for beat in fold.log.heartbeats().values() if not beat.retired]
    if not beats:
        return "starting its roles"
    silent_s = time.time() - max(beat.beaten for beat in beats)
    if silent_s > SILENT_S:
        return f"silent for {silent_s:.0f} s: its processes may be gone; resume goes on with it"
    waits = sorted(
        f"{beat.status.get('role')} waits for {w}" for beat in beats if (w := beat.status.get("waiting_for"))
    )
    return "training" + (f": {'; '.join(waits)}" if waits else "")


def _latest(fold: RunFold) -> Latest:
    if not fold.steps:
        return Latest(accuracy=fold.evaluations[-1].accuracy if fold.evaluations else None)
    metrics, recent = fold.steps[-1].metrics, fold.steps[-21:]
    seconds = recent[-1].finished - recent[0].finished
    return Latest(
        loss_nats=metrics.get("train/loss_nats"),
        kl_nats=metrics.get("train/kl_nats"),
        drift_nats=metrics.get("train/drift_nats"),
        accuracy=fold.evaluations[-1].accuracy if fold.evaluations else None,
        staleness_mean_versions=metrics.get("train/staleness_mean_versions"),
        staleness_max_versions=metrics.get("train/staleness_max_versions"),
        tokens_per_s=sum(step.num_tokens for step in recent[1:]) / seconds if seconds > 0 else None,
    )


def _thinned(steps: Sequence[TrainStep], num_points: int) -> Sequence[TrainStep]:
    stride = max(1, -(-len(steps) // num_points))
    return steps[::stride]
