"""Flow `maintain` (deployments `maintain/audit` and `maintain/collect`): maintenance on a schedule.

An audit with findings ends as Failed, so that an automation or a person notices; its report is an artifact.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Failed

from storage.maintain.audit import GRACE_S, audit_run
from storage.maintain.collect import collect_run
from storage.runs import find_run
from storage.stores import open_store


@flow(name="maintain", flow_run_name="{action}-{run_id}")
async def maintain(
    action: Literal["audit", "collect"],
    run_id: str,
    root: str = "runs",
    grace_s: float = GRACE_S,
    dry_run: bool = False,
) -> str | State[Any]:
    """Verify or clean one run.

    Args:
        action: `audit` changes nothing; `collect` removes garbage.
        run_id: may be running.
        root: its storage root.
        grace_s: age, seconds, below which unreferenced objects are left alone.
        dry_run: of `collect`: only say what would happen.
    Returns:
        What the command would print; a Failed state with it when an audit found something.
    """
    store = open_store(root)
    find_run(store, run_id)
    text, is_clean = await asyncio.to_thread(_act, action, store, run_id, grace_s, dry_run)
    get_run_logger().info(text)
    await acreate_markdown_artifact(key=f"maintain-{action}", markdown=f"```\n{text}\n```", description=run_id)
    return text if is_clean else Failed(message=text)


def _act(action: str, store: Any, run_id: str, grace_s: float, dry_run: bool) -> tuple[str, bool]:
    if action == "audit":
        report = audit_run(store, run_id, grace_s=grace_s)
        return report.to_text(), report.is_clean
    return collect_run(store, run_id, grace_s=grace_s, dry_run=dry_run).to_text(), True
