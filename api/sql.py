"""`/v1/sql`: SELECTs of anybody over the run log, each in a process of its own, and the questions that are stored.

request -> QueryQueue: MAX_CONCURRENT at work, MAX_WAITING in line, the rest 503 -> Sandbox -> child process
client gone -> the child is killed
"""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response

from api.deps import Reader, part
from api.problems import ProblemError, no_run, responses
from api.schemas import Question, QuestionList, QuestionParameter, SqlRequest, SqlResult
from asyncopd.errors import QueryError
from storage.catalog.child import QueryLimits
from storage.catalog.export import plain
from storage.catalog.sandbox import FileGoneError, RunningQuery, Sandbox
from storage.catalog.snapshot import Catalog
from storage.catalog.stored_queries import StoredQuery, stored_queries
from storage.layout import RunLayout
from storage.stores.base import ObjectStore

router = APIRouter(prefix="/v1/sql", tags=["queries"], dependencies=[Reader])
MAX_CONCURRENT = 2
MAX_WAITING = 8
MAX_RESULT_BYTES = 8 * 2**20
"""As Arrow. JSON is about three times as much, and writing it holds Python's lock for a tenth of a second."""
TIMEOUT_S = 30.0


@dataclass
class _Asked:
    """One request at work, which may be cancelled at any moment, also before its process exists."""

    running: RunningQuery | None = None
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True
        if self.running is not None:
            self.running.cancel()


class QueryQueue:
    """Answers queries without blocking the event loop."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._sandbox = Sandbox(Catalog(store), max_concurrent=MAX_CONCURRENT)
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT, thread_name_prefix="sql")
        self._num_inside = 0

    async def answer(self, asked: SqlRequest, request: Request) -> bytes:
        """The SqlResult as JSON; made in a thread, because of its size.

        Raises:
            ProblemError: 503 when too many wait already.
            QueryError, QueryLimitError, StorageError: as the sandbox says.
        """
        if self._num_inside >= MAX_CONCURRENT + MAX_WAITING:
            detail = f"{self._num_inside} queries run or wait already. Repeat this one in a while."
            raise ProblemError(503, "too-many-queries", detail, {"Retry-After": "5"})
        self._num_inside += 1
        state = _Asked()
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._run, asked, state)
        gone: asyncio.Future[Any] = asyncio.create_task(_gone(request))
        waiting: set[asyncio.Future[Any]] = {work, gone}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                state.cancel()
            return await work
        finally:
            state.cancel()
            gone.cancel()
            self._num_inside -= 1

    def _run(self, asked: SqlRequest, state: _Asked) -> bytes:
        for run_id in asked.runs or ():
            if not self._store.exists(RunLayout(run_id).key("run")):
                raise no_run(run_id)
        try:
            return self._query(asked, state)
        except FileGoneError:
            # Files were collected or quarantined since their manifest was read: look again, once.
            self._sandbox.catalog.forget()
            return self._query(asked, state)

    def _query(self, asked: SqlRequest, state: _Asked) -> bytes:
        if state.is_cancelled:
            raise QueryError("the query was cancelled.")
        limits = QueryLimits(max_rows=asked.limit, timeout_s=TIMEOUT_S, max_result_bytes=MAX_RESULT_BYTES)
        running = self._sandbox.start(asked.sql, asked.parameters, limits=limits, runs=asked.runs)
        # Said before it is looked at, here and in `cancel`: of two threads the second sees what the first said.
        state.running = running
        if state.is_cancelled:
            running.cancel()
        found = running.result()
        # By position, not by name: two columns may have one name.
        columns = [[plain(value) for value in column.to_pylist()] for column in found.table.columns]
        result = {
            "columns": found.table.column_names,
            "rows": list(zip(*columns, strict=True)),
            "seconds": found.seconds,
            "truncated": found.truncated,
        }
        return json.dumps(result, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


@router.post("", operation_id="run_sql", response_model=SqlResult, responses=responses(404, 413))
async def run_sql(asked: SqlRequest, request: Request, queries: Annotated[QueryQueue, part("queries")]) -> Response:
    """Run one SELECT over the run log: read-only, in a sandboxed process, for at most 30 s."""
    return Response(await queries.answer(asked, request), media_type="application/json")


@router.get("/questions", operation_id="list_questions", responses=responses())
@cache
def list_questions() -> QuestionList:
    """Stored questions, each with SQL that runs as it stands."""
    return QuestionList(data=[_question(query) for query in stored_queries().values()])


def _question(query: StoredQuery) -> Question:
    defaults = {p.name: _literal(p.default) for p in query.parameters}
    return Question(
        name=query.name,
        question=query.question,
        sql=re.sub(r"\$(\w+)", lambda name: defaults.get(name[1], name[0]), query.sql),
        template=query.sql,
        parameters=[
            QuestionParameter(name=p.name, type=p.type, default=plain(p.default), about=p.doc) for p in query.parameters
        ],
    )


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return json.dumps(value)
