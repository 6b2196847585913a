"""The student every study starts from: the quickstart's, made by the same code and found in the same cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from asyncopd.config import OracleTeacher, RunConfig, TinyModel
from asyncopd.learner.pretrain import pretrain
from asyncopd.modeling import architecture_of_size, build_causal_lm, load_safetensors, to_safetensors
from asyncopd.tasks.build import build_task
from asyncopd.tasks.walk import WalkTask
from asyncopd.teacher.oracle import OracleScorer
from storage.objects import ObjectStore
from storage.runs import find_model, publish_model, read_model


@dataclass(frozen=True)
class WarmStart:
    """A configuration with the initial student it stands for."""

    config: RunConfig
    architecture: str
    """JSON of the transformers configuration."""
    safetensors: bytes

    def model(self, safetensors: bytes | None = None) -> PreTrainedModel:
        """A fresh copy of the student, with other weights if given."""
        causal_lm = build_causal_lm(json.loads(self.architecture), seed=0)
        load_safetensors(causal_lm, self.safetensors if safetensors is None else safetensors)
        return causal_lm

    def task(self, seed: int) -> WalkTask:
        task = build_task(self.config.task, seed=seed)
        assert isinstance(task, WalkTask)
        return task

    def scorer(self) -> OracleScorer:
        assert isinstance(self.config.teacher, OracleTeacher)
        return OracleScorer(self.task(0).rules, smoothing=self.config.teacher.smoothing)


def warm_start(config: RunConfig, models: ObjectStore, on_step: Callable[[int, int], None]) -> WarmStart:
    """The pre-trained student of `config`, a walk run with a tiny student; made once per model digest.

    Args:
        models: the store whose model cache is used, for example the one of training runs.
        on_step: called with (steps done, steps planned) while it is made.
    """
    model = config.student
    assert isinstance(model, TinyModel)
    key = config.model_digest(model)
    if find_model(models, key) is None:
        _make(config, model, models, key, on_step)
    objects = read_model(models, key)
    return WarmStart(config, objects["config.json"].decode(), objects["model.safetensors"])


def _make(
    config: RunConfig, model: TinyModel, models: ObjectStore, key: str, on_step: Callable[[int, int], None]
) -> None:
    settings = model.pretrain
    task = build_task(config.task, seed=settings.seed)
    architecture = architecture_of_size(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        vocab_size=task.tokenizer.vocab_size,
        max_positions=model.max_context,
        eos_id=task.tokenizer.eos_id,
        pad_id=task.tokenizer.pad_id,
        model_type=model.architecture,
    )
    causal_lm = build_causal_lm(architecture, seed=settings.seed)
    started = time.time()
    loss = pretrain(
        causal_lm,
        task,
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        warmup_steps=settings.warmup_steps,
        row_capacity=config.learner.row_capacity,
        on_step=lambda step, _: on_step(step, settings.num_steps),
    )
    objects = {
        "config.json": json.dumps(causal_lm.config.to_dict()).encode(),
        "model.safetensors": to_safetensors(causal_lm),
    }
    facts = {"settings": model.model_dump(mode="json"), "loss_nats": loss, "seconds": time.time() - started}
    publish_model(models, key, objects, facts=facts)
