"""The immutable values that stages exchange: numpy only, no torch, no I/O. Constructors check what they can.

Row t of every per-token array speaks about the distribution at the prefix that produced `response_ids[t]`
(the alignment contract of docs/estimators.md); EOS is a row like any other. Suffixes: T response tokens,
K support ids, N draws, M teacher draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asyncopd.errors import ShapeError

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
FinishReason = Literal["stop", "length"]
"""`stop`: the model emitted EOS. `length`: the response hit its token limit."""
DrawLaw = Literal["policy", "tail"]
"""What draws are i.i.d. samples of: `policy` p_old itself, the emitted token being draw 0; `tail` p_old restricted
to the complement of the head and renormalised there."""
Split = Literal["train", "eval"]
LOGPROB_FLOOR = -100.0
"""Nats; stored where a log-prob is lower or −inf. exp(−100) is 0 in any loss, and unlike −inf it can be subtracted."""


@dataclass(frozen=True, order=True)
class IndexRange:
    """Trajectory indices [start, stop): the address of a shard or of a learner step."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ShapeError(f"index range [{self.start}, {self.stop}) is empty or negative.")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def indices(self) -> range:
        return range(self.start, self.stop)

    @property
    def name(self) -> str:
        """`000128-000191`: first and last index, both inclusive, as they appear in keys."""
        return f"{self.start:06d}-{self.stop - 1:06d}"

    @classmethod
    def parse(cls, name: str) -> IndexRange:
        """The inverse of `name`. Raises ValueError when `name` is not of that form."""
        first, last = name.split("-")
        return cls(int(first), int(last) + 1)


@dataclass(frozen=True)
class IndexSet:
    """Trajectory indices in the order a learner step came to them: a step of order `arrival` has no range."""

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.indices or len(set(self.indices)) != len(self.indices):
            raise ShapeError(f"an index set needs at least one index and none twice, found {list(self.indices)}.")

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def name(self) -> str:
        """`64 of 000128-000210`: how many, and between which."""
        return f"{len(self)} of {min(self.indices):06d}-{max(self.indices):06d}"


@dataclass(frozen=True)
class Prompt:
    """One question of a task, before anything was generated."""

    index: int
    """Address in the seeded prompt stream."""
    prompt_id: str
    """Stable id of the question itself: the same question at two indices has one prompt id."""
    ids: IntArray
    """[P] token ids, P >= 1."""
    reference: str
    """What the task's verifier compares a response with."""
    group: str = ""
    """Label that reports break results down by, for example a noise level; may be empty."""


@dataclass(frozen=True)
class VersionRun:
    """`length` consecutive response tokens that policy version `version` produced."""

    version: int
    length: int


@dataclass(frozen=True)
class Candidates:
    """Extra token ids per position whose teacher log-prob is wanted, with the law they were drawn from."""

    head_ids_TK: IntArray
    """[T, K] the sampling student's K most likely ids, most likely first; K may be 0."""
    head_logprobs_TK: FloatArray
    """[T, K] log p_old at `head_ids_TK`, nats."""
    tail_logmass_T: FloatArray
    """[T] log of p_old's mass outside the head, nats; 0 when K is 0."""
    draw_ids_TN: IntArray
    """[T, N] i.i.d. draws with replacement from `law`; N may be 0."""
    draw_logprobs_TN: FloatArray
    """[T, N] log p_old at `draw_ids_TN`, nats: of p_old itself, not of its restriction to the tail."""
    law: DrawLaw = "policy"

    def __post_init__(self) -> None:
        num_tokens = len(self.tail_logmass_T)
        for name, ids, logprobs in (
            ("head", self.head_ids_TK, self.head_logprobs_TK),
            ("draw", self.draw_ids_TN, self.draw_logprobs_TN),
        ):
            if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != num_tokens:
                raise ShapeError(
                    f"candidates.{name}: ids {ids.shape} and logprobs {logprobs.shape} must both be "
                    f"[{num_tokens}, *], one row per response token."
                )


@dataclass(frozen=True)
class Trajectory:
    """One response: what was sampled, by which policy versions, with the log-probs it was really sampled from."""

    index: int
    prompt_id: str
    prompt_ids: IntArray
    """[P]"""
    response_ids: IntArray
    """[T], EOS included when `finish_reason` is `stop`; T >= 1."""
    behaviour_logprobs_T: FloatArray
    """[T] log p_old(response_ids[t]), nats, of the law really sampled from (temperature, top-p)."""
    version_runs: tuple[VersionRun, ...]
    """Which policy version produced which run of tokens, in order; lengths add up to T."""
    finish_reason: FinishReason
    candidates: Candidates
    group: str = ""
    """Copied from the Prompt."""
    correct: bool | None = None
    """The verifier's answer; None where the task has no verifier."""

    def __post_init__(self) -> None:
        num_tokens = len(self.response_ids)
        if num_tokens == 0 or len(self.prompt_ids) == 0:
            raise ShapeError(f"trajectory {self.index}: prompt and response need at least one token each.")
        for name, length in (
            ("behaviour_logprobs_T", len(self.behaviour_logprobs_T)),
            ("version_runs", sum(run.length for run in self.version_runs)),
            ("candidates", len(self.candidates.tail_logmass_T)),
        ):
            if length != num_tokens:
                raise ShapeError(f"trajectory {self.index}: {name} covers {length} of {num_tokens} response tokens.")

    @property
    def version_first(self) -> int:
        return self.version_runs[0].version

    @property
    def version_last(self) -> int:
        return self.version_runs[-1].version

    @property
    def version_oldest(self) -> int:
        """The lowest version among its tokens: the first, because samplers never go back to an older one."""
        return min(run.version for run in self.version_runs)

    @property
    def versions_T(self) -> IntArray:
        """[T] the policy version that produced each token."""
        return np.repeat(
            np.array([run.version for run in self.version_runs], np.int32), [run.length for run in self.version_runs]
        )


@dataclass(frozen=True)
class TeacherScores:
    """One teacher's log-probs on one Trajectory, nats, full-vocabulary softmax at `temperature`, at least
    `LOGPROB_FLOOR`."""

    index: int
    teacher: str
    teacher_digest: str
    """Hash of everything that decides the numbers: weights or closed form, and tokenizer."""
    temperature: float
    sampled_logprobs_T: FloatArray
    """[T] log q(response_ids[t])."""
    topk_ids_TK: IntArray
    """[T, K] the teacher's K most likely ids, descending; K may be 0, and K = V is the full vocabulary."""
    topk_logprobs_TK: FloatArray
    """[T, K] log q at `topk_ids_TK`."""
    head_logprobs_TK: FloatArray
    """[T, K'] log q at the trajectory's `candidates.head_ids_TK`."""
    draw_logprobs_TN: FloatArray
    """[T, N] log q at the trajectory's `candidates.draw_ids_TN`."""
    teacher_draw_ids_TM: IntArray
    """[T, M] ids the scorer drew i.i.d. from q; M may be 0."""
    teacher_draw_logprobs_TM: FloatArray
    """[T, M] log q at `teacher_draw_ids_TM`."""


@dataclass(frozen=True)
class ScoredTrajectory:
    """A Trajectory with its TeacherScores; construction proves that they belong together."""

    trajectory: Trajectory
    scores: TeacherScores

    def __post_init__(self) -> None:
        trajectory, scores = self.trajectory, self.scores
        if trajectory.index != scores.index:
            raise ShapeError(f"scores of index {scores.index} were joined to trajectory {trajectory.index}.")
        num_tokens = len(trajectory.response_ids)
        candidates = trajectory.candidates
        for name, array, expected in (
            ("sampled_logprobs_T", scores.sampled_logprobs_T, (num_tokens,)),
            ("topk_logprobs_TK", scores.topk_logprobs_TK, scores.topk_ids_TK.shape),
            ("head_logprobs_TK", scores.head_logprobs_TK, candidates.head_ids_TK.shape),
            ("draw_logprobs_TN", scores.draw_logprobs_TN, candidates.draw_ids_TN.shape),
            ("teacher_draw_logprobs_TM", scores.teacher_draw_logprobs_TM, scores.teacher_draw_ids_TM.shape),
        ):
            if array.shape != expected or len(array) != num_tokens:
                raise ShapeError(
                    f"index {trajectory.index}: scores.{name} is {array.shape}, expected {expected} "
                    f"with one row for each of {num_tokens} response tokens."
                )


@dataclass(frozen=True, order=True)
class PolicyVersion:
    """Address of the n-th published student weights of a Run; 0 is the initial student."""

    number: int
    """Learner steps behind these weights."""
    rewind: int = 0
    """How often the learner had gone back to a checkpoint when it published them (docs/storage.md)."""


@dataclass(frozen=True)
class PolicyWeights:
    """A PolicyVersion with its weights, as every engine can load them."""

    version: PolicyVersion
    safetensors: bytes
    """Serialised tensors under the names the student's architecture gives them."""


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step: what it trained on, what was measured, and the version it made."""

    step: int
    rewind: int
    indices: IndexRange | IndexSet
    """What the step decided about: trained, dropped or held. A range in index order, a set in arrival order."""
    version: PolicyVersion
    """The version published after this step."""
    num_tokens: int
    """Response tokens trained."""
    metrics: Mapping[str, float]
    """`stage/quantity_unit` -> value; docs/metrics.md has one line for each."""
    staleness_tokens: Mapping[int, int]
    """Staleness in versions -> number of trained tokens that had it."""
    finished: float
    """Unix time, seconds."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Index -> reason, for indices of this step that were not trained and never will be."""
    held: Mapping[int, str] = field(default_factory=dict)
    """Index -> reason, for indices of this step that were kept untrained, for a replay."""

    @property
    def trained(self) -> tuple[int, ...]:
        """The indices this step trained, in the order it took them."""
        return tuple(index for index in self.indices.indices if index not in self.dropped and index not in self.held)


@dataclass(frozen=True)
class Example:
    """A held-out response to read; the same questions for every version."""

    prompt: str
    response: str
    """Special tokens are shown."""
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """Sampled-decoding quality of one PolicyVersion on held-out prompts."""

    version: PolicyVersion
    num_prompts: int
    accuracy: float
    """Fraction of responses the verifier accepts; NaN without a verifier."""
    accuracy_by_group: Mapping[str, float]
    kl_nats: float
    """KL(p‖q) student to teacher per response token, student's own responses."""
    kl_standard_error_nats: float
    mean_response_tokens: float
    finished: float
    """Unix time, seconds."""
    examples: tuple[Example, ...] = ()
    """The first few responses."""


@dataclass(frozen=True)
class Span:
    """A stretch of wall time one worker spent on one activity."""

    role: str
    worker: str
    activity: str
    """`sample`, `score`, `train`, ... are busy; names that start with `wait:` say what was waited for;
    names that start with `orchestrate:` are overhead of the platform itself."""
    start: float
    end: float
    """Unix time, seconds."""
    detail: str = ""
    """For example the shard or the version."""
