"""SQL from anybody: what it may ask works; nothing it says reads, writes, connects, or takes the server along."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from catalog_builders import root_of, written_log
from storage_builders import fresh_log, fresh_store

from asyncopd.errors import QueryError, QueryLimitError, ShardCorruptError, StorageError
from storage.catalog.child import QueryLimits
from storage.catalog.connection import connect
from storage.catalog.sandbox import Sandbox
from storage.catalog.snapshot import Catalog
from storage.records import to_json
from storage.stores import open_store

SECRET = "s3cret-of-the-server"
LIMITS = QueryLimits(max_rows=1000, timeout_s=4, memory_bytes=128 * 2**20, max_result_bytes=8 * 2**20)


@pytest.fixture(scope="module")
def bait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files worth reading."""
    folder = tmp_path_factory.mktemp("bait")
    (folder / "secret.csv").write_text(f"a\n{SECRET}\n")
    (folder / "secret.json").write_text(f'{{"a": "{SECRET}"}}')
    with duckdb.connect(str(folder / "secret.db")) as connection:
        connection.execute(f"CREATE TABLE t AS SELECT '{SECRET}' AS a")
        connection.execute(f"COPY t TO '{folder}/secret.parquet'")
    return folder


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    os.environ["ASYNCOPD_TEST_SECRET"] = SECRET
    catalog = Catalog(open_store(str(root_of(written_log()))))
    yield Sandbox(catalog, LIMITS)
    del os.environ["ASYNCOPD_TEST_SECRET"]


FILES = [
    "SELECT * FROM read_csv('{bait}/secret.csv')",
    "SELECT * FROM read_csv_auto('{bait}/secret.csv')",
    "SELECT * FROM read_text('{bait}/secret.csv')",
    "SELECT * FROM read_blob('{bait}/secret.csv')",
    "SELECT * FROM read_json('{bait}/secret.json')",
    "SELECT * FROM read_json_objects('{bait}/secret.json')",
    "SELECT * FROM read_parquet('{bait}/secret.parquet')",
    "SELECT * FROM parquet_scan('{bait}/secret.parquet')",
    "SELECT * FROM parquet_metadata('{bait}/secret.parquet')",
    "SELECT * FROM sniff_csv('{bait}/secret.csv')",
    "SELECT * FROM glob('{bait}/*')",
    "SELECT * FROM '{bait}/secret.csv'",
    "FROM '{bait}/secret.parquet'",
    'FROM "{bait}/secret.csv"',
    "DESCRIBE '{bait}/secret.csv'",
    "SUMMARIZE SELECT * FROM '{bait}/secret.parquet'",
    "SELECT (SELECT content FROM read_text('{bait}/secret.csv'))",
    "WITH x AS (FROM read_text('/proc/self/environ')) SELECT * FROM x",
    "SELECT * FROM tokens WHERE token_id IN (SELECT size FROM read_blob('{bait}/secret.csv'))",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    "SELECT * FROM read_parquet('s3://runs/x.parquet')",
    "SELECT * FROM query('SELECT content FROM read_text(''{bait}/secret.csv'')')",
    "SELECT * FROM query_table('{bait}/secret.csv')",
    "SELECT * FROM sqlite_scan('{bait}/secret.db', 't')",
]
STATEMENTS = [
    "COPY (SELECT 1) TO '{bait}/written.csv'",
    "COPY runs TO '{bait}/written.parquet'",
    "EXPORT DATABASE '{bait}/written'",
    "IMPORT DATABASE '{bait}/written'",
    "ATTACH '{bait}/secret.db' AS other",
    "ATTACH ':memory:' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{bait}/x.duckdb_extension'",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET memory_limit = '100GB'",
    "SET temp_directory = '{bait}'",
    "RESET memory_limit",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL duckdb_settings()",
    "CREATE TABLE t AS SELECT 1",
    "CREATE VIEW tokens AS SELECT 1",
    "CREATE SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')",
    "CREATE MACRO f() AS TABLE FROM read_text('/etc/passwd')",
    "DROP VIEW tokens",
    "INSERT INTO runs VALUES (1)",
    "DELETE FROM runs",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO '{bait}/written.csv'",
    "EXPLAIN ANALYZE SELECT 1",
    "VACUUM",
    "CHECKPOINT",
    "USE memory",
    "",
    "this is not SQL",
]
INSIDES = [
    "SELECT getenv('ASYNCOPD_TEST_SECRET')",
    "SELECT current_setting('temp_directory')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM duckdb_logs()",
    "SELECT * FROM pragma_database_list()",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM main.sqlite_master",
    "SELECT * FROM catalog",  # a variable of the Python that runs this
    "SELECT * FROM tables",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM arrow_scan_dumb(1, 2, 3)",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM python_map_function(1)",
    "SELECT * FROM runs_",
    "SELECT write_log('x')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
]


@pytest.mark.parametrize("sql", [*FILES, *STATEMENTS, *INSIDES])
def test_an_escape_fails_and_the_error_says_what_is_allowed(sql: str, sandbox: Sandbox, bait: Path) -> None:
    with pytest.raises(QueryError) as caught:
        sandbox.query(sql.format(bait=bait))
    message = str(caught.value)
    assert SECRET not in message
    assert "one SELECT" in message
    assert "documentation" in message
    assert sorted(path.name for path in bait.iterdir()) == ["secret.csv", "secret.db", "secret.json", "secret.parquet"]


OWN_WALL = [sql for sql in [*FILES, *STATEMENTS[:19]] if "query_table" not in sql]


@pytest.mark.parametrize("sql", OWN_WALL)
def test_the_connection_itself_refuses_files_even_without_the_check_of_the_parse_tree(sql: str, bait: Path) -> None:
    catalog = Catalog(written_log().store)
    snapshot = catalog.snapshot(())
    with connect(snapshot, sql="", memory_bytes=2**27, locked=True) as connection:
        try:
            rows = connection.execute(sql.format(bait=bait)).fetchall()
        except duckdb.Error:
            rows = []
        assert SECRET not in str(rows)
        with pytest.raises(duckdb.Error):
            connection.execute("SET enable_external_access = true")
    assert not list(bait.glob("written*"))


BOMBS = [
    "SELECT count(*) FROM range(1000000000) a, range(1000000000) b",
    "SELECT count(*) FROM tokens a, tokens b, tokens c, tokens d",
    "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t) SELECT count(*) FROM t",
    "WITH RECURSIVE t(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM t) SELECT max(length(s)) FROM t",
    "SELECT list(i) FROM range(3000000000) t(i)",
    "SELECT string_agg(i::VARCHAR, '') FROM range(3000000000) t(i)",
    "SELECT repeat('x', 4000000000)",
    "SELECT len(range(2000000000))",
    "SELECT i, repeat('x', 1000000) FROM range(1000) t(i)",
    "SELECT count(DISTINCT hash(i)) FROM range(100000000000) t(i)",
    "SELECT * FROM range(100000000) t(i) ORDER BY hash(i) DESC",
    "SELECT sum(sin(i)) FROM range(100000000000) t(i)",
]


@pytest.mark.parametrize("sql", BOMBS)
def test_a_bomb_ends_by_itself_and_harms_nobody(sql: str, sandbox: Sandbox) -> None:
    started = time.monotonic()
    with pytest.raises(QueryLimitError):
        sandbox.query(sql)
    assert time.monotonic() - started < LIMITS.timeout_s + 15  # of which most is waiting for a busy machine
    assert sandbox.query("SELECT count(*) FROM runs").rows() == [{"count_star()": 1}]


def test_very_deep_nesting_ends_in_an_error(sandbox: Sandbox) -> None:
    with pytest.raises(QueryError):
        sandbox.query("SELECT " + "(" * 20_000 + "1" + ")" * 20_000)
    with pytest.raises(QueryError):
        sandbox.query("SELECT " + "(SELECT " * 3_000 + "1" + ")" * 3_000)


def test_what_is_allowed_works(sandbox: Sandbox) -> None:
    for sql in (
        "SELECT 1 AS x",
        "FROM runs",
        "VALUES (1), (2)",
        "DESCRIBE tokens",
        "SUMMARIZE steps",
        "WITH runs2 AS (FROM runs) SELECT * FROM runs2 -- a comment",
        "SELECT unnest(response_ids) FROM trajectories",
        "SELECT * FROM main.tokens LIMIT 1",
        "SELECT * FROM range(3)",
        "FROM documentation",
        "SELECT config->>'$.task.kind' FROM runs;",
    ):
        assert sandbox.query(sql).table.num_rows > 0, sql


def test_rows_beyond_the_limit_are_cut_off_and_the_result_says_so(sandbox: Sandbox) -> None:
    result = sandbox.query("SELECT * FROM range(1001)")
    assert (result.table.num_rows, result.truncated) == (1000, True)
    result = sandbox.query("SELECT * FROM range(1000)")
    assert (result.table.num_rows, result.truncated) == (1000, False)


def test_parameters_are_values_and_never_sql(sandbox: Sandbox) -> None:
    result = sandbox.query("SELECT $a AS a, $b AS b", {"a": "'; DROP VIEW runs; --", "b": [1, 2]})
    assert result.rows() == [{"a": "'; DROP VIEW runs; --", "b": [1, 2]}]
    with pytest.raises(QueryError, match="parameters"):
        sandbox.query("SELECT $a", {"a": object()})
    with pytest.raises(QueryError):
        sandbox.query("SELECT $a + 1", {"b": 1})


def test_the_environment_of_the_child_is_empty(sandbox: Sandbox) -> None:
    query = sandbox.start("SELECT sum(sin(i)) FROM range(100000000000) t(i)")
    time.sleep(0.3)
    environment = Path(f"/proc/{query._child.pid}/environ").read_bytes()
    query.cancel()
    with pytest.raises(QueryError, match="cancelled"):
        query.result()
    assert environment.strip(b"\0") in (b"", b"LC_CTYPE=C.UTF-8")


def test_a_query_can_be_cancelled_from_another_thread(sandbox: Sandbox) -> None:
    query = sandbox.start(
        "SELECT sum(sin(i)) FROM range(100000000000) t(i)", limits=dataclasses.replace(LIMITS, timeout_s=60)
    )
    threading.Timer(0.5, query.cancel).start()
    started = time.monotonic()
    with pytest.raises(QueryError, match="cancelled"):
        query.result()
    assert time.monotonic() - started < 10


async def test_an_event_loop_goes_on_while_a_query_runs_in_a_thread(sandbox: Sandbox) -> None:
    ticks = 0
    query = asyncio.create_task(asyncio.to_thread(sandbox.query, "SELECT sum(sin(i)) FROM range(20000000) t(i)"))
    while not query.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert (await query).table.num_rows == 1
    assert ticks > 10


def test_no_more_queries_run_at_once_than_allowed() -> None:
    catalog = Catalog(open_store(str(root_of(written_log()))))
    sandbox = Sandbox(catalog, LIMITS, max_concurrent=1)
    running = sandbox.start("SELECT 1")
    waiting = threading.Thread(target=sandbox.query, args=["SELECT 2"])
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert running.result().table.num_rows == 1
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_query_whose_caller_stops_reading_is_ended() -> None:
    sandbox = Sandbox(Catalog(open_store(str(root_of(written_log())))), dataclasses.replace(LIMITS, max_rows=0))
    query = sandbox.start("SELECT * FROM range(100000000)")
    batches = query.batches()
    next(batches)
    batches.close()
    assert query._child.poll() is not None


def test_a_file_that_was_replaced_is_looked_up_again(tmp_path: Path) -> None:
    # As when a shard was made again: the manifest names another object from now on, and the old one is gone.
    from test_catalog import FIRST, publish_shard

    log = fresh_log("file", tmp_path)
    publish_shard(log, FIRST)
    sandbox = Sandbox(Catalog(log.store), LIMITS)
    assert sandbox.query("SELECT count(*) AS n FROM trajectories").rows() == [{"n": 4}]
    manifest_key = log.layout.shard_manifest(log.layout.trajectories, FIRST)
    manifest = log.find_trajectories(FIRST)
    ((old, promise),) = manifest.objects.items()
    new = old.replace(".parquet", "x.parquet")
    log.store.put(new, log.store.get(old))
    log.store.put(manifest_key, to_json(dataclasses.replace(manifest, objects={new: promise})))
    log.store.delete(old)
    assert sandbox.query("SELECT count(*) AS n FROM trajectories").rows() == [{"n": 4}]
    log.store.delete(new)
    with pytest.raises(StorageError, match="No such file"):
        sandbox.query("SELECT count(*) AS n FROM trajectories")


def test_the_sandbox_reads_s3_without_credentials_in_its_environment(tmp_path: Path) -> None:
    from test_catalog import FIRST, publish_shard

    log = fresh_log("s3", tmp_path)
    publish_shard(log, FIRST)
    sandbox = Sandbox(Catalog(log.store), dataclasses.replace(LIMITS, timeout_s=20))
    assert sandbox.query("SELECT count(*) AS n FROM trajectories").rows() == [{"n": 4}]
    with pytest.raises(QueryError, match="one SELECT"):
        sandbox.query(f"SELECT * FROM read_parquet('{log.store.url}/runs/run/trajectories/*.parquet')")


def test_a_memory_root_is_refused_with_a_way_out(tmp_path: Path) -> None:
    sandbox = Sandbox(Catalog(fresh_store("memory", tmp_path)), LIMITS)
    with pytest.raises(StorageError, match="open_run"):
        sandbox.query("SELECT 1")


def test_a_flipped_byte_in_a_page_is_never_an_answer(tmp_path: Path) -> None:
    # It was: sums over a damaged shard came back as if nothing were wrong.
    from test_catalog import FIRST, publish_shard

    log = fresh_log("file", tmp_path)
    publish_shard(log, FIRST)
    sandbox = Sandbox(Catalog(log.store), LIMITS)
    sql = "SELECT sum(hash(t)) AS h FROM trajectory_rows t"
    right = sandbox.query(sql).rows()
    (key,) = log.find_trajectories(FIRST).objects
    whole = log.store.get(key)
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    rng = random.Random(1)
    num_refused = 0
    for _ in range(12):
        body = bytearray(whole)
        body[rng.randrange(4, len(whole) - footer)] ^= 1 << rng.randrange(8)
        log.store.put(key, bytes(body))
        try:
            assert sandbox.query(sql).rows() == right
        except ShardCorruptError:
            num_refused += 1
    assert num_refused > 6, "pages are most of the bytes"
