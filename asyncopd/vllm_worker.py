"""What every vLLM worker process of ours can do besides vLLM's own work; a worker extension class of vLLM."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

_LOOK_EVERY_S = 1.0


class EngineWorker:
    """Mixed into vLLM's worker class by `worker_extension_cls`; called through `AsyncLLM.collective_rpc`."""

    def end_with(self, pid: int) -> None:
        """End this process within a second or so of process `pid`, however that ends: vLLM itself does not notice."""
        threading.Thread(target=_end_with, args=(psutil.Process(pid),), name="end-with-role", daemon=True).start()


def _end_with(role: psutil.Process) -> None:
    while role.is_running() and role.status() != psutil.STATUS_ZOMBIE:
        time.sleep(_LOOK_EVERY_S)
    # Nobody is left to hand anything to, and an orderly shutdown would wait for that nobody.
    os.kill(os.getpid(), signal.SIGKILL)
