"""Supervised training of the small models on a task's demonstrations: the student's warm start and neural teachers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from asyncopd.config import TinyModel
from asyncopd.learner.optimize import LogprobModel
from asyncopd.learner.student import learning_rate
from asyncopd.losses.divergences import cross_entropy
from asyncopd.models.causal_lm import architecture_of_size, build_causal_lm, to_safetensors
from asyncopd.models.packing import pack
from asyncopd.ports import Task
from asyncopd.records import Facts


@dataclass(frozen=True)
class MadeModel:
    """A tiny model as the model cache stores it."""

    objects: Mapping[str, bytes]
    """`config.json` and `model.safetensors`."""
    facts: Facts
    """Settings, last loss and the seconds it took."""


def make_tiny_model(
    model: TinyModel, task: Task, *, row_capacity: int, on_step: Callable[[int, float], None]
) -> MadeModel:
    """Build a tiny model for the vocabulary of `task` and pre-train it as its settings say.

    Args:
        task: with the model's own seed, not a run's: the product is shared by all runs with the same settings.
        on_step: as in `pretrain`.
    """
    settings = model.pretrain
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
        row_capacity=row_capacity,
        on_step=on_step,
    )
    objects = {
        "config.json": json.dumps(causal_lm.config.to_dict()).encode(),
        "model.safetensors": to_safetensors(causal_lm),
    }
    facts = Facts(settings=model.model_dump(mode="json"), loss_nats=loss, seconds=time.time() - started)
    return MadeModel(objects, facts)


def pretrain(
    causal_lm: nn.Module,
    task: Task,
    *,
    num_steps: int,
    batch_size: int,
    lr: float,
    warmup_steps: int,
    row_capacity: int,
    on_step: Callable[[int, float], None],
) -> float:
    """Minimise the cross-entropy of the task's demonstrations, in place.

    Args:
        on_step: called after every step with the number of steps done and the loss, nats per token.
    Returns:
        The mean loss of the last tenth of the steps, nats per token.
    """
    model = LogprobModel(causal_lm.train(), temperature=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(num_steps):
        indices = range(step * batch_size, (step + 1) * batch_size)
        demonstrations = [task.demonstration(index, "train") for index in indices]
        sequences = [(d.prompt_ids, d.response_ids) for d in demonstrations]
        longest = max(len(prompt) + len(response) for prompt, response in sequences)
        ids_T = torch.cat([torch.as_tensor(d.response_ids, dtype=torch.int64) for d in demonstrations])
        logprobs_TJ, _ = model(pack(sequences, max(row_capacity, longest)), ids_T[:, None])
        loss = cross_entropy(logprobs_TJ[:, 0]).mean()
        rate = learning_rate(step, peak=0.9 * lr, warmup_steps=warmup_steps, num_steps=num_steps, schedule="cosine")
        for group in optimizer.param_groups:
            group["lr"] = rate + 0.1 * lr * min(1.0, (step + 1) / max(1, warmup_steps))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        on_step(step + 1, losses[-1])
    last = losses[-max(1, num_steps // 10) :]
    return sum(last) / len(last) if last else float("nan")
