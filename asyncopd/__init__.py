"""AsyncOPD: asynchronous on-policy distillation whose shard log is the queue."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`asyncopd.open_run`, found when it is asked for: this package is below storage, and imports nothing of it."""
    if name == "open_run":
        return importlib.import_module("storage.catalog.opened").open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
