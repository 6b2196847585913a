"""AsyncOPD: asynchronous on-policy distillation whose shard log is the queue."""

import importlib

__version__ = "0.1.0"


_FROM_STORAGE = {"open_run": "storage.catalog.notebook", "AsOf": "storage.catalog.rows"}


def __getattr__(name: str) -> object:
    """`asyncopd.open_run` and `asyncopd.AsOf`, found when they are asked for: storage is above this package."""
    if name in _FROM_STORAGE:
        return getattr(importlib.import_module(_FROM_STORAGE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
