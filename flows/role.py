"""Entry of a role's child process: `python -m flows.role rollout --run-id … --root …`.

SIGTERM cancels the flow from within the event loop, so that every `finally` runs: what is finished gets published,
claims are released, and the process is gone within a second or two.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys

from prefect.exceptions import CancelledRun

from asyncopd.supervise import watch_parent
from asyncopd.worker import STOPPED, until_terminated

ROLES = ("pretrain", "rollout", "score", "learn", "evaluate")


def main() -> None:
    """Run one role to its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--root", required=True, help="storage root of the run")
    arguments = parser.parse_args()
    watch_parent()
    sys.exit(asyncio.run(_run(arguments.role, arguments.run_id, arguments.root)))


async def _run(role: str, run_id: str, root: str) -> int:
    # One role per process: importing all five would load every engine into each of them.
    flow = getattr(importlib.import_module(f"flows.{role}"), role)
    try:
        return await until_terminated(flow(run_id=run_id, root=root))
    except CancelledRun:
        return STOPPED


if __name__ == "__main__":
    main()
