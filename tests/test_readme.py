"""The README lists every source file there is, and none that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def listed_files() -> set[str]:
    tree = (ROOT / "README.md").read_text().rpartition("## Files")[2]
    folder, files = "", set()
    for line in tree.splitlines():
        if re.fullmatch(r"[a-z]+/", line):
            folder = line
        elif match := re.match(r"  (\S+\.(?:py|yaml)) ", line):
            files.add(folder + match[1])
    return files


def test_the_file_tree_is_that_of_the_repository() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("flows", "asyncopd", "storage", "api", "configs", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml") and path.read_text().strip()
    }
    assert listed_files() == found


def test_no_document_holds_a_placeholder() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert "@@" not in path.read_text(), path
