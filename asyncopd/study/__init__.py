"""Which estimator to use: measured on the walk task, gradients at frozen snapshots and accuracy under a fixed lag.

    estimators   bias and variance of every estimator's gradient against drift, at equal teacher cost
    staleness    accuracy and KL to the teacher against lag, for estimators, learning rates and seeds

Both store every finished cell as one object, so a killed study goes on where it stood. flows/study.py runs them.
"""

from __future__ import annotations

import sys


def study_command(study: str, *, out: str, root: str, quick: bool = False, workers: int = 2) -> list[str]:
    """The child process of a study; that process loads torch, this module does not."""
    options = ["--out", out, "--models", root, "--workers", str(workers), *(["--quick"] if quick else [])]
    return [sys.executable, "-m", "flows.study", study, *options]
