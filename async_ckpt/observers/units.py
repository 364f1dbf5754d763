"""Numbers as people read them: bytes, rates, times, ages; and numbers that people type."""

from __future__ import annotations

import re

from ..errors import ConfigError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_AGES = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_FACTORS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def format_bytes(num_bytes: float) -> str:
    """Such as "17 B" or "1.25 GiB": three digits or more, binary units."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 1000 and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{int(value)} B"
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {_BINARY[unit]}"


def format_rate(bytes_per_s: float) -> str:
    """Such as "1.25 GiB/s"."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_seconds(seconds: float) -> str:
    """Such as "85 us", "3.2 ms" or "12.3 s"."""
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s"


def format_age(seconds: float) -> str:
    """Such as "5 min" or "3.5 h"; "in the future" for a clock that disagrees by more than a second."""
    if seconds < -1:
        return "in the future"
    for length_s, unit in _AGES:
        if seconds >= length_s:
            value = seconds / length_s
            return f"{value:.1f} {unit}" if value < 10 and unit in ("y", "d", "h") else f"{value:.0f} {unit}"
    return "now"


def parse_duration_s(text: str) -> float:
    """Seconds of "90", "90s", "15min", "6h", "2d" or "1w".

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|min|m|h|d|w)?\s*", text)
    if match is None:
        raise ConfigError(f"{text!r} is no duration; write 90s, 15min, 6h, 2d or 1w")
    return float(match[1]) * _FACTORS[match[2] or ""]
