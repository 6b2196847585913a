"""Strikes: hit a random process at a random moment, wait until a step is trained that was never trained before.

plan: kills of everything once, then at random; pauses and one full disk in between, in random order
for each:  wait a random time -> strike -> tend the world until the next new step -> how long that took
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import psutil

from asyncopd.errors import DeadlineError, RoleFailedError
from chaos.observer import Observer
from chaos.worlds import World, descendants

Found = TypeVar("Found")
Kind = Literal["SIGKILL", "SIGSTOP", "full disk"]
RECOVERY_S = 240.0
"""No strike may hold training up longer: the slowest recovery, a server and a flow started anew, needs well under a
minute on two idle cores."""
FULL_DISK_S = 6.0
CALM_S = (0.2, 3.0)
"""Seconds between a recovery and the next strike, uniform: a few steps of every phase."""


@dataclass(frozen=True)
class Strike:
    """What is to be done to whom."""

    kind: Kind
    target: str


@dataclass(frozen=True)
class Disturbance:
    """What was done, and how the run took it."""

    strike: Strike
    struck: float
    """Unix time, seconds."""
    at_step: int
    """Steps trained when it struck."""
    recovery_s: float
    """Until the next step that had never been trained before."""
    restarted: tuple[str, ...]
    """What had to be started again by somebody, while waiting for that step."""


def plan_strikes(rng: random.Random, world: World, *, num_kills: int, full_disk: bool) -> list[Strike]:
    """A random order of kills (everything once as far as there are enough), one pause per five kills, one full disk."""
    everything = [*world.roles, *world.beyond_roles]
    first_round = rng.sample(everything, k=min(num_kills, len(everything)))
    kills = first_round + rng.choices(everything, k=num_kills - len(first_round))
    strikes = [Strike("SIGKILL", name) for name in kills]
    extra = [Strike("SIGSTOP", rng.choice(world.roles)) for _ in range(max(1, num_kills // 5))]
    if full_disk:
        extra.append(Strike("full disk", "all roles"))
    for strike in extra:
        strikes.insert(rng.randrange(len(strikes) + 1), strike)
    return strikes


class Striker:
    """Disturbs one running world."""

    def __init__(
        self,
        world: World,
        observer: Observer,
        *,
        rng: random.Random,
        num_steps: int,
        pause_s: float,
        disk: Path | None,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            num_steps: of the run; strikes that outlast it is refused.
            pause_s: how long a stopped process stays stopped; longer than a lease.
            disk: a file system of the run's own that may be filled up.
        """
        self._world, self._observer, self._rng, self._say = world, observer, rng, say
        self._num_steps, self._pause_s, self._disk = num_steps, pause_s, disk

    def run(self, strikes: Sequence[Strike]) -> list[Disturbance]:
        """Strike after strike, then let the run come to its end.

        Raises:
            DeadlineError: training did not go on after a strike; says which.
            RoleFailedError: the run was over before every strike had struck.
        """
        self._until(lambda: self._observer.num_steps >= 3, "the first three steps")
        disturbances = []
        for number, strike in enumerate(strikes, 1):
            self._rest(self._rng.uniform(*CALM_S))
            disturbance = self._strike(strike)
            disturbances.append(disturbance)
            self._say(
                f"{number:3d}/{len(strikes)}  {strike.kind} {strike.target} at step {disturbance.at_step}: "
                f"next new step after {disturbance.recovery_s:.1f} s"
            )
        seconds = RECOVERY_S + self._num_steps
        self._until(lambda: self._observer.num_steps >= self._num_steps, "the last step", seconds=seconds)
        return disturbances

    def _strike(self, strike: Strike) -> Disturbance:
        if self._observer.num_steps >= self._num_steps - 1:
            raise RoleFailedError(f"the run was over before {strike.kind} of {strike.target}; raise --steps.")
        pid = 0
        if strike.kind != "full disk":
            pid = self._until(lambda: self._world.pid(strike.target) or 0, f"{strike.target} to run")
        at_step, struck, began = self._observer.num_steps, time.time(), time.monotonic()
        restarted: list[str] = []
        with self._struck(strike, pid, restarted):
            self._until(
                lambda: self._observer.num_steps > at_step,
                f"a step after {strike.kind} of {strike.target} at step {at_step}",
                restarted=restarted,
            )
        recovery_s = self._observer.step_times[at_step] - began
        return Disturbance(strike, struck, at_step, recovery_s, tuple(restarted))

    @contextlib.contextmanager
    def _struck(self, strike: Strike, pid: int, restarted: list[str]) -> Iterator[None]:
        """The run is struck; where the strike lasts, it is over when the body is, and not before its time."""
        if strike.kind == "SIGKILL":
            # With its children where it is no flow or role: Prefect's server is more than one process.
            for process in descendants(pid)[: None if strike.target == "server" else 1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            yield
        elif strike.kind == "SIGSTOP":
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).send_signal(signal.SIGSTOP)
            self._rest(self._pause_s, restarted)
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).send_signal(signal.SIGCONT)
            yield
        else:
            assert self._disk is not None
            ballast = self._disk / "ballast"
            fill(ballast)
            self._rest(FULL_DISK_S, restarted)
            ballast.unlink()
            yield

    def _rest(self, seconds: float, restarted: list[str] | None = None) -> None:
        """Let time pass, starting again what has to be."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            self._tend(restarted)
            time.sleep(min(0.05, left_s))

    def _until(
        self,
        condition: Callable[[], Found],
        what: str,
        *,
        restarted: list[str] | None = None,
        seconds: float = RECOVERY_S,
    ) -> Found:
        """The first true answer of `condition`. Raises DeadlineError, which says what was waited for."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"chaos waited {seconds:.0f} s for {what} and it did not come; "
                    f"{self._observer.num_steps} of {self._num_steps} steps are trained."
                )
            self._rest(0.05, restarted)
        return found

    def _tend(self, restarted: list[str] | None) -> None:
        if self._observer.error is not None:
            raise self._observer.error
        done = self._world.tend()
        if restarted is not None:
            restarted += done


def fill(ballast: Path) -> None:
    """Write zeros to a new file until the disk it is on is full."""
    block = bytes(1 << 16)
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(block)
