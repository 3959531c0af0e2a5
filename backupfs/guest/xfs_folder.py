"""What is in a folder of an XFS. Source: fs/xfs/libxfs/xfs_da_format.h."""

import struct
from collections.abc import Iterator

from backupfs.errors import GuestError
from backupfs.guest.xfs_disk import FOLDER, LOCAL, Disk, Inode

_DATA_END = 1 << 35  # bytes: behind it there are hashes of the names
_UNUSED = 0xFFFF
_ONE = (b"XD2B", b"XDB3")  # of a folder of one block
_MANY = (b"XD2D", b"XDD3")
_MOST_BLOCKS = 1 << 17


def entries(disk: Disk, folder: Inode) -> Iterator[tuple[bytes, int]]:
    """Yield names and inodes, without `.` and `..`. Raises GuestError."""
    if folder.form == LOCAL:
        yield from _short(disk, folder)
        return
    for at, block in _blocks(disk, folder):
        first = 64 if disk.version == 5 else 16
        disk.check(block, at, folder.number, FOLDER, *_ONE, *_MANY)
        end = len(block)
        if block.startswith(_ONE):
            end -= 8 + 8 * struct.unpack_from(">I", block, end - 8)[0]
        if end < first:
            raise GuestError(f"folder {folder.number} is damaged")
        yield from _block(disk, folder.number, block[:end], first)


def _short(disk: Disk, folder: Inode) -> Iterator[tuple[bytes, int]]:
    data = folder.data[: folder.size]
    if len(data) != folder.size or len(data) < 6:
        raise GuestError(f"folder {folder.number} is damaged")
    count, wide = data[0], data[1] > 0  # the second counts also the parent
    width, position = (8, 10) if wide else (4, 6)
    for _ in range(count):
        end = position + 3 + data[position]
        name = data[position + 3 : end]
        end += disk.has_types
        number = data[end : end + width]
        if len(number) != width:
            raise GuestError(f"folder {folder.number} is damaged")
        yield name, int.from_bytes(number)
        position = end + width


def _blocks(disk: Disk, folder: Inode) -> Iterator[tuple[int, bytes]]:
    """Yield the folder's blocks of names, each with its place on the volume."""
    pieces = [piece for piece in disk.mapped(folder) if piece.offset < _DATA_END]
    expected = -(-folder.size // disk.folder_block)
    if folder.size % disk.folder_block or expected > _MOST_BLOCKS:
        raise GuestError(f"folder {folder.number} is damaged: it has {folder.size} bytes")
    parts: dict[int, list[tuple[int, int]]] = {}
    for piece in pieces:
        if piece.unwritten or piece.offset + piece.length > _DATA_END:
            raise GuestError(f"folder {folder.number} is damaged")
        for inside in range(0, piece.length, disk.block):
            number, within = divmod(piece.offset + inside, disk.folder_block)
            parts.setdefault(number, []).append((within, piece.at + inside))
    for number in sorted(parts):
        places = parts[number]
        if [within for within, _ in places] != list(range(0, disk.folder_block, disk.block)):
            raise GuestError(f"folder {folder.number} is damaged: a part of a block is missing")
        yield places[0][1], b"".join(disk.read(at, disk.block) for _, at in places)


def _block(disk: Disk, number: int, block: bytes, position: int) -> Iterator[tuple[bytes, int]]:
    while position < len(block):
        tag, length = struct.unpack_from(">HH", block, position)
        if tag == _UNUSED:
            if length < 8 or length % 8:
                raise GuestError(f"folder {number} is damaged")
            position += length
            continue
        inode, size = struct.unpack_from(">QB", block, position)
        name = block[position + 9 : position + 9 + size]
        length = -(-(9 + size + disk.has_types + 2) // 8) * 8
        if position + length > len(block) or struct.unpack_from(">H", block, position + length - 2)[0] != position:
            raise GuestError(f"folder {number} is damaged")
        if name not in (b".", b".."):
            yield name, inode
        position += length
    if position != len(block):
        raise GuestError(f"folder {number} is damaged")
