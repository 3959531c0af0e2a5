"""The log of an XFS as sectors and records: sectors that say in which round they were written, records with a header.

Source: fs/xfs/libxfs/xfs_log_format.h (xlog_rec_header), fs/xfs/xfs_log.c (xlog_cksum, xlog_pack_data),
fs/xfs/xfs_log_recover.c (xlog_valid_rec_header, xlog_logrec_hblks). Records are big-endian, what they hold is as the
guest's processor has it: read is what x86 and ARM write.
"""

import struct
from dataclasses import dataclass

from crc32c import crc32c

from backupfs.guest.xfs_disk import Disk

SECTOR = 512
MAGIC = b"\xfe\xed\xba\xbe"
_LITTLE_ENDIAN = 1
_VERSIONS = 0x3
_CRC_AT, _HEADERS, _MORE_HEADER = 32, (328, 324), 260  # bytes that count: of the first sector of a header; of others
_PER_HEADER = 32 << 10  # bytes of a record that one sector of header is for
_LARGEST = 256 << 10
_FLAGS_AT, _UNMOUNT = 9, 0x20
_FIRST_ROUNDS, _ROUNDS = 44, 64  # where the rounds that were replaced are in the first sector; in each


class UnreadableLogError(Exception):
    """The log can't be taken apart."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record.

    Attributes:
        at: its first sector.
        sectors: of it, headers too.
        lsn: its number, greater than those of the records before it.
        operations: how many are in `data`.
        is_sound: whether it is of this file system, and has a checksum; mkfs writes none.
    """

    at: int
    sectors: int
    lsn: int
    operations: int
    data: bytes
    is_sound: bool


class Records:
    """The sectors of the log.

    Attributes:
        sectors: how many there are.

    Raises:
        UnreadableLogError: it is on another disk.
    """

    def __init__(self, disk: Disk) -> None:
        if disk.log_at is None or disk.log_blocks < 1:
            raise UnreadableLogError
        self._disk = disk
        self._begin = disk.log_at
        self.sectors: int = disk.log_blocks * disk.block // SECTOR

    def read(self, number: int, count: int) -> bytes:
        """Return sectors, around the end. Raises GuestError: the volume can't be read."""
        number %= self.sectors
        if count > self.sectors:
            raise UnreadableLogError
        before = min(count, self.sectors - number)
        data = self._disk.read(self._begin + number * SECTOR, before * SECTOR)
        return data + (self._disk.read(self._begin, (count - before) * SECTOR) if before < count else b"")

    def rounds(self, number: int, count: int) -> list[int]:
        """Return the rounds in which sectors were written. Raises GuestError."""
        data = self.read(number, count) if count else b""
        return [
            int.from_bytes(data[at + 4 : at + 8] if data[at : at + 4] == MAGIC else data[at : at + 4])
            for at in range(0, len(data), SECTOR)
        ]

    def is_header(self, number: int) -> bool:
        """Whether a record seems to begin in a sector. Raises GuestError."""
        return self.read(number, 1)[:4] == MAGIC

    def length(self, number: int) -> int:
        """Return how many sectors the record has that seems to begin in a sector. Raises GuestError."""
        head = self.read(number, 1)
        return self._headers(head) + -(-int.from_bytes(head[12:16]) // SECTOR)

    def is_unmount(self, number: int) -> bool:
        """Whether the record there is the one that is written last. Raises GuestError.

        Of it nothing is checked: what is behind it may have been written by another kind of processor.
        """
        head = self.read(number, 1)
        data = self.read(number + self._headers(head), 1)
        return int.from_bytes(head[40:44]) == 1 and bool(data[_FLAGS_AT] & _UNMOUNT)

    def room(self, number: int) -> int:
        """Return of how many bytes no record had more when the one there was written. Raises GuestError."""
        return int.from_bytes(self.read(number, 1)[320:324])

    def check_owner(self, number: int) -> None:
        """Check that the record there is this file system's. Raises UnreadableLogError, GuestError."""
        if self.read(number, 1)[304:320] not in (self._disk.log_uuid, bytes(16)):
            raise UnreadableLogError

    @staticmethod
    def _headers(head: bytes) -> int:
        version: int
        room: int
        version, room = struct.unpack_from(">I308xI", head, 8)
        return max(1, -(-room // _PER_HEADER)) if version & 2 else 1

    def record(self, number: int) -> Record:
        """Return the record that begins in a sector.

        Raises:
            UnreadableLogError: none that is complete and right does.
            GuestError: the volume can't be read.
        """
        head = self.read(number, 1)
        version, length, lsn = struct.unpack_from(">IIQ", head, 8)
        operations, form, room = struct.unpack_from(">I256xI16xI", head, 40)
        headers, count = self._headers(head), -(-length // SECTOR)
        sane = (
            head[:4] == MAGIC
            and 0 < version <= _VERSIONS
            and 0 < length <= (_LARGEST if operations == 1 else room) <= _LARGEST  # mkfs wrote a room that is too small
        )
        if not sane:
            raise UnreadableLogError
        heads, data = self.read(number, headers), bytearray(self.read(number + headers, count))
        (checksum,) = struct.unpack_from("<I", head, _CRC_AT)
        if checksum and checksum not in (_checksum(heads, bytes(data[:length]), counted) for counted in _HEADERS):
            raise UnreadableLogError
        for i in range(count):  # the round stands in place of the first four bytes of each sector
            place, inside = divmod(i, _ROUNDS)
            at = place * SECTOR + 4 + 4 * inside if place else _FIRST_ROUNDS + 4 * inside
            data[i * SECTOR : i * SECTOR + 4] = heads[at : at + 4]
        is_sound = bool(checksum) and form == _LITTLE_ENDIAN and head[304:320] == self._disk.log_uuid
        return Record(number, headers + count, lsn, operations, bytes(data[:length]), is_sound)


def _checksum(heads: bytes, data: bytes, counted: int) -> int:
    """Return a record's checksum. Headers for which it has no data do not count; of the first, less on 32 bits."""
    state = crc32c(heads[:_CRC_AT] + bytes(4) + heads[_CRC_AT + 4 : counted])
    for i in range(1, -(-len(data) // _PER_HEADER)):
        state = crc32c(heads[i * SECTOR : i * SECTOR + _MORE_HEADER], state)
    return crc32c(data, state)
