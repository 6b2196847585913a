"""One Prefect flow run, seen through Prefect's REST API: state, message, cancellation. Imports no Prefect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from asyncopd.errors import ServerAwayError, StackError
from asyncopd.stack import api_url

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


def _request(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    try:
        response = httpx.request(method, f"{api_url()}{path}", json=body, timeout=30)
    except httpx.TransportError as error:
        raise ServerAwayError(
            f"no Prefect server answers at {api_url()} ({error}). Start it again with `asyncopd up`; runs that go on "
            "find it, or are ended with `asyncopd down`."
        ) from error
    if response.is_server_error:
        raise ServerAwayError(f"Prefect answered {response.status_code} to {method} {path}: {response.text[:300]}")
    if response.is_error:
        raise StackError(f"Prefect answered {response.status_code} to {method} {path}: {response.text[:300]}")
    return response.json()
