"""Studies store each finished cell once, and go on from them after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tiny_study import tiny_config

from asyncopd.config.losses import DenseReverseKLConfig
from asyncopd.study.cells import CellStore
from asyncopd.study.loop import LoopSettings, train_lagged
from asyncopd.study.report import mean_and_error, staleness_markdown
from asyncopd.study.staleness import FULL, QUICK
from flows.study import warm_start
from storage.stores.base import MemoryStore

ROOT = Path(__file__).parent.parent


def start(study: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "tests/tiny_study.py", study, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(out: Path) -> dict[str, tuple[int, bytes]]:
    """Cell -> when it was written, and its body."""
    paths = [path for path in out.glob("cells/*/*.json") if path.name != "settings.json"]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_a_killed_staleness_study_goes_on_and_leaves_finished_cells_untouched(tmp_path: Path) -> None:
    first = start("staleness", tmp_path)
    while len(finished(tmp_path)) < 3:
        assert first.poll() is None, first.communicate()[1].decode()
        time.sleep(0.02)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    # The worker ends with its parent.
    assert psutil.wait_procs(children, timeout=10)[1] == []
    before = finished(tmp_path)
    assert 3 <= len(before) < 8

    second = start("staleness", tmp_path)
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors.decode()
    after = finished(tmp_path)
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    rows = pq.read_table(tmp_path / "staleness.parquet").to_pylist()
    assert {(r["estimator"], r["lag"], r["seed"]) for r in rows} == {
        (e, lag, s) for e in ("head 4 + tail 4", "dense reverse KL") for lag in (0, 2) for s in (0, 1)
    }
    assert all(np.isfinite(row["kl_nats"]) for row in rows)
    assert output.decode().startswith("### lr 0.001, 2 seeds")
    assert (tmp_path / "staleness.png").read_bytes().startswith(b"\x89PNG")


def test_the_estimator_study_writes_its_tables_and_reuses_its_cells(tmp_path: Path) -> None:
    for _ in range(2):
        process = start("estimators", tmp_path)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
        cells = finished(tmp_path)
        assert len(cells) == 3
    rows = pq.read_table(tmp_path / "estimators.parquet").to_pylist()
    assert {row["drift_target_nats"] for row in rows} == {0.0, 0.05}
    for row in rows:
        assert row["drift_nats"] == pytest.approx(row["drift_target_nats"], rel=0.01, abs=1e-12)
    assert "head 4 + tail 4" in output.decode()
    assert (tmp_path / "estimators.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_is_written_once_and_other_settings_have_other_cells() -> None:
    store = MemoryStore("memory://cells")
    cells = CellStore(store, "study", {"num_steps": 1})
    assert cells.find("a") is None
    assert cells.put("a", {"accuracy": 0.5})
    assert not cells.put("a", {"accuracy": 0.9})
    assert cells.find("a") == {"accuracy": 0.5}
    assert CellStore(store, "study", {"num_steps": 2}).find("a") is None


async def test_batches_are_exactly_lag_versions_old() -> None:
    warm = warm_start(tiny_config(), MemoryStore("memory://warm"))
    loop = LoopSettings(num_steps=4, batch_size=4, max_new_tokens=12, num_prompts=0)
    drifts = {}
    for lag in (0, 2):
        trained = await train_lagged(warm, DenseReverseKLConfig(), loop, lag=lag, lr=1e-2, seed=0)
        drifts[lag] = [metrics["train/drift_nats"] for metrics in trained.metrics]
    assert max(drifts[0]) < 1e-8
    assert drifts[2][0] < 1e-8  # step 0 trains version 0's batch under version 0
    assert min(drifts[2][1:]) > 1e-6


def test_grids_cover_what_the_study_promises() -> None:
    assert len(QUICK.cells()) == 63
    assert set(FULL.lags) == {0, 1, 4, 16, 64}
    assert set(FULL.lrs) == {3e-4, 1e-3}
    assert len(FULL.seeds) >= 3
    names = [cell.name for cell in FULL.cells()]
    assert len(set(names)) == len(names) == 420


def test_standard_errors_and_missing_cells_in_the_table() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))
    rows = [
        {"estimator": "a", "lag": lag, "lr": 1e-3, "seed": seed, "accuracy": 0.5 + 0.1 * seed, "kl_nats": 1.0}
        for lag, seed in ((0, 0), (0, 1), (4, 0))
    ]
    rows.append({**rows[0], "estimator": "b"})
    text = " ".join(staleness_markdown(rows).split())
    assert "| a | 0.55 ± 0.05 | 0.50 ± nan | 1.00 ± 0.00 | 1.00 ± nan |" in text
    assert "| b | 0.50 ± nan | – | 1.00 ± nan | – |" in text
