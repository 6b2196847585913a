"""One Prefect flow run, seen through Prefect's REST API: state, message, cancellation. Imports no Prefect."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx

from asyncopd.errors import ServerAwayError, StackError
from asyncopd.local.stack import api_url, shown_url

BUSY_PAUSES_S = (0.5, 2.0)
"""Prefect answers 503 when its SQLite is locked for too long, having done nothing; its own client repeats, too."""
TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


@dataclass(frozen=True)
class FlowRun:
    """A flow run by its id."""

    id: str

    def state(self) -> dict[str, Any]:
        """Prefect's state object: `type`, `name`, `message`."""
        state: dict[str, Any] = _request("GET", f"/flow_runs/{self.id}")["state"] or {"type": "PENDING"}
        return state

    def terminal_state(self) -> str | None:
        """COMPLETED, FAILED, CRASHED or CANCELLED; None while it goes on."""
        kind = self.state()["type"]
        return kind if kind in TERMINAL else None

    def message(self) -> str:
        return str(self.state().get("message") or "no message")

    def cancel(self) -> None:
        """Ask Prefect to cancel it; the flow stops its roles within seconds."""
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
        _request("POST", f"/flow_runs/{self.id}/set_state", body)


def create_flow_run(
    deployment: str, parameters: Mapping[str, Any], *, name: str, idempotency_key: str | None = None
) -> FlowRun:
    """Start a deployment by name, for example `asyncopd/train`; a second call with one key finds the first's run.

    Raises:
        ServerAwayError: no server answers.
        StackError: there is no such deployment.
    """
    found = _request("GET", f"/deployments/name/{deployment}")
    body = {"parameters": dict(parameters), "name": name, "idempotency_key": idempotency_key}
    return FlowRun(_request("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])


def _request(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    try:
        response = httpx.request(method, f"{api_url()}{path}", json=body, timeout=30)
        for pause_s in BUSY_PAUSES_S:
            if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                break
            time.sleep(pause_s)
            response = httpx.request(method, f"{api_url()}{path}", json=body, timeout=30)
    except httpx.TransportError as error:
        raise ServerAwayError(
            f"no Prefect server answers at {shown_url()} ({error}). Start it again with `asyncopd up`; runs that go on "
            "find it, or are ended with `asyncopd down`."
        ) from error
    if response.is_error:
        kind = ServerAwayError if response.is_server_error else StackError
        raise kind(f"Prefect answered {response.status_code} to {method} {path}: {response.text[:300]}")
    return response.json()
