"""Names in a block of an ext folder."""

import struct

import pytest

from backupfs.errors import GuestError
from backupfs.guest.ext_folder import inline_names


def entry(inode: int, name: bytes, length: int) -> bytes:
    return (struct.pack("<IHBB", inode, length & 0xFFFF, len(name), 1) + name).ljust(length, b"\0")


def test_names_and_what_only_looks_like_one() -> None:
    block = entry(2, b".", 12) + entry(2, b"..", 12) + entry(0, b"gone", 16)
    block += entry(9, b"x" * 255, 1024 - 12 - len(block)) + entry(0, b"", 12)
    assert list(inline_names(block, 10)) == [(b"x" * 255, 9)]


@pytest.mark.parametrize("stored", [0, 0xFFFF])
def test_blocks_of_64_kib(stored: int) -> None:
    assert list(inline_names(struct.pack("<IHBB", 3, stored, 1, 1) + b"a" + bytes(65536 - 9), 10)) == [(b"a", 3)]


@pytest.mark.parametrize("length", [0, 4, 8, 14, 2048])
def test_a_length_that_can_not_be(length: int) -> None:
    with pytest.raises(GuestError, match="makes no sense"):
        list(inline_names(entry(5, b"name", 16)[:4] + struct.pack("<H", length) + entry(5, b"name", 1024)[6:], 10))


@pytest.mark.parametrize("name", [b"", b"a/b", b"a\0b"])
def test_a_name_that_can_not_be(name: bytes) -> None:
    with pytest.raises(GuestError, match="has the name"):
        list(inline_names(entry(5, name, 1024), 10))


def test_an_inode_that_can_not_be() -> None:
    with pytest.raises(GuestError, match="makes no sense"):
        list(inline_names(entry(11, b"name", 1024), 10))
