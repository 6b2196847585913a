"""Imports point down only (docs/architecture.md), and the heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [
    ("asyncopd.types", 0), ("asyncopd.errors", 0),
    ("asyncopd.config", 1), ("asyncopd.schedule", 1), ("asyncopd.simulate", 1), ("asyncopd.ports", 1),
    ("asyncopd.ledger", 1), ("asyncopd.arrivals", 1), ("asyncopd.open_shards", 1),
    ("asyncopd.packing", 1), ("asyncopd.modeling", 1), ("asyncopd.sampling", 1), ("asyncopd.losses", 1),
    ("asyncopd.vllm_engine", 1), ("asyncopd.vllm_folder", 1), ("asyncopd.vllm_worker", 1),
    ("asyncopd.tasks", 1), ("asyncopd.worker", 1), ("asyncopd.busy", 1), ("asyncopd.bottleneck", 1),
    ("asyncopd.supervise", 1), ("asyncopd.stack", 1), ("asyncopd.flow_runs", 1), ("asyncopd.summary", 1),
    ("asyncopd.summary_text", 1), ("asyncopd.progress", 1), ("asyncopd.progress_text", 1),
    ("asyncopd.bars", 1), ("asyncopd.mixture", 1), ("asyncopd.counterfactual", 1),
    ("asyncopd.cli_replay", 4), ("asyncopd.replay_text", 2), ("asyncopd.offline_checks", 2),
    ("asyncopd.replay_scores", 2),
    ("asyncopd.rollout", 2), ("asyncopd.teacher", 2), ("asyncopd.learner", 2), ("asyncopd.evaluate", 2),
    ("asyncopd.report", 2), ("asyncopd.follow", 2), ("asyncopd.roles", 2), ("storage", 2),
    ("asyncopd.study", 2), ("asyncopd.chaos", 2), ("asyncopd.plan", 2),
    ("flows.wiring", 3), ("flows.wiring_vllm", 3), ("flows.work", 3), ("flows.preflight", 3),
    ("flows.preflight_vllm", 3),
    ("flows", 4), ("asyncopd.cli", 4), ("asyncopd.cli_study", 1), ("asyncopd.cli_worker", 4), ("asyncopd.cli_chaos", 4),
    ("asyncopd.cli_maintain", 3), ("asyncopd.cli_plan", 4), ("asyncopd.cli_serve", 4), ("api", 4),
    ("asyncopd.cli_sql", 4), ("asyncopd.cli_export", 4), ("asyncopd.sql_shell", 4), ("asyncopd.sql_format", 1),
]  # fmt: skip
SIBLINGS = (
    "asyncopd.rollout",
    "asyncopd.teacher",
    "asyncopd.learner",
    "asyncopd.evaluate",
    "asyncopd.report",
    "storage",
)
ONLY_IN = {
    "torch": ("asyncopd.losses", "asyncopd.modeling", "asyncopd.sampling", "asyncopd.learner", "asyncopd.rollout",
              "asyncopd.teacher", "asyncopd.study", "flows.wiring"),
    "prefect": ("flows",),
    "fastapi": ("api",),
    "duckdb": ("storage",),
    "vllm": ("asyncopd.rollout.vllm", "asyncopd.teacher.vllm", "asyncopd.vllm_engine"),
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("asyncopd", "storage", "flows", "api"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int | None:
    matches = [(len(name), number) for name, number in LAYERS if within(module, name)]
    return max(matches)[1] if matches else None


MODULES = [
    pytest.param(name, path, id=name) for name, path in modules() if name not in ("asyncopd", "storage", "flows")
]


@pytest.mark.parametrize(("module", "path"), MODULES)
def test_imports_point_down(module: str, path: Path) -> None:
    own = layer(module)
    assert own is not None, f"{module} has no layer: add it to LAYERS"
    for imported in imports(path):
        theirs = layer(imported)
        assert theirs is None or theirs <= own, f"{module} (L{own}) imports {imported} (L{theirs})"
        mine = next((s for s in SIBLINGS if within(module, s)), None)
        other = next((s for s in SIBLINGS if within(imported, s)), None)
        assert mine is None or other in (None, mine), f"siblings: {module} imports {imported}"


@pytest.mark.parametrize(("module", "path"), MODULES)
def test_heavy_packages_are_imported_where_they_belong(module: str, path: Path) -> None:
    for imported in imports(path):
        allowed = ONLY_IN.get(imported.split(".")[0])
        assert allowed is None or any(within(module, a) for a in allowed), f"{module} imports {imported}"


@pytest.mark.parametrize(
    "module", ["asyncopd.config", "asyncopd.cli", "asyncopd.types", "storage.run_log", "flows.preflight"]
)
def test_light_modules_import_neither_torch_nor_prefect(module: str) -> None:
    heavy = ("torch", "prefect", "transformers", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"
