"""CRC-32 (the zip polynomial), from zlib-ng: about four times zlib's speed, and it releases the GIL for large buffers.

`crc32(buffer, value=0)`: of a bytes-like object, continued from `value`. `crc32_combine(crc1, crc2, nbytes2)`: of A+B
from the CRCs of A and of B and the length of B in bytes. Any thread; they do not block on I/O. The functions themselves
and no wrappers: they are called per tensor.
"""

from __future__ import annotations

from zlib_ng.zlib_ng import crc32, crc32_combine

__all__ = ["crc32", "crc32_combine"]
