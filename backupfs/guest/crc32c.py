"""CRC-32C of many blocks at once, in pure Python: about 40 MB/s for 512 blocks of 4 KiB.

All blocks advance together, a byte each: the four bytes of their checksums lie in four rows, one byte a block, so that
a step is four translations and some exclusive ors of whole rows.
"""

from collections.abc import Sequence

_POLYNOMIAL = 0x82F63B78  # reversed


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)  # noqa: PLW2901 (a register)
        table.append(value)
    return table


_TABLE = _table()
_ROWS = [bytes(value >> shift & 0xFF for value in _TABLE) for shift in (0, 8, 16, 24)]


def crc32c(data: bytes, state: int = 0xFFFFFFFF) -> int:
    """Return the checksum's state after some bytes, as the kernel counts it: without the last inversion."""
    for byte in data:
        state = state >> 8 ^ _TABLE[(state ^ byte) & 0xFF]
    return state


def crc32c_each(blocks: Sequence[bytes], state: int = 0xFFFFFFFF) -> list[int]:
    """Return `crc32c` of each of some blocks of the same length."""
    count = len(blocks)
    if not count:
        return []
    length, joined = len(blocks[0]), b"".join(blocks)
    a, b, c, d = (int.from_bytes(bytes([state >> shift & 0xFF]) * count, "little") for shift in (0, 8, 16, 24))
    low, second, third, high = _ROWS
    number = int.from_bytes
    for position in range(length):
        index = (a ^ number(joined[position::length], "little")).to_bytes(count, "little")
        a = b ^ number(index.translate(low), "little")
        b = c ^ number(index.translate(second), "little")
        c = d ^ number(index.translate(third), "little")
        d = number(index.translate(high), "little")
    rows = (row.to_bytes(count, "little") for row in (a, b, c, d))
    return [w | x << 8 | y << 16 | z << 24 for w, x, y, z in zip(*rows, strict=True)]
