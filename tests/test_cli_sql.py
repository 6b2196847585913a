"""`asyncopd sql`, `asyncopd export`, and `asyncopd.open_run`, as a user meets them."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from catalog_builders import root_of, scored, written_log
from storage_builders import fresh_log, make_trajectories

import asyncopd
from asyncopd.cli import main
from asyncopd.cli.query import parse_time
from asyncopd.errors import ObjectMissingError, QueryError, StorageError
from asyncopd.types import IndexRange
from storage.catalog.connection import Decoder, TokenTexts, token_class
from storage.catalog.rows import token_texts_of
from storage.catalog.sandbox import Sandbox
from storage.catalog.snapshot import Catalog
from storage.layout import split_run_path

ROOT = Path(__file__).parent.parent
SELECT = "SELECT run, index, num_tokens AS length, correct FROM trajectories WHERE correct ORDER BY index"


@pytest.fixture
def root() -> str:
    return str(root_of(written_log()))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_every_format_holds_the_same_rows(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [(p.trajectory.index, len(p.trajectory.response_ids)) for p in scored(written_log())][:5]
    query = "SELECT index, num_tokens FROM trajectories ORDER BY index"
    for name in ("rows.csv", "rows.json", "rows.parquet"):
        assert run("sql", query, "--root", root, "--limit", "5", "--output", str(tmp_path / name)) == 0
    said = capsys.readouterr().err
    assert "only the first 5 rows" in said
    assert f"5 rows written to {tmp_path / 'rows.csv'} (csv)" in said
    read: list[Any] = [
        pa.csv.read_csv(tmp_path / "rows.csv").to_pylist(),
        [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()],
        pq.read_table(tmp_path / "rows.parquet").to_pylist(),
    ]
    for rows in read:
        assert [(row["index"], row["num_tokens"]) for row in rows] == expected
    assert run("sql", query, "--root", root, "--output", str(tmp_path / "rows.csv")) == 2
    assert "exists" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.json", "rows.parquet"]


def test_stored_queries_are_listed_and_run_by_name(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sql", "--list") == 0
    assert "largest_disagreements" in capsys.readouterr().out
    assert run("sql", "made-version", "-p", "version=2", "--root", root, "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("first,8,walk-8,")
    assert run("sql", "made-version", "-p", "version=abc", "--root", root) == 2
    assert "version=abc is no INTEGER. It means the version; the default is 1." in capsys.readouterr().err
    assert run("sql", "nothing_like_it", "--root", root) == 2
    assert "--list" in capsys.readouterr().err


def test_as_of_and_run_choose_what_is_seen(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = ("sql", "SELECT max(version) AS v FROM policies", "--root", root, "--format", "json")
    assert run(*newest, "--as-of-version", "3") == 0
    assert capsys.readouterr().out == '{"v": 3}\n'
    assert run(*newest, "--as-of-time", "2020-01-01") == 0
    assert capsys.readouterr().out == '{"v": null}\n'
    assert run(*newest, "--run", "nobody") == 2
    assert "nobody" in capsys.readouterr().err
    assert parse_time("1970-01-02") == parse_time("86400") == parse_time("1970-01-02T01:00:00+01:00")
    with pytest.raises(QueryError, match="2026-11-21T06:00:00"):
        parse_time("yesterday")


def test_a_query_may_come_by_standard_input_and_without_one_is_said_what_to_give(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 40 + 2 AS answer"))
    assert run("sql", "--root", root, "--format", "csv") == 0
    assert capsys.readouterr().out == "answer\n42\n"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run("sql", "--root", root) == 2
    assert "there is no query. Give a SELECT" in capsys.readouterr().err


def test_an_sft_export_has_text_and_where_each_row_came_from(root: str, tmp_path: Path) -> None:
    assert run("export", SELECT, "--format", "sft", "--output", str(tmp_path / "set"), "--root", root) == 0
    rows = [json.loads(line) for line in (tmp_path / "set" / "train.jsonl").read_text().splitlines()]
    right = {p.trajectory.index: p for p in scored(written_log()) if p.trajectory.correct}
    assert [row["index"] for row in rows] == sorted(right)
    texts = Decoder(token_texts_of(written_log().record))
    for row in rows:
        t = right[row["index"]].trajectory
        ids = t.response_ids[:-1] if t.finish_reason == "stop" else t.response_ids
        assert (row["prompt"], row["response"]) == (texts.text(t.prompt_ids), texts.text(ids))
        assert (row["version_first"], row["version_last"]) == (t.version_first, t.version_last)
        assert (row["run"], row["teacher"], row["teacher_digest"]) == ("first", "oracle", "d1")
        assert (row["length"], row["correct"]) == (len(t.response_ids), True)
    facts = json.loads((tmp_path / "set" / "export.json").read_text())
    assert (facts["query"], facts["num_rows"], facts["runs"][0]["run"]) == (SELECT, len(rows), "first")


def test_parquet_and_hf_exports_hold_the_same_rows(root: str, tmp_path: Path) -> None:
    for style in ("parquet", "hf"):
        assert run("export", SELECT, "--format", style, "--output", str(tmp_path / style), "--root", root) == 0
    plain = pq.read_table(tmp_path / "parquet" / "data.parquet")
    (data,) = (tmp_path / "hf" / "data").iterdir()
    assert plain.equals(pq.read_table(data))
    assert plain.column_names[:6] == ["run", "index", "version_first", "version_last", "teacher", "teacher_digest"]
    card = yaml.safe_load((tmp_path / "hf" / "README.md").read_text().split("---")[1])
    assert card["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    if importlib.util.find_spec("datasets"):
        loaded = importlib.import_module("datasets").load_dataset(str(tmp_path / "hf"), split="train")
        assert loaded["index"] == plain["index"].to_pylist()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT count(*) AS n FROM tokens", "without which no row"),
        ("SELECT run, index FROM trajectories WHERE false", "nothing to export"),
        ("SELECT run, index FROM read_csv('/etc/passwd')", "one SELECT"),
    ],
)
def test_an_export_that_cannot_be_leaves_nothing(
    query: str, reason: str, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", query, "--format", "parquet", "--output", str(tmp_path / "set"), "--root", root) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_an_export_never_overwrites(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    assert run("export", SELECT, "--format", "sft", "--output", str(tmp_path / "set"), "--root", root) == 2
    assert "never overwrites" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine"]


def test_a_run_is_opened_by_path_or_id(root: str) -> None:
    by_path = asyncopd.open_run(f"{root}/runs/first")
    by_id = asyncopd.open_run("first", root=root)
    assert by_path.log.steps() == by_id.log.steps() != []
    assert by_path.config.learner.batch_size == 8
    assert by_path.sql("SELECT $x + 1 AS y", x=1).rows() == [{"y": 2}]
    assert len(by_path.table("steps")) == len(by_path.log.steps())
    with pytest.raises(ObjectMissingError):
        asyncopd.open_run("second", root=root)
    with pytest.raises(QueryError, match="there is no relation"):
        by_path.table("stepps")
    assert split_run_path("s3://bucket/prefix/runs/a") == ("s3://bucket/prefix", "a")
    assert split_run_path("a") == ("runs", "a")
    with pytest.raises(StorageError, match="not a run"):
        split_run_path("some/where")


@pytest.mark.parametrize("package", ["polars", "pandas"])
def test_a_missing_data_frame_library_is_named(package: str, root: str) -> None:
    rows = asyncopd.open_run("first", root=root).table("steps")
    if importlib.util.find_spec(package):
        assert len(getattr(rows, package)()) == len(rows)
    else:
        with pytest.raises(QueryError, match=f"pip install {package}"):
            getattr(rows, package)()


def test_importing_asyncopd_imports_nothing_above_it() -> None:
    code = (
        "import sys, asyncopd; print([m for m in sys.modules if m.split('.')[0] in ('storage', 'duckdb', 'pyarrow')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'open_rum'"):
        _ = asyncopd.open_rum


def test_the_example_script_runs(root: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / "example_queries.py"), f"{root}/runs/first"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert "KL" in shown
    assert "trajectories" in shown


def test_bytes_and_tokenizer_files_read_as_text(tmp_path: Path) -> None:
    assert Decoder(TokenTexts("bytes")).text([72, 105, 258]) == "Hi<eos>"
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<eos>": 0, "Hi": 1, "42": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    record = {"config": {"task": {"kind": "text", "train_path": "x.jsonl", "tokenizer": str(tmp_path)}}}
    decoder = Decoder(token_texts_of(record))
    assert decoder.text([1, 2, 0]).split() == ["Hi", "42", "<eos>"]
    assert decoder.vocabulary() == [("<eos>", "special"), ("Hi", "word"), ("42", "number")]
    assert decoder.text([1, 99]).endswith("<?99>")
    assert [token_class(text) for text in (" the", "3.5", "\n", "+=", "x1")] == [
        "word",
        "number",
        "blank",
        "symbol",
        "mixed",
    ]


def test_a_run_whose_tokenizer_is_gone_still_answers_everything_else(tmp_path: Path) -> None:
    log = fresh_log("file", tmp_path)
    log.publish_trajectories(IndexRange(0, 2), make_trajectories(IndexRange(0, 2)), worker="w")
    sandbox = Sandbox(Catalog(log.store))
    assert sandbox.query("SELECT count(*) AS n FROM trajectories").rows() == [{"n": 2}]
    with pytest.raises(QueryError, match="cannot be shown as text"):
        sandbox.query("SELECT text_of(run, response_ids) FROM trajectories")
