"""Every relation a query can name: its columns with their meaning, and, where it is derived, the view that makes it.

    records    runs, policies, steps, evals, claims, shards, ...    Arrow tables built from JSON objects and manifests
    rows       trajectory_rows, score_rows                          Arrow datasets over the Parquet shards
    derived    trajectories, scores, tokens, candidates, ...        views over the two

Times are TIMESTAMP WITH TIME ZONE in UTC. Indices and positions count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from storage.catalog.record_relations import RECORDS, ROWS
from storage.catalog.relation import Relation
from storage.catalog.views import DERIVED

RELATIONS: tuple[Relation, ...] = (*RECORDS, *ROWS, *DERIVED)
TEXT_FUNCTION = "text_of"
"""SQL function text_of(run, ids): the ids as text."""
BY_NAME = {relation.name: relation for relation in RELATIONS}


def closure(names: Collection[str]) -> set[str]:
    """`names` and everything their views read."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += BY_NAME[name].reads
    return found


def mentioned(sql: str) -> set[str]:
    """Every relation `sql` can refer to, views resolved: those whose name occurs in its text as a word.

    A superset, which is all that deciding what to read needs; nobody else's SQL is parsed in this process.
    """
    words = set(re.findall(r"\w+", sql.lower()))
    return closure(words & BY_NAME.keys())
