"""What a run is made of: frozen pydantic values with a reason beside every default. Importing this loads no torch.

The same model is the YAML file, the flow's parameter and the stored record of a run. Values are checked here as far
as they can be without touching disk or a model; flows/preflight.py checks the rest before anything is loaded.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from asyncopd.config.base import Frozen
from asyncopd.config.engines import (
    EngineDtype,
    HfTeacher,
    ModelConfig,
    OracleTeacher,
    TeacherConfig,
    TinyModel,
    VllmSampling,
    VllmTeacher,
)
from asyncopd.config.losses import HeadTailConfig, LossConfig, PolicyGradientConfig
from asyncopd.config.recorded import CacheRequirements
from asyncopd.config.tasks import TaskConfig, WalkConfig
from asyncopd.schedule import OnStale, Order, Plan
from asyncopd.types import DrawLaw

Schedule = Literal["constant", "linear", "cosine"]

DEFAULT_MAX_AHEAD = 2
PRETRAIN_CODE = 1
"""Raised whenever pre-training itself changes, so that models made by older code are not taken for new ones."""


class Staleness(Frozen):
    """How old a trajectory may be when it is trained, and what happens to one that is older (docs/staleness.md)."""

    max_staleness: int = Field(2, ge=0)
    """Oldest admissible weights, in policy versions. 0 is synchronous. 2 already hides the long responses behind the
    next steps' (docs/performance.md); larger buys mostly staleness."""
    order: Order = "index"
    """`index`: a step trains its own index range, whatever finished first: no bias against long responses, no waste.
    `arrival`: it trains the first batch_size that are scored."""
    on_stale: OnStale | None = None
    """What order `arrival` does with a trajectory that is older than max_staleness when a step comes to it: `drop` it,
    `hold` it untrained for a replay, or `train` it all the same. No default: each gives up something else."""
    max_ahead: int = Field(DEFAULT_MAX_AHEAD, ge=1)
    """Order `arrival`: steps' worth of trajectories that may be started beyond those the learner has come to. With 2
    and on_stale train, mean staleness is that of index order at the default max_staleness, so that the two compare;
    3 drops a third of everything under on_stale drop (docs/performance.md)."""
    in_flight_updates: bool = True
    """Responses in progress go on under newer weights as soon as there are some. Otherwise they end under the weights
    they started with, and the sampler's batch runs empty once per version (docs/performance.md)."""
    max_drift: float | None = Field(None, gt=0)
    """While the learner's last step measured more drift KL(p_old‖p_θ) than this, nats per token, samplers start only
    what the next version needs. None, because the drift that an estimator bears is a matter of the estimator."""

    @model_validator(mode="after")
    def _settings_belong_together(self) -> Self:
        if self.order == "arrival" and self.on_stale is None:
            raise ValueError(
                "order arrival needs on_stale, what becomes of trajectories older than max_staleness when a step comes "
                "to them: drop, hold or train."
            )
        if self.order == "index" and self.on_stale is not None:
            raise ValueError(
                f"on_stale {self.on_stale} has nothing to decide in order index, where no trajectory starts under "
                "weights older than max_staleness. Leave it out, or set order: arrival."
            )
        if self.order == "index" and self.max_ahead != DEFAULT_MAX_AHEAD:
            raise ValueError(
                f"max_ahead {self.max_ahead} has no effect in order index, where max_staleness bounds how far ahead "
                "samplers run. Leave it out, or set order: arrival."
            )
        synchronous = self.order == "index" and self.max_staleness == 0
        if synchronous and not self.in_flight_updates:
            raise ValueError(
                "in_flight_updates false has no effect at max_staleness 0 in order index: nothing is in flight when a "
                "version appears. Leave it out, or raise max_staleness."
            )
        if self.max_staleness == 0 and self.max_drift is not None and self.order == "index":
            raise ValueError(
                "max_drift has no effect at max_staleness 0 in order index: nothing starts before the version it "
                "is trained under. Leave it out, or raise max_staleness."
            )
        return self


class KeepCheckpoints(Frozen):
    keep_last: int | None = Field(3, ge=1)
    """Newest checkpoints of the surviving lineage. A resume needs one; two more are there should it be corrupt. null
    keeps all."""


class KeepPolicies(Frozen):
    keep_every: int = Field(1, ge=0)
    """Versions whose number this divides. 1 keeps all: weights are what a run is for, and small ones cost little. 0
    keeps none for their number."""
    keep_last: int = Field(10, ge=1)
    """Newest versions. Samplers and the evaluator may still be reading the last few."""


class KeepShards(Frozen):
    keep_last_steps: int | None = Field(None, ge=1)
    """Newest steps whose trajectories and scores stay, so that they can be trained again. null keeps all: a run that
    lost them cannot be replayed from its beginning."""


class Retention(Frozen):
    """What a run keeps. Nothing is removed before `asyncopd maintain collect` runs, and never what a resume needs."""

    checkpoints: KeepCheckpoints = KeepCheckpoints()
    policies: KeepPolicies = KeepPolicies()
    shards: KeepShards = KeepShards()
    superseded: bool = False
    """Keep versions and checkpoints that the learner went back over. No resume and no replay reads them."""
    grace_s: float = Field(3600.0, ge=0)
    """Nothing younger is removed: it may belong to a reader or writer that is about to use it."""
    quarantine_s: float = Field(7 * 86400.0, ge=0)
    """How long data set aside by `maintain quarantine` can be looked at, or put back."""


class Storage(Frozen):
    root: str = "runs"
    """Directory or URL (`s3://bucket/prefix`) that holds runs and pre-trained models."""
    min_free_bytes: int = Field(200_000_000, ge=0)
    """Refuse to start on a local disk with less. 200 MB is several times what the quickstart writes."""


class Rollout(Frozen):
    engine: Literal["hf", "vllm"] = "hf"
    """`hf` for CPUs and small models; `vllm` for GPUs (docs/engines.md). Evaluations sample with hf either way."""
    vllm: VllmSampling = VllmSampling()
    """Only read when engine is vllm."""
    dtype: EngineDtype = "auto"
    """Of the hf engine's weights and activations; log-probs are float32 either way."""
    workers: int = Field(1, ge=1)
    """Rollout processes on this machine. One fills one core."""
    slots: int = Field(128, ge=1)
    """Responses generated at once by one engine. 128 slots of 2 × 48 make 1.4 times the tokens per CPU-second of 64."""
    shard_size: int = Field(64, ge=1)
    """Consecutive indices written as one Parquet object; must divide learner.batch_size."""
    shards_per_task: int = Field(16, ge=1)
    """Shards one Prefect task writes. A task costs about 25 ms of CPU on both sides together; 16 walk shards take
    about 2 s, which keeps that near 1 % (docs/performance.md)."""
    responses_per_prompt: int = Field(1, ge=1)
    """Consecutive indices that answer one prompt. Prompts are then computed once for all of their responses, by
    sampler, teacher and learner; a step sees fewer of them."""
    max_new_tokens: int = Field(192, ge=1)
    """Response limit. Above the longest walk demonstration, so that `length` means a lost student."""
    temperature: float = Field(1.0, gt=0)
    """1 samples from the student itself. The learner and the teacher use the same temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """1 keeps the whole distribution; less truncates it, and the stored log-probs are those of the truncated law. A run
    says at its start what then cannot be corrected (docs/estimators.md)."""


class Recording(Frozen):
    """Arrays to store beyond what the loss needs, so that the same log can be replayed with another estimator."""

    top_k: int = Field(0, ge=0)
    """Teacher's most likely ids per token."""
    head: int = Field(0, ge=0)
    """Sampling student's most likely ids per token."""
    num_draws: int = Field(0, ge=0)
    """Ids drawn by the sampling student per token."""
    law: DrawLaw = "tail"
    """What those draws are drawn from, when the loss does not say."""
    num_teacher_draws: int = Field(0, ge=0)
    """Ids drawn by the teacher per token."""


class Score(Frozen):
    workers: int = Field(1, ge=1)
    """Teacher processes on this machine."""
    row_capacity: int = Field(128, ge=8)
    """Tokens of one packed row of a forward pass, as in learner."""
    shards_per_task: int = Field(16, ge=1)
    """As in rollout."""
    cache: bool = False
    """Keep the teacher's answers under the storage root, for all runs, and ask only for what nobody asked before
    (docs/replay.md). Off by default: two runs share rollouts only where seed, settings and versions agree, and the
    oracle answers faster than a disk."""


class Publish(Frozen):
    """How policy versions are stored for the samplers (docs/storage.md)."""

    kind: Literal["full", "delta"] = "full"
    """`delta` stores what changed since the version before. It pays in bfloat16 at small learning rates; the
    quickstart's 280 kB are not worth the trouble."""
    full_every: int = Field(16, ge=1)
    """Every so many versions the full weights are stored beside the delta: what a joining worker starts from. With
    deltas of 3 % of the full size, 16 makes a join cost at most half more than a full version."""
    dtype: EngineDtype = "auto"
    """Of the published floating-point weights. The learner keeps float32 master weights and checkpoints; bfloat16
    makes samplers act on rounded weights, which counts as drift. `auto` is the dtype the samplers compute in."""


class Learner(Frozen):
    num_steps: int = Field(100, ge=1)
    """Optimizer steps, each of which publishes a policy version."""
    batch_size: int = Field(64, ge=1)
    """Trajectories per step."""
    lr: float = Field(1e-3, gt=0)
    """Peak AdamW rate. 1e-3 suits models below a million parameters; use about 1e-6 for billions."""
    warmup_steps: int = Field(5, ge=0)
    """Steps over which the rate rises linearly from 0; AdamW's second moments are guesses before that."""
    schedule: Schedule = "constant"
    """After warm-up: constant, or down to 0 at num_steps."""
    schedule_steps: int = Field(0, ge=0)
    """Steps at which the schedule is down to 0 when that is not num_steps; 0 for num_steps. A replay of the first 50 of
    200 steps keeps 200 here, or it would train at other rates than the run it replays."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay. 0: distillation runs are short and start from weights worth keeping."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest gradient norm, of the loss averaged over the step's tokens."""
    row_capacity: int = Field(128, ge=8)
    """Tokens of one packed row; attention is quadratic in it. On walk lengths 128 takes 33 ms for forward and backward
    where 256 takes 48. A longer response gets a longer row."""
    rows_per_micro_batch: int = Field(32, ge=1)
    """Packed rows of one forward and backward. The gradient does not depend on it, memory does."""
    compute_dtype: EngineDtype = "auto"
    """Of forward and backward. Master weights and the optimizer are float32 either way."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints; what a crash can cost is at most this many optimizer steps, never a rollout."""
    publish: Publish = Publish()

    @model_validator(mode="after")
    def _schedule_covers_the_steps(self) -> Self:
        if 0 < self.schedule_steps < self.num_steps:
            raise ValueError(
                f"schedule_steps {self.schedule_steps} ends before num_steps {self.num_steps}: the rate would fall "
                "below 0. Raise schedule_steps, or leave it 0."
            )
        return self


class Evaluate(Frozen):
    every: int = Field(25, ge=0)
    """Policy versions between evaluations; the first and the last are always evaluated. 0 evaluates none."""
    num_prompts: int = Field(300, ge=1)
    """Held-out prompts, the same ones every time. 300 gives a standard error of 2.7 points near 65 %."""
    dtype: EngineDtype = "auto"
    """Of the evaluator's student and teacher; `auto` is that of rollout and teacher."""


class Limits(Frozen):
    lease_s: float = Field(10.0, gt=0)
    """A worker whose heartbeat stands still for this long loses its claims."""
    heartbeat_s: float = Field(1.0, gt=0)
    """Between signs of life of a role. Well below lease_s, so that a busy disk costs no lease."""
    hang_s: float = Field(300.0, gt=0)
    """A role whose process lives but whose heartbeat stands still for this long is killed and started again. Loading a
    large model holds the heartbeat up, so this must exceed the slowest load."""
    deadline_s: float = Field(1800.0, gt=0)
    """No wait for one shard or one version lasts longer; the error says what was waited for. A role that dies is
    noticed at once: this is for one that hangs, so it must exceed the slowest step of the run."""
    poll_s: float = Field(0.01, gt=0)
    """Pause between looks at storage. 10 ms on a local disk; 0.5 s is kinder to S3."""
    max_restarts: int = Field(3, ge=0)
    """How often one role process is started again after it died. One that failed in a way that would repeat itself (a
    configuration or model that cannot work, a NaN in the first step) is not."""


class RunConfig(Frozen):
    """Everything that decides a run."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=40)
    """First part of the run id."""
    seed: int = 0
    """Of prompts and sampling. Pre-training has its own."""
    storage: Storage = Storage()
    task: TaskConfig = WalkConfig()
    student: ModelConfig = TinyModel()
    teacher: TeacherConfig = OracleTeacher()
    rollout: Rollout = Rollout()
    recording: Recording = Recording()
    staleness: Staleness = Staleness()
    score: Score = Score()
    learner: Learner = Learner()
    loss: LossConfig = HeadTailConfig()
    evaluate: Evaluate = Evaluate()
    limits: Limits = Limits()
    retention: Retention = Retention()

    @property
    def plan(self) -> Plan:
        """How the run divides its indices."""
        return Plan(
            num_steps=self.learner.num_steps,
            batch_size=self.learner.batch_size,
            shard_size=self.rollout.shard_size,
            max_staleness=self.staleness.max_staleness,
            order=self.staleness.order,
            on_stale=self.staleness.on_stale or "train",
            max_ahead=self.staleness.max_ahead,
            max_drift=self.staleness.max_drift,
        )

    def cached(self) -> CacheRequirements:
        """The per-token arrays the run stores: what the loss needs joined with what `recording` asks for."""
        return self.loss.requirements().joined_with(**self.recording.model_dump())

    @property
    def caveats(self) -> list[str]:
        """What no estimator can make right under these settings: said when a run starts, and in its report."""
        top_p = self.rollout.top_p
        if top_p == 1.0:
            return []
        told = [
            f"rollout.top_p {top_p}: responses and evaluations are of the truncated student, the teacher is whole. Of "
            f"equal models KL to the teacher is up to {-math.log(top_p):.3f} nats per token.",
            "Ids that enter the student's nucleus after a response was sampled are missing from its gradient; those "
            "that left it weigh 0 (train/outside_nucleus_fraction). Keep staleness low.",
        ]
        if not isinstance(self.loss, PolicyGradientConfig | HeadTailConfig):
            told.append(
                f"loss.name {self.loss.name} trains the whole student, on prefixes that only the truncated one made."
            )
        return told

    def models(self) -> dict[str, ModelConfig]:
        """The models of the run by role; a closed-form teacher is none."""
        models: dict[str, Any] = {"student": self.student}
        if isinstance(self.teacher, HfTeacher | VllmTeacher):
            models["teacher"] = self.teacher.model
        return models

    def model_digest(self, model: ModelConfig) -> str:
        """Digest under which `model` is cached: its own settings and, when it is trained here, the task's."""
        parts = f"{PRETRAIN_CODE}/{model.digest()}/{self.task.digest() if isinstance(model, TinyModel) else ''}"
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _combinations_work(self) -> Self:
        _ = self.plan  # raises when the shard size does not divide the batch size
        _ = self.cached()  # raises when recording and loss ask for different laws
        if self.teacher.engine == "oracle" and self.task.kind != "walk":
            raise ValueError("teacher.engine oracle is the closed form of task.kind walk; use engine hf for text.")
        for role, model in self.models().items():
            needed = self.rollout.max_new_tokens + self.task.max_prompt_tokens
            if isinstance(model, TinyModel) and needed > model.max_context:
                raise ValueError(
                    f"{role}: task.max_prompt_tokens {self.task.max_prompt_tokens} + rollout.max_new_tokens "
                    f"{self.rollout.max_new_tokens} = {needed} tokens do not fit max_context {model.max_context}. "
                    f"Raise {role} max_context or lower rollout.max_new_tokens."
                )
        return self
