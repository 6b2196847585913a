"""What must hold after a run was disturbed, checked against storage, a replay and an undisturbed twin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from asyncopd.config import RunConfig
from asyncopd.types import IndexRange, IndexSet, Trajectory
from chaos.observer import Observer
from chaos.strikes import Disturbance
from storage.run_log import StoredRunLog
from storage.run_view import RunView


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    claim: str
    holds: bool
    found: str
    """The numbers behind the answer."""


@dataclass(frozen=True)
class Cost:
    """What a disturbance cost, in response tokens."""

    tokens_again: int
    """Of shards claimed again after it and before the next: what was sampled twice is at most this."""
    tokens_lost: int
    """Durable when it struck, and gone or changed at the end."""


def checks(observer: Observer, config: RunConfig, *, replayed: bytes, twin: StoredRunLog | None) -> list[Check]:
    """Everything that must hold at the end.

    Args:
        replayed: final weights of a learner that trained the same log without interruption.
        twin: the same run, undisturbed; comparable at τ = 0, where no timing decides which version a response begins
            under.
    """
    log = observer.log
    found = [
        _trained_once(log, config),
        _within_staleness(log, config),
        _durable_stays(observer),
        _conserved(log, config),
    ]
    found += [_not_claimed_again(observer, stage) for stage in observer.stages]
    weights = _final_weights(log)
    found.append(
        Check("final weights are those of an uninterrupted replay, bit for bit", weights == replayed, _size(weights))
    )
    if twin is not None:
        ours, theirs = list(_trajectories(log)), list(_trajectories(twin))
        same_tokens = _equal(ours, theirs, lambda t: t.response_ids.tobytes())
        same_logprobs = _equal(ours, theirs, lambda t: t.behaviour_logprobs_T.tobytes())
        count = f"{sum(len(t.response_ids) for t in ours)} tokens of {len(ours)} responses"
        found += [
            Check("tokens are those of an undisturbed run", same_tokens, count),
            Check("their log-probs too, bit for bit", same_logprobs, count),
            Check("final weights too, bit for bit", weights == _final_weights(twin), _size(weights)),
        ]
    return found


def costs(observer: Observer, disturbances: Sequence[Disturbance]) -> list[Cost]:
    """What each disturbance cost, from claims and from what was seen durable."""
    changed = {shard for stage, shard in _changed(observer) if stage == "rollout"}
    taken_over = [
        claim
        for claim in RunView(observer.log).read("claim").claims()
        if claim.stage == "rollout" and claim.attempt > 1
    ]
    ends = [later.struck for later in disturbances[1:]] + [float("inf")]
    found = []
    for disturbance, end in zip(disturbances, ends, strict=True):
        again = [claim.shard for claim in taken_over if disturbance.struck <= claim.claimed < end]
        lost = [shard for shard in changed if observer.durable["rollout"][shard].seen < disturbance.struck]
        found.append(Cost(_tokens(observer, again), _tokens(observer, lost)))
    return found


# -- the checks -----------------------------------------------------------------------------------------------------
def _trained_once(log: StoredRunLog, config: RunConfig) -> Check:
    counts = Counter(index for step in log.steps() for index in step.indices.indices)
    missing = config.plan.num_indices - len(counts.keys() & set(range(config.plan.num_indices)))
    twice = sum(count > 1 for count in counts.values())
    extra = len(counts.keys() - set(range(config.plan.num_indices)))
    return Check(
        "every index is trained exactly once in the surviving lineage",
        missing == twice == extra == 0,
        f"{len(counts)} indices, {missing} lost, {twice} trained twice, {len(log.rewinds())} rewinds",
    )


def _within_staleness(log: StoredRunLog, config: RunConfig) -> Check:
    seen = sorted({staleness for step in log.steps() for staleness in step.staleness_tokens})
    bound = config.staleness.max_staleness
    return Check(f"staleness is within 0..{bound} versions", set(seen) <= set(range(bound + 1)), f"seen {seen}")


def _durable_stays(observer: Observer) -> Check:
    changed = list(_changed(observer))
    total = sum(len(shards) for shards in observer.durable.values())
    return Check("what was durable stays as it was", not changed, f"{total} shards, {len(changed)} gone or changed")


def _not_claimed_again(observer: Observer, stage: str) -> Check:
    again = [claim for claim in observer.claims_after_durable() if claim.stage == stage]
    taken_over = sum(
        claim.stage == stage and claim.attempt > 1 for claim in RunView(observer.log).read("claim").claims()
    )
    return Check(
        f"{stage}: no shard is claimed after it was durable",
        not again,
        f"{len(again)} claimed after, {taken_over} taken over before",
    )


def _conserved(log: StoredRunLog, config: RunConfig) -> Check:
    """Each index is in exactly one trajectory shard and one score shard, with a row or a reason, and in one step."""
    planned = list(range(config.plan.num_indices))
    produced = _indices(log.trajectory_shards())
    scored = _indices(log.score_shards(config.teacher.name))
    trained = _indices(step.indices for step in log.steps())
    # Reading checks rows and dropped indices against the manifest, and every byte against its sha256.
    num_rows = sum(len(log.read_trajectories(shard)) for shard in log.trajectory_shards())
    num_scores = sum(
        len(log.read_scores(config.teacher.name, shard)) for shard in log.score_shards(config.teacher.name)
    )
    return Check(
        "admitted = produced = scored = trained, each index once",
        planned == produced == scored == trained and num_rows == num_scores == len(planned),
        f"{len(planned)} admitted, {num_rows} produced, {num_scores} scored, {len(trained)} trained",
    )


# -- pieces ---------------------------------------------------------------------------------------------------------
def _changed(observer: Observer) -> Iterable[tuple[str, IndexRange]]:
    """Shards that were durable and are not, or not the same."""
    for stage, shards in observer.durable.items():
        for shard, durable in shards.items():
            now = observer.manifest(stage, shard)
            if now is None or now.objects != durable.manifest.objects:
                yield stage, shard


def _indices(ranges: Iterable[IndexRange | IndexSet]) -> list[int]:
    return sorted(index for shard in ranges for index in shard.indices)


def _tokens(observer: Observer, shards: Iterable[IndexRange]) -> int:
    known = observer.durable["rollout"]
    return sum(known[shard].manifest.facts.num_tokens or 0 for shard in shards if shard in known)


def _trajectories(log: StoredRunLog) -> Iterable[Trajectory]:
    for shard in log.trajectory_shards():
        yield from log.read_trajectories(shard)


def _equal(ours: Sequence[Trajectory], theirs: Sequence[Trajectory], part: Callable[[Trajectory], bytes]) -> bool:
    return [(t.index, part(t)) for t in ours] == [(t.index, part(t)) for t in theirs]


def _final_weights(log: StoredRunLog) -> bytes:
    latest = log.latest_policy()
    return log.read_policy(latest).safetensors if latest is not None else b""


def _size(weights: bytes) -> str:
    return f"{len(weights)} bytes"
