"""What every vLLM worker process of ours can do besides vLLM's own work; a worker extension class of vLLM."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import psutil

_LOOK_EVERY_S = 1.0


class EngineWorker:
    """Mixed into vLLM's worker class by `worker_extension_cls`; called through `AsyncLLM.collective_rpc`."""

    def end_with(self, pid: int) -> None:
        """End the engine within a second or so of process `pid`, however that ends: vLLM itself does not notice.

        The engine is this process and those between it and `pid`: with its own worker processes vLLM has two layers.
        """
        role = psutil.Process(pid)
        ancestors = psutil.Process().parents()
        between = ancestors[: ancestors.index(role)] if role in ancestors else []
        watch = threading.Thread(target=_end_with, args=(role, between), name="end-with-role", daemon=True)
        watch.start()


def _end_with(role: psutil.Process, between: list[psutil.Process]) -> None:
    while _runs(role):
        time.sleep(_LOOK_EVERY_S)
    # Nobody is left to hand anything to, and an orderly shutdown would wait for that nobody.
    for process in between:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
