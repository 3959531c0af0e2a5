"""Partition tables: MBR with logical partitions, and GPT (gpt.py), for sectors of 512 and of 4,096 bytes.

Partitions have the numbers that Linux gives them. What a table says beyond the disk's end is a problem, in words, and
no partition. Everything is bounded: at most 255 partitions, as in Linux, and each table of the chain of logical ones
is read once.

Nothing says how large the sectors are that an MBR counts in: 512 bytes, unless only with 4,096 something that is known
begins where its partitions do.

Source: Linux, block/partitions/msdos.c; util-linux, libblkid/src/partitions/dos.c.
"""

import struct
from dataclasses import dataclass

from backupfs.errors import BackupfsError
from backupfs.guest import gpt
from backupfs.guest.reading import read
from backupfs.guest.signatures import is_boot_sector, is_known
from backupfs.guest.table import MOST_PARTITIONS, SECTORS, Partition, Table, outside
from backupfs.image import Image

_ENTRY = struct.Struct("<B3xB3xII")  # of an MBR: boot indicator, type, first sector, sectors
_ENTRIES_AT = 446
_PROTECTIVE = 0xEE
_DYNAMIC = 0x42
_EXTENDED = (0x05, 0x0F, 0x85)
_FIRST_LOGICAL = 5


@dataclass(frozen=True, slots=True)
class _Entry:
    boot: int
    kind: int
    first: int
    sectors: int

    @property
    def is_extended(self) -> bool:
        return self.kind in _EXTENDED


def read_table(disk: Image) -> Table:
    """Return a disk's partitions; none, without a problem, where there is no table.

    Raises:
        BackupfsError: the disk can't be read.
    """
    first = read(disk, 0, 512)
    if first is None:
        return Table()
    entries = _entries(first)
    if entries is None or is_boot_sector(first):
        return Table() if is_known(disk, 0) else gpt.read_unannounced(disk)
    is_mbr = all(entry.boot in (0, 0x80) for entry in entries)  # a boot sector's code ends with 55 AA too
    protective = [entry for entry in entries if entry.kind == _PROTECTIVE and (is_mbr or entry.first == 1)]
    if protective:
        return gpt.read_gpt(disk, [entry.first + entry.sectors for entry in protective])
    if not is_mbr:
        return Table() if is_known(disk, 0) else gpt.read_unannounced(disk)
    return _Mbr(disk, _sector_size(disk, entries)).read(entries)


def _entries(sector: bytes) -> list[_Entry] | None:
    """Return the four entries of an MBR, or of a table of logical partitions; None: it is neither."""
    if sector[510:512] != b"\x55\xaa":
        return None
    return [_Entry(*_ENTRY.unpack_from(sector, _ENTRIES_AT + 16 * i)) for i in range(4)]


def _sector_size(disk: Image, entries: list[_Entry]) -> int:
    starts = [entry.first for entry in entries if entry.sectors]
    last = max((entry.first + entry.sectors for entry in entries if entry.sectors), default=0)
    small, large = SECTORS
    if last * large > disk.size:
        return small
    return large if _begins(disk, starts, large) and not _begins(disk, starts, small) else small


def _begins(disk: Image, starts: list[int], sector: int) -> bool:
    for start in starts:
        head = read(disk, start * sector, 512)
        if head is not None and (_entries(head) is not None or is_known(disk, start * sector)):
            return True
    return False


class _Mbr:
    """Reads an MBR's partitions."""

    def __init__(self, disk: Image, sector: int) -> None:
        self._disk = disk
        self._sector = sector
        self._partitions: list[Partition] = []
        self._problems: list[str] = []
        self._next = _FIRST_LOGICAL
        self._seen: set[int] = set()

    def read(self, entries: list[_Entry]) -> Table:
        for number, entry in enumerate(entries, 1):
            if not entry.sectors:
                continue
            if entry.kind == _DYNAMIC:
                self._problems.append(f"partition {number} is a Windows dynamic disk: its volumes are not supported")
            if not entry.is_extended:
                self._add(number, entry.first, entry.sectors)
                continue
            try:
                self._read_logical(number, entry)
            except BackupfsError as e:
                self._problems.append(f"partition {number} is extended, and its logical partitions can't be read: {e}")
        return Table(tuple(sorted(self._partitions, key=lambda p: p.number)), tuple(self._problems))

    def _add(self, number: int, first: int, sectors: int) -> None:
        offset, length = first * self._sector, sectors * self._sector
        if offset + length > self._disk.size:
            self._problems.append(outside(number, offset, length, self._disk.size))
        else:
            self._partitions.append(Partition(number, offset, length))

    def _read_logical(self, number: int, extended: _Entry) -> None:
        """Follow the chain of tables, each of which has a partition and the place of the next table.

        A partition's place counts from its table, the next table's from the extended partition.
        """
        where, length = extended.first, extended.sectors
        while True:
            sector = read(self._disk, where * self._sector, 512)
            entries = None if sector is None else _entries(sector)
            if entries is None or where in self._seen:
                what = "is a loop" if entries else "breaks off"
                self._problems.append(f"partition {number} is extended, and the chain of its logical ones {what}")
                return
            self._seen.add(where)
            for i, entry in enumerate(entries):
                if not entry.sectors or entry.is_extended:
                    continue
                if i >= 2 and not _is_inside(entry, where, length, extended):
                    continue  # often rubbish, so Linux looks at it twice
                if self._next > MOST_PARTITIONS:
                    self._problems.append(f"there are more than {MOST_PARTITIONS} partitions")
                    return
                self._add(self._next, where + entry.first, entry.sectors)
                self._next += 1
            following = next((entry for entry in entries if entry.sectors and entry.is_extended), None)
            if following is None:
                return
            if len(self._seen) > 2 * MOST_PARTITIONS:
                self._problems.append(f"partition {number} is extended, and the chain of its logical ones has no end")
                return
            where, length = extended.first + following.first, following.sectors


def _is_inside(entry: _Entry, where: int, length: int, extended: _Entry) -> bool:
    start = where + entry.first
    return entry.first + entry.sectors <= length and start + entry.sectors <= extended.first + extended.sectors
