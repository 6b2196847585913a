"""The questions that ship with the platform: one .sql file each, whose header says what it answers.

-- question: one sentence
-- parameter name TYPE = default: meaning        (any number)
-- column name: meaning, unit                    (every column, in order)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from asyncopd.errors import QueryError
from storage.catalog.relations import documented

_PARAMETER = re.compile(r"-- parameter (\w+) (\w+) = (.+?): (.+)")
_QUESTION = re.compile(r"-- question: (.+)")


@dataclass(frozen=True)
class Parameter:
    """One $name of a stored query."""

    name: str
    type: str
    default: Any
    doc: str


@dataclass(frozen=True)
class StoredQuery:
    """A question with its SQL."""

    name: str
    question: str
    parameters: tuple[Parameter, ...]
    columns: Mapping[str, str]
    """Column -> meaning, in order."""
    sql: str

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of all parameters. Raises QueryError on a name the query does not have, or a value of another type."""
        defaults = {parameter.name: parameter.default for parameter in self.parameters}
        unknown = sorted(given.keys() - defaults.keys())
        if unknown:
            raise QueryError(
                f"query {self.name} has no parameter {unknown[0]}; it has {', '.join(defaults) or 'none at all'}."
            )
        for parameter in self.parameters:
            value = given.get(parameter.name, parameter.default)
            if type(value) is not type(parameter.default) and (type(value), type(parameter.default)) != (int, float):
                raise QueryError(
                    f"query {self.name}: {parameter.name}={value} is no {parameter.type}. It means {parameter.doc}; "
                    f"the default is {parameter.default}."
                )
        return {**defaults, **given}


@cache
def stored_queries() -> Mapping[str, StoredQuery]:
    """All of them, by name."""
    folder = files("storage.catalog") / "queries"
    found = sorted((item for item in folder.iterdir() if item.name.endswith(".sql")), key=lambda item: item.name)
    return {query.name: query for query in (_parse(item.name[:-4], item.read_text("utf-8")) for item in found)}


def find_query(name: str) -> StoredQuery | None:
    """The stored query `name`, with - or _ between its words; None when there is none."""
    return stored_queries().get(name.strip().replace("-", "_"))


def _parse(name: str, sql: str) -> StoredQuery:
    question = _QUESTION.match(sql)
    if question is None:
        raise QueryError(f"stored query {name}: its first line is not `-- question: ...`.")
    parameters = tuple(
        Parameter(found, kind, yaml.safe_load(default), doc) for found, kind, default, doc in _PARAMETER.findall(sql)
    )
    return StoredQuery(name, question[1], parameters, documented(sql), sql)
