"""No benchmark rots: each still imports what it measures, and says how it is asked."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text()]
PARTS = sorted({*FOLDER.glob("*.py")} - {*SCRIPTS})


@pytest.mark.parametrize(
    "script", [pytest.param(s, id=s.stem, marks=[pytest.mark.vllm] if "vllm" in s.stem else []) for s in SCRIPTS]
)
def test_a_benchmark_says_how_it_is_asked(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: {script.name}")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.stem)
def test_what_benchmarks_share_imports_what_it_uses(part: Path) -> None:
    assert importlib.import_module(part.stem).__doc__
