"""The student every study starts from: the quickstart's, made by the same code and found in the same cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from asyncopd.config import OracleTeacher, RunConfig, TinyModel
from asyncopd.learner.pretrain import make_tiny_model
from asyncopd.modeling import build_causal_lm, load_safetensors
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
        num_steps = model.pretrain.num_steps
        made = make_tiny_model(
            model,
            build_task(config.task, seed=model.pretrain.seed),
            row_capacity=config.learner.row_capacity,
            on_step=lambda step, _: on_step(step, num_steps),
        )
        publish_model(models, key, made.objects, made.facts)
    objects = read_model(models, key)
    return WarmStart(config, objects["config.json"].decode(), objects["model.safetensors"])
