"""`asyncopd check-model | export-model`: a model is refused by what its files show, or loaded and tried; a student
leaves a run as a folder. The work is done in flows/, which loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from asyncopd.cli import Root
from asyncopd.config.engines import EngineDtype, PretrainedModel
from asyncopd.errors import ConfigError
from asyncopd.local.console import console_table
from asyncopd.models.files import ModelFiles
from storage.runs import open_run
from storage.stores import open_store

DIFFERENT = 1
"""Status when the engines do not agree."""
SHORTEST_CONTEXT = 32


def check_model(
    path: str,
    /,
    *,
    revision: str = "main",
    gguf_file: str = "",
    drop_layers: Annotated[tuple[int, ...], Parameter(metavar="N", consume_multiple=True)] = (),
    teacher: Annotated[str | None, Parameter(metavar="PATH")] = None,
    teacher_revision: str = "main",
    teacher_gguf_file: str = "",
    dtype: EngineDtype = "auto",
    json_: Annotated[Path | None, Parameter("--json", metavar="FILE")] = None,
) -> int:
    """Try a model.

    Args:
        path: Directory, hub name, or package:NAME of a student.
        revision: Branch, tag or commit of a hub name.
        gguf_file: Name of a GGUF file in it.
        drop_layers: Layers to leave out.
        teacher: Directory, hub name, or package:NAME of its teacher, which is tried too.
        teacher_revision: Branch, tag or commit of the teacher's hub name.
        teacher_gguf_file: Name of a GGUF file in it.
        dtype: Of sampler and scorer; the learner computes in it too.
        json_: Write everything here too.
    """
    models = {"student": PretrainedModel(path=path, revision=revision, gguf_file=gguf_file, drop_layers=drop_layers)}
    if teacher is not None:
        models["teacher"] = PretrainedModel(path=teacher, revision=teacher_revision, gguf_file=teacher_gguf_file)
    files = [ModelFiles(model, role) for role, model in models.items()]
    for each in files:
        each.check(needed_context=SHORTEST_CONTEXT)
    digests = {each.role: each.tokenizer.digest for each in files}
    if len(set(digests.values())) > 1:
        raise ConfigError(
            f"tokenizers differ: {digests} (sha256 of vocabulary, merges, normalisation and added tokens). Student and "
            "teacher must share one tokenizer."
        )
    from flows.check_model import check  # loads torch; what the files show to be wrong is refused in a second

    console = Console(highlight=False, soft_wrap=True)
    found = check(files, dtype, say=lambda line: console.print(f"[dim]{line}[/]" if line[0] == " " else line))
    for role, facts in found.items():
        console.print(console_table(f"\n{role}", ("", ""), _rows(facts), left=(0, 1)))
    if json_ is not None:
        json_.write_text(json.dumps(found, indent=1))
    wrong = [role for role, facts in found.items() if not facts["difference_nats"] <= facts["tolerance_nats"]]
    for role in wrong:
        console.print(f"[bold red]The engines do not agree about the {role}[/]; it cannot be trained faithfully.")
    return DIFFERENT if wrong else 0


def export_model(
    run_id: str,
    /,
    *,
    output: Annotated[Path, Parameter(metavar="DIR")],
    number: Annotated[int | None, Parameter("--policy-version", metavar="N")] = None,
    root: Root = "runs",
) -> int:
    """Write a student.

    Args:
        run_id: Of the run that trained it.
        output: New folder; must not exist.
        number: Which version (default: the latest).
    """
    log = open_run(open_store(root), run_id)
    if output.exists():
        raise ConfigError(f"{output} exists; an export never overwrites. Remove it or name another folder.")
    from flows.export_model import export_model as write_model  # loads transformers

    version = write_model(log, number, output)
    Console(highlight=False, soft_wrap=True).print(f"version {version.number} of {run_id} in {output}")
    return 0


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    differences = ", ".join(f"{engine} {nats:.2g}" for engine, nats in facts["differences_nats"].items())
    stops = ", ".join(f"{token_id} {text!r}" for token_id, text in facts["stop_ids"].items())
    rows = [
        ("architecture", f"{facts['architecture']}, {facts['parameters'] / 1e6:,.1f} million parameters"),
        ("computed in", facts["dtype"]),
        ("ids, rows", f"{facts['ids']:,} ids of the tokenizer, {facts['rows']:,} rows of the head"),
        ("context", f"{facts['positions'] or 'no bound'} tokens"),
        ("stop ids", stops),
        ("tokenizer", f"sha256 {facts['tokenizer_digest']}"),
        ("largest difference", f"{facts['difference_nats']:.2g} nats (tolerance {facts['tolerance_nats']:g})"),
        ("", f"from transformers' own forward pass: {differences}"),
        ("a response", repr(facts["example"])),
        ("peak memory", f"{_size(facts['peak_bytes'])} during this check"),
        *((f"a step: {what}", _size(num_bytes)) for what, num_bytes in facts["step_bytes"].items()),
        ("a step: altogether", _size(sum(facts["step_bytes"].values()))),
        ("a published version", _size(facts["published_bytes"])),
    ]
    if "kl_of_student_nats" in facts:
        rows.append(("student against it", f"KL {facts['kl_of_student_nats']:.3f} nats per sampled token"))
    return rows


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
