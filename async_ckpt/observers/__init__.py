"""Observers: what the engine reports, as log records, metrics of other tools, a trace, a progress bar.

Each lives in its own module, so that the libraries they speak to are needed only by those who use them.
"""
