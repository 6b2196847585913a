"""What the service was asked for and is not yet, or no longer, in a run: launches, requests, idempotency keys."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.layout import parse, shared_key
from storage.records import from_json, to_json
from storage.stores.base import ObjectStore

RequestedState = Literal["running", "paused", "cancelled"]


@dataclass(frozen=True)
class StateRequest:
    """What a user last asked of a run."""

    state: RequestedState
    recorded: float
    """Unix time, seconds."""


class LaunchLog:
    """The service's own records in a storage root; any number of service processes share them."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def record_launch(self, run_id: str, fields: Mapping[str, Any]) -> bool:
        """Remember what a run was asked to be. False when a launch of that id exists."""
        key = shared_key("launch", run_id=run_id)
        return self._store.put_if_absent(key, to_json({**fields, "recorded": time.time()}))

    def find_launch(self, run_id: str) -> dict[str, Any] | None:
        """What `record_launch` stored, with `recorded`."""
        return self._find("launch", run_id)

    def launches(self) -> list[str]:
        """Run ids of all launches, sorted."""
        keys = self._store.folder(shared_key("launch", run_id="x").rpartition("/")[0]).keys
        return sorted(parsed.fields["run_id"] for key in keys if (parsed := parse(key)).kind == "launch")

    def record_flow_run(self, run_id: str, flow_run_id: str) -> None:
        """The flow run that now works on a run."""
        self._put("flow run", run_id, {"flow_run_id": flow_run_id})

    def find_flow_run(self, run_id: str) -> str | None:
        found = self._find("flow run", run_id)
        return None if found is None else str(found["flow_run_id"])

    def record_request(self, run_id: str, state: RequestedState) -> None:
        self._put("request", run_id, {"wish": state})

    def find_request(self, run_id: str) -> StateRequest | None:
        found = self._find("request", run_id)
        return None if found is None else StateRequest(found["wish"], found["recorded"])

    def claim_key(self, key: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What was first stored under an idempotency key: `fields`, or an earlier request's."""
        name = shared_key("idempotency", digest=hashlib.sha256(key.encode()).hexdigest())
        if self._store.put_if_absent(name, to_json(fields)):
            return dict(fields)
        return from_json(self._store.get(name), name, dict)

    def _put(self, kind: str, run_id: str, fields: Mapping[str, Any]) -> None:
        self._store.put(shared_key(kind, run_id=run_id), to_json({**fields, "recorded": time.time()}))

    def _find(self, kind: str, run_id: str) -> dict[str, Any] | None:
        key = shared_key(kind, run_id=run_id)
        body = self._store.find(key)
        return None if body is None else from_json(body, key, dict)
