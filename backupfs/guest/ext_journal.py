"""An ext file system as it is once its journal was replayed: in memory, the disk stays as it is.

What a running guest's disk holds is older than what the guest sees: what it wrote last is in the journal alone. The
kernel replays it when it mounts; no parser does. Memory holds where the blocks lie in the journal, not what is in them.
"""

import struct
from collections.abc import Iterator

from backupfs.errors import GuestError, NotFound
from backupfs.extents import Extent
from backupfs.guest.crc32c import crc32c
from backupfs.guest.ext_inode import Inodes
from backupfs.guest.ext_map import Map
from backupfs.guest.jbd2 import DamagedJournalError, Journal
from backupfs.guest.reading import read
from backupfs.image import Buffer, Image, check_range

_SUPER, _SUPER_SIZE = 1024, 1024
_RECOVER = 0x4
_CHECKSUMS = 0x400  # ro_compat
_REPAIR = "`backupfs mount --scratch` shows a copy, DISK.rw, that e2fsck can repair"
_LARGEST = 16 << 20  # blocks of a journal: e2fsprogs makes none of more than 10,240,000


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
    inodes = Inodes(volume)
    try:
        return _replay(volume, inodes, number)
    except (DamagedJournalError, GuestError, NotFound, struct.error) as e:
        raise GuestError(f"its journal is damaged ({e}), and the file system was in use; {_REPAIR}") from e


def _replay(volume: Image, inodes: Inodes, number: int) -> tuple[Image, tuple[str, ...]]:
    block, blocks = inodes.block, _journal_blocks(inodes, number)

    def read_block(position: int) -> bytes:
        content = read(volume, blocks[position] * block, block) if position < len(blocks) and blocks[position] else None
        if content is None:
            raise DamagedJournalError(f"it has no block {position}")
        return content

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


def _journal_blocks(inodes: Inodes, number: int) -> list[int]:
    """Return where each block of the journal is, 0: nowhere. Raises GuestError, NotFound, DamagedJournalError."""
    inode = inodes.get(number)
    count = inode.size // inodes.block
    if not 0 < count <= _LARGEST:
        raise DamagedJournalError(f"it is {inode.size} bytes long")
    blocks = [0] * count
    for part in Map(inodes).segments(inode, 0, count):
        if not part.written:
            raise DamagedJournalError("a part of it was never written")
        blocks[part.first : part.first + part.blocks] = range(part.at, part.at + part.blocks)
    return blocks
