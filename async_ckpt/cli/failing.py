"""Exceptions as exit codes and one clear line."""

from __future__ import annotations

from ..errors import CheckpointError, ConfigError, UnsafePathError, escaped

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def exit_code(error: BaseException) -> int | None:
    """The exit code for a known kind of failure; None for a bug."""
    if isinstance(error, (ConfigError, UnsafePathError)):
        return EXIT_USAGE
    if isinstance(error, FileNotFoundError):
        return EXIT_NOT_FOUND
    if isinstance(error, (CheckpointError, OSError, ImportError)):
        return EXIT_FAILED
    return None


def one_line(error: BaseException) -> str:
    """The message without line breaks or control characters."""
    text = str(error) or type(error).__name__
    if isinstance(error, ImportError) and error.name:
        text = f"this command needs the package {error.name!r}: pip install {error.name}"
    return escaped(" ".join(text.split()))
