"""Evaluations, spans and failures: what a run tells about itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

from asyncopd.types import Evaluation, Span
from storage.layout import RunLayout, parse_version
from storage.lineage import Lineage, surviving
from storage.objects import ObjectStore
from storage.records import (
    Failure,
    evaluation_from_json,
    evaluation_to_json,
    failure_from_json,
    from_json,
    spans_from_json,
    spans_to_json,
    to_json,
)


class ObservationLog:
    """Evaluations, spans and failures of one run."""

    store: ObjectStore
    layout: RunLayout
    lineage: Lineage

    def publish_evaluation(self, evaluation: Evaluation) -> None:
        """Record the quality of one version; the first evaluation of a version is kept."""
        self.store.put_if_absent(self.layout.evaluation(evaluation.version), evaluation_to_json(evaluation))

    def evaluations(self) -> list[Evaluation]:
        """Evaluations of the surviving lineage, by version."""
        return [self.read_evaluation(key) for key in self.evaluation_keys()]

    def evaluation_keys(self) -> list[str]:
        """Keys of the evaluations of the surviving lineage, by version. What is stored under one never changes."""
        keys = self.store.folder(self.layout.evaluations).keys
        found = [version for key in keys if (version := parse_version(key)) is not None]
        return [self.layout.evaluation(version) for version in surviving(found, self.lineage.rewinds())]

    def read_evaluation(self, key: str) -> Evaluation:
        """One evaluation. Raises ObjectMissingError or ShardCorruptError."""
        return from_json(self.store.get(key), key, evaluation_from_json)

    def publish_spans(self, worker: str, sequence: int, spans: Sequence[Span]) -> None:
        """Write the `sequence`-th batch of a worker's spans; writing it again replaces it."""
        self.store.put(self.layout.span(worker, sequence), spans_to_json(spans))

    def spans(self) -> list[Span]:
        """All spans of all workers, by start."""
        spans = [span for key in self.span_keys() for span in self.read_spans(key)]
        return sorted(spans, key=lambda span: span.start)

    def span_keys(self) -> list[str]:
        """Keys of all batches of spans; those of one worker in order. A worker replaces at most its last."""
        return self.store.list(self.layout.spans)

    def read_spans(self, key: str) -> list[Span]:
        """One batch of a worker's spans. Raises ObjectMissingError or ShardCorruptError."""
        return list(from_json(self.store.get(key), key, spans_from_json))

    def publish_failure(self, role: str, worker: str, reason: str) -> None:
        """Record why a role failed; every call adds a record."""
        now = time.time()
        fields = {"role": role, "worker": worker, "reason": reason, "failed": now}
        self.store.put(self.layout.failure(now, role, worker), to_json(fields))

    def failures(self) -> list[Failure]:
        """All failures, oldest first."""
        return [self.read_failure(key) for key in self.failure_keys()]

    def failure_keys(self) -> list[str]:
        """Keys of all failures, oldest first. What is stored under one never changes."""
        return self.store.list(self.layout.failures)

    def read_failure(self, key: str) -> Failure:
        """One failure. Raises ObjectMissingError or ShardCorruptError."""
        return from_json(self.store.get(key), key, failure_from_json)
