"""Threads and locks of the package."""
