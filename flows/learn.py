"""Flow `learn`: the long-running learner. One process, one model, until the last step of the run."""

from __future__ import annotations

from prefect import flow

from flows.wiring import learn_stage, open_stored_run


@flow(name="learn", flow_run_name="learn-{run_id}")
async def learn(run_id: str, root: str = "runs") -> None:
    """Train a run from its newest checkpoint to its last step, publishing a policy version after every step.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    run = open_stored_run(root, run_id)
    worker = run.worker("learn")
    async with worker.alive():
        await learn_stage(run, worker).run()
