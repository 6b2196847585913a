"""How a role flow ends when its run is stopped elsewhere: as Cancelled, with the reason, not as Failed."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from asyncopd.errors import RunStoppedError


async def cancelled_with_its_run(body: Awaitable[None]) -> State[Any] | None:
    """Await `body`; a Cancelled state when the run's record says that it was stopped, None when the work was done."""
    try:
        await body
    except RunStoppedError as stopped:
        return Cancelled(message=str(stopped))
    return None
