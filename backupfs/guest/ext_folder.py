"""The names in an ext folder, block by block, as Linux reads one without its index (htree).

What an index adds looks like entries that are not used, but for its checksums.

Source: Linux, fs/ext4/ext4.h (ext4_dir_entry_2), dir.c (__ext4_check_dir_entry), namei.c (ext4_dirblock_csum_verify,
get_dx_countlimit), inline.c.
"""

import struct
from collections.abc import Iterator

from backupfs.errors import GuestError
from backupfs.guest.crc32c import crc32c

_ENTRY = struct.Struct("<IHBB")  # inode, rec_len, name_len, file_type
_TAIL, _TAIL_TYPE = 12, 0xDE
_LEAST = 12  # bytes of an entry
_ROOT_SIZE = 8  # of what describes an index, behind `.` and `..`


def names(part: bytes, offset: int, inodes: int, seed: int | None, indexed: bool) -> Iterator[tuple[bytes, int]]:
    """Yield the names in a block of a folder and their inodes, without `.` and `..`.

    Args:
        part: the block.
        offset: of it in the folder, bytes.
        inodes: that the file system has.
        seed: state of the CRC-32C that the folder's checksums begin with; None: it has none.
        indexed: whether the block may be one of an index.

    Raises:
        GuestError: it is damaged.
    """
    if seed is not None and not (indexed and _is_index(part, first=not offset)):
        _verify(part, seed)
    yield from entries(part, inodes)


def entries(part: bytes, inodes: int) -> Iterator[tuple[bytes, int]]:
    """Yield what is in one block, or in an inode. Raises GuestError."""
    position, end = 0, len(part)
    while position < end:
        if end - position < _LEAST:
            raise GuestError("an entry goes over its end")
        inode, length, name_length, _ = _ENTRY.unpack_from(part, position)
        length = _length(length, end)
        if length < max(_LEAST, 8 + name_length) or length % 4 or length > end - position or inode > inodes:
            raise GuestError(f"the entry at {position} of a block of it makes no sense")
        name = part[position + 8 : position + 8 + name_length]
        if inode and name not in {b".", b".."}:
            if not name or b"/" in name or b"\0" in name:
                raise GuestError(f"it has the name {name!r}")
            yield name, inode
        position += length


def _length(length: int, block: int) -> int:
    """Source: ext4_rec_len_from_disk."""
    if block < 1 << 16:
        return length
    return block if length in {0, 0xFFFF} else length & 0xFFFC | (length & 3) << 16


def _is_index(part: bytes, *, first: bool) -> bool:
    block = len(part)
    inode, length, _, _ = _ENTRY.unpack_from(part)
    if not first:
        return bool(not inode and _length(length, block) == block)
    _, second, _, _ = _ENTRY.unpack_from(part, _LEAST)
    return bool(length == _LEAST and _length(second, block) == block - _LEAST and part[29] == _ROOT_SIZE)


def _verify(part: bytes, seed: int) -> None:
    inode, length, name_length, kind, found = struct.unpack_from("<IHBBI", part, len(part) - _TAIL)
    if (inode, length, name_length, kind) != (0, _TAIL, 0, _TAIL_TYPE) or crc32c(part[:-_TAIL], seed) != found:
        raise GuestError("the checksum of a block of it is wrong")
