"""Frameworks: each module needs its framework only when it is used, and has an extra of its name."""
