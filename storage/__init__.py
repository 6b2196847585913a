"""Runs as immutable objects: stores, key names, file formats and the run log. No torch, no Prefect."""
