"""The small protocols through which stages meet engines, tasks and storage; flows/wiring.py composes them.

Task ---prompts---> Sampler ---Trajectory---> Scorer ---TeacherScores---> learner ---PolicyWeights---> Sampler
                        trajectories, scores and weights pass through a RunLog; prompts are recomputed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from asyncopd.records import NO_FACTS, Claim, Facts, Manifest, RunState, WorkerStatus
from asyncopd.schedule import Arrival
from asyncopd.types import (
    Evaluation,
    IndexRange,
    IntArray,
    PolicyVersion,
    PolicyWeights,
    Prompt,
    Span,
    Split,
    TeacherScores,
    TrainStep,
    Trajectory,
)


class Tokenizer(Protocol):
    """Text to ids and back. Student and teacher must have equal `digest`s."""

    vocab_size: int
    """Ids that exist: 0 ... vocab_size − 1. A model may have more rows than that."""
    eos_id: int
    stop_ids: frozenset[int]
    """Ids that end a response, `eos_id` among them."""
    pad_id: int
    digest: str
    """Hash of everything that decides the mapping."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text; special tokens are shown, not dropped."""

    def token_text(self, token_id: int) -> str:
        """The text of a single token, for viewers."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a response to imitate, for supervised warm starts."""

    prompt_ids: IntArray
    response_ids: IntArray
    """EOS included."""


class Task(Protocol):
    """Prompts and a verifier. All methods are pure functions of the task's own settings and their arguments."""

    name: str
    tokenizer: Tokenizer
    max_prompt_tokens: int
    """No prompt of the task is longer; checked against the model's context before anything is loaded."""
    groups: tuple[str, ...]
    """Labels that prompts carry; () where the task has none."""

    def prompt(self, index: int, split: Split) -> Prompt:
        """The `index`-th prompt of the seeded, endless stream of `split`; the two splits share no question."""

    def verify(self, prompt: Prompt, response_ids: Sequence[int]) -> bool:
        """Is the response right? Never raises on what a model may generate."""

    def demonstration(self, index: int, split: Split) -> Demonstration:
        """The `index`-th demonstration of the seeded stream that pre-training uses."""


@dataclass(frozen=True)
class SampleRequest:
    """Ask for one response. The same request under the same version gives the same tokens, whatever runs beside it."""

    index: int
    """Seeds the draws together with the run's seed."""
    prompt_ids: IntArray
    max_new_tokens: int


@dataclass(frozen=True)
class InFlight:
    """What a sampler has in hand at one moment."""

    doing: str | None
    """What it does before or besides generating, in words: `loads version 3`, `prefills 4 prompts`."""
    num_responses: int
    """Begun and not finished."""
    num_generated: int
    """Tokens since it was made, those of unfinished responses included."""


class Sampler(Protocol):
    """A generation engine with one set of weights at a time."""

    @property
    def version(self) -> PolicyVersion | None:
        """The version new tokens are sampled from; None before the first `refresh`."""

    def in_flight(self) -> InFlight:
        """What it does right now; from any thread, at any time."""

    async def sample(self, request: SampleRequest) -> Trajectory:
        """Generate one response; many calls run at once and share the engine's batch.

        The returned Trajectory has an empty `prompt_id` and `group` and no `correct`: the rollout stage knows those.
        Raises EngineError when the request cannot be served (prompt and limit exceed the context, for example).
        """

    async def refresh(self, weights: PolicyWeights) -> None:
        """Switch to newer weights.

        With in-flight updates, what is in flight keeps its finished tokens and goes on under the new weights. Without,
        it ends under the weights it started with, and this call returns when it has.
        """

    async def close(self) -> None:
        """Stop the engine; pending `sample` calls raise EngineError."""


@dataclass(frozen=True)
class ScoreRequest:
    """What to ask a teacher about each response token, besides the sampled token and the trajectory's candidates."""

    top_k: int
    """Most likely ids to return; 0 for none, the vocabulary size for all."""
    num_teacher_draws: int
    """Ids to draw i.i.d. from q; 0 for none. Seeded by `seed` and the trajectory's index."""
    temperature: float
    seed: int


class Scorer(Protocol):
    """A teacher. `digest` changes whenever its numbers could."""

    name: str
    digest: str
    tokenizer_digest: str

    async def start(self) -> None:
        """Start the engine, where there is one to start; the first `score` does so too."""

    async def score(self, trajectories: Sequence[Trajectory], request: ScoreRequest) -> list[TeacherScores]:
        """Score every response token of every trajectory; the result is in the order of the argument."""

    async def close(self) -> None:
        """Stop the engine, if it has one of its own; harmless when repeated."""


class ScoreCache(Protocol):
    """Answers of teachers, kept for all runs of a storage root."""

    def find(
        self, teacher_digest: str, request: ScoreRequest, trajectories: Sequence[Trajectory]
    ) -> Mapping[int, TeacherScores]:
        """The answers that are there, by trajectory index; their index and teacher are those of the first asker."""

    def add(
        self,
        teacher_digest: str,
        request: ScoreRequest,
        answers: Sequence[tuple[Trajectory, TeacherScores]],
        *,
        worker: str,
    ) -> None:
        """Keep what a teacher answered. Harmless when repeated."""


class RunLog(Protocol):
    """One Run in storage; `storage.run_log.StoredRunLog` says what each method does. Stages call them in threads.

    Every `publish_*` is durable when it returns and harmless when repeated; reads verify. `find_*` answers None or an
    empty list when nothing was published yet; `read_*` raises instead (ObjectMissingError, ShardCorruptError).
    """

    run_id: str

    # -- rollouts -----------------------------------------------------------------------------------------------
    def find_trajectories(self, shard: IndexRange) -> Manifest | None: ...
    def read_trajectories(self, shard: IndexRange) -> list[Trajectory]: ...
    def publish_trajectories(
        self, shard: IndexRange, trajectories: Sequence[Trajectory], *, worker: str, facts: Facts = NO_FACTS
    ) -> bool: ...

    # -- scores -------------------------------------------------------------------------------------------------
    def find_scores(self, teacher: str, shard: IndexRange) -> Manifest | None: ...
    def read_scores(self, teacher: str, shard: IndexRange) -> list[TeacherScores]: ...
    def publish_scores(
        self, teacher: str, shard: IndexRange, scores: Sequence[TeacherScores], *, worker: str, facts: Facts = NO_FACTS
    ) -> bool: ...

    # -- who works on what --------------------------------------------------------------------------------------
    def claim(self, stage: str, shard: IndexRange, *, worker: str, lease_s: float) -> Claim | None: ...
    def heartbeat(self, worker: str, status: WorkerStatus) -> None: ...
    def retire(self, worker: str) -> None: ...
    def run_state(self) -> RunState | None: ...

    # -- policy versions ----------------------------------------------------------------------------------------
    def publish_policy(self, weights: PolicyWeights, *, worker: str, facts: Facts = NO_FACTS) -> None: ...
    def latest_policy(self) -> PolicyVersion | None: ...
    def find_policy(self, number: int) -> PolicyVersion | None: ...
    def read_policy(self, version: PolicyVersion) -> PolicyWeights: ...
    def policies(self) -> Sequence[PolicyVersion]: ...

    # -- learner ------------------------------------------------------------------------------------------------
    def publish_step(self, step: TrainStep) -> None: ...
    def find_step(self, number: int) -> TrainStep | None: ...
    def publish_checkpoint(self, step: int, rewind: int, objects: Mapping[str, bytes], *, worker: str) -> None: ...
    def checkpoints(self) -> Sequence[tuple[int, int]]: ...
    def latest_checkpoint(self) -> tuple[int, int] | None: ...
    def read_checkpoint(self, step: int, rewind: int) -> Mapping[str, bytes]: ...
    def record_rewind(self, to_step: int, *, worker: str) -> int: ...
    def current_rewind(self) -> int: ...
    def arrivals(self) -> Sequence[Arrival]: ...
    def record_arrival(self, arrival: Arrival) -> bool: ...

    # -- observations -------------------------------------------------------------------------------------------
    def publish_evaluation(self, evaluation: Evaluation) -> None: ...
    def evaluations(self) -> list[Evaluation]: ...
    def publish_spans(self, worker: str, sequence: int, spans: Sequence[Span]) -> None: ...
    def publish_failure(self, role: str, worker: str, reason: str) -> None: ...


class NamedBytes(Protocol):
    """A place that keeps bytes by name, such as an object store: where studies leave their cells and tables."""

    def find(self, key: str) -> bytes | None:
        """The bytes under `key`; None where there are none."""

    def put(self, key: str, body: bytes) -> None:
        """Store `body`, instead of what was there."""

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Store `body` unless something is there, which then stays: False."""
