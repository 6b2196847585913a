"""The interactive part of `asyncopd sql`: history, completion, and a few words that begin with a dot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from asyncopd.cli.query import text_of_result
from asyncopd.config import parse_override
from asyncopd.errors import AsyncOPDError
from asyncopd.local.processes import home
from storage.catalog.rows import AsOf
from storage.catalog.sandbox import Sandbox
from storage.catalog.stored_queries import find_query, stored_queries
from storage.catalog.views import BY_NAME, RELATIONS, TEXT_FUNCTION

_KEYWORDS = (
    "select",
    "from",
    "where",
    "group by",
    "order by",
    "having",
    "limit",
    "join",
    "left join",
    "using",
    "with",
    "and",
    "not",
    "null",
    "between",
    "case",
    "when",
    "then",
    "else",
    "end",
    "distinct",
    "count",
    "sum",
    "avg",
    "min",
    "max",
    "describe",
    "unnest",
    "exp",
    "quantile_cont",
)
_HELP = """\
SELECT ...;           a query, over several lines if need be; it ends with ;
NAME [p=value ...]    a stored query, for example: kl_by_position width=4
.tables  .columns RELATION  .list  .help  .quit
"""


class SqlCompleter(Completer):
    """Words of SQL, relations, stored queries, and the columns of the relations the query mentions."""

    def get_completions(self, document: Document, _: CompleteEvent) -> Iterable[Completion]:
        word = document.get_word_before_cursor(WORD=False)
        if not word:
            return
        text = document.text.lower()
        columns = {f.name for relation in RELATIONS if relation.name in text for f in relation.fields}
        known = [*sorted(columns), *BY_NAME, *stored_queries(), TEXT_FUNCTION, *_KEYWORDS]
        for candidate in dict.fromkeys(known):
            if candidate.startswith(word.lower()) and candidate != word:
                yield Completion(candidate, start_position=-len(word))


def run_shell(sandbox: Sandbox, as_of: AsOf | None, *, console: Console) -> int:
    """Read and answer queries until .quit or Ctrl-D."""
    history = home() / "sql_history"
    history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)), completer=SqlCompleter(), multiline=True, key_bindings=_bindings()
    )
    console.print(f"{len(sandbox.catalog.run_ids())} runs in {sandbox.catalog.store.url}. .help for help.", style="dim")
    while True:
        try:
            line = session.prompt("asyncopd> ", prompt_continuation="     ...> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0
        if line in (".quit", ".exit"):
            return 0
        if line:
            with contextlib.suppress(KeyboardInterrupt):
                console.print(answer(sandbox, line, as_of), markup=False, highlight=False, soft_wrap=True, end="")


def answer(sandbox: Sandbox, line: str, as_of: AsOf | None = None) -> str:
    """What the shell prints for one entry; errors of ours are an answer too."""
    word, _, rest = line.rstrip(";").partition(" ")
    if word == ".tables":
        return "".join(f"{relation.name:20} {relation.doc}\n" for relation in RELATIONS)
    if word == ".columns":
        relation = BY_NAME.get(rest.strip())
        if relation is None:
            return f"there is no relation {rest.strip()!r}; .tables lists them\n"
        return "".join(f"{field.name:24} {field.doc}\n" for field in relation.fields)
    if word == ".list":
        return "".join(f"{query.name:24} {query.question}\n" for query in stored_queries().values())
    if word.startswith("."):
        return _HELP
    stored = find_query(word)
    try:
        if stored is None:
            result = sandbox.query(line, as_of=as_of)
        else:
            result = sandbox.query(stored.sql, stored.arguments(_assignments(rest)), as_of=as_of)
    except AsyncOPDError as error:
        return f"{type(error).__name__}: {error}\n"
    cut_off = "there are more rows\n" if result.truncated else ""
    return text_of_result(result.table, "table") + cut_off


def _assignments(text: str) -> dict[str, object]:
    return dict(parse_override(part) for part in text.split())


def _bindings() -> KeyBindings:
    """Enter sends what is complete: a query that ends with ;, a dotted word, or a stored query."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        is_whole = not text or text.endswith(";") or text.startswith(".") or find_query(text.partition(" ")[0])
        if is_whole:
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    return bindings
