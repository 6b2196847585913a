"""What a query sees: the complete shards and records of some runs at one moment, as values another process can be sent.

    Catalog (this process, remembers what it read) --snapshot--> Snapshot --> connection.py (here, or in a child)

Every snapshot lists the runs again, so new shards appear by themselves. A shard is in it once its manifest is.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session

from asyncopd.errors import StorageError
from storage.catalog.connection import Place, Snapshot
from storage.catalog.relations import RECORDS
from storage.catalog.rows import AsOf, RunRecords
from storage.runs import list_runs, open_run
from storage.stores.base import ObjectStore

_PARALLEL_RUNS = 8
"""Runs read at once; on S3 a cold run costs a request per object."""


class Catalog:
    """The runs of a storage root as relations. Safe to share between threads."""

    def __init__(self, store: ObjectStore, runs: Sequence[str] | None = None) -> None:
        """`runs`: ids; None for all there are whenever a snapshot is taken.

        Raises StorageError (ObjectMissingError) when one of them does not exist.
        """
        self.store = store
        self._chosen = None if runs is None else tuple(runs)
        self._records: dict[str, RunRecords] = {}
        for run_id in self._chosen or ():
            self._of(run_id)

    def snapshot(
        self, relations: Collection[str], as_of: AsOf | None = None, runs: Sequence[str] | None = None
    ) -> Snapshot:
        """What is stored now, of `relations` only (`relations.mentioned` finds those a query needs).

        Args:
            runs: only these; None for all of the catalog.
        Raises:
            StorageError: an object cannot be read, was written by newer code, or no run has the version of `as_of`.
            ObjectMissingError: one of `runs` does not exist.
        """
        chosen = self._chosen if runs is None else runs
        run_ids = list_runs(self.store) if chosen is None else sorted(set(chosen))
        with ThreadPoolExecutor(_PARALLEL_RUNS) as pool:
            records = list(pool.map(self._of, run_ids))
            cuts = list(pool.map(lambda run: run.cut(as_of), records))
            present = [(run, cut) for run, cut in zip(records, cuts, strict=True) if cut is not None]
            if as_of is not None and as_of.version is not None and run_ids and not present:
                raise StorageError(
                    f"no run has published policy version {as_of.version} in its surviving lineage; looked at "
                    f"{', '.join(run_ids[:5])}. Relation `policies` tells what there is."
                )
            read = list(pool.map(lambda pair: pair[0].read(relations, pair[1]), present))
        return Snapshot(
            tables={
                relation.name: relation.table([row for rows in read for row in rows[relation.name]])
                for relation in RECORDS
                if relation.name in relations and relation.name != "vocabulary"
            },
            files={
                name: tuple(file for rows in read for file in rows.get(name, ()))
                for name in ("trajectory_rows", "score_rows")
                if name in relations
            },
            place=place_of(self.store),
            token_texts={run.run_id: run.token_texts for run, _ in present},
        )

    def forget(self) -> None:
        """Drop everything remembered, after a file that a remembered manifest named turned out to be gone."""
        self._records.clear()

    def _of(self, run_id: str) -> RunRecords:
        if run_id not in self._records:
            self._records[run_id] = RunRecords(open_run(self.store, run_id))
        return self._records[run_id]


def place_of(store: ObjectStore) -> Place:
    """Where the objects of `store` are. Raises StorageError when S3 credentials cannot be found."""
    scheme, _, rest = store.url.rpartition("://")
    if scheme == "memory":
        return Place("memory", f"/{rest}".rstrip("/"), {})
    if scheme != "s3":
        return Place("file", str(Path(rest).expanduser().absolute()), {})
    # The usual chain (environment, profile, instance role), asked here so that the reader needs none of it.
    session = botocore.session.get_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise StorageError(f"{store.url}: no S3 credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    frozen = credentials.get_frozen_credentials()
    arguments = {
        "access_key": frozen.access_key,
        "secret_key": frozen.secret_key,
        "session_token": frozen.token,
        "region": session.get_config_variable("region") or "us-east-1",
        # pyarrow reads AWS_ENDPOINT_URL itself, but then puts the bucket into the host name.
        "endpoint_override": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
    }
    return Place("s3", rest.strip("/"), {name: value for name, value in arguments.items() if value})
