"""Flow `evaluate`: follows the policy versions of a run and measures the chosen ones on held-out prompts."""

from __future__ import annotations

from prefect import flow

from asyncopd.evaluate.stage import versions_to_evaluate
from flows.wiring import evaluate_stage, open_stored_run


@flow(name="evaluate", flow_run_name="evaluate-{run_id}")
async def evaluate(run_id: str, root: str = "runs") -> None:
    """Evaluate version 0, every `evaluate.every`-th and the last version of a run as they appear.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    run = open_stored_run(root, run_id)
    worker = run.worker("evaluate")
    async with worker.alive():
        await worker.wait_for(run.log.latest_policy, "version 0 to be published")
        stage, sampler = evaluate_stage(run, worker)
        try:
            await stage.run(versions_to_evaluate(run.config.learner.num_steps, run.config.evaluate.every))
        finally:
            await sampler.close()
