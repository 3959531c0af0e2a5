"""The names in an NTFS folder, from its index; and those of a file's streams, from its record.

The Sleuth Kit cuts names off at what is no whole UTF-16 (an unpaired surrogate), and two of a folder may then be one.
Here they are the bytes that ntfs-3g makes of them.

Source: ntfs-3g, include/ntfs-3g/layout.h (INDEX_ROOT, INDEX_BLOCK, INDEX_ENTRY, FILE_NAME_ATTR, MFT_RECORD,
ATTR_RECORD), libntfs-3g/dir.c (ntfs_readdir), mst.c (ntfs_mst_post_read_fixup).
"""

import struct
from collections.abc import Iterator

from backupfs.errors import GuestError

LARGEST_BLOCK = 64 << 10
"""Bytes of a block of an index."""

_ROOT_HEAD, _BLOCK_HEAD = 16, 24  # bytes before what says where the entries are
_HEADER = struct.Struct("<II")  # where the entries begin and end, from here
_ENTRY = struct.Struct("<QHHH")  # what it leads to; bytes of the entry, of its key; flags
_KEY, _NAME = 16, 82  # where the key begins in an entry, and in it the name
_LAST = 0x2
_DOS = 2  # a second name, for DOS only
_SECTOR = 512
_ATTRIBUTE = struct.Struct("<IIBBHHH")  # type; bytes; whether elsewhere; units and place of the name; flags; number
_LISTED = struct.Struct("<IHBB18x")  # type; bytes; units and place of the name
_LIST, _DATA, _END = 0x20, 0x80, 0xFFFFFFFF


def block_size(root: bytes) -> int:
    """Return the size of the blocks of an index, bytes; of what its first part, the attribute INDEX_ROOT, says."""
    size = int(struct.unpack_from("<I", root, 8)[0]) if len(root) >= _ROOT_HEAD + _HEADER.size else 0
    if not _SECTOR <= size <= LARGEST_BLOCK or size & (size - 1):
        raise GuestError("the first part of its index makes no sense")
    return size


def root_names(root: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the names in the first part of an index and the references of what they stand for. Raises GuestError."""
    return _names(root, _ROOT_HEAD)


def block_names(block: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield what is in a block of an index. Raises GuestError."""
    return _names(_whole(block, b"INDX"), _BLOCK_HEAD)


def stream_names(record: bytes) -> dict[int, bytes] | None:
    """Return the names of a file's streams of data, b"" for its content, by their numbers; None: they are not all here.

    Args:
        record: of the master file table.

    Raises:
        GuestError: it is damaged.
    """
    record = _whole(record, b"FILE")
    found: dict[int, bytes] = {}
    position = int(struct.unpack_from("<H", record, 20)[0])
    while position + 4 <= len(record):
        (kind,) = struct.unpack_from("<I", record, position)
        if kind == _END:
            return found
        if kind == _LIST:
            return None
        if position + _ATTRIBUTE.size > len(record):
            break
        kind, size, _, units, at, _, number = _ATTRIBUTE.unpack_from(record, position)
        if size < _ATTRIBUTE.size or position + size > len(record) or at + 2 * units > size:
            break
        if kind == _DATA:
            found[number] = _encoded(record[position + at : position + at + 2 * units])
        position += size
    raise GuestError("the record of a file makes no sense")


def listed_streams(attributes: bytes) -> set[bytes]:
    """Return the names of a file's streams of data, b"" for its content, of the list of its attributes.

    Raises:
        GuestError: it is damaged.
    """
    found = set[bytes]()
    position = 0
    while position + _LISTED.size <= len(attributes):
        kind, size, units, at = _LISTED.unpack_from(attributes, position)
        if size < _LISTED.size or position + max(size, at + 2 * units) > len(attributes):
            raise GuestError("the list of a file's attributes makes no sense")
        if kind == _DATA:
            found.add(_encoded(attributes[position + at : position + at + 2 * units]))
        position += size
    return found


def _names(part: bytes, header: int) -> Iterator[tuple[bytes, int]]:
    begin, length = _HEADER.unpack_from(part, header)
    position, end = header + begin, header + length
    while position + _ENTRY.size <= end <= len(part):
        reference, size, key, flags = _ENTRY.unpack_from(part, position)
        if flags & _LAST:
            return
        if size < _NAME or size % 8 or position + size > end or key < _NAME - _KEY:
            break
        units, space = part[position + _NAME - 2], part[position + _NAME - 1]
        if not units or _NAME + 2 * units > size:
            break
        if space != _DOS:
            yield _encoded(part[position + _NAME : position + _NAME + 2 * units]), reference
        position += size
    raise GuestError("an entry of its index makes no sense")


def _encoded(name: bytes) -> bytes:
    """Return a name as ntfs-3g shows it. UTF-16 that is not whole is kept."""
    return name.decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")


def _whole(block: bytes, magic: bytes) -> bytes:
    """Return a block with the last bytes of its sectors where they belong. Raises GuestError."""
    at, count = struct.unpack_from("<HH", block, 4)
    if block[:4] != magic or count != len(block) // _SECTOR + 1 or at % 2 or at + 2 * count > _SECTOR - 2:
        raise GuestError(f"a block of it is no {magic.decode()}")
    fixed = bytearray(block)
    for sector in range(1, count):
        end = sector * _SECTOR
        if fixed[end - 2 : end] != block[at : at + 2]:
            raise GuestError("a block of it was written in part")
        fixed[end - 2 : end] = block[at + 2 * sector : at + 2 * sector + 2]
    return bytes(fixed)
