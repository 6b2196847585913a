"""A Summary in words and table rows, as Markdown and for the terminal: every figure with its unit, gaps as a dash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from asyncopd.report.summary import Quality, Summary

MISSING = "–"


def headline(summary: Summary) -> str:
    """What the run achieved, in one sentence or two."""
    done = f"{summary.num_steps} of {summary.num_steps_planned} steps"
    took = f" in {duration(summary.wall_s)}" if summary.wall_s else ""
    text = f"Trained {done}{took} {_bound(summary)}."
    first, last = summary.first, summary.last
    if first and last and first.version != last.version:
        gains = []
        if first.accuracy is not None and last.accuracy is not None:
            gains.append(f"accuracy {percent(first.accuracy)} -> **{percent(last.accuracy)}**")
        if first.kl_nats is not None and last.kl_nats is not None:
            gains.append(f"KL to the teacher {first.kl_nats:.3f} -> **{last.kl_nats:.3f}** nats per token")
        if gains:
            text += f" On {last.num_prompts} held-out prompts: {', '.join(gains)}."
    return text


class ReportTable(NamedTuple):
    """One table of the report, for Markdown and for the terminal."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int]
    """Columns of words; the others, of figures, align right."""


def tables(summary: Summary) -> Iterator[ReportTable]:
    """What was reached, how fast, and where the time went; those that have rows."""
    first, last = summary.first, summary.last
    if first and last:
        title = f"Quality on {last.num_prompts} held-out prompts, ± one standard error"
        header = ("", f"version {first.version}", f"version {last.version}", "change")
        yield ReportTable(title, header, _quality_rows(first, last), left=(0,))
    yield ReportTable("Speed", ("", "value", "meaning"), _speed_rows(summary), left=(0, 2))
    if summary.roles:
        roles = ("role", "processes", "busy", "busy / wall", "waited, while idle, for")
        rows = [
            (role, str(time.num_workers), f"{time.busy_s:.1f} s", percent(time.busy_share), _waits(time.waiting_s))
            for role, time in summary.roles.items()
        ]
        yield ReportTable("Where the time went", roles, rows, left=(0, 4))


def _quality_rows(first: Quality, last: Quality) -> list[tuple[str, ...]]:
    groups = sorted({*first.accuracy_by_group, *last.accuracy_by_group})
    by_group = [(group, first.accuracy_by_group.get(group), last.accuracy_by_group.get(group)) for group in groups]
    tokens = (first.mean_response_tokens, last.mean_response_tokens)
    rows = [
        ("accuracy", _accuracy(first), _accuracy(last), _points(first.accuracy, last.accuracy)),
        *((f"accuracy, {group}", percent(old), percent(new), _points(old, new)) for group, old, new in by_group),
        ("KL to teacher, nats/token", _kl(first), _kl(last), _difference(first.kl_nats, last.kl_nats, "+.4f")),
        ("mean response, tokens", *(number(value, ".1f") for value in tokens), _difference(*tokens, "+.1f")),
    ]
    if first.version == last.version:
        return [(*row[:2], MISSING, MISSING) for row in rows]
    return rows


def _speed_rows(summary: Summary) -> list[tuple[str, str, str]]:
    overhead, staleness = summary.orchestration, summary.staleness
    kinds = ", ".join(f"{name} {percent(share)}" for name, share in overhead.share_by_kind.items())
    ages = f"{number(staleness.mean_versions, '.2f')} / {number(staleness.max_versions, 'd')} versions"
    bound = f"over trained tokens; the bound τ is {summary.max_staleness}"
    per_s = summary.tokens.trained_per_s
    return [
        ("wall time", duration(summary.wall_s), "first to last busy moment of rollout, score and learn"),
        ("throughput", MISSING if per_s is None else f"{per_s:,.0f} tokens/s", "response tokens trained / wall time"),
        ("overlap", number(summary.overlap, ".2f"), "Σ busy time of rollout, score and learn / wall time"),
        ("orchestration", percent(overhead.share), f"Σ overhead / Σ lifetime of the roles{kinds and f': {kinds}'}"),
        ("orchestration, exposed", percent(overhead.exposed_share), "the part beside which the process did no work"),
        (
            "staleness, mean / max",
            ages,
            f"{bound}, and what was older was trained too" if summary.on_stale == "train" else bound,
        ),
    ]


def _bound(summary: Summary) -> str:
    """What the run's order promised about staleness."""
    at_most = f"at a staleness of at most τ = {summary.max_staleness}"
    match summary.on_stale:
        case None:
            return at_most
        case "train":
            return f"in arrival order, also what was older than τ = {summary.max_staleness}"
        case "drop":
            return f"in arrival order {at_most} (what was older was dropped)"
        case "hold":
            return f"in arrival order {at_most} (what was older is held)"


def _waits(waiting_s: Mapping[str, float]) -> str:
    longest_first = sorted(waiting_s.items(), key=lambda item: -item[1])
    return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in longest_first if seconds >= 0.05) or MISSING


# -- figures as text ----------------------------------------------------------------------------------------------
def percent(fraction: float | None) -> str:
    """`43.1 %`, or a dash."""
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float | None) -> str:
    """`48.2 s`, `4 min 05 s` or `2 h 03 min`, or a dash."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None, form: str) -> str:
    """`value` in the given format, or a dash."""
    return MISSING if value is None else format(value, form)


def _difference(before: float | None, after: float | None, form: str) -> str:
    return MISSING if before is None or after is None else format(after - before, form)


def _points(before: float | None, after: float | None) -> str:
    return MISSING if before is None or after is None else f"{100 * (after - before):+.1f} points"


def _accuracy(quality: Quality) -> str:
    if quality.accuracy is None:
        return MISSING
    return f"{100 * quality.accuracy:.1f} ± {100 * (quality.accuracy_standard_error or 0):.1f} %"


def _kl(quality: Quality) -> str:
    return MISSING if quality.kl_nats is None else f"{quality.kl_nats:.4f} ± {quality.kl_standard_error_nats or 0:.4f}"


def to_markdown(summary: Summary, folder: str) -> str:
    """The whole report, without plots.

    Args:
        folder: where plots and trace are, for the reader to find them.
    """
    parts = [
        f"# {summary.run_id}",
        headline(summary),
        *(f"> **Note.** {note}" for note in summary.notes),
        *(f"## {shown.title}\n\n{table(shown.header, shown.rows, shown.left)}" for shown in tables(summary)),
        _tokens(summary),
        _incidents(summary),
        _examples(summary),
        f"Plots, `summary.json` and `trace.json` (open it at https://ui.perfetto.dev) are in `{folder}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_plots(markdown: str, plots: Mapping[str, str]) -> str:
    """`markdown` followed by pictures: caption -> file name beside the report."""
    pictures = [f"### {caption}\n\n![{caption}]({name})" for caption, name in plots.items()]
    return "\n\n".join([markdown.rstrip("\n"), "## Plots", *pictures]) + "\n"


# -- sections -----------------------------------------------------------------------------------------------------
def _tokens(summary: Summary) -> str:
    tokens, lengths, staleness = summary.tokens, summary.lengths, summary.staleness
    lines = [
        f"- Response tokens: {tokens.generated:,} generated, {tokens.scored:,} scored, {tokens.trained:,} trained."
    ]
    never = tokens.scored - tokens.trained
    if never > 0:
        share = percent(never / tokens.scored)
        lines.append(f"- {never:,} tokens were scored and never trained, {share} of those scored.")
    if lengths.num_responses:
        lines.append(
            f"- Response length: mean {number(lengths.mean_tokens, '.1f')}, 99th percentile "
            f"{number(lengths.p99_tokens, '.0f')}, longest {number(lengths.max_tokens, 'd')} tokens; "
            f"{percent(lengths.stopped_fraction)} ended by themselves, the rest at the limit "
            f"({lengths.num_responses:,} responses)."
        )
    total = sum(staleness.tokens.values())
    if total:
        shares = ", ".join(f"{versions}: {percent(count / total)}" for versions, count in staleness.tokens.items())
        lines.append(f"- Share of trained tokens by staleness in versions: {shares}.")
    return "## Tokens\n\n" + "\n".join(lines)


def _incidents(summary: Summary) -> str:
    incidents = summary.incidents
    lines = [f"- {failure}" for failure in incidents.failures]
    if incidents.num_extra_workers:
        lines.append(f"- {incidents.num_extra_workers} role processes were started again (restarts and resumptions).")
    if incidents.num_rewinds:
        lines.append(f"- The learner went back to a checkpoint {incidents.num_rewinds} times.")
    lines += [f"- {count} trajectories were not trained: {reason}." for reason, count in incidents.dropped.items()]
    lines += [f"- {count} trajectories are held untrained: {reason}." for reason, count in incidents.held.items()]
    return "## Incidents\n\n" + ("\n".join(lines) or "None: no failure, no restart, nothing dropped.")


# -- tables -------------------------------------------------------------------------------------------------------
def _examples(summary: Summary) -> str:
    """Held-out responses of the first and the last evaluated version, to be read."""
    parts = ["## Held-out responses, before and after"] if summary.examples else []
    for number, pair in enumerate(summary.examples, start=1):
        parts.append(f"{number}. Asked:\n\n{_quoted(pair[0].prompt)}")
        for when, said in zip(("before", "after"), pair, strict=True):
            if said is not None:
                parts.append(f"   {when} ({'right' if said.correct else 'wrong'}):\n\n{_quoted(said.response)}")
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """A block of its own inside a list item, whatever the text contains."""
    return "\n".join(f"       {line}" for line in text.strip("\n").split("\n"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table with padded cells, a table in a terminal too; columns not in `left` align right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
