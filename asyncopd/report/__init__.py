"""What became of a run: figures, Markdown, plots and a trace, from what its roles left in storage."""

from asyncopd.report.measure import summarise
from asyncopd.report.write import Report, write_report
from asyncopd.summary import Summary

__all__ = ["Report", "Summary", "summarise", "write_report"]
