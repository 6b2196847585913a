"""Flow `pretrain`: makes the tiny models of a run that the model cache does not hold yet."""

from __future__ import annotations

import asyncio
import json
import time

from prefect import flow

from asyncopd.config import TinyModel
from asyncopd.learner.pretrain import pretrain as train_on_demonstrations
from asyncopd.modeling import build_causal_lm, to_safetensors
from asyncopd.worker import Worker
from flows.wiring import OpenRun, architecture_of, missing_models, open_stored_run, task_of
from storage.runs import publish_model


@flow(name="pretrain", flow_run_name="pretrain-{run_id}")
async def pretrain(run_id: str, root: str = "runs") -> None:
    """Pre-train the run's student and teacher where they are tiny models and not in the cache.

    Args:
        run_id: a run that `asyncopd/train` created.
        root: its storage root.
    """
    run = open_stored_run(root, run_id)
    worker = run.worker("pretrain")
    async with worker.alive():
        for role, model in missing_models(run).items():
            await asyncio.to_thread(make_model, run, worker, role, model)


def make_model(run: OpenRun, worker: Worker, role: str, model: TinyModel) -> None:
    """Train one tiny model and publish it under its digest. Repeating it is harmless: the first one is kept."""
    settings = model.pretrain
    architecture = architecture_of(model, run.task)
    causal_lm = build_causal_lm(architecture, seed=settings.seed)
    worker.status.update(model=role, step=0, num_steps=settings.num_steps)
    started = time.time()

    def on_step(step: int, loss: float) -> None:
        worker.status.update(step=step, loss_nats=loss)

    with worker.span("pretrain", role):
        loss = train_on_demonstrations(
            causal_lm,
            # The model's own seed, not the run's: the product is shared by all runs with the same settings.
            task_of(run.config, settings.seed),
            num_steps=settings.num_steps,
            batch_size=settings.batch_size,
            lr=settings.lr,
            warmup_steps=settings.warmup_steps,
            row_capacity=run.config.learner.row_capacity,
            on_step=on_step,
        )
    publish_model(
        run.store,
        run.config.model_digest(model),
        {
            "config.json": json.dumps(causal_lm.config.to_dict()).encode(),
            "model.safetensors": to_safetensors(causal_lm),
        },
        facts={"settings": model.model_dump(mode="json"), "loss_nats": loss, "seconds": time.time() - started},
    )
