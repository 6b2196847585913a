"""Imports point down, as rules over folders (docs/architecture.md), and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    "types errors records metrics",
    "config schedule ports worker losses models tasks",
    "rollout teacher learner evaluate vllm report local plan study storage",
    "flows api",
    "cli",
)
"""Names below asyncopd/, or at the top. A module imports from lower floors and from its own folder."""
ALLOWED = {
    "types": {"errors"},
    "records": {"types"},
    "metrics": {"errors"},
    "config": {"schedule"},
    "ports": {"schedule"},
    "worker": {"schedule", "ports", "config"},
    "losses": {"config", "models"},
    "models": {"config"},
    "tasks": {"config", "ports", "models", "schedule"},
    "vllm": {"rollout", "teacher"},
    "study": {"rollout", "teacher", "learner", "evaluate", "report", "local"},
    # Its preflight: what the flow would refuse, the service refuses at once.
    "api": {"flows"},
}
"""Neighbours of the same floor that a folder knows. Stages are siblings and never know each other."""
STORAGE_KNOWS = {"types", "errors", "records", "schedule", "config", "tasks", "ports"}
ONLY_IN = {
    "torch": {"losses", "models", "learner", "rollout", "teacher", "vllm", "study", "flows"},
    "vllm": {"vllm"},
    "prefect": {"flows"},
    "fastapi": {"api"},
    "duckdb": {"storage"},
    "cyclopts": {"cli"},
}


def folder(module: str) -> str:
    """`learner` of `asyncopd.learner.stage`, `storage` of `storage.maintain.audit`; the package itself is ``."""
    first, *rest = module.split(".")
    return first if first != "asyncopd" else rest[0] if rest else ""


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names.split())


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "asyncopd":
            yield from (f"asyncopd.{alias.name}" for alias in node.names if (ROOT / "asyncopd" / alias.name).exists())
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


MODULES = [
    pytest.param(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path)
    for package in ("asyncopd", "storage", "flows", "api")
    for path in sorted((ROOT / package).rglob("*.py"))
]


@pytest.mark.parametrize(("module", "path"), MODULES, ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(module: str, path: Path) -> None:
    own = folder(module)
    for imported in imports(path):
        if imported.split(".")[0] in ("asyncopd", "storage", "flows", "api") and folder(imported) not in ("", own):
            assert own, f"the package itself imports {imported}"
            theirs = folder(imported)
            is_lower = floor(theirs) < floor(own) and (own != "storage" or theirs in STORAGE_KNOWS)
            # Below asyncopd/cli, only the edges know storage: stages are handed what they need.
            is_lower = is_lower and (theirs != "storage" or own in ("flows", "api", "cli"))
            assert is_lower or theirs in ALLOWED.get(own, ()), f"{module} imports {imported}"


@pytest.mark.parametrize(("module", "path"), MODULES, ids=lambda value: value if isinstance(value, str) else "")
def test_heavy_packages_are_imported_where_they_belong(module: str, path: Path) -> None:
    for imported in imports(path):
        allowed = ONLY_IN.get(imported.split(".")[0])
        assert allowed is None or folder(module) in allowed, f"{module} imports {imported}"


@pytest.mark.parametrize(("module", "path"), MODULES, ids=lambda value: value if isinstance(value, str) else "")
def test_no_import_is_hidden(module: str, path: Path) -> None:
    """A module found by name at run time would escape the rules above."""
    hidden = [way for way in ("import_module", "__import__", "def __getattr__") if way in path.read_text()]
    assert not hidden or module in HIDDEN_IMPORTS, f"{module} uses {hidden}"


HIDDEN_IMPORTS = {
    "asyncopd": "open_run, the one name that is found above its package",
    "asyncopd.tasks.prompts": "datasets, which need not be installed",
    "storage.catalog.notebook": "pandas and polars, which need not be installed",
}


@pytest.mark.parametrize(
    "module",
    [
        "asyncopd.config",
        "asyncopd.cli",
        "asyncopd.cli.train, asyncopd.cli.replay, asyncopd.cli.query, asyncopd.cli.maintain, asyncopd.cli.plan",
        "asyncopd.types",
        "storage.run_log",
        "flows.preflight",
    ],
)
def test_light_modules_import_neither_torch_nor_prefect(module: str) -> None:
    heavy = ("torch", "prefect", "transformers", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"
