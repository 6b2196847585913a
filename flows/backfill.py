"""A back-fill: another teacher, wider top-k or new candidates for rollouts that exist. Without Prefect.

run's trajectories [--CandidateSource--> candidates/<name>/] --cache, Scorer--> scores/<teacher>[@<what>]/
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from asyncopd.config.requests import BackfillRequest, CandidateWidths
from asyncopd.errors import ConfigError
from asyncopd.local.console import bar
from asyncopd.models.sampling import CandidateRule
from asyncopd.ports import ScoreRequest
from asyncopd.records import Facts
from asyncopd.rollout.candidates import CandidateSource
from asyncopd.teacher.stage import Backfilled, BackfillStage
from asyncopd.types import IndexRange, Trajectory
from flows.engines import make_scorer, student_skeleton
from flows.preflight import missing_models
from flows.replay import find_version
from flows.wiring import OpenRun, open_stored_run, pretrain_model
from storage.replay import backfill_asked
from storage.run_log import StoredRunLog
from storage.score_cache import StoredScoreCache


async def run_backfill(root: str, run_id: str, asked: BackfillRequest, *, console: Console) -> Backfilled:
    """Score every trajectory shard that the run has, under a folder of its own. A replay's are its source's.

    Raises:
        ConfigError: settings that cannot work, or nothing to do.
        EngineError: the teacher or the student that sampled cannot serve a shard.
    """
    run = open_stored_run(root, run_id)
    if (source := run.log.source) is not run.log:
        run = open_stored_run(root, source.run_id)
    config = run.config
    wanted = backfill_asked(run.log, config, asked, vocab_size=run.task.tokenizer.vocab_size)
    teacher, shards = wanted.teacher, run.log.trajectory_shards()
    worker = run.worker("score")
    changed = OpenRun(run.store, run.log, config.model_copy(update={"teacher": teacher}), run.task)
    async with worker.alive():
        for role, model in missing_models(changed.config, changed.store).items():
            console.print(f"making the {role}, which is a tiny model that no run has made yet", highlight=False)
            pretrain_model(changed, worker, role, model)
        scorer = make_scorer(changed.config, changed.task, changed.store)
        try:
            _check_name(run.log, teacher.name, scorer.digest)
            if teacher != config.teacher == teacher.model_copy(update={"name": config.teacher.name}):
                console.print(
                    f"{teacher.name} differs from the run's own teacher {config.teacher.name} by its name only: the "
                    "same model is asked, unless what is behind it has changed.",
                    highlight=False,
                )
            with bar(
                console, f"{run.log.run_id} scores/{wanted.folder}", sum(map(len, shards)), "trajectories"
            ) as advance:
                stage = BackfillStage(
                    log=run.log,
                    worker=worker,
                    folder=wanted.folder,
                    scorer=scorer,
                    request=ScoreRequest(
                        wanted.top_k, wanted.num_teacher_draws, config.rollout.temperature, config.seed
                    ),
                    cache=StoredScoreCache(run.store) if asked.cache else None,
                    with_candidates=_candidates(run, wanted.candidates, worker.name) if wanted.candidates else None,
                    facts=Facts(
                        backfill={"teacher": teacher.model_dump(mode="json"), "top_k": wanted.top_k},
                        candidates=wanted.candidates.name if wanted.candidates else None,
                    ),
                    lease_s=config.limits.lease_s,
                    on_shard=advance,
                )
                done = await stage.run(shards)
        finally:
            await scorer.close()
    said = (
        f"scores/{done.folder}: {done.num_shards} shards scored, {done.num_shards_found} were there; "
        f"{done.num_tokens_asked:,} tokens asked of the teacher, {done.num_tokens_cached:,} from the cache, "
        f"{done.seconds:.1f} s\ntrain on them: asyncopd replay {run_id} --set scores={done.folder}"
    )
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    return done


def _check_name(log: StoredRunLog, name: str, digest: str) -> None:
    """Within a run one teacher has one name, so that a mistyped one never has the same teacher asked all over again.

    Raises:
        ConfigError: the name stands for another teacher there, or the teacher has another name there.
    """
    for folder in sorted(log.teachers(), key=lambda folder: _teacher_in(folder) != name):
        manifests = (log.find_scores(folder, shard) for shard in log.score_shards(folder))
        found = (manifest.facts.teacher_digests for manifest in manifests if manifest is not None)
        digests = next(filter(None, found), ())
        if _teacher_in(folder) == name and digests and digest not in digests:
            raise ConfigError(
                f"run {log.run_id}: scores/{folder} holds answers of another teacher (digest {digests[0][:12]}, this "
                f"one has {digest[:12]}). Give it another name with --teacher name=…."
            )
        if _teacher_in(folder) != name and digest in digests:
            raise ConfigError(
                f"run {log.run_id}: {name} is the teacher whose answers are in scores/{folder}, under another name "
                f"(digest {digest[:12]} both). Use --teacher name={_teacher_in(folder)}, or give a setting that makes "
                "it another teacher, for example smoothing=1e-4 or model.path=…."
            )


def _teacher_in(folder: str) -> str:
    """The teacher's name in that of a folder of scores: `oracle` in `oracle@top16`."""
    return folder.partition("@")[0]


def _candidates(
    run: OpenRun, wanted: CandidateWidths, worker: str
) -> Callable[[IndexRange, list[Trajectory]], list[Trajectory]]:
    """Candidates made by the student that sampled, kept in the run."""
    config = run.config
    source = CandidateSource(
        student_skeleton(run.log),
        lambda number: run.log.read_policy(find_version(run.log, number)).safetensors,
        rule=CandidateRule(wanted.head, wanted.num_draws, wanted.law),
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        seed=config.seed,
        row_capacity=config.learner.row_capacity,
    )

    def join(shard: IndexRange, trajectories: list[Trajectory]) -> list[Trajectory]:
        if run.log.find_candidates(wanted.name, shard) is None:
            run.log.publish_candidates(wanted.name, shard, source.candidates(trajectories), worker=worker)
        return run.log.with_candidates(wanted.name, shard, trajectories)

    return join
