"""Which estimator to use: measured on the walk task, gradients at frozen snapshots and accuracy under fixed lag.

    estimators.py   snapshots x drift  --gradients.py-->  bias and variance of every estimator at equal teacher cost
    staleness.py    lag x estimator x lr x seed  --loop.py-->  accuracy and KL to the teacher

Both store every finished cell as one object (cells.py), so a killed study goes on where it stood. Run as
`asyncopd study ...` or `python -m asyncopd.study ...`.
"""

from __future__ import annotations

import sys


def study_command(study: str, *, out: str, root: str, quick: bool = False, workers: int = 2) -> list[str]:
    """The child process of a study; that process loads torch, this module does not."""
    options = ["--out", out, "--models", root, "--workers", str(workers), *(["--quick"] if quick else [])]
    return [sys.executable, "-m", "asyncopd.study", study, *options]
