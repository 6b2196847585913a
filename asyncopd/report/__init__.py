"""What became of a run: figures, Markdown, plots and a trace, from what its roles left in storage."""

from asyncopd.report.measure import summarise
from asyncopd.report.summary import Summary
from asyncopd.report.write import Report, write_report

__all__ = ["Report", "Summary", "summarise", "write_report"]
