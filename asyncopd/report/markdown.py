"""The report as Markdown that reads well in a terminal and on GitHub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asyncopd.summary import Quality, RoleTime, Summary
from asyncopd.summary_text import headline, number, percent, quality_rows, role_rows, speed_rows


def to_markdown(summary: Summary, folder: str) -> str:
    """The whole report, without plots.

    Args:
        folder: where plots and trace are, for the reader to find them.
    """
    parts = [
        f"# {summary.run_id}",
        headline(summary),
        *(f"> **Note.** {note}" for note in summary.notes),
        _quality(summary.first, summary.last),
        _speed(summary),
        _roles(summary.roles),
        _tokens(summary),
        _incidents(summary),
        f"Plots, `summary.json` and `trace.json` (open it at https://ui.perfetto.dev) are in `{folder}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_plots(markdown: str, plots: Mapping[str, str]) -> str:
    """`markdown` followed by pictures: caption -> file name beside the report."""
    pictures = [f"### {caption}\n\n![{caption}]({name})" for caption, name in plots.items()]
    return "\n\n".join([markdown.rstrip("\n"), "## Plots", *pictures]) + "\n"


# -- sections -----------------------------------------------------------------------------------------------------
def _quality(first: Quality | None, last: Quality | None) -> str:
    rows = quality_rows(first, last)
    if first is None or last is None:
        return ""
    before, after = f"version {first.version}", f"version {last.version}"
    title = f"## Quality\n\nSampled decoding on {last.num_prompts} held-out prompts, ± one standard error."
    return f"{title}\n\n{table(('', before, after if last.version != first.version else 'after', 'change'), rows)}"


def _speed(summary: Summary) -> str:
    return f"## Speed\n\n{table(('', 'value', 'meaning'), speed_rows(summary), left=(0, 2))}"


def _roles(roles: Mapping[str, RoleTime]) -> str:
    if not roles:
        return ""
    header = ("role", "processes", "busy", "busy / wall time", "waited, while idle, for")
    return f"### Where the time went\n\n{table(header, role_rows(roles), left=(0, 4))}"


def _tokens(summary: Summary) -> str:
    tokens, lengths, staleness = summary.tokens, summary.lengths, summary.staleness
    lines = [
        f"- Response tokens: {tokens.generated:,} generated, {tokens.scored:,} scored, {tokens.trained:,} trained.",
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
        shares = ", ".join(f"{age}: {percent(count / total)}" for age, count in staleness.tokens.items())
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
def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table with padded cells, a table in a terminal too; columns not in `left` align right."""
    widths = [max(len(str(row[column])) for row in (header, *rows)) for column in range(len(header))]
    widths = [max(3, width) for width in widths]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
