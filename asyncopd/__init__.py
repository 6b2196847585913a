"""AsyncOPD: asynchronous on-policy distillation whose shard log is the queue.

    prompts        Trajectory           TeacherScores         ScoredTrajectory        TrainStep
       |  rollout/ ----------> teacher/ -----------> (index order, staleness) --> learner/ ---> PolicyVersion
       |     ^                                                                  losses/            |
       |     +------------------------- PolicyVersion: fetched by samplers, never pushed <-----------+

    trajectories, scores, steps and versions are immutable objects in storage; prompts are recomputed from their
    index, and the learner joins trajectories to scores; flows/ starts the roles, api/ and SQL only read

Read in this order: types -> schedule -> ports -> flows/roles -> worker -> rollout/stage -> teacher/stage
-> learner/intake -> learner/stage -> losses/head_tail -> storage/manifests. What a crash at each step costs is in
docs/architecture.md.
"""

import importlib

__version__ = "0.1.0"

_FROM_STORAGE = {"open_run": "storage.catalog.notebook", "AsOf": "storage.catalog.rows"}


def __getattr__(name: str) -> object:
    """`asyncopd.open_run` and `asyncopd.AsOf`, for notebooks: the one import that points up, made when it is used."""
    if name in _FROM_STORAGE:
        return getattr(importlib.import_module(_FROM_STORAGE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
