"""Everything a run has stored, read once and extended: page, terminal, report, SQL rows and audit look through this.

numbered records --probed-->  records by kind and key,  --events.surviving-> steps, evaluations, versions, ...
folders ----------listed--->  each read once            --refresh--> History (storage/history.py)
the whole run ----listed, with sizes and damage--> `everything`, which maintenance reasons about
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import takewhile
from typing import Any

from asyncopd.config import RunConfig
from asyncopd.config.schema import Limits
from asyncopd.errors import ShardCorruptError, StorageError
from asyncopd.records import Claim, Failure, Heartbeat, Manifest, Removal, Rewind, RunChange, RunState
from asyncopd.schedule import Arrival
from asyncopd.types import Evaluation, IndexRange, PolicyVersion, Span, TrainStep
from storage.events import config_in_force, possible_rewinds, surviving
from storage.history import History, is_alive, role_of
from storage.layout import parse, parse_shard, parse_version
from storage.records import from_json
from storage.run_log import StoredRunLog
from storage.stores.base import Entry, ObjectStore

KINDS: Mapping[str, type[Any]] = {
    "run": dict,
    "architecture": Manifest,
    "trajectories": Manifest,
    "scores": Manifest,
    "candidates": Manifest,
    "policy": Manifest,
    "checkpoint": Manifest,
    "step": TrainStep,
    "evaluation": Evaluation,
    "arrival": Arrival,
    "state": RunState,
    "change": RunChange,
    "rewind": Rewind,
    "claim": Claim,
    "heartbeat": Heartbeat,
    "spans": list[Span],
    "failure": Failure,
    "removal": Removal,
}
MANIFESTS = ("architecture", "trajectories", "scores", "candidates", "policy", "checkpoint")
UNFLUSHED = ("claim", "heartbeat")
"""Kinds that a power cut may leave half-written: nobody is refused anything for it."""
_PARALLEL_REQUESTS = 16
"""Records read at once from S3, where each costs a request."""


class RunView:
    """One run. `read` and `refresh` ask storage for what is new; everything else tells what was read.

    A run that does not exist reads as empty. Safe to share between threads.
    """

    def __init__(self, log: StoredRunLog, *, fresh_s: float = 0.0) -> None:
        """A history younger than `fresh_s` is not read again. A replay's shards are those of the run it reads."""
        self.log, self.store, self.layout, self.run_id = log, log.store, log.layout, log.run_id
        self.records: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        """Kind -> key -> what the record says; kinds without objects are present and empty."""
        self.entries: dict[str, Entry] = {}
        """Every object below the run's folder, by key. Like all below, filled by `everything` only."""
        self.broken: dict[str, StorageError] = {}
        """Records that cannot be read."""
        self.unknown: list[str] = []
        """Keys that the layout does not know: nothing is concluded from them, but what they name is not garbage, and
        those that carry a checksum must match it."""
        self.references: dict[str, list[str]] = {}
        """Data key -> keys of the manifests that promise it, quarantined ones not included."""
        self.set_aside: dict[str, str] = {}
        """Data key -> key of the quarantined manifest that promises it."""
        self.history = History()
        self._shards = log.shards
        self._config: tuple[int, RunConfig] | None = None
        self._is_complete = False
        self._fresh_s, self._refreshed = fresh_s, -math.inf
        self._lock = threading.RLock()

    @classmethod
    def everything(cls, store: ObjectStore, run_id: str) -> RunView:
        """All that a run has stored at one moment, for maintenance: sizes, every record, and what is wrong with some.

        It never changes afterwards. A run that goes on meanwhile may lack its newest objects; nothing in it is wrong.
        """
        view = cls(StoredRunLog(store, run_id))
        view.entries = {entry.key: entry for entry in store.entries(view.layout.root)}
        for key in list(view.entries):
            kind = parse(key).kind
            if kind == "unknown":
                view.unknown.append(key)
            if kind in KINDS or (kind in ("unknown", "quarantined") and key.endswith(".json")):
                view._examine(kind, key)
        view._is_complete = True
        return view

    # -- asking storage -------------------------------------------------------------------------------------------
    def read(self, *kinds: str) -> RunView:
        """Read what is new of these kinds of record (names of KINDS), in this order.

        Raises:
            ShardCorruptError: a record is not what was written. Half-written claims and heartbeats are left out.
            StorageError: storage does not answer, or newer code wrote a record.
        """
        layout, shards = self.layout, self._shards
        with self._lock:
            for kind in () if self._is_complete else kinds:
                if kind == "run":
                    self._find(kind, layout.key("run"))
                elif kind in ("state", "change", "rewind", "arrival"):
                    first, where = (0, shards) if kind == "arrival" else (1, layout)
                    while self._find(kind, where.key(kind, number=first + len(self.records[kind]))) is not None:
                        pass
                else:
                    self._read_listed(kind, self._list(kind))
        return self

    def listed(self, kind: str) -> list[PolicyVersion]:
        """The versions with a `policy`, `checkpoint`, `step` or `evaluation` record, sorted. Reads a listing only."""
        keys = list(self.records[kind]) if self._is_complete else self._list(kind)
        return sorted(version for key in keys if (version := parse_version(key)) is not None)

    @property
    def is_fresh(self) -> bool:
        """Was storage asked a moment ago?"""
        return time.monotonic() - self._refreshed < self._fresh_s

    def refresh(self) -> RunView:
        """Bring `history` up to date, unless that was done a moment ago: a probe for each kind of numbered record and
        for the next step, and listings of evaluations, failures and heartbeats. Raises as `read` does."""
        with self._lock:
            if not self.is_fresh:
                self.history = self._look(self.history)
                self._refreshed = time.monotonic()
        return self

    def find_step(self, number: int) -> TrainStep | None:
        """Step `number` of the surviving lineage, as far as rewinds were read."""
        # Step s made state s + 1, and counts exactly when that state does.
        states = possible_rewinds(number + 1, self.rewinds)
        steps = (self._find("step", self.layout.step(number, rewind)) for rewind in states)
        return next((step for step in steps if step is not None), None)

    def find_policy(self, number: int) -> PolicyVersion | None:
        """Version `number` of the surviving lineage, as far as rewinds were read."""
        versions = (PolicyVersion(number, rewind) for rewind in possible_rewinds(number, self.rewinds))
        return next((v for v in versions if self._find("policy", self.layout.key("policy", state=v)) is not None), None)

    def is_finished(self, config: RunConfig) -> bool:
        """Is every step of `config` trained, and the last version evaluated where evaluations are on?"""
        last = config.learner.num_steps
        if self.read("rewind").find_step(last - 1) is None:
            return False
        return not config.evaluate.every or any(e.version.number == last for e in self.read("evaluation").evaluations())

    # -- the run itself -------------------------------------------------------------------------------------------
    @property
    def record(self) -> Mapping[str, Any]:
        """What `create_run` stored. Raises ObjectMissingError."""
        found: dict[str, Any] | None = self._find("run", self.layout.key("run"))
        if found is None:
            raise self.store.missing(self.layout.key("run"))
        return found

    @property
    def config(self) -> RunConfig:
        """The configuration in force: the recorded one with every change since, in the root it is read from."""
        if self._config is None:
            self.read("change")
        num_changes = len(self.records["change"])
        if self._config is None or self._config[0] != num_changes:
            changes = [change for _, change in sorted(self.records["change"].items())]
            fields = config_in_force(self.record["config"], changes, root=self.store.url)
            self._config = (num_changes, RunConfig.model_validate(fields))
        return self._config[1]

    def find_config(self) -> RunConfig | None:
        """The same; None when the run's record is gone, broken, or holds none."""
        try:
            return self.config
        except (StorageError, KeyError, ValueError):
            return None

    # -- what counts ----------------------------------------------------------------------------------------------
    @property
    def rewinds(self) -> list[Rewind]:
        """Those that count: numbered from 1 without a gap."""
        by_number = {rewind.number: rewind for rewind in list(self.records["rewind"].values())}
        return [by_number[n] for n in takewhile(by_number.__contains__, range(1, len(by_number) + 1))]

    def states(self, kind: str) -> list[PolicyVersion]:
        """The surviving states of `policy`, `checkpoint` or `evaluation` records, oldest first."""
        parsed = (parse_version(key) for key in list(self.records[kind]))
        return surviving((version for version in parsed if version is not None), self.rewinds)

    def steps(self) -> list[TrainStep]:
        """The steps of the surviving lineage, in order."""
        by_state = {PolicyVersion(s.step + 1, s.rewind): s for s in list(self.records["step"].values())}
        return [by_state[state] for state in surviving(by_state, self.rewinds)]

    def evaluations(self) -> list[Evaluation]:
        """The evaluations of the surviving lineage, by version."""
        found = self.records["evaluation"]
        return [found[self.layout.key("evaluation", state=version)] for version in self.states("evaluation")]

    def latest_checkpoint(self) -> PolicyVersion | None:
        """The newest complete checkpoint of the surviving lineage."""
        return next(reversed(self.states("checkpoint")), None)

    # -- shards ---------------------------------------------------------------------------------------------------
    @property
    def manifests(self) -> dict[str, Manifest]:
        """All readable manifests, by key."""
        return {key: manifest for kind in MANIFESTS for key, manifest in self.records[kind].items()}

    def trajectories(self) -> dict[IndexRange, Manifest]:
        """The manifest of every shard of trajectories, in index order."""
        return _by_shard(self.records["trajectories"])

    def scores(self, teacher: str) -> dict[IndexRange, Manifest]:
        """The manifest of every shard of a teacher's scores, in index order."""
        return _by_shard({k: m for k, m in list(self.records["scores"].items()) if self.teacher_of(k) == teacher})

    def teachers(self) -> list[str]:
        """The teachers that have scored something, sorted."""
        return sorted({self.teacher_of(key) for key in list(self.records["scores"])})

    def teacher_of(self, key: str) -> str:
        """The teacher of a key of scores/."""
        return str(parse(key).fields["teacher"])

    # -- what happened --------------------------------------------------------------------------------------------
    def failures(self) -> list[Failure]:
        """Why roles failed, oldest first."""
        return [failure for _, failure in sorted(self.records["failure"].items())]

    def claims(self) -> list[Claim]:
        """Every claim ever made, by stage, shard and attempt; a half-written one is nobody's."""
        return sorted(self.records["claim"].values(), key=lambda claim: (claim.stage, claim.shard, claim.attempt))

    def spans(self) -> list[Span]:
        """All spans of all workers, by start."""
        spans = [span for batch in list(self.records["spans"].values()) for span in batch]
        return sorted(spans, key=lambda span: span.start)

    def beats(self) -> dict[str, Heartbeat]:
        """The last heartbeat of every worker, by worker."""
        return {beat.worker: beat for _, beat in sorted(self.records["heartbeat"].items())}

    def alive_workers(self, role: str = "", now: float | None = None) -> list[str]:
        """Workers, of one role or all, that give signs of life."""
        return self._alive(self.beats().values(), role, time.time() if now is None else now)

    def possibly_alive(self, role: str) -> list[str]:
        """The same, in `everything`, by the store's clock as well: a worker whose own is behind may be at work."""
        now, beats = time.time(), self.records["heartbeat"]
        by_store = [replace(beat, beaten=self.entries[key].modified) for key, beat in sorted(beats.items())]
        return sorted({*self.alive_workers(role, now), *self._alive(by_store, role, now)})

    @property
    def removed_keys(self) -> set[str]:
        """What maintenance took out of the run on purpose."""
        removals: list[Removal] = list(self.records["removal"].values())
        return {key for removal in removals for key in removal.keys}

    # -- private --------------------------------------------------------------------------------------------------
    def _alive(self, beats: Iterable[Heartbeat], role: str, now: float) -> list[str]:
        config = self.find_config()
        lease_s = (config.limits if config else Limits()).lease_s
        alive = (beat for beat in beats if is_alive(beat, lease_s=lease_s, now=now))
        return [beat.worker for beat in alive if role_of(beat).startswith(role)]

    def _look(self, known: History) -> History:
        self.read("state")
        states: list[RunState] = [state for _, state in sorted(self.records["state"].items())]
        if known.is_over and len(states) == len(known.states):
            return known
        if len(states) != len(known.states):
            # A resume may have changed settings, and says that it runs afterwards.
            self.read("change")
        rewinds = self.read("rewind").rewinds
        if known.steps and len(rewinds) == len(known.rewinds):
            steps = list(known.steps)
        else:
            steps = self.steps() or self.read("step").steps()
        num_kept = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], zip(known.steps, steps, strict=False)))
        # A replay's first step has its parent's number.
        while (step := self.find_step(steps[-1].step + 1 if steps else 0)) is not None:
            steps.append(step)
        self.read("evaluation", "failure", "heartbeat")
        return History(
            states=states,
            rewinds=rewinds,
            steps=steps,
            evaluations=self.evaluations(),
            failures=self.failures(),
            beats=self.beats(),
            columns=known.columns.extended(steps, num_kept),
        )

    def _find(self, kind: str, key: str) -> Any:
        """What the record under `key` says; None when there is none. Read once it is there."""
        with self._lock:
            if key not in self.records[kind] and not self._is_complete:
                body = self.store.find(key)
                if body is not None:
                    self.records[kind][key] = from_json(body, key, KINDS[kind])
            return self.records[kind].get(key)

    def _list(self, kind: str) -> list[str]:
        """Keys of the folder with records of this kind, and of others beside them."""
        layout = self._shards if kind in ("trajectories", "scores") else self.layout
        is_tree = kind in ("scores", "claim")
        return self.store.list(layout.folder(kind)) if is_tree else self.store.folder(layout.folder(kind)).keys

    def _read_listed(self, kind: str, keys: Sequence[str]) -> None:
        known = self.records[kind]
        for gone in known.keys() - set(keys):
            del known[gone]
        # A worker overwrites its heartbeat, and its newest spans when it failed to write them.
        is_open = set(keys) if kind == "heartbeat" else set()
        if kind == "spans":
            is_open = set({key.rsplit(".", 2)[0]: key for key in keys}.values())
        new = (key for key in keys if key.endswith(".json") and (key not in known or key in is_open))
        wanted = [key for key in new if parse(key).kind == kind]
        for key, body in zip(wanted, self._bodies(wanted), strict=True):
            try:
                if body is not None:
                    known[key] = from_json(body, key, KINDS[kind])
            except ShardCorruptError:
                if kind not in UNFLUSHED:
                    raise
                if kind == "claim":
                    known[key] = Claim(**parse(key).fields, worker="?", claimed=0.0)

    def _bodies(self, keys: Sequence[str]) -> Iterable[bytes | None]:
        if not self.store.url.startswith("s3://"):
            return map(self.store.find, keys)
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return list(pool.map(self.store.find, keys))

    def _examine(self, kind: str, key: str) -> None:
        """Read one record of `everything`."""
        body = self.store.find(key)
        if body is None:
            del self.entries[key]  # deleted since the listing
            return
        try:
            value = from_json(body, key, KINDS.get(kind, Manifest))
        except StorageError as error:
            if kind in KINDS or (kind == "unknown" and _is_damaged(body, key)):
                self.broken[key] = error
            return
        if kind in KINDS:
            self.records[kind][key] = value
        if kind == "quarantined":
            self.set_aside.update(dict.fromkeys(value.objects, key))
        elif isinstance(value, Manifest):
            for promised in value.objects:
                self.references.setdefault(promised, []).append(key)


def _by_shard(manifests: Mapping[str, Manifest]) -> dict[IndexRange, Manifest]:
    found = {shard: m for key, m in list(manifests.items()) if (shard := parse_shard(key)) is not None}
    return dict(sorted(found.items()))


def _is_damaged(body: bytes, key: str) -> bool:
    """Is this one of our records, of whatever kind, that was not written so? Foreign files are none."""
    try:
        from_json(body, key, dict)
    except StorageError:
        return b'"schema_version"' in body or b'"sha256"' in body
    return False
