"""README and docs name what exists: folders, files, commands and their options, targets, deployments, words, links."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from test_layers import FLOORS

from asyncopd.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("C*.md"))]
SOURCES = [
    path
    for folder in ("asyncopd", "storage", "flows", "api", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in listed.stdout.splitlines()]


def without_history(path: Path) -> str:
    """A page's text; CHANGELOG and decisions may name what is gone, so they are asked for links only."""
    return "" if path.name in ("CHANGELOG.md", "decisions.md") else path.read_text()


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_readme_names_every_folder_and_no_other() -> None:
    rows = [line.split("|")[1] for line in README.read_text().splitlines() if line.startswith("| `")]
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([\w/]+/)`", row)}
    parents = {parent for file in tracked_files() for parent in file.parents}
    folders = {
        str(folder)
        for folder in parents
        if not str(folder).startswith(".")
        and (len(folder.parts) == 1 or (len(folder.parts) == 2 and folder.parts[0] in ("asyncopd", "storage", "flows")))
    }
    assert named == folders


def test_the_path_through_the_code_has_twelve_files() -> None:
    text = README.read_text()
    sentence = text[text.index("these twelve files") :].split("\n\n")[0]
    files = re.findall(r"`([\w/]+\.py)`", sentence)
    assert len(files) == 12
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_index_of_docs_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.is_file()} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


@page
def test_make_targets_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for names in re.findall(r"^([\w -]+):", makefile, re.M) for name in names.split()}
    named = set(re.findall(r"(?:^\$ |^ {4}|`)make ([a-z0-9-]+)", without_history(path), re.M))
    assert named - targets == set()


@cache
def help_of(*command: str) -> str:
    """What `asyncopd COMMAND --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()


def commands_in(text: str) -> set[tuple[str, ...]]:
    """(command, option, ...) of every `asyncopd` call that a text shows, groups with their second word."""
    found = set()
    text = text.replace("\\\n", " ")
    for call in re.findall(r"(?:^|\s|`|bin/)asyncopd ([a-z][a-z-]*(?: [^`\n|]*)?)", text, re.M):
        words = call.split("#")[0].split()
        command = words[0]
        if command in GROUPS and len(words) > 1 and re.fullmatch("[a-z]+", words[1]):
            command += f" {words[1]}"
        found.add((command, *(word for word in words if re.fullmatch(r"--[a-z-]+", word))))
    return found


GROUPS = ("maintain", "study", "token")


@page
def test_commands_and_their_options_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command, *options in commands_in("\n".join(code_in(without_history(path)))):
        printed = help_of(*command.split())
        assert f"asyncopd {command}" in printed, f"{path.name} names `asyncopd {command}`"
        assert [option for option in options if option not in printed] == [], f"{path.name}: asyncopd {command}"


def code_in(text: str) -> list[str]:
    """Code spans, and the lines of code blocks, fenced or indented."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    return [*fenced, *re.findall(r"^ {4}.*$", rest, re.M), *re.findall(r"`[^`\n]+`", rest)]


@cache
def deployments() -> set[str]:
    """`flow/deployment` of everything in prefect.yaml."""
    found = set()
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        file, function = entry["entrypoint"].split(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), function)
        found.add(f"{flow.name}/{entry['name']}")
    return found


@page
def test_deployments_exist(path: Path) -> None:
    named = set(re.findall(r"deployment run ([a-z-]+/[a-z-]+)", without_history(path)))
    assert named - deployments() == set()


def test_the_table_of_flows_names_every_deployment() -> None:
    rows = [line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`([a-z-]+/[a-z-]+)`", line.split("|")[1])}
    assert named == deployments()


@page
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        aimed_at = (path.parent / file).resolve() if file else path
        assert aimed_at.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(aimed_at), f"{path.name} links to {target}"


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


FILE = re.compile(
    r"(?<![\w/.-])((?:asyncopd|storage|flows|api|tests|benchmarks|configs|docs)/[\w/]+\.(?:py|md|yaml|sql|png))\b"
)


MADE_BY_THE_READER = ("NAME", "squared_gap")
"""Files of the worked examples in CONTRIBUTING.md."""


def missing_files(text: str) -> set[str]:
    named = {file for file in FILE.findall(text) if not any(part in file for part in MADE_BY_THE_READER)}
    return {file for file in named if not (ROOT / file).exists()}


@page
def test_files_named_in_pages_exist(path: Path) -> None:
    assert missing_files(without_history(path)) == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_sources_exist(path: Path) -> None:
    assert missing_files("\n".join(line for line in path.read_text().splitlines() if "/tmp" not in line)) == set()


WORDS = re.findall(r"^\| \*\*(.+?)\*\* \| .* \| `([\w.]+)` \|$", (ROOT / "docs" / "glossary.md").read_text(), re.M)


@pytest.mark.parametrize(("word", "place"), WORDS, ids=[word for word, _ in WORDS])
def test_words_are_defined_where_the_glossary_says(word: str, place: str) -> None:
    module, _, name = place.rpartition(".")
    if name.islower() and (ROOT / place.replace(".", "/")).with_suffix(".py").exists():
        module, name = place, ""
    defined = importlib.import_module(module)
    assert not name or hasattr(defined, name), f"{word}: {place}"


def test_the_glossary_has_its_words() -> None:
    assert len(WORDS) == 27
    assert len({word for word, _ in WORDS}) == 27


def test_architecture_has_the_floors_of_imports() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert "\n".join(f"    {names}" for names in reversed(FLOORS)) in text


@page
def test_nothing_is_cut_off(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for paragraph in re.split(r"\n\s*\n", text):
        last = paragraph.rstrip().splitlines()[-1] if paragraph.strip() else ""
        is_prose = last and not last.startswith(("#", "|", "    ", "!", "[", "<")) and "://" not in last.split()[-1]
        assert not is_prose or last.rstrip("*)`").endswith((".", ":", ";")) or last.endswith(("`", ")")), paragraph


@page
def test_no_page_holds_a_placeholder(path: Path) -> None:
    assert "@@" not in path.read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_sentences_of_modules_are_whole(path: Path) -> None:
    summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    assert not summary or "\n" in summary or summary.endswith((".", ":", "?", ")", "`")), summary
