"""`study estimators`: bias and variance of every estimator's gradient at equal teacher cost, against drift.

Snapshots are the warm start and two later stages of on-policy distillation with the dense reverse KL. At each, p_old is
the snapshot, prefixes are its own, and p_θ is the snapshot moved in weight space until the mean KL(p_old‖p_θ) over the
prefixes is the wanted drift, in one of two directions:

    trained   θ + s·(θ_later − θ), θ_later being 20 further training steps; s > 1 extrapolates
    random    θ + s·noise, Gaussian, scaled by each tensor's root mean square
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.config import losses as c
from asyncopd.config.losses import LossConfig
from asyncopd.models.causal_lm import output_embedding, packed_hidden, to_safetensors
from asyncopd.models.packing import pack
from asyncopd.ports import NamedBytes
from asyncopd.study.cells import CellStore, digest
from asyncopd.study.gradients import Target, World, measure
from asyncopd.study.loop import LoopSettings, WarmStart, sample_prompts, train_lagged
from asyncopd.tasks.walk_rules import WalkOracle
from asyncopd.types import Trajectory

STUDY_CODE = 1
"""Raised whenever what a cell measures changes."""
COSTS = (8, 16)
"""Teacher-scored ids per prefix at which estimators are compared."""
LOOP = LoopSettings(num_steps=80, batch_size=32, max_new_tokens=96, num_prompts=0)
"""Of the training run whose weights the snapshots are."""
DIRECTIONS = ("trained", "random")
DRIFT_TOLERANCE = 0.005
"""Relative; of the mean drift of a world."""


@dataclass(frozen=True)
class Contestant:
    """An estimator as the study compares it."""

    name: str
    config: LossConfig
    target: Target
    teacher_ids: int
    """Ids per prefix whose log q it needs; 42 stands for the full row."""

    def columns(self) -> dict[str, Any]:
        """Of a row of the study's tables."""
        return {"estimator": self.name, "target": self.target, "teacher_ids": self.teacher_ids}


@dataclass(frozen=True)
class Scale:
    """How large a study is."""

    stages: tuple[int, ...] = (0, 15, 60)
    """Training steps behind the snapshots."""
    further: int = 20
    """Training steps from a snapshot to the end of its `trained` direction."""
    num_prompts: int = 64
    num_prefixes: int = 192
    drifts: tuple[float, ...] = (0.0, 0.02, 0.05, 0.15, 0.5)
    """nats."""
    loop: LoopSettings = LOOP


def contestants(cost: int, vocab_size: int) -> Iterator[Contestant]:
    """Every estimator that can be had for `cost` teacher ids per prefix."""

    def pg(name: str, **settings: Any) -> Contestant:
        config = c.PolicyGradientConfig.model_validate({"name": "policy_gradient", "num_draws": cost, **settings})
        return Contestant(name, config, "D_R", cost)

    half = cost // 2
    yield Contestant(f"head {half} + tail {half}", c.HeadTailConfig(head=half, num_draws=half), "D_R", cost)
    if cost > 8:
        yield Contestant(f"head {cost - 4} + tail 4", c.HeadTailConfig(head=cost - 4, num_draws=4), "D_R", cost)
    joined = c.HeadTailConfig(head=(cost - 4) // 2, num_draws=4, teacher_top_k=(cost - 4) // 2)
    yield Contestant(f"head {joined.head} + teacher {joined.teacher_top_k} + tail 4", joined, "D_R", cost)
    yield pg("draws, leave-one-out")
    yield pg("draws, no baseline", baseline="none")
    yield pg("draws, A_old", advantage="behaviour")
    yield pg("draws, no ratio", ratio="none")
    for correction in ("clip", "decoupled", "m2po", "truncate", "mask"):
        # The exact baseline is what leave-one-out estimates; with it the correction's bias is exact too.
        yield pg(f"draws, {correction} (exact baseline)", correction={"name": correction}, baseline="exact")
    for support in ("teacher", "student"):
        for tail in ("bucket", "drop", "renormalise"):
            config = c.ReverseKLConfig.model_validate({"support": support, "top_k": cost, "tail": tail})
            yield Contestant(f"reverse KL, {support} top-{cost}, {tail}", config, "D_R", cost)
    yield Contestant(f"JSD β=½, teacher top-{cost}", c.GeneralisedJSDConfig(top_k=cost), "D_R", cost)
    skew = c.SkewKLConfig(top_k=cost, direction="reverse")
    yield Contestant(f"skew reverse KL, teacher top-{cost}", skew, "D_R", cost)
    yield Contestant(f"teacher draws {cost}", c.ForwardKLDrawsConfig(num_teacher_draws=cost), "D_F", cost)
    for tail in ("bucket", "drop", "renormalise"):
        forward = c.ForwardKLConfig.model_validate({"top_k": cost, "tail": tail})
        yield Contestant(f"forward KL, teacher top-{cost}, {tail}", forward, "D_F", cost)
    yield Contestant(f"skew forward KL, teacher top-{cost}", c.SkewKLConfig(top_k=cost), "D_F", cost)
    yield Contestant(f"NPD, teacher top-{cost}", c.NPDConfig(top_k=cost), "D_F", cost)
    if cost > min(COSTS):
        return
    # References, once: their cost is their own.
    one = c.PolicyGradientConfig(num_draws=1)
    yield Contestant("sampled token alone", one, "D_R", 1)
    yield Contestant("sampled token, A_old", one.model_copy(update={"advantage": "behaviour"}), "D_R", 1)
    exact = one.model_copy(update={"baseline": "exact"})
    yield Contestant("sampled token, exact baseline", exact, "D_R", vocab_size)
    yield Contestant("cross-entropy", c.CrossEntropyConfig(), "D_F", 0)
    yield Contestant("dense reverse KL", c.DenseReverseKLConfig(), "D_R", vocab_size)
    yield Contestant("dense forward KL", c.DenseForwardKLConfig(), "D_F", vocab_size)


async def run_cells(
    warm: WarmStart, store: NamedBytes, scale: Scale, on_done: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Measure every cell that is not stored yet. Returns all rows, one for each estimator and cell.

    Args:
        store: at the output directory.
        on_done: called with (what was done, units done, units planned).
    """
    vocab_size = warm.task(0).tokenizer.vocab_size
    everyone = [each for cost in COSTS for each in contestants(cost, vocab_size)]
    estimators = [asdict(each) | {"config": each.config.model_dump(mode="json")} for each in everyone]
    settings = {"code": STUDY_CODE, "scale": asdict(scale), "estimators": estimators, **warm.identity()}
    cells = CellStore(store, "estimators", settings)
    places = [
        (stage, direction, drift)
        for stage in scale.stages
        for direction in DIRECTIONS
        for drift in scale.drifts
        # Without drift there is no direction.
        if drift > 0 or direction == DIRECTIONS[0]
    ]
    total = scale.loop.num_steps + len(places)
    weights = await _stages(warm, store, scale, lambda step: on_done(f"training step {step}", step, total))
    rows: list[dict[str, Any]] = []
    prefixes: dict[int, Prefixes] = {}
    for number, (stage, direction, drift) in enumerate(places, scale.loop.num_steps + 1):
        name = f"stage{stage:03d}-{direction}-drift{drift:g}"
        cell = cells.find(name)
        if cell is None:
            if stage not in prefixes:
                trajectories = await sample_prompts(warm, weights[stage], scale.loop, scale.num_prompts, seed=1)
                prefixes[stage] = Prefixes.choose(trajectories, scale.num_prefixes)
            world, s = _world(warm, prefixes[stage], weights[stage], weights[stage + scale.further], direction, drift)
            place = {"stage_steps": stage, "direction": direction, "drift_target_nats": drift}
            place |= {"drift_nats": mean_kl(world.behaviour_TV, world.student_TV), "scale": s}
            measured = [(each, measure(each.config, world, each.target)) for each in everyone]
            cell = {"rows": [place | each.columns() | asdict(figures) for each, figures in measured]}
            cells.put(name, cell)
        rows += cell["rows"]
        on_done(name, number, total)
    return rows


async def _stages(
    warm: WarmStart, store: NamedBytes, scale: Scale, on_step: Callable[[int], None]
) -> Mapping[int, bytes]:
    """Weights after each wanted number of training steps; trained once per settings."""
    wanted = sorted({*scale.stages, *(stage + scale.further for stage in scale.stages)})
    made_by = [STUDY_CODE, warm.config.model_digest(warm.config.student), asdict(scale.loop)]
    keys = {step: f"snapshots/{digest(made_by)}/{step:03d}.safetensors" for step in wanted}
    found = {step: body for step, key in keys.items() if (body := store.find(key)) is not None}
    if len(found) == len(wanted):
        return found
    weights = {0: to_safetensors(warm.model())}

    def keep(step: int, safetensors: bytes) -> None:
        weights[step] = safetensors
        on_step(step)

    await train_lagged(warm, c.DenseReverseKLConfig(), scale.loop, lag=0, lr=1e-3, seed=0, on_step=keep)
    for step, key in keys.items():
        store.put_if_absent(key, weights[step])
    return weights


def _world(
    warm: WarmStart, prefixes: Prefixes, snapshot: bytes, later: bytes, direction: str, drift: float
) -> tuple[World, float]:
    """The world at a drift, and the s that makes it."""
    origin, moved = warm.model(snapshot), warm.model(snapshot)
    starts = [start.detach() for start in origin.parameters()]
    if direction == "trained":
        steps = [end.detach() - start for start, end in zip(starts, warm.model(later).parameters(), strict=True)]
    else:
        generator = torch.Generator().manual_seed(0)
        steps = [torch.randn(p.shape, generator=generator) * p.square().mean().sqrt() for p in starts]
    behaviour_TV = prefixes.student_logprobs(origin)

    def student_at(scale: float) -> Tensor:
        with torch.no_grad():
            for target, start, step in zip(moved.parameters(), starts, steps, strict=True):
                target.copy_(start + scale * step)
        return prefixes.student_logprobs(moved)

    scale = scale_for_drift(lambda s: mean_kl(behaviour_TV, student_at(s)), drift) if drift else 0.0
    smoothing = warm.config.teacher.smoothing  # type: ignore[union-attr]
    teacher_TV = prefixes.teacher_logprobs(WalkOracle(warm.task(0).rules, smoothing))
    return World(student_at(scale), behaviour_TV, teacher_TV), scale


# -- worlds -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prefixes:
    """Chosen positions of sampled responses."""

    trajectories: Sequence[Trajectory]
    rows_T: NDArray[np.int64]
    """[T] which response tokens, counted over all trajectories."""

    @classmethod
    def choose(cls, trajectories: Sequence[Trajectory], count: int) -> Prefixes:
        """`count` positions of the sampler's own distribution over prefixes, in a seeded random choice."""
        total = sum(len(t.response_ids) for t in trajectories)
        return cls(trajectories, np.sort(np.random.default_rng(0).permutation(total)[:count]))

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
    """KL(first‖second), nats, mean over the prefixes."""
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
