"""Log-probs of one stored response under any stored policy version: `python -m flows.logprobs --root … --run-id …`.

stored version --weights--> student's architecture --HfScorer, as if it were a teacher--> log p of every response token

A process of its own, because whoever asks (the service) keeps torch out of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from asyncopd.errors import AsyncOPDError, ObjectMissingError
from asyncopd.models.causal_lm import load_safetensors
from asyncopd.ports import ScoreRequest
from asyncopd.teacher.hf import HfScorer
from asyncopd.types import Trajectory
from flows.engines import student_skeleton
from flows.wiring import OpenRun, open_stored_run


def logprobs_under(run: OpenRun, index: int, version: int) -> list[float]:
    """log p of every response token of trajectory `index` under policy version `version`, nats, in float32.

    At the run's temperature over the whole vocabulary: the law the learner trains. A sampler with top_p < 1 drew from
    a narrower one.

    Raises:
        ObjectMissingError: the trajectory or the version is not stored.
    """
    policy = run.log.find_policy(version)
    if policy is None:
        raise ObjectMissingError(f"run {run.log.run_id}: policy version {version} is not stored (any more).")
    model = student_skeleton(run.log)
    load_safetensors(model, run.log.read_policy(policy).safetensors)
    scorer = HfScorer(model, name="student", tokenizer_digest=run.task.tokenizer.digest)
    request = ScoreRequest(top_k=0, num_teacher_draws=0, temperature=run.config.rollout.temperature, seed=0)
    (scores,) = asyncio.run(scorer.score([_trajectory(run, index)], request))
    return [float(value) for value in scores.sampled_logprobs_T]


def _trajectory(run: OpenRun, index: int) -> Trajectory:
    shard = run.log.shard_of(index)
    for trajectory in run.log.read_trajectories(shard) if shard is not None else ():
        if trajectory.index == index:
            return trajectory
    raise ObjectMissingError(f"run {run.log.run_id}: index {index} is not produced yet, or was dropped.")


def main() -> None:
    """Print the log-probs as a JSON list; errors of ours end with status 1 and their message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="storage root of the run")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--version", type=int, required=True)
    arguments = parser.parse_args()
    try:
        run = open_stored_run(arguments.root, arguments.run_id)
        found = logprobs_under(run, arguments.index, arguments.version)
    except AsyncOPDError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
