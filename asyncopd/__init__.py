"""AsyncOPD: asynchronous on-policy distillation whose shard log is the queue."""

__version__ = "0.1.0"
