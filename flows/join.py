"""A role of a running run as a plain process, without Prefect: `python -m flows.join rollout --run-id … --root …`.

What `asyncopd worker` becomes. It needs to reach storage and nothing else, may come and go at any time, and ends by
itself when nothing is left to do or the run was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from asyncopd.errors import AsyncOPDError
from asyncopd.supervise import watch_parent
from asyncopd.worker import until_terminated
from flows import work
from flows.wiring import open_stored_run

ROLES = {
    "rollout": work.roll_out,
    "score": work.score,
    "learn": work.learn,
    "evaluate": work.evaluate,
    "pretrain": work.pretrain,
}


def main() -> None:
    """Run one role to its end; errors of ours end with status 1 and their message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--root", required=True, help="storage root of the run")
    parser.add_argument("--watch-parent", action="store_true", help="end when stdin ends")
    arguments = parser.parse_args()
    if arguments.watch_parent:
        watch_parent()
    try:
        run = open_stored_run(arguments.root, arguments.run_id)
        status = asyncio.run(until_terminated(ROLES[arguments.role](run)))
    except AsyncOPDError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
