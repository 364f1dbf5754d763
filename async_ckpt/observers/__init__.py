"""Observers: what the engine reports, as log records, metrics of other tools, a trace, a progress bar."""
