"""An ext file system as it is once its journal was replayed: in memory, the disk stays as it is.

What a running guest's disk holds is older than what the guest sees: what it wrote last is in the journal alone. The
kernel replays it when it mounts; no parser does. Memory holds where the blocks lie in the journal, not what is in them.
"""

import struct
from collections.abc import Iterator

from backupfs.errors import GuestError
from backupfs.extents import Extent
from backupfs.guest.crc32c import crc32c
from backupfs.guest.jbd2 import DamagedJournalError, Journal
from backupfs.guest.reading import read
from backupfs.image import Buffer, Image, check_range

_SUPER, _SUPER_SIZE = 1024, 1024
_RECOVER, _EXTENTS, _WIDE = 0x4, 0x80000, 0x80
_CHECKSUMS = 0x400  # ro_compat
_EXTENT_MAGIC, _DEEPEST = 0xF30A, 5
_REPAIR = "`backupfs mount --scratch` shows a copy, DISK.rw, that e2fsck can repair"
_DIRECT, _LARGEST = 12, 1 << 20  # blocks of a journal: e2fsprogs makes none of more than 10,240,000, mkfs of 262,144


def replayed(volume: Image) -> tuple[Image, tuple[str, ...]]:
    """Return an ext file system with its journal replayed, and what somebody has to know: what could not be replayed.

    The image is the volume itself where there is nothing to replay. Closing it closes the volume.

    Raises:
        GuestError: it can't be replayed. Without that a file that was removed may have the bytes of whoever got its
            blocks since, so nothing is shown; Linux does not mount it either.
        BackupfsError: the disk can't be read.
    """
    head = read(volume, _SUPER, _SUPER_SIZE)
    if head is None or not struct.unpack_from("<I", head, 96)[0] & _RECOVER:
        return volume, ()
    number, device = struct.unpack_from("<2I", head, 0xE0)
    if not number and device:
        raise GuestError("its journal is on another disk, and what is there is needed: it was in use")
    try:
        return _replay(volume, head, number)
    except (DamagedJournalError, struct.error) as e:
        raise GuestError(f"its journal is damaged ({e}), and the file system was in use; {_REPAIR}") from e


def _replay(volume: Image, head: bytes, number: int) -> tuple[Image, tuple[str, ...]]:
    block = 1024 << min(struct.unpack_from("<I", head, 24)[0], 6)
    blocks = _journal_blocks(volume, head, block, number)

    def read_block(position: int) -> bytes:
        if position >= len(blocks) or not blocks[position]:
            raise DamagedJournalError(f"it has no block {position}")
        return _read(volume, blocks[position] * block, block)

    journal = Journal(read_block, block, len(blocks))
    logged = journal.committed()
    places: dict[int, tuple[int, bool]] = {}
    for target, content in logged.items():
        if (target + 1) * block > volume.size:
            raise DamagedJournalError(f"it writes block {target}, behind the end of the volume")
        places[target] = blocks[content.at] * block, content.escaped
    # Blocks change hands with full commits only: without the fast ones it is an older moment, and a right one.
    notes = ("the fast commits in its journal were not replayed: what was written in the last seconds may be missing",)
    return Replayed(volume, block, places), notes if journal.fast_commits else ()


class Replayed:
    """An Image: a volume, with other contents of some blocks, and no journal to replay."""

    def __init__(self, volume: Image, block: int, places: dict[int, tuple[int, bool]]) -> None:
        self.size = volume.size
        self._volume = volume
        self._block = block
        self._places = places
        head = bytearray(_SUPER_SIZE)
        self._fill(_SUPER, memoryview(head))
        struct.pack_into("<I", head, 96, struct.unpack_from("<I", head, 96)[0] & ~_RECOVER)
        if struct.unpack_from("<I", head, 100)[0] & _CHECKSUMS:
            struct.pack_into("<I", head, 1020, crc32c(bytes(head[:1020])))
        self._head = bytes(head)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        check_range(self, offset, len(buffer))
        view = memoryview(buffer)
        self._fill(offset, view)
        first, last = max(offset, _SUPER), min(offset + len(view), _SUPER + _SUPER_SIZE)
        if first < last:
            view[first - offset : last - offset] = self._head[first - _SUPER : last - _SUPER]

    def differs(self, offset: int, length: int) -> bool:
        """Whether a range is another one than on the volume."""
        first, last = offset // self._block, -(-(offset + length) // self._block)
        if len(self._places) < last - first:
            return any(first <= number < last for number in self._places)
        return any(number in self._places for number in range(first, last))

    def _fill(self, offset: int, view: memoryview) -> None:
        self._volume.readinto(offset, view)
        end, block = offset + len(view), self._block
        for number in range(offset // block, -(-end // block)):
            place = self._places.get(number)
            if place is None:
                continue
            at, escaped = place
            content = bytearray(block)
            self._volume.readinto(at, content)
            if escaped:
                content[:4] = b"\xc0\x3b\x39\x98"
            begin = number * block
            first, last = max(offset, begin), min(end, begin + block)
            view[first - offset : last - offset] = content[first - begin : last - begin]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        check_range(self, offset, length)
        if length:
            yield Extent(offset, length, False)

    def close(self) -> None:
        self._volume.close()


# Where the journal lies. Source: fs/ext4/ext4.h, ext4_extents.h.


def _read(volume: Image, offset: int, length: int) -> bytes:
    data = read(volume, offset, length)
    if data is None:
        raise DamagedJournalError(f"it wants {length} bytes at {offset}, behind the end of the volume")
    return data


def _journal_blocks(volume: Image, head: bytes, block: int, number: int) -> list[int]:
    """Return where each block of the journal is, 0: nowhere."""
    first_data, per_group = struct.unpack_from("<I", head, 20)[0], struct.unpack_from("<I", head, 40)[0]
    wide = struct.unpack_from("<I", head, 96)[0] & _WIDE
    inode_size = struct.unpack_from("<H", head, 88)[0] if struct.unpack_from("<I", head, 76)[0] else 128
    if not 1 <= number <= per_group:
        raise DamagedJournalError(f"its inode is {number}")
    descriptor = _read(volume, (first_data + 1) * block, 64)
    table = struct.unpack_from("<I", descriptor, 8)[0]
    if wide:
        table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
    inode = _read(volume, table * block + (number - 1) * inode_size, 128)
    size = struct.unpack_from("<I", inode, 4)[0] | struct.unpack_from("<I", inode, 108)[0] << 32
    count = size // block
    if not 0 < count <= 16 * _LARGEST:
        raise DamagedJournalError(f"it is {size} bytes long")
    content, flags = inode[40:100], struct.unpack_from("<I", inode, 32)[0]
    blocks = [0] * count
    if flags & _EXTENTS:
        for at, where, length in _extents(volume, content, block, _DEEPEST):
            for i in range(max(0, min(length, count - at))):
                blocks[at + i] = where + i
    else:
        for at, where in zip(range(count), _mapped(volume, content, block), strict=False):
            blocks[at] = where
    return blocks


def _extents(volume: Image, node: bytes, block: int, depth: int) -> Iterator[tuple[int, int, int]]:
    """Yield position, place and number of blocks."""
    magic, entries, _, level = struct.unpack_from("<4H", node)
    if magic != _EXTENT_MAGIC or level > depth or 12 + entries * 12 > len(node):
        raise DamagedJournalError("its list of extents is damaged")
    for i in range(entries):
        entry = 12 + i * 12
        if level:
            low, high = struct.unpack_from("<IH", node, entry + 4)
            yield from _extents(volume, _read(volume, (low | high << 32) * block, block), block, level - 1)
            continue
        at, length, high, low = struct.unpack_from("<IHHI", node, entry)
        if length > 0x8000:
            raise DamagedJournalError("a part of it was never written")
        yield at, low | high << 32, length


def _mapped(volume: Image, content: bytes, block: int) -> Iterator[int]:
    """Yield the places of a file that has no extents."""
    pointers = struct.unpack("<15I", content)
    yield from pointers[:_DIRECT]
    for level, pointer in enumerate(pointers[_DIRECT:]):
        yield from _indirect(volume, pointer, block, level)


def _indirect(volume: Image, pointer: int, block: int, level: int) -> Iterator[int]:
    per_block = block // 4
    if not pointer:
        yield from (0 for _ in range(per_block ** (level + 1)))
        return
    for inner in struct.unpack(f"<{per_block}I", _read(volume, pointer * block, block)):
        if level:
            yield from _indirect(volume, inner, block, level - 1)
        else:
            yield inner
