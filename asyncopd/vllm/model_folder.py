"""`ModelFolder`: where vLLM's engine processes find a model to load, in memory if the machine has room for it there.

write(weights) --file--> engine process loads it --drop_weights()--> only config.json stays
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_PREFIX = "asyncopd-vllm-weights-"
_SHARED_MEMORY = Path("/dev/shm")


class ModelFolder:
    """One model in Hugging Face format, written and replaced by its owner. `remove` when done.

    A killed owner cannot remove its folder; the next one made on the machine does it.
    """

    def __init__(self, size_bytes: int, parent: Path | None = None) -> None:
        """
        Args:
            size_bytes: of the weights that will be written.
            parent: /dev/shm by default where that has room, the folder for temporary files elsewhere.
        """
        parent = parent or _roomy(size_bytes)
        _remove_abandoned(parent)
        # Locked under a name nobody looks for: an unlocked folder is one whose owner died.
        unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(unlocked, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unlocked.rename(parent / unlocked.name.removeprefix("."))
        self._removed = False

    def write(self, architecture: Mapping[str, Any], safetensors: bytes) -> None:
        """Write a model as vLLM and transformers read it; replaces an earlier one."""
        # vLLM takes a configuration that names no class for an embedding model.
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture["model_type"]]
        (self.path / "config.json").write_text(json.dumps({**architecture, "architectures": [name]}))
        # Renamed, not overwritten: a worker may have the old file mapped.
        unfinished = self.path / "model.unfinished"
        unfinished.write_bytes(safetensors)
        unfinished.replace(self.path / "model.safetensors")

    def drop_weights(self) -> None:
        """Free the memory of weights that every worker has loaded."""
        (self.path / "model.safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder; harmless when repeated."""
        if not self._removed:
            self._removed = True
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


def _roomy(size_bytes: int) -> Path:
    """/dev/shm, if it has twice the room: a container's often has 64 MB, and sampler and teacher may start at once."""
    with contextlib.suppress(OSError):
        if os.access(_SHARED_MEMORY, os.W_OK) and shutil.disk_usage(_SHARED_MEMORY).free >= 2 * size_bytes:
            return _SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # Another user's, or removed by its owner meanwhile.
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
