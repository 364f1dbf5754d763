"""CRC-32 (the zip polynomial), from zlib-ng: about four times zlib's speed, and it releases the GIL for large buffers."""

from __future__ import annotations

from typing import Any

from zlib_ng import zlib_ng as _zlib_ng


def crc32(buffer: Any, value: int = 0) -> int:
    """CRC-32 of a bytes-like `buffer`, continued from `value`. Any thread; does not block on I/O."""
    return _zlib_ng.crc32(buffer, value)


def crc32_combine(crc1: int, crc2: int, nbytes2: int) -> int:
    """CRC-32 of A+B from the CRCs of A and of B and the length of B in bytes."""
    return _zlib_ng.crc32_combine(crc1, crc2, nbytes2)
