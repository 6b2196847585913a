"""The rollout stage: keeps one sampler busy with the shards the admission rule lets start.

RunLog --newest version--> following_versions --refresh--> Sampler
next_shard: lowest index range nobody produced or holds, once the plan admits it: by the sampler's version, the last
            step's drift, and in arrival order what the learner has come to
work:       prompts -> Sampler (all indices of the shard at once) -> verifier -> Parquet shard
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace

from asyncopd.errors import ObjectMissingError, ShardCorruptError, StorageError
from asyncopd.metrics import DRIFT
from asyncopd.ports import RunLog, Sampler, SampleRequest, Task
from asyncopd.records import Facts
from asyncopd.schedule import Plan, Seen, num_taken
from asyncopd.types import IndexRange, PolicyVersion, PolicyWeights, Trajectory
from asyncopd.worker import ShardStage, Worker

logger = logging.getLogger(__name__)

READ_AGAIN_S = 0.5
"""Pause before a version that could not be read is tried again: the learner answers while it waits for a batch."""


class RolloutStage(ShardStage):
    """Samples the shards of one run with one engine."""

    def __init__(
        self,
        log: RunLog,
        worker: Worker,
        *,
        plan: Plan,
        task: Task,
        sampler: Sampler,
        max_new_tokens: int,
        responses_per_prompt: int = 1,
        lease_s: float,
        busy_intervals: Callable[[], list[tuple[float, float]]] = list,
    ) -> None:
        """
        Args:
            busy_intervals: drains the engine's (start, end) stretches of decoding in Unix seconds, for the timeline.
        """
        super().__init__(log, worker, plan, stage="rollout", lease_s=lease_s)
        self._task, self._sampler = task, sampler
        self._max_new_tokens, self._busy_intervals = max_new_tokens, busy_intervals
        self._responses_per_prompt = responses_per_prompt
        self._drift = (-1, 0.0)
        """The last step whose drift is known, and that drift, nats per token."""
        self._unreadable: PolicyVersion | None = None
        self._read_again_s = 0.0
        worker.tell(num_trajectories=0, num_tokens=0, num_tokens_discarded=0)
        worker.watch(sampler)

    @contextlib.asynccontextmanager
    async def following_versions(self) -> AsyncIterator[None]:
        """Load the newest version, then keep the sampler on it while the body runs."""
        await self._worker.wait_for(self._log.latest_policy, "version 0 to be published")
        latest = await asyncio.to_thread(self._log.latest_policy)
        assert latest is not None, "the role waits for version 0 first"
        await self._load(latest)
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._follow())
            try:
                yield
            finally:
                following.cancel()
                self._record_busy()

    async def _work(self, shard: IndexRange) -> None:
        started = time.time()
        trajectories = await asyncio.gather(*(self._one(index) for index in shard.indices))
        num_tokens = sum(len(t.response_ids) for t in trajectories)
        facts = Facts(num_correct=sum(bool(t.correct) for t in trajectories), seconds=time.time() - started)
        with self._worker.span("orchestrate:parquet", shard.name):
            first = await asyncio.to_thread(
                self._log.publish_trajectories, shard, trajectories, worker=self._worker.name, facts=facts
            )
        self._worker.count(num_trajectories=len(trajectories), num_tokens=num_tokens)
        self._worker.count(num_tokens_discarded=0 if first else num_tokens)
        self._record_busy()

    async def _one(self, index: int) -> Trajectory:
        prompt = self._task.prompt(index // self._responses_per_prompt, "train")
        request = SampleRequest(index=index, prompt_ids=prompt.ids, max_new_tokens=self._max_new_tokens)
        trajectory = await self._sampler.sample(request)
        correct = self._task.verify(prompt, trajectory.response_ids.tolist())
        return replace(trajectory, prompt_id=prompt.prompt_id, group=prompt.group, correct=correct)

    def _ready(self) -> Iterable[IndexRange] | None:
        seen = self._seen()
        if self._plan.is_complete(seen):
            return None
        return itertools.takewhile(lambda shard: self._plan.admits(shard, seen), self._open)

    def _is_done(self, shard: IndexRange) -> bool:
        return self._log.find_trajectories(shard) is not None

    def _seen(self) -> Seen:
        """What this worker knows of the run, as the plan wants it."""
        version = self._sampler.version
        assert version is not None  # following_versions has loaded one
        arrivals = self._log.arrivals() if self._plan.order == "arrival" else []
        return Seen(version.number, self._drift_nats(version.number), len(arrivals), num_taken(arrivals))

    def _drift_nats(self, version: int) -> float:
        """Of the step that made `version`, or of the one before while its record, which follows, is not there yet."""
        if self._plan.max_drift is None:
            return 0.0
        for number in (version - 1, version - 2):
            if number < 0 or number == self._drift[0]:
                break
            if (step := self._log.find_step(number)) is not None:
                self._drift = number, step.metrics[DRIFT.key]
                break
        return self._drift[1]

    def _what_is_missing(self, first: IndexRange) -> str:
        if self._unreadable is not None:
            return f"a version after {self._unreadable.number}, which is published but cannot be read"
        return self._plan.waits_for(first, self._seen()) or f"shard {first.name} (another worker holds it)"

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._worker.poll_s)
            latest, current = await asyncio.to_thread(self._log.latest_policy), self._sampler.version
            if latest == self._unreadable and time.monotonic() < self._read_again_s:
                continue
            # Only forward in number: after a rewind, what is in flight was admitted for the version it began with, and
            # going on under an older one would break the staleness bound. The learner trains past here again.
            if latest is not None and current is not None and latest.number > current.number:
                await self._load(latest)

    async def _load(self, latest: PolicyVersion) -> None:
        """Switch the sampler to the version that the caller compared: asked for again, it may have been rewound."""
        name = f"version {latest.number}"
        with self._worker.span("orchestrate:refresh", name), self._worker.doing(f"loads {name}"):
            weights = await asyncio.to_thread(self._newest_readable, latest)
            if weights is None:
                return
            await self._sampler.refresh(weights)
        self._worker.tell(version=weights.version.number)

    def _newest_readable(self, latest: PolicyVersion) -> PolicyWeights | None:
        """The weights of `latest`, or of the newest version that can be read; None when the sampler has that one.

        Weights that cannot be read (a broken chain of deltas) are gone around: the next full version can be read.
        Raises as `read_policy` does while the sampler has no weights at all and none can be read.
        """
        try:
            weights = self._log.read_policy(latest)
        except (ObjectMissingError, ShardCorruptError) as error:
            if latest != self._unreadable:
                logger.warning("%s Going on with an older version until a newer one can be read.", error)
            self._unreadable, self._read_again_s = latest, time.monotonic() + READ_AGAIN_S
            return self._older_readable(latest, error)
        self._unreadable = None
        return weights

    def _older_readable(self, latest: PolicyVersion, error: StorageError) -> PolicyWeights | None:
        current = self._sampler.version
        for version in reversed(self._log.policies()):
            if current is not None and version.number <= current.number:
                return None
            with contextlib.suppress(ObjectMissingError, ShardCorruptError):
                if version < latest:
                    return self._log.read_policy(version)
        if current is None:
            raise error
        return None

    def _record_busy(self) -> None:
        for start, end in self._busy_intervals():
            self._worker.record("sample", start, end)
