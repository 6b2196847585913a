"""Every request and answer of the service. Times are Unix seconds; log-probs are nats; absent numbers are null."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from asyncopd.metrics import LOSS
from storage.history import RunStatus

RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
CONFIG_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"

EventKind = Literal["state", "step", "rewind", "evaluation", "failure", "end"]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A finite number, or null where there is none: JSON has no NaN."""


class Schema(BaseModel):
    """Base of all of them: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def field(description: str, example: Any, default: Any = ..., **constraints: Any) -> Any:
    """A field with what OpenAPI must say about it."""
    return Field(default, description=description, examples=[example], **constraints)


class Problem(Schema):
    """RFC 9457 problem details."""

    type: str = field("Stable name of the kind of problem.", "urn:asyncopd:problem:config-refused")
    title: str = field("The HTTP status in words.", "Unprocessable Content")
    status: int = field("The HTTP status.", 422)
    detail: str = field("What was found, what was expected, what to do.", "learner.lrr: unknown key. Nearest known …")
    errors: list[dict[str, Any]] = field("The places in the request, where there are several.", [], [])


# -- runs ---------------------------------------------------------------------------------------------------------
class RunCreate(Schema):
    """A run to launch: a configuration by name or in full, and changes to it."""

    config_name: str | None = field(
        "Name of a file in the service's configs folder, without `.yaml`.",
        "quickstart",
        None,
        pattern=CONFIG_NAME_PATTERN,
    )
    config: dict[str, Any] | None = field("A configuration in full, instead of a name.", {"name": "mine"}, None)
    overrides: dict[str, Any] = field(
        "Dotted keys that replace values of it.", {"staleness.max_staleness": 0}, {}, max_length=200
    )
    run_id: str | None = field(
        "Id for the run; made from the name and time when left out.", "walk-7", None, pattern=RUN_ID_PATTERN
    )


class Progress(Schema):
    """How far a run is."""

    steps: int = field("Optimizer steps trained, in the surviving lineage.", 120)
    total_steps: int = field("Optimizer steps planned.", 200)
    tokens: int = field("Response tokens trained.", 301_224)


class Worker(Schema):
    """A process that works on a run."""

    worker: str = field("Its name.", "rollout-host-71-3f2a")
    role: str = field("Its role.", "rollout")
    activity: str = field("What it does, in words.", "samples with version 3, 24 responses done; 17 tokens/s")
    waiting_for: str | None = field("What its next piece of work waits for.", "version 4 to be published", None)
    tokens_per_s: Number = field("Sampled or scored in the last seconds; null until the first are known.", 17.0, None)
    num_begun: int = field("Responses it has begun and not finished.", 4, 0)
    num_tokens_in_flight: int = field("Tokens of responses whose shard is not finished.", 512, 0)


class Latest(Schema):
    """The newest measurements of a run."""

    loss_nats: Number = field("Loss of the last step, nats per token.", 0.31, None)
    kl_nats: Number = field("KL(student‖teacher) on the last step's tokens, nats per token.", 0.42, None)
    drift_nats: Number = field("KL(sampling policy‖current policy) on them, nats per token.", 0.004, None)
    accuracy: Number = field("Held-out accuracy at the last evaluation, 0 to 1.", 0.79, None)
    staleness_mean_versions: Number = field("Mean staleness of the tokens of the last 20 steps.", 1.4, None)
    staleness_max_versions: Number = field("Largest staleness in the last 20 steps.", 2.0, None)
    tokens_per_s: Number = field("Trained tokens per second over the last 20 steps.", 9_120.0, None)


class Run(Schema):
    """A training run."""

    id: str = field("The run's id.", "quickstart-20261121-024605-3f2a")
    name: str = field("First part of ids made for this configuration.", "quickstart")
    status: RunStatus = field("Where the run is in its life.", "running")
    phase: str = field("What it does or waits for, in words.", "rollout samples with version 3, 24 responses done")
    created: float = field("When it was created.", 1_795_000_000.0)
    updated: float | None = field("When its last step was trained.", 1_795_000_100.0, None)
    config_hash: str | None = field("Digest of its configuration.", "9f2c11aa", None)
    parent: dict[str, Any] | None = field("What it was replayed from.", None, None)
    progress: Progress = field("How far it is.", {"steps": 1, "total_steps": 2, "tokens": 10})
    latest: Latest = field("Newest measurements.", {})
    eta_s: Number = field("Seconds to the last step; null before the first shard is finished.", 340.0, None)
    notes: list[str] = field("What its settings cannot make right.", ["rollout.top_p 0.9: …"], [])
    workers: list[Worker] = field("What works on it now, in the order of the pipeline.", [], [])
    sparkline: list[Number] = field("Loss over the run, at most 60 points.", [0.9, 0.6, 0.4])
    error: str | None = field("Why it failed, by its role's own words.", None, None)
    flow_run_id: str | None = field("Prefect's id of its last flow run.", None, None)


class RunPage(Schema):
    """One page of runs, newest first."""

    data: list[Run] = field("The runs.", [])
    next_cursor: str | None = field("Send as `after` for the next page; null at the end.", None, None)


class RunConfigOut(Schema):
    """The configuration in force."""

    config: dict[str, Any] = field("Every value, defaults included.", {"name": "quickstart"})
    changes: list[dict[str, Any]] = field("Changes a resume made, oldest first.", [])


class Config(Schema):
    """A configuration that can be launched by name."""

    name: str = field("Send as `config_name`.", "quickstart")
    about: str = field("Its first comment.", "Walks on Z_31 with the oracle teacher.")
    config: dict[str, Any] = field("Every value, defaults included.", {"name": "quickstart"})


class ConfigList(Schema):
    """The configurations of the service."""

    data: list[Config] = field("By name.", [])
    json_schema: dict[str, Any] = field("JSON schema of a configuration.", {"type": "object"})


# -- observations -------------------------------------------------------------------------------------------------
class Event(Schema):
    """Something that happened to a run."""

    id: str = field("Cursor: send as `after` or `Last-Event-ID` to get what came later.", "e0-0.f0.r0.s0-41.t1")
    kind: EventKind = field("What happened.", "step")
    time: float = field("When.", 1_795_000_000.0)
    message: str = field("In words.", "step 40 trained 2,411 tokens, loss 0.31 nats")
    data: dict[str, Any] = field("In numbers.", {"step": 40})


class EventPage(Schema):
    """Events in the order they were seen."""

    data: list[Event] = field("The events.", [])
    has_more: bool = field("Are there later ones than these?", False)


class Metrics(Schema):
    """Training curves, at most `max_points` points each; every point is the mean of its stretch of steps."""

    steps: list[float] = field("Mean step number of each point.", [0.0, 1.0])
    wall_s: list[Number] = field("Seconds since the run's first step was trained.", [0.0, 0.4])
    tokens: list[int] = field("Response tokens trained so far.", [2_400, 4_810])
    series: dict[str, list[Number]] = field("By metric; docs/metrics.md explains each.", {LOSS.key: [0.9]})


class Staleness(Schema):
    """Trained tokens by staleness, over stretches of steps."""

    steps: list[float] = field("Mean step number of each stretch.", [0.5])
    versions: list[int] = field("Staleness of each row, in versions.", [0, 1, 2])
    tokens: list[list[int]] = field("[version][stretch] tokens.", [[900], [700], [100]])
    max_staleness: int = field("The bound the run was given.", 2)


class Throughput(Schema):
    """Response tokens per second by stage, over time."""

    seconds: list[float] = field("Middle of each stretch, seconds since the first shard was begun.", [0.5, 1.5])
    generated: list[Number] = field("Sampled, spread over the time their shard took.", [11_000.0, 12_000.0])
    scored: list[Number] = field("Scored, by the same.", [9_000.0, 12_500.0])
    trained: list[Number] = field("Trained, spread over the time their step took.", [8_000.0, 11_900.0])


class Policy(Schema):
    """A published version of the student."""

    number: int = field("Learner steps behind it.", 12)
    rewind: int = field("How often the learner had gone back when it was published.", 0)
    created: float | None = field("When it was published.", 1_795_000_000.0, None)
    size_bytes: int | None = field("Size of what was stored.", 311_296, None)
    accuracy: Number = field("Held-out accuracy, where it was evaluated.", 0.66, None)
    kl_nats: Number = field("Held-out KL to the teacher, where it was evaluated.", 1.02, None)


class PolicyList(Schema):
    """Versions of the surviving lineage."""

    data: list[Policy] = field("Oldest first.", [])
    superseded: list[Policy] = field("Versions still stored that a rewind superseded, oldest first.", [], [])
    rewinds: list[dict[str, Any]] = field("How often and to where the learner went back.", [])


class Checkpoint(Schema):
    """A state the learner can resume from."""

    step: int = field("Steps behind it.", 40)
    rewind: int = field("Rewind it belongs to.", 0)


class CheckpointList(Schema):
    """Checkpoints of the surviving lineage."""

    data: list[Checkpoint] = field("Oldest first.", [])


class Lane(Schema):
    """What one worker did, over time."""

    worker: str = field("The worker.", "rollout-3f2a")
    role: str = field("Its role.", "rollout")
    starts: list[float] = field("Start of each span, seconds since `origin`.", [0.0, 1.5])
    ends: list[float] = field("End of each.", [1.2, 3.0])
    activities: list[str] = field("`sample`, `train`, `wait:version`, …", ["sample", "wait:version"])
    details: list[str] = field("For example the shard.", ["000000-000063", ""])


class Timeline(Schema):
    """Who worked and who waited for what. Neighbouring spans of one activity are joined below `resolution_s`."""

    origin: float = field("Unix time of second 0.", 1_795_000_000.0)
    duration_s: float = field("Length of the window.", 56.6)
    resolution_s: float = field("Shorter gaps are not shown.", 0.03)
    lanes: list[Lane] = field("One per worker.", [])


# -- trajectories -------------------------------------------------------------------------------------------------
class TrajectorySummary(Schema):
    """A response, without its tokens."""

    index: int = field("Its address in the run.", 128)
    prompt_id: str = field("Equal for equal questions.", "1f00a7")
    group: str = field("Difficulty label of the task.", "noise 0.35")
    correct: bool | None = field("The verifier's answer.", True)
    num_tokens: int = field("Response length.", 17)
    finish_reason: str = field("`stop` or `length`.", "stop")
    version_first: int = field("Version that produced its first token.", 11)
    version_last: int = field("Version that produced its last token.", 12)
    kl_nats: Number = field("Mean of log p_old − log q over its tokens, nats; null before scoring.", 0.2)


class TrajectoryPage(Schema):
    """One page of trajectories, in index order."""

    data: list[TrajectorySummary] = field("The trajectories.", [])
    next_cursor: int | None = field("Send as `after` for the next page; null at the end.", None, None)


class Alternative(Schema):
    """A token the teacher or the student considered."""

    id: int = field("Token id.", 7)
    text: str = field("Its text.", "+1")
    logprob: Number = field("Nats.", -0.7)


class Token(Schema):
    """One response token."""

    id: int = field("Token id.", 7)
    text: str = field("Its text.", "+1")
    version: int = field("Policy version that produced it.", 12)
    behaviour_logprob: Number = field("log p_old, nats, when it was sampled.", -0.4)
    teacher_logprob: Number = field("log q, nats; null before scoring.", -0.2)
    teacher_top: list[Alternative] = field("The teacher's most likely tokens.", [])
    student_top: list[Alternative] = field("The sampling student's most likely tokens.", [])


class TrajectoryOut(Schema):
    """A response token by token."""

    summary: TrajectorySummary = field("Without tokens.", None)
    prompt: str = field("The prompt's text.", "z=0.35 s=4 g=19")
    response: str = field("The response's text.", "+1 5 ×2 10 …")
    tokens: list[Token] = field("In order.", [])
    teacher: str = field("Whose scores these are.", "oracle")
    teacher_top_of: Literal["topk", "head"] = field(
        "`teacher_top` ranks its recorded top-k or, where none was recorded, the student's head.", "topk", "topk"
    )
    trained_at_step: int | None = field("The step that trained it; null before.", 2, None)
    staleness: int | None = field("Learner version then − version_first.", 1, None)


# -- queries ------------------------------------------------------------------------------------------------------
class SqlRequest(Schema):
    """One SELECT over the catalog's relations; docs/queries.md lists them."""

    sql: str = field(
        "One SELECT.", "SELECT run, count(*) AS num FROM trajectories GROUP BY run", min_length=1, max_length=100_000
    )
    runs: list[Annotated[str, Field(pattern=RUN_ID_PATTERN)]] | None = field(
        "Only these runs; all when left out.", ["walk-7"], None, max_length=100
    )
    limit: int = field("Rows at most; `truncated` says whether there were more.", 1000, 1000, ge=1, le=10_000)
    parameters: dict[str, Any] = field("Values of the query's $names.", {"every": 25}, {}, max_length=100)


class SqlResult(Schema):
    """The rows of a query."""

    columns: list[str] = field("Names, in order.", ["run", "num"])
    rows: list[list[Any]] = field("Values by column: times as ISO text, no number as null.", [["walk-7", 12_800]])
    seconds: float = field("Time the query took, without starting its process.", 0.04)
    truncated: bool = field("Were there more rows than `limit`?", False)


class QuestionParameter(Schema):
    """A value that a stored question can be asked with."""

    name: str = field("Its $name.", "every")
    type: str = field("SQL type.", "INTEGER")
    default: Any = field("The value in `sql`.", 25)
    about: str = field("What it decides.", "steps per row")


class Question(Schema):
    """A stored question."""

    name: str = field("Name, as in `asyncopd sql NAME`.", "kl_by_position")
    question: str = field("What it answers.", "Where in a response do student and teacher differ?")
    sql: str = field("Ready to send: the defaults of its parameters are written in.", "SELECT run FROM runs")
    template: str = field("The same with its $names; send `parameters` with it.", "SELECT run FROM runs")
    parameters: list[QuestionParameter] = field("What those are.", [])


class QuestionList(Schema):
    """The stored questions."""

    data: list[Question] = field("By name.", [])


# -- work on a log that exists ------------------------------------------------------------------------------------
class Work(Schema):
    """Work that was started on a run's log."""

    parent: str = field("The run whose log it reads.", "walk-7")
    run_id: str | None = field(
        "The run that a single replay makes; it appears once its flow has started.", "walk-7-replay-9f2c11aa", None
    )
    flow_run_id: str = field("Prefect's id of the flow run.", "5c2f7f0e-6d3c-4b57-9a53-1f0f3f0c7a11")


class Health(Schema):
    """Is the process alive?"""

    status: Literal["ok"] = field("Always ok.", "ok", "ok")
    version: str = field("Of AsyncOPD.", "0.1.0")


class Check(Schema):
    """One thing the service needs."""

    ok: bool = field("Does it work now?", True)
    detail: str = field("What was found, and what to do.", "http://127.0.0.1:4200/api answers")


class Readiness(Schema):
    """Can the service do everything?"""

    ready: bool = field("Is every check ok?", True)
    checks: dict[str, Check] = field("storage and prefect.", {"storage": {"ok": True, "detail": "runs answers"}})
