"""A tiny student and scored trajectories for learner tests: random distributions, every cached array present."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from transformers import PreTrainedModel

from asyncopd.config.losses import LossConfig
from asyncopd.config.schema import Learner
from asyncopd.learner.optimize import LogprobModel
from asyncopd.learner.student import Student
from asyncopd.losses import build_estimator
from asyncopd.models.load import architecture_of_size, build_causal_lm
from asyncopd.types import Candidates, DrawLaw, ScoredTrajectory, TeacherScores, Trajectory, VersionRun

torch.set_num_threads(1)

VOCAB_SIZE, HEAD, NUM_DRAWS = 17, 3, 4
LENGTHS = (1, 7, 2, 13, 4, 31, 3, 5, 2, 9)
"""Response lengths of the default batch: a single token, and one response longer than a row of 24."""


def tiny_model(seed: int = 0, *, hidden_size: int = 16) -> PreTrainedModel:
    architecture = architecture_of_size(
        num_layers=1,
        hidden_size=hidden_size,
        num_heads=2,
        vocab_size=VOCAB_SIZE,
        max_positions=64,
        eos_id=1,
        pad_id=0,
    )
    return build_causal_lm(architecture, seed=seed)


def scored_batch(lengths: Sequence[int] = LENGTHS, *, law: DrawLaw = "policy", seed: int = 0) -> list[ScoredTrajectory]:
    """One scored trajectory for every length; their indices count from 0."""
    return [_scored(index, length, law, np.random.default_rng((seed, index))) for index, length in enumerate(lengths)]


def _scored(index: int, length: int, law: DrawLaw, rng: np.random.Generator) -> ScoredTrajectory:
    behaviour_TV, teacher_TV = (_log_softmax(0.7 * rng.standard_normal((length, VOCAB_SIZE))) for _ in range(2))
    response_T = _draw(np.exp(behaviour_TV), 1, rng)[:, 0]
    head_TK = np.argsort(-behaviour_TV, axis=1)[:, :HEAD].astype(np.int32)
    outside_TV = np.exp(behaviour_TV)
    np.put_along_axis(outside_TV, head_TK, 0.0, axis=1)
    tail_mass_T = outside_TV.sum(1)
    draws_TN = _draw(np.exp(behaviour_TV) if law == "policy" else outside_TV / tail_mass_T[:, None], NUM_DRAWS, rng)
    if law == "policy":
        draws_TN[:, 0] = response_T
    teacher_draws_TM = _draw(np.exp(teacher_TV), 3, rng)
    topk_TK = np.argsort(-teacher_TV, axis=1).astype(np.int32)

    def at(rows_TV: NDArray[np.float64], ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.take_along_axis(rows_TV, ids.reshape(length, -1), axis=1).reshape(ids.shape).astype(np.float32)

    trajectory = Trajectory(
        index=index,
        prompt_id=f"p{index}",
        prompt_ids=rng.integers(2, VOCAB_SIZE, 1 + index % 4).astype(np.int32),
        response_ids=response_T,
        behaviour_logprobs_T=at(behaviour_TV, response_T),
        version_runs=(VersionRun(0, length),),
        finish_reason="length",
        candidates=Candidates(
            head_ids_TK=head_TK,
            head_logprobs_TK=at(behaviour_TV, head_TK),
            tail_logmass_T=np.log(tail_mass_T).astype(np.float32),
            draw_ids_TN=draws_TN,
            draw_logprobs_TN=at(behaviour_TV, draws_TN),
            law=law,
        ),
    )
    scores = TeacherScores(
        index=index,
        teacher="random",
        teacher_digest="0",
        temperature=1.0,
        sampled_logprobs_T=at(teacher_TV, response_T),
        topk_ids_TK=topk_TK,
        topk_logprobs_TK=at(teacher_TV, topk_TK),
        head_logprobs_TK=at(teacher_TV, head_TK),
        draw_logprobs_TN=at(teacher_TV, draws_TN),
        teacher_draw_ids_TM=teacher_draws_TM,
        teacher_draw_logprobs_TM=at(teacher_TV, teacher_draws_TM),
    )
    return ScoredTrajectory(trajectory, scores)


def student(model: PreTrainedModel, config: LossConfig, accelerator: Accelerator, **changes: Any) -> Student:
    settings = {"lr": 1e-3, "warmup_steps": 0, "grad_clip": 1e9, "row_capacity": 24, "rows_per_micro_batch": 2}
    return Student(model, build_estimator(config), accelerator, Learner(**{**settings, **changes}), temperature=1.0)


@contextmanager
def accelerator(mixed_precision: Literal["no", "bf16"] = "no") -> Iterator[Accelerator]:
    """An Accelerator on the CPU; its process-wide state is forgotten before and after."""
    AcceleratorState._reset_state(True)
    try:
        yield Accelerator(cpu=True, mixed_precision=mixed_precision)
    finally:
        AcceleratorState._reset_state(True)


class KeepsParameters(torch.optim.Optimizer):
    """Its step does nothing, so that a test can read the gradient that a step made."""

    def __init__(self, model: LogprobModel) -> None:
        super().__init__(model.parameters(), {})

    def step(self, closure: Any = None) -> None:
        del closure


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def flat_parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def _log_softmax(logits_TV: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True)))


def _draw(law_TV: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int32]:
    return np.stack([rng.choice(law_TV.shape[1], count, p=row / row.sum()) for row in law_TV]).astype(np.int32)
