"""Master weights are float32 whatever forward and backward compute in (check 10)."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from learner_builders import HEAD, NUM_DRAWS, accelerator, flat_parameters, scored_batch, student, tiny_model

from asyncopd.config import losses as c
from asyncopd.errors import ShapeError

LOSS = c.HeadTailConfig(head=HEAD, num_draws=NUM_DRAWS)


def distance_moved(mixed_precision: Literal["no", "bf16"], *, num_steps: int = 100) -> torch.Tensor:
    """θ_after − θ_before over steps at lr 1e-6."""
    model = tiny_model(hidden_size=32)
    before = flat_parameters(model)
    with accelerator(mixed_precision) as this_process:
        trained = student(model, LOSS, this_process, lr=1e-6)
        for step in range(num_steps):
            trained.train(step, scored_batch(law="tail", seed=step % 4))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return flat_parameters(model) - before


def test_a_hundred_bf16_steps_at_lr_1e_6_move_as_far_as_fp32_ones() -> None:
    in_fp32, in_bf16 = distance_moved("no"), distance_moved("bf16")
    assert float(in_bf16.norm()) == pytest.approx(float(in_fp32.norm()), rel=0.05)
    assert torch.nn.functional.cosine_similarity(in_bf16, in_fp32, dim=0) > 0.95
    # In bf16 the weights themselves, of size 0.1, could not have moved: their spacing there is 5e-4.
    assert in_fp32.abs().max() < 2e-4


def test_bf16_compute_is_really_used() -> None:
    assert not torch.equal(distance_moved("no", num_steps=1), distance_moved("bf16", num_steps=1))


def test_half_precision_master_weights_are_refused() -> None:
    with accelerator() as this_process, pytest.raises(ShapeError, match="master weights must be float32"):
        student(tiny_model().bfloat16(), LOSS, this_process)
