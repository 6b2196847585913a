"""Starting and stopping runs: what is asked is stored first, then Prefect is told. Repeating any call is harmless.

create: idempotency key -> launch record -> flow run        a crash between two of them is mended by the repeat
stop:   request -> flow run cancelled -> the flow records `stopped` -> paused or cancelled
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from api.problems import ProblemError
from api.reader import TERMINAL, RunReader
from api.schemas import Run, RunCreate
from asyncopd.config import RunConfig, load_config
from asyncopd.errors import ConfigError, ServerAwayError
from asyncopd.local.stack import FlowRun, create_flow_run
from flows.preflight import preflight
from storage.runs import RequestedState

TRAIN = "asyncopd/train"


class RunLauncher:
    """Launches and stops runs of one storage root."""

    def __init__(self, reader: RunReader, *, root: str, configs: Path) -> None:
        self._reader, self._root, self._configs = reader, root, configs
        self._launches = reader.launches

    def files(self) -> tuple[tuple[Path, int], ...]:
        """Every configuration's file with the time of its last change, ns."""
        return tuple((path, path.stat().st_mtime_ns) for path in sorted(self._configs.glob("*.yaml")))

    def create(self, asked: RunCreate, idempotency_key: str | None) -> tuple[Run, bool]:
        """Launch a run; the second value says whether an earlier request made it.

        Raises:
            ProblemError: 409 for an id or idempotency key that already stands for something else.
            ConfigError: the configuration cannot work, or a model or file that it names.
            StoreUnusableError: the storage root has no room or cannot be written.
            ServerAwayError: Prefect does not answer; the launch is stored, and repeating the request goes on with it.
        """
        config = self._resolve(asked)
        preflight(config)
        digest = hashlib.sha256(json.dumps(asked.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        run_id = asked.run_id or f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        if idempotency_key is not None:
            known = self._launches.claim_key(idempotency_key, {"run_id": run_id, "body_sha256": digest})
            run_id = known["run_id"]
            if known["body_sha256"] != digest:
                detail = f"This Idempotency-Key launched {run_id} with another body. Use a new key for a new run."
                raise ProblemError(409, "idempotency-key-reused", detail)
        launch = {"config": config.model_dump(mode="json"), "body_sha256": digest}
        replayed = not self._launches.record_launch(run_id, launch)
        if replayed:
            self._check_same(run_id, launch, idempotency_key)
        elif self._reader.find(run_id) is not None:
            raise ProblemError(409, "run-exists", f"Run {run_id} exists. Choose another run_id, or resume it.")
        if self._launches.find_flow_run(run_id) is None:
            try:
                self._start(run_id, {"config": launch["config"], "run_id": run_id}, idempotency_key=run_id)
            except ServerAwayError as error:
                again = "with its Idempotency-Key" if idempotency_key else f'with "run_id": "{run_id}"'
                raise ServerAwayError(f"{error} The launch is stored; repeat the request {again}.") from error
        return self._reader.run(run_id), replayed

    def stop(self, run_id: str, state: RequestedState) -> Run:
        """Pause or cancel: the flow stops every role within ten seconds, and nothing stored is lost.

        Raises:
            ProblemError: 404, or 409 when the run is over.
        """
        run = self._reader.run(run_id)
        if run.status in TERMINAL:
            if run.status == ("paused" if state == "paused" else "cancelled"):
                return run
            raise ProblemError(409, "run-is-over", f"Run {run_id} is {run.status}; only a run that goes on is stopped.")
        self._launches.record_request(run_id, state)
        if run.flow_run_id is not None:
            FlowRun(run.flow_run_id).cancel()
        return self._reader.run(run_id)

    def resume(self, run_id: str) -> Run:
        """Go on with a run that was paused, cancelled or failed, or whose processes are gone.

        Raises:
            ProblemError: 404, or 409 when it is finished or still going on.
        """
        run = self._reader.run(run_id)
        if run.status not in ("paused", "cancelled", "failed") and not self._reader.is_abandoned(run_id):
            detail = f"Run {run_id} is {run.status}; only a stopped run is resumed."
            more = "To train more, launch another or replay this one."
            raise ProblemError(409, "run-not-stopped", f"{detail} {more}")
        launch = self._launches.find_launch(run_id)
        known = self._reader.find(run_id) is not None
        # A run that its flow never came to create is created now.
        config = {} if known or launch is None else {"config": launch["config"]}
        self._start(run_id, {"run_id": run_id, **config})
        # Last: a run that Prefect did not hear of is not on its way, and may be resumed again.
        self._launches.record_request(run_id, "running")
        return self._reader.run(run_id)

    def _resolve(self, asked: RunCreate) -> RunConfig:
        if (asked.config is None) == (asked.config_name is None):
            raise ProblemError(422, "config-missing", "Give exactly one of `config_name` and `config`.")
        root = asked.overrides.get("storage.root", self._root)
        if root != self._root:
            raise ConfigError(f"storage.root: this service keeps its runs in {self._root}. Leave storage.root out.")
        overrides = {**asked.overrides, "storage.root": self._root}
        if asked.config is not None:
            return load_config(asked.config, overrides)
        # Looked up in the listing, never joined into a path: a name cannot lead out of the folder.
        paths = {path.stem: path for path, _ in self.files()}
        if asked.config_name not in paths:
            expected = f"There is no configuration {asked.config_name!r}. Expected one of {list(paths)}."
            raise ProblemError(422, "no-such-config", expected)
        return load_config(paths[asked.config_name], overrides)

    def _check_same(self, run_id: str, body: Mapping[str, Any], idempotency_key: str | None) -> None:
        launch = self._launches.find_launch(run_id)
        if idempotency_key is not None:
            is_repeat = launch is not None and launch["body_sha256"] == body["body_sha256"]
        else:
            # Without a key, a repeat is told from a second request by this: the first came to nothing.
            is_started = self._launches.find_flow_run(run_id) is not None
            is_repeat = launch is not None and not is_started and launch["config"] == body["config"]
        if not is_repeat:
            detail = f"Run {run_id} was launched before. Choose another run_id; an Idempotency-Key makes repeats safe."
            raise ProblemError(409, "run-exists", detail)

    def _start(self, run_id: str, parameters: Mapping[str, Any], *, idempotency_key: str | None = None) -> None:
        flow_run = create_flow_run(
            TRAIN, {**parameters, "root": self._root}, name=run_id, idempotency_key=idempotency_key
        )
        self._launches.record_flow_run(run_id, flow_run.id)
