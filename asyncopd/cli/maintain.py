"""`asyncopd maintain audit|collect|quarantine|compact`: the options and what they print. Loads no torch, no Prefect."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from storage.compact import MAX_ROWS, compact_run
from storage.layout import RunLayout, run_of
from storage.maintain.audit import GRACE_S, audit_run
from storage.maintain.collect import CollectReport, collect_run
from storage.maintain.findings import AuditReport, to_text
from storage.maintain.quarantine import set_aside
from storage.runs import missing_run
from storage.stores import open_store
from storage.stores.base import ObjectStore

FOUND_PROBLEMS = 1


def add_maintain(commands: Any) -> None:
    """Add `maintain` and its subcommands to the parser's commands."""
    maintain = commands.add_parser("maintain", help="verify, clean and mend stored runs (docs/maintenance.md)")
    actions = maintain.add_subparsers(required=True, metavar="ACTION")

    audit = _action(actions, "audit", "verify every object of a run; status 1 when something is wrong", _audit)
    audit.add_argument("--grace-s", type=float, default=GRACE_S, help="younger unreferenced objects are no finding")

    collect = _action(actions, "collect", "remove garbage and what the run's retention policy lets go", _collect)
    collect.add_argument("--dry-run", action="store_true", help="only say what would go")
    collect.add_argument("--grace-s", type=float, help="keep what is younger (default: the run's retention.grace_s)")

    compact = _action(actions, "compact", "merge small shards into larger objects", _compact)
    compact.add_argument("--dry-run", action="store_true", help="only say what would be merged")
    compact.add_argument("--max-rows", type=int, default=MAX_ROWS, help=f"rows per object (default {MAX_ROWS})")

    quarantine = actions.add_parser("quarantine", help="set a corrupt object aside, and say what follows")
    quarantine.add_argument("key", help="as an error or an audit names it, for example runs/R/trajectories/….json")
    _common(quarantine, _quarantine)


def find_run(store: ObjectStore, run_id: str) -> str:
    """`run_id` itself. Raises RunMissingError when the root has no object of such a run."""
    if not store.list(RunLayout(run_id).root):
        raise missing_run(store, run_id)
    return run_id


def collected(report: CollectReport) -> str:
    """The report of a collection for people."""
    verb = "would remove" if report.dry_run else "removed"
    lines = [f"{g.reason:10}  {g.size_bytes:>12,} bytes  {g.key}" for g in report.removed]
    shards = f"; {report.num_shards_emptied} shards keep their manifest only" if report.num_shards_emptied else ""
    return "\n".join([*lines, f"{verb} {len(report.removed)} objects, {report.num_bytes:,} bytes{shards}"])


def _action(actions: Any, name: str, description: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=description, description=description)
    parser.add_argument("run_id")
    _common(parser, run)
    return parser


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--root", default="runs", help="storage root (default: runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _audit(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.root)
    report = _with_progress(store, find_run(store, arguments.run_id), arguments.grace_s)
    _print(arguments, report.to_dict(), to_text(report))
    return 0 if report.is_clean else FOUND_PROBLEMS


def _with_progress(store: ObjectStore, run_id: str, grace_s: float) -> AuditReport:
    columns = (
        TextColumn("verifying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[key]}"),
    )
    # On stderr, so that --json leaves stdout to the object.
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, key="")
        return audit_run(
            store,
            run_id,
            grace_s=grace_s,
            on_progress=lambda done, total, key: bar.update(task, completed=done, total=total, key=key),
        )


def _collect(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.root)
    run_id = find_run(store, arguments.run_id)
    report = collect_run(store, run_id, grace_s=arguments.grace_s, dry_run=arguments.dry_run)
    _print(arguments, report.to_dict(), collected(report))
    return 0


def _compact(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.root)
    run_id = find_run(store, arguments.run_id)
    report = compact_run(store, run_id, max_rows=arguments.max_rows, dry_run=arguments.dry_run)
    verb = "would merge" if report.dry_run else "merged"
    sizes = f", {report.bytes_before:,} -> {report.bytes_after:,} bytes" if report.bytes_after else ""
    text = f"{verb} {report.num_shards} shards into {report.num_objects} objects{sizes}"
    if report.bytes_after:
        text += f"\nthe replaced objects go with: asyncopd maintain collect {run_id} --root {store.url}"
    _print(arguments, report.to_dict(), text)
    return 0


def _quarantine(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.root)
    run_id = run_of(arguments.key)
    if run_id is not None:
        find_run(store, run_id)
    done = set_aside(store, arguments.key)
    fields = {"key": done.key, "moved": done.moved, "consequences": done.consequences}
    lines = [f"{old}\n  -> {new}" for old, new in done.moved.items()]
    _print(arguments, fields, "\n".join([*lines, *done.consequences]))
    return 0


def _print(arguments: argparse.Namespace, fields: dict[str, Any], text: str) -> None:
    # Not through rich: keys and commands are to be copied, and must not be wrapped.
    print(json.dumps(fields, indent=1) if arguments.json else text)
