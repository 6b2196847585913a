"""What became of a run: figures, Markdown, plots and a trace, from what its roles left in storage."""
