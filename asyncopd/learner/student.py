"""The student being trained: fp32 master weights, AdamW, schedule, checkpoint. Everything torch the learner needs."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from asyncopd.config.schema import Learner, Schedule
from asyncopd.errors import ShapeError
from asyncopd.learner.optimize import LogprobModel, StepResult, micro_batches, optimizer_step
from asyncopd.losses.contract import Estimator
from asyncopd.models.causal_lm import load_safetensors, to_safetensors
from asyncopd.types import ScoredTrajectory


class Student:
    """A causal LM with its optimizer. One rank's view; several ranks train the same step together."""

    def __init__(
        self,
        causal_lm: nn.Module,
        estimator: Estimator,
        accelerator: Accelerator,
        settings: Learner,
        *,
        temperature: float,
        top_p: float = 1.0,
        published_dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            causal_lm: float32 parameters, whatever the accelerator's mixed precision computes in.
            temperature, top_p: of the law that responses are sampled from.
            published_dtype: of the floating-point weights that samplers get.
        Raises:
            ShapeError: a parameter is not float32; updates at small learning rates would be rounded away.
        """
        wrong = {p.dtype for p in causal_lm.parameters() if p.dtype != torch.float32}
        if wrong:
            raise ShapeError(f"master weights must be float32, found {wrong}; load the student with dtype float32.")
        self._causal_lm, self._estimator = causal_lm, estimator
        self._accelerator, self._settings = accelerator, settings
        self._published_dtype = published_dtype
        # Not train(): dropout, layer dropping and noise in routers would make what is trained another policy than the
        # one that was sampled.
        causal_lm.eval()
        model = LogprobModel(causal_lm, temperature, top_p)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
        )
        self._model, self._optimizer = accelerator.prepare(model, optimizer)
        self._step = 0

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`."""
        settings = self._settings
        num_steps = settings.schedule_steps or settings.num_steps
        return learning_rate(step, settings.lr, settings.warmup_steps, num_steps, settings.schedule)

    def train(
        self,
        step: int,
        batch: Sequence[ScoredTrajectory],
        on_micro_batch: Callable[[int, int], None] = lambda number, num_batches: None,
    ) -> StepResult:
        """One optimizer step over `batch`, of which this rank works on every `num_processes`-th trajectory.

        Args:
            batch: of the whole step, the same on every rank.
            on_micro_batch: see `optimizer_step`.
        Raises:
            NonFiniteError: see `optimizer_step`.
            ShapeError: fewer trajectories than ranks; raised on every rank, so that none waits for another.
        """
        accelerator = self._accelerator
        if len(batch) < accelerator.num_processes:
            raise ShapeError(
                f"step {step} has {len(batch)} trajectories for {accelerator.num_processes} ranks; each needs at least "
                "one. Raise learner.batch_size or use fewer ranks."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr(step)
        batches = micro_batches(
            batch[accelerator.process_index :: accelerator.num_processes],
            row_capacity=self._settings.row_capacity,
            rows_per_micro_batch=self._settings.rows_per_micro_batch,
            device=accelerator.device,
        )
        result = optimizer_step(
            self._model,
            self._optimizer,
            batches,
            self._estimator,
            accelerator=accelerator,
            grad_clip=self._settings.grad_clip,
            on_micro_batch=on_micro_batch,
        )
        self._step = step + 1
        return result

    def weights(self) -> bytes:
        """The current weights, as samplers load them."""
        return to_safetensors(self._causal_lm, self._published_dtype)

    def checkpoint(self) -> dict[str, bytes]:
        """Everything a resumed learner needs: weights, optimizer, random state, steps done."""
        state = {
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
            "torch_rng": torch.get_rng_state(),
            "numpy_rng": _plain(np.random.get_state()),
            "python_rng": _plain(random.getstate()),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return {"model.safetensors": to_safetensors(self._causal_lm), "learner.pt": buffer.getvalue()}

    def load(self, safetensors: bytes) -> None:
        """Take over published weights; the optimizer stays as it is."""
        load_safetensors(self._causal_lm, safetensors)

    def restore(self, objects: Mapping[str, bytes]) -> None:
        """The inverse of `checkpoint`."""
        load_safetensors(self._causal_lm, objects["model.safetensors"])
        state = torch.load(io.BytesIO(objects["learner.pt"]), weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            # The checkpoint's value would undo a replay's other one; the learning rate is set at every step.
            group["weight_decay"] = self._settings.weight_decay
        self._step = state["step"]
        torch.set_rng_state(state["torch_rng"])
        name, keys, *rest = state["numpy_rng"]
        np.random.set_state((name, np.array(keys, np.uint32), *rest))
        version, internal, gauss = state["python_rng"]
        random.setstate((version, tuple(internal), gauss))


def learning_rate(step: int, peak: float, warmup_steps: int, num_steps: int, schedule: Schedule) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or down to 0 at `num_steps` linearly or as half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * (1 + math.cos(math.pi * progress)) / 2


def _plain(state: Any) -> list[Any]:
    """Random states as lists of numbers, which `torch.load(weights_only=True)` accepts."""
    return [
        part.tolist() if isinstance(part, np.ndarray) else list(part) if isinstance(part, tuple) else part
        for part in state
    ]
