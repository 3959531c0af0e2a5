"""CRC-32C as Linux's file systems count it."""

import crc32c as library

_INVERTED = 0xFFFFFFFF


def crc32c(data: bytes, state: int = _INVERTED) -> int:
    """Return the checksum's state after some bytes: without the inversions at both ends that others make."""
    return int(library.crc32c(data, state ^ _INVERTED)) ^ _INVERTED
