"""`make chaos`: a small real run, struck at random, and the proof that nothing was lost. Loads no torch."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cyclopts
from rich.console import Console
from rich.table import Table

from asyncopd.config import RunConfig
from asyncopd.local.processes import RoleSpec
from chaos.cleanup import cleaned_up
from chaos.observer import Observer
from chaos.runs import LEASE_S, RUN_ID, chaos_config, copied_run, replayed_weights
from chaos.strikes import Disturbance, Striker, plan_strikes
from chaos.verdict import Check, Cost, checks, costs
from chaos.worlds import PlainWorld, StackWorld, plain_run, restarter
from storage.run_log import StoredRunLog

DISK_SIZE = "512m"
PLAIN_ROLES = ("learn", "learn", "rollout", "rollout", "score")


def chaos(
    *,
    kills: int = 20,
    seed: int | None = None,
    root: str | None = None,
    steps: int | None = None,
    max_staleness: int = 0,
    without_prefect: bool = False,
) -> int:
    """Disturb a run and compare it with an uninterrupted one.

    A small run of its own (own Prefect server, own home): random parts of it are killed with SIGKILL at random moments,
    some stopped with SIGSTOP, its disk filled once. Exit status 0 only if nothing was lost, nothing was done twice and
    the weights are bit-equal.

    Args:
        kills: SIGKILLs; pauses and a full disk come on top.
        seed: Of victims and moments (default: random, printed).
        root: Storage root to use and keep (default: a temporary one, on a disk to fill up).
        steps: Learner steps (default: enough for the kills).
        max_staleness: τ of the run; above 0 there is no twin to compare.
        without_prefect: Roles alone, started again by this process.
    """
    console = Console(width=140, highlight=False)
    seed = random.randrange(10_000) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="asyncopd-chaos-"))
    console.print(f"chaos in {folder}")
    with cleaned_up(folder):
        # Its own: a user's stack is never touched.
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{_free_port()}/api"
        disk = folder / "disk"
        disk.mkdir()
        is_own = root is None and _mount(disk)
        if not is_own:
            why = "--root is a disk that others use" if root else "mounting a tmpfs needs root"
            console.print(f"left out: the full disk ({why})")
        # Under Prefect training goes on while a server is started again for half a minute: slower, and more steps.
        config = chaos_config(
            root or str(disk / "runs"),
            num_steps=steps or (24 + 6 * kills if without_prefect else 40 + 10 * kills),
            max_staleness=max_staleness,
            poll_s=0.1 if without_prefect else 0.25,
        )
        console.print(f"seed {seed}, {config.learner.num_steps} steps, τ = {max_staleness}, {config.storage.root}")
        return _disturb(config, random.Random(seed), kills, folder, disk if is_own else None, console, without_prefect)


def _disturb(
    config: RunConfig,
    rng: random.Random,
    num_kills: int,
    folder: Path,
    disk: Path | None,
    console: Console,
    is_plain: bool,
) -> int:
    started = time.monotonic()
    with contextlib.ExitStack() as resources:
        world: PlainWorld | StackWorld
        if is_plain:
            log = plain_run(config, RUN_ID)
            world = PlainWorld(log, _numbered(PLAIN_ROLES), log_dir=folder / "logs")
            resources.enter_context(world.running())
        else:
            world = StackWorld(config, RUN_ID)
            resources.enter_context(world.running())
            log = world.log()
        observer = Observer(log, teacher=config.teacher.name)
        resources.enter_context(observer.watching())
        striker = Striker(
            world,
            observer,
            rng=rng,
            num_steps=config.learner.num_steps,
            pause_s=LEASE_S + 1.5,
            disk=disk,
            say=console.print,
        )
        disturbances = striker.run(plan_strikes(rng, world, num_kills=num_kills, full_disk=disk is not None))
    console.print(f"the run is over after {time.monotonic() - started:.0f} s; comparing …")
    replayed = replayed_weights(config.storage.root, RUN_ID, str(folder / "replay"))
    twin = _twin(log, config, folder) if config.staleness.max_staleness == 0 else None
    verdict = checks(observer, config, replayed=replayed, twin=twin)
    _show(console, disturbances, costs(observer, disturbances), verdict, plain=is_plain)
    return 0 if all(check.holds for check in verdict) else 1


def _twin(log: StoredRunLog, config: RunConfig, folder: Path) -> StoredRunLog:
    """The same run again, undisturbed and unpaced: who waits how long decides nothing at τ = 0."""
    unpaced = config.limits.model_copy(update={"poll_s": 0.01}).model_dump(mode="json")
    twin = copied_run(log, str(folder / "twin"), overrides={"limits": unpaced})
    world = PlainWorld(twin, _numbered(("learn", "rollout", "score")), log_dir=folder / "twin-logs")
    observer = Observer(twin, teacher=config.teacher.name)
    with world.running(), observer.watching():
        Striker(
            world,
            observer,
            rng=random.Random(0),
            num_steps=config.learner.num_steps,
            pause_s=0,
            disk=None,
            say=lambda line: None,
        ).run([])
    return twin


def _numbered(roles: Sequence[str]) -> list[RoleSpec]:
    return [RoleSpec(role, roles[:place].count(role)) for place, role in enumerate(roles)]


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
            f"median {statistics.median(kills):.1f}, max {max(kills):.1f}"
        )
    for check in verdict:
        console.print(f"{'[green]holds[/]' if check.holds else '[bold red]FAILS[/]'}  {check.claim}: {check.found}")


if __name__ == "__main__":
    # As Ctrl-C does: whatever is under way ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cyclopts.run(chaos)
