"""Supervised training of the small models on a task's demonstrations: the student's warm start and neural teachers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from asyncopd.learner.optimize import LogprobModel
from asyncopd.learner.student import learning_rate
from asyncopd.losses.cross_entropy import cross_entropy
from asyncopd.packing import pack
from asyncopd.ports import Task


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
