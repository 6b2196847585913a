"""The process that works on a log that exists: `python -m flows.offline replay|backfill|counterfactual …`.

    asyncopd/cli/replay.py, flows/requests.py --Request.command()--> this --> child run, score folder, tables in --out

Ctrl-C and SIGTERM stop it between two writes; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from asyncopd.config.requests import BackfillRequest, CounterfactualRequest, ReplayRequest, Request
from asyncopd.errors import AsyncOPDError
from asyncopd.local.processes import watch_parent
from asyncopd.worker import until_terminated
from flows.backfill import run_backfill
from flows.counterfactual import run_counterfactual
from flows.replay import run_replay

REQUESTS: dict[str, type[Request]] = {
    request.verb: request for request in (ReplayRequest, BackfillRequest, CounterfactualRequest)
}


def main(argv: Sequence[str] | None = None) -> None:
    """Do one request to its end; refusals end with status 2 and their message."""
    parser = argparse.ArgumentParser(prog="flows.offline", description=__doc__)
    parser.add_argument("verb", choices=REQUESTS)
    parser.add_argument("root", help="storage root")
    parser.add_argument("run_id")
    parser.add_argument("request", type=json.loads, help="JSON, as asyncopd/config/requests.py has it")
    parser.add_argument("--out", help="folder of tables (default: beside the run's reports)")
    parser.add_argument("--watch-parent", action="store_true", help="end when standard input does")
    parsed = parser.parse_args(argv)
    if parsed.watch_parent:
        watch_parent()
    try:
        request = REQUESTS[parsed.verb].of(parsed.request)
        body = work(parsed.root, parsed.run_id, request, console=Console(), out=parsed.out)
        status = asyncio.run(until_terminated(body))
    except AsyncOPDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    if status:
        Console().print("\nstopped; nothing stored is lost. The same command goes on.", highlight=False)
    sys.exit(status)


async def work(root: str, run_id: str, asked: Request, *, console: Console, out: str | None = None) -> None:
    """Do what is asked of a run.

    Raises:
        AsyncOPDError: it cannot be done; the message says why.
    """
    match asked:
        case ReplayRequest():
            await run_replay(root, run_id, asked, console=console, out=out)
        case BackfillRequest():
            await run_backfill(root, run_id, asked, console=console)
        case CounterfactualRequest():
            await run_counterfactual(root, run_id, asked, console=console, out=out)


if __name__ == "__main__":
    main()
