"""A study in seconds, with meaningless numbers: `python tests/tiny_study.py estimators|staleness DIR`."""

from __future__ import annotations

import sys

from asyncopd.config import RunConfig
from asyncopd.study.estimators import Scale
from asyncopd.study.loop import LoopSettings
from asyncopd.study.staleness import QUICK_ESTIMATORS, Grid
from flows.study import run
from storage.stores import open_store

LOOP = LoopSettings(num_steps=3, batch_size=4, max_new_tokens=16, num_prompts=6)
SCALE = Scale((0,), further=3, num_prompts=8, num_prefixes=24, drifts=(0.0, 0.05), loop=LOOP)
ESTIMATORS = {name: QUICK_ESTIMATORS[name] for name in ("head 4 + tail 4", "dense reverse KL")}
GRID = Grid(LOOP, ESTIMATORS, lags=(0, 2), lrs=(1e-3,), seeds=(0, 1))


def tiny_config() -> RunConfig:
    """A student that is made in a second."""
    pretrain = {"num_steps": 5, "batch_size": 4}
    student = {"kind": "tiny", "num_layers": 1, "hidden_size": 16, "num_heads": 2, "pretrain": pretrain}
    return RunConfig.model_validate({"student": student})


if __name__ == "__main__":
    kind, out = sys.argv[1:]
    run(kind, open_store(out), open_store(f"{out}/models"), tiny_config(), SCALE, GRID, num_workers=1)
