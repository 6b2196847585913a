"""The student a study starts from, and worlds made of it: frozen prefixes with three full distributions each.

snapshot weights --sample--> prefixes;  snapshot + s · direction --s by bisection--> mean KL(p_old‖p_θ) = target
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.config import OracleTeacher, RunConfig
from asyncopd.losses import TokenRows
from asyncopd.models.causal_lm import build_causal_lm, load_safetensors, output_embedding, packed_hidden
from asyncopd.models.packing import pack
from asyncopd.tasks.build import build_task
from asyncopd.tasks.walk import WalkTask
from asyncopd.tasks.walk_rules import WalkOracle
from asyncopd.teacher.oracle import OracleScorer
from asyncopd.types import Trajectory

DRIFT_TOLERANCE = 0.005
"""Relative; of the mean drift of a world."""


@dataclass(frozen=True)
class World:
    """log-probs [T, V] at T prefixes, float64, nats."""

    student_TV: Tensor
    behaviour_TV: Tensor
    teacher_TV: Tensor

    def drift_nats(self) -> float:
        """Mean KL(p_old‖p_θ) over the prefixes, exactly."""
        return mean_kl(self.behaviour_TV, self.student_TV)


@dataclass(frozen=True)
class Prefixes:
    """Chosen positions of sampled responses."""

    trajectories: Sequence[Trajectory]
    rows_T: NDArray[np.int64]
    """[T] which response tokens, counted over all trajectories."""

    @classmethod
    def choose(cls, trajectories: Sequence[Trajectory], count: int, seed: int) -> Prefixes:
        """`count` positions of the sampler's own distribution over prefixes, in a seeded random choice."""
        total = sum(len(t.response_ids) for t in trajectories)
        rows_T = np.sort(np.random.default_rng(seed).permutation(total)[:count])
        return cls(trajectories, rows_T)

    @torch.no_grad()
    def student_logprobs(self, model: PreTrainedModel) -> Tensor:
        """[T, V] of a student."""
        packed = pack([(t.prompt_ids, t.response_ids) for t in self.trajectories], 256)
        hidden_TD = packed_hidden(model, packed)[torch.from_numpy(self.rows_T)]
        weight_VD, bias_V = output_embedding(model)
        logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V)
        return torch.log_softmax(logits_TV.double(), -1)

    def teacher_logprobs(self, oracle: WalkOracle) -> Tensor:
        """[T, V] of the closed form."""
        rows = np.concatenate([oracle.logprobs_TV(t.prompt_ids, t.response_ids) for t in self.trajectories])
        return torch.from_numpy(rows[self.rows_T])


def mean_kl(first_TV: Tensor, second_TV: Tensor) -> float:
    return float((first_TV.exp() * (first_TV - second_TV)).sum(-1).mean())


def scale_for_drift(drift_at: Callable[[float], float], target: float) -> float:
    """s > 0 with drift_at(s) ≈ target; drift_at(0) is 0 and grows, at least to the first crossing."""
    low, high = 0.0, 0.25
    while drift_at(high) < target:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        found = drift_at(middle)
        if abs(found - target) <= DRIFT_TOLERANCE * target or high - low < 1e-9 * high:
            return middle
        low, high = (middle, high) if found < target else (low, middle)


def token_rows(
    world: World, prefix_R: Tensor, draw_ids_RN: Tensor, teacher_draw_ids_RM: Tensor, *, head: int
) -> TokenRows:
    """R rows at prefixes `prefix_R`, as a log would hold them; the teacher's top-k is its full row.

    Args:
        draw_ids_RN: under p_old, or p_old outside the head. The first draw is the emitted token.
    """
    behaviour_RV, teacher_RV = world.behaviour_TV[prefix_R], world.teacher_TV[prefix_R]
    has_draws = draw_ids_RN.shape[1] > 0
    responses_R = draw_ids_RN[:, 0] if has_draws else torch.zeros_like(prefix_R)
    topk_RK = world.teacher_TV.argsort(-1, descending=True)[prefix_R]
    head_RK = heads(world, head)[prefix_R]
    return TokenRows(
        response_ids_T=responses_R,
        behaviour_logprobs_T=behaviour_RV.gather(-1, responses_R[:, None])[:, 0],
        teacher_logprobs_T=teacher_RV.gather(-1, responses_R[:, None])[:, 0],
        topk_ids_TK=topk_RK,
        topk_logprobs_TK=teacher_RV.gather(-1, topk_RK),
        head_ids_TK=head_RK,
        head_behaviour_logprobs_TK=behaviour_RV.gather(-1, head_RK),
        head_teacher_logprobs_TK=teacher_RV.gather(-1, head_RK),
        tail_logmass_T=outside_head(world, head).sum(-1).log()[prefix_R],
        draw_ids_TN=draw_ids_RN,
        draw_behaviour_logprobs_TN=behaviour_RV.gather(-1, draw_ids_RN),
        draw_teacher_logprobs_TN=teacher_RV.gather(-1, draw_ids_RN),
        teacher_draw_ids_TM=teacher_draw_ids_RM,
        teacher_draw_logprobs_TM=teacher_RV.gather(-1, teacher_draw_ids_RM),
        trajectory_T=torch.arange(len(prefix_R)),
    )


def heads(world: World, head: int) -> Tensor:
    """[T, K] p_old's most likely ids."""
    return world.behaviour_TV.argsort(-1, descending=True)[:, :head]


def outside_head(world: World, head: int) -> Tensor:
    """[T, V] p_old with the head's entries 0."""
    return world.behaviour_TV.exp().scatter(-1, heads(world, head), 0.0)


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

    def identity(self) -> dict[str, Any]:
        """Of student and teacher, for the settings of a study's cells."""
        return {
            "student": self.config.model_digest(self.config.student),
            "teacher": self.config.teacher.model_dump(mode="json"),
        }

    def task(self, seed: int) -> WalkTask:
        task = build_task(self.config.task, seed=seed)
        assert isinstance(task, WalkTask)
        return task

    def scorer(self) -> OracleScorer:
        assert isinstance(self.config.teacher, OracleTeacher)
        return OracleScorer(self.task(0).rules, smoothing=self.config.teacher.smoothing)
