"""The run that chaos disturbs: small, paced, and repeatable bit for bit at τ = 0."""

from __future__ import annotations

from typing import Any

from asyncopd.config import RunConfig, load_config

RUN_ID = "chaos"
LEASE_S = 2.0


def chaos_config(root: str, *, num_steps: int, max_staleness: int, poll_s: float = 0.1) -> RunConfig:
    """A tiny student, the oracle teacher, two samplers, and limits short enough to be hit.

    One slot: a response is then decoded alone, so its log-probs do not depend on what is beside it. With more slots the
    tokens are the same, but the last bits of log-probs, and so of weights, follow the composition of the batch.

    Args:
        poll_s: the pace. A step waits for three looks at storage, which leaves room to be disturbed on any machine.
    """
    sections: dict[str, Any] = {
        "name": "chaos",
        "student": {"kind": "tiny", "num_layers": 1, "hidden_size": 16, "num_heads": 2, "pretrain": {"num_steps": 30}},
        "rollout": {"workers": 2, "slots": 1, "shard_size": 4, "shards_per_task": 2, "max_new_tokens": 32},
        "score": {"shards_per_task": 2},
        "staleness": {"max_staleness": max_staleness},
        "learner": {"num_steps": num_steps, "batch_size": 8, "checkpoint_every": 5},
        "evaluate": {"every": 0},
        "storage": {"root": root, "min_free_bytes": 1_000_000},
        "limits": {
            "lease_s": LEASE_S,
            "heartbeat_s": 0.2,
            "hang_s": 20,
            "deadline_s": 180,
            "max_restarts": 10_000,
            "poll_s": poll_s,
        },
    }
    return load_config(sections)
