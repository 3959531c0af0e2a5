"""Zstandard payloads of a given length, for the place of another one."""

import random

import pytest

from backupfs.repository import codec
from backupfs.units import KiB, MiB


@pytest.mark.parametrize("size", [4 * KiB, 64 * KiB, 128 * KiB, MiB])
def test_a_frame_of_exactly_this_length(size: int) -> None:
    rng = random.Random(size)
    for chunk in (rng.randbytes(size // 8) * 8, bytes(size), rng.randbytes(size // 2) + bytes(size // 2)):
        shortest = codec.compress(chunk)
        assert shortest is not None
        for more in (0, 3, 6, *range(8, 40), 1000, 1001, 1002):
            payload = codec.compress_to(chunk, len(shortest) + more)
            assert payload is not None, more
            assert len(payload) == len(shortest) + more
            assert codec.decompress(payload, size) == chunk


def test_none_is_so_short() -> None:
    chunk = random.Random(1).randbytes(4 * KiB)
    assert codec.compress_to(chunk, 1000) is None
    assert codec.compress_to(bytes(4 * KiB), 5) is None
