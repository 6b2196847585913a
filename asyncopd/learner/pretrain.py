"""Supervised training of the small models on a task's demonstrations: the student's warm start and neural teachers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import nn

from asyncopd.config.engines import Pretrain, TinyModel
from asyncopd.learner.optimize import LogprobModel
from asyncopd.learner.student import learning_rate
from asyncopd.losses.divergences import cross_entropy
from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.models.packing import pack
from asyncopd.ports import Task
from asyncopd.records import Facts


def make_tiny_model(
    model: TinyModel, task: Task, *, row_capacity: int, on_step: Callable[[int, float], None]
) -> tuple[dict[str, bytes], Facts]:
    """Build a tiny model for the vocabulary of `task` and pre-train it as its settings say.

    Args:
        task: with the model's own seed, not a run's: the product is shared by all runs with the same settings.
        on_step: as in `pretrain`.
    Returns:
        `config.json` and `model.safetensors`, as the model cache stores them; and settings, last loss and seconds.
    """
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
    causal_lm = build_causal_lm(architecture, seed=model.pretrain.seed)
    started = time.time()
    loss = pretrain(causal_lm, task, model.pretrain, row_capacity=row_capacity, on_step=on_step)
    objects = {
        "config.json": json.dumps(causal_lm.config.to_dict()).encode(),
        "model.safetensors": to_safetensors(causal_lm),
    }
    facts = Facts(settings=model.model_dump(mode="json"), loss_nats=loss, seconds=time.time() - started)
    return objects, facts


def pretrain(
    causal_lm: nn.Module, task: Task, settings: Pretrain, *, row_capacity: int, on_step: Callable[[int, float], None]
) -> float:
    """Minimise the cross-entropy of the task's demonstrations, in place.

    Args:
        on_step: called after every step with the number of steps done and the loss, nats per token.
    Returns:
        The mean loss of the last tenth of the steps, nats per token.
    """
    num_steps, lr, warmup_steps = settings.num_steps, settings.lr, settings.warmup_steps
    model = LogprobModel(causal_lm.train(), temperature=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(num_steps):
        indices = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        demonstrations = [task.demonstration(index, "train") for index in indices]
        sequences = [(d.prompt_ids, d.response_ids) for d in demonstrations]
        longest = max(len(prompt) + len(response) for prompt, response in sequences)
        ids_T = torch.cat([torch.as_tensor(d.response_ids, dtype=torch.int64) for d in demonstrations])
        logprobs_TJ, _ = model(pack(sequences, max(row_capacity, longest)), ids_T[:, None])
        loss = cross_entropy(logprobs_TJ[:, 0]).mean()
        rate = learning_rate(step, 0.9 * lr, warmup_steps, num_steps, "cosine")
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
