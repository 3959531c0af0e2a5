"""The names in an ext folder, block by block, as Linux reads one without its index (htree).

What an index adds looks like entries that are not used, but for its checksums.

Source: Linux, fs/ext4/ext4.h (ext4_dir_entry_2), dir.c (__ext4_check_dir_entry), namei.c (ext4_dirblock_csum_verify,
get_dx_countlimit, ext4_dx_csum), inline.c.
"""

import struct
from collections.abc import Iterator

from backupfs.errors import GuestError
from backupfs.guest.crc32c import crc32c

_ENTRY = struct.Struct("<IHBB")  # inode, rec_len, name_len, file_type
_TAIL, _TAIL_TYPE = 12, 0xDE
_LEAST = 12  # bytes of an entry
_INDEX = 8  # bytes of an index's entry, and of what has its checksum
_ROOT_SIZE = 8  # of what describes an index, behind `.` and `..`


def block_names(part: bytes, offset: int, inodes: int, seed: int | None, indexed: bool) -> Iterator[tuple[bytes, int]]:
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
    if seed is not None:
        at = _index_at(part, first=not offset) if indexed else 0
        if at:
            _verify_index(part, at, seed)
        else:
            _verify(part, seed)
    yield from inline_names(part, inodes)


def inline_names(part: bytes, inodes: int) -> Iterator[tuple[bytes, int]]:
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


def _index_at(part: bytes, *, first: bool) -> int:
    """Return where the entries of an index begin in a block; 0: it has names, not an index."""
    block = len(part)
    inode, length, _, _ = _ENTRY.unpack_from(part)
    if not first:
        return 8 if not inode and _length(length, block) == block else 0
    _, second, _, _ = _ENTRY.unpack_from(part, _LEAST)
    is_root = length == _LEAST and _length(second, block) == block - _LEAST
    return 32 if is_root and part[24:28] == bytes(4) and part[29] == _ROOT_SIZE else 0


def _verify_index(part: bytes, at: int, seed: int) -> None:
    """Source: ext4_dx_csum."""
    limit, count = struct.unpack_from("<2H", part, at)
    used, tail = at + count * _INDEX, at + limit * _INDEX
    if count > limit or tail + _INDEX > len(part):
        raise GuestError("its index makes no sense")
    (found,) = struct.unpack_from("<I", part, tail + 4)
    if crc32c(part[tail : tail + 4] + bytes(4), crc32c(part[:used], seed)) != found:
        raise GuestError("the checksum of a block of its index is wrong")


def _verify(part: bytes, seed: int) -> None:
    inode, length, name_length, kind, found = struct.unpack_from("<IHBBI", part, len(part) - _TAIL)
    if (inode, length, name_length, kind) != (0, _TAIL, 0, _TAIL_TYPE) or crc32c(part[:-_TAIL], seed) != found:
        raise GuestError("the checksum of a block of it is wrong")
