"""`asyncopd chaos`: a small real run, struck at random, and the proof that nothing was lost. Loads no torch."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asyncopd.chaos.ordeal import Disturbance, Ordeal, plan_strikes
from asyncopd.chaos.replay import copied_run, replayed_weights
from asyncopd.chaos.settings import LEASE_S, RUN_ID, chaos_config
from asyncopd.chaos.verdict import Check, Cost, checks, costs
from asyncopd.chaos.witness import Witness
from asyncopd.chaos.worlds import PlainWorld, StackWorld, own_environment, plain_run, restarter
from asyncopd.config import RunConfig
from asyncopd.local.processes import RoleSpec
from storage.run_log import StoredRunLog

DISK_SIZE = "512m"
PLAIN_ROLES = ("learn", "learn", "rollout", "rollout", "score")


def add_chaos(commands: Any) -> None:
    """Add `chaos` to the parser's commands."""
    description = (
        "Start a small run of its own (own Prefect server, own home), kill random parts of it with SIGKILL at random "
        "moments, stop some with SIGSTOP, fill its disk once, and compare the result with an uninterrupted run. Exit "
        "status 0 only if nothing was lost, nothing was done twice and the weights are bit-equal."
    )
    chaos = commands.add_parser(
        "chaos", help="kill parts of a real run and prove nothing is lost", description=description
    )
    chaos.add_argument(
        "--kills", type=int, default=20, help="SIGKILLs; pauses and a full disk come on top (default 20)"
    )
    chaos.add_argument("--seed", type=int, help="of victims and moments (default: random, printed)")
    chaos.add_argument("--root", help="storage root to use and keep (default: a temporary one, on a disk to fill up)")
    chaos.add_argument("--steps", type=int, help="learner steps (default: enough for the kills)")
    chaos.add_argument(
        "--max-staleness", type=int, default=0, help="τ of the run (default 0; above, no twin to compare)"
    )
    chaos.add_argument("--without-prefect", action="store_true", help="roles alone, started again by this process")
    chaos.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    console = Console(width=140)
    seed = arguments.seed if arguments.seed is not None else random.randrange(10_000)
    with _folder(arguments.root) as (folder, root, disk):
        if disk is None:
            why = "--root is a disk that others use" if arguments.root else "mounting a tmpfs needs root"
            console.print(f"left out: the full disk ({why})", highlight=False)
        return _chaos(arguments, seed, folder, root, disk, console)


def _chaos(
    arguments: argparse.Namespace, seed: int, folder: Path, root: str, disk: Path | None, console: Console
) -> int:
    rng, plain = random.Random(seed), arguments.without_prefect
    # Under Prefect training goes on while a server is started again for half a minute: slower, and more steps.
    num_steps = arguments.steps or (24 + 6 * arguments.kills if plain else 40 + 10 * arguments.kills)
    poll_s = 0.1 if plain else 0.25
    config = chaos_config(root, num_steps=num_steps, max_staleness=arguments.max_staleness, poll_s=poll_s)
    console.print(f"chaos: seed {seed}, {num_steps} steps, τ = {arguments.max_staleness}, {root}", highlight=False)
    own_environment(folder, _free_port())
    started = time.monotonic()
    with contextlib.ExitStack() as resources:
        world: PlainWorld | StackWorld
        if plain:
            log = plain_run(config, RUN_ID)
            world = PlainWorld(log, _numbered(PLAIN_ROLES), log_dir=folder / "logs")
            resources.enter_context(world.running())
        else:
            world = StackWorld(config, RUN_ID)
            resources.enter_context(world.running())
            log = world.log()
        witness = Witness(log, teacher=config.teacher.name)
        resources.enter_context(witness.watching())
        strikes = plan_strikes(rng, world, num_kills=arguments.kills, full_disk=disk is not None)
        ordeal = Ordeal(
            world,
            witness,
            rng=rng,
            num_steps=num_steps,
            pause_s=LEASE_S + 1.5,
            disk=disk,
            say=lambda line: console.print(line, highlight=False),
        )
        disturbances = ordeal.go_through(strikes)
    console.print(f"the run is over after {time.monotonic() - started:.0f} s; comparing …", highlight=False)
    replayed = replayed_weights(root, RUN_ID, str(folder / "replay"))
    twin = _twin(log, config, folder) if arguments.max_staleness == 0 else None
    verdict = checks(witness, config, replayed=replayed, twin=twin)
    _show(console, disturbances, costs(witness, disturbances), verdict, plain=plain)
    return 0 if all(check.holds for check in verdict) else 1


def _twin(log: StoredRunLog, config: RunConfig, folder: Path) -> StoredRunLog:
    """The same run again, undisturbed and unpaced: who waits how long decides nothing at τ = 0."""
    unpaced = config.limits.model_copy(update={"poll_s": 0.01}).model_dump(mode="json")
    twin = copied_run(log, str(folder / "twin"), overrides={"limits": unpaced})
    world = PlainWorld(twin, _numbered(("learn", "rollout", "score")), log_dir=folder / "twin-logs")
    witness = Witness(twin, teacher=config.teacher.name)
    with world.running(), witness.watching():
        Ordeal(
            world,
            witness,
            rng=random.Random(0),
            num_steps=config.learner.num_steps,
            pause_s=0,
            disk=None,
            say=lambda line: None,
        ).go_through([])
    return twin


def _numbered(roles: Sequence[str]) -> list[RoleSpec]:
    return [RoleSpec(role, roles[:place].count(role)) for place, role in enumerate(roles)]


@contextlib.contextmanager
def _folder(root: str | None) -> Iterator[tuple[Path, str, Path | None]]:
    """(scratch folder, storage root, the disk the root is on if it may be filled up)."""
    folder = Path(tempfile.mkdtemp(prefix="asyncopd-chaos-"))
    disk = folder / "disk"
    disk.mkdir()
    mounted = root is None and _mount(disk)
    try:
        yield folder, root or str(disk / "runs"), disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _mount(disk: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "asyncopd-chaos", str(disk)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _show(
    console: Console,
    disturbances: Sequence[Disturbance],
    prices: Sequence[Cost],
    verdict: Sequence[Check],
    *,
    plain: bool,
) -> None:
    table = Table(title="Disturbances", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "what", "role", "at step", "next new step, s", "tokens sampled again, at most", "tokens lost"):
        table.add_column(name, justify="left" if name in ("what", "role") else "right")
    table.add_column("started again by")
    for number, (seen, price) in enumerate(zip(disturbances, prices, strict=True), 1):
        by = "chaos, as a cluster would" if plain else restarter(seen.strike.target)
        again = by if seen.strike.kind == "SIGKILL" else "; ".join(seen.restarted) or "not needed"
        table.add_row(
            str(number),
            seen.strike.kind,
            seen.strike.target,
            str(seen.at_step),
            f"{seen.recovery_s:.1f}",
            str(price.tokens_again),
            str(price.tokens_lost),
            again,
        )
    console.print(table)
    kills = [seen.recovery_s for seen in disturbances if seen.strike.kind == "SIGKILL"]
    if kills:
        console.print(
            f"{len(kills)} kills; seconds to the next new step: "
            f"median {statistics.median(kills):.1f}, max {max(kills):.1f}",
            highlight=False,
        )
    for check in verdict:
        console.print(
            f"{'[green]holds[/]' if check.holds else '[bold red]FAILS[/]'}  {check.claim}: {check.found}",
            highlight=False,
        )
