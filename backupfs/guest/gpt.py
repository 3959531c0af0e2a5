"""GUID partition tables, for sectors of 512 and of 4,096 bytes, the first one or the backup at the disk's end.

A table counts only when its header's and its entries' checksums are right, and it says itself that it is where it is.

Source: UEFI Specification 2.10, chapter 5; Linux, block/partitions/efi.c.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from backupfs.guest.reading import read
from backupfs.guest.table import MOST_PARTITIONS, SECTORS, Partition, Table, outside
from backupfs.image import Image
from backupfs.units import MiB

# signature, revision, header size, its CRC, reserved, my LBA, the other one's LBA, first and last usable LBA, GUID,
# LBA of the entries, their number, bytes of one, CRC of them all
_HEADER = struct.Struct("<8sIII4xQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQ")  # type, GUID, first LBA, last LBA
_SIGNATURE = b"EFI PART"
_LARGEST_ENTRIES = 1 * MiB
_LARGEST_ENTRY = 4096
_FIRST_LBA = 1


@dataclass(frozen=True, slots=True)
class _Gpt:
    sector: int
    entry_size: int
    entries: bytes


def read_gpt(disk: Image, announced_ends: Iterable[int] = ()) -> Table:
    """Return the partitions of a disk whose first sector says that it has a GPT.

    Args:
        disk: the disk.
        announced_ends: how many sectors the disk has, or had before it grew, as its first sector says.

    Raises:
        BackupfsError: the disk can't be read.
    """
    first = [found for sector in SECTORS if (found := _read_at(disk, sector, _FIRST_LBA))]
    if first:
        return _partitions(disk, first)
    backup = _backups(disk, announced_ends)
    if not backup:
        return Table(problems=("the GPT is damaged, and its backup at the disk's end too, or it is not there",))
    return _partitions(disk, backup, "the first GPT is damaged: the partitions are those of its backup")


def read_unannounced(disk: Image) -> Table:
    """Return the partitions of a GPT that the first sector, which may have been wiped, says nothing of.

    Raises:
        BackupfsError: the disk can't be read.
    """
    found = [found for sector in SECTORS if (found := _read_at(disk, sector, _FIRST_LBA))] or _backups(disk, ())
    if not found:
        return Table()
    return _partitions(disk, found, "the first sector is not that of a disk with a GPT, but there is one: it is shown")


def _backups(disk: Image, announced_ends: Iterable[int]) -> list[_Gpt]:
    backups = []
    for sector in SECTORS:
        last = {disk.size // sector - 1, *(end - 1 for end in announced_ends)}
        last.add(_named_backup(disk, sector))
        found = [gpt for lba in sorted(last, reverse=True) if lba > _FIRST_LBA and (gpt := _read_at(disk, sector, lba))]
        backups += found[:1]
    return backups


def _named_backup(disk: Image, sector: int) -> int:
    """Return where the first header, damaged as it is, says that its backup is."""
    raw = read(disk, sector, _HEADER.size)
    if raw is None:
        return 0
    signature, *_, other = _HEADER.unpack(raw)[:6]
    return int(other) if signature == _SIGNATURE else 0


def _read_at(disk: Image, sector: int, lba: int) -> _Gpt | None:
    """Return the table whose header is in a sector, if it is right."""
    raw = read(disk, lba * sector, sector)
    if raw is None:
        return None
    (signature, _, size, crc, mine, _, first, last, _, entries_lba, count, entry_size, entries_crc) = (
        _HEADER.unpack_from(raw)
    )
    if signature != _SIGNATURE or not _HEADER.size <= size <= sector or mine != lba:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != crc:
        return None
    if not first <= last < disk.size // sector:
        return None
    if entry_size % 128 or not 0 < entry_size <= _LARGEST_ENTRY or not 0 < count * entry_size <= _LARGEST_ENTRIES:
        return None
    entries = read(disk, entries_lba * sector, count * entry_size)
    if entries is None or zlib.crc32(entries) != entries_crc:
        return None
    return _Gpt(sector, entry_size, entries)


def _partitions(disk: Image, tables: list[_Gpt], *problems: str) -> Table:
    if len(tables) > 1:
        return Table(problems=("there is a GPT for sectors of 512 and another for those of 4,096 bytes",))
    gpt, said = tables[0], list(problems)
    partitions = []
    for i in range(len(gpt.entries) // gpt.entry_size):
        kind, _, first, last = _ENTRY.unpack_from(gpt.entries, i * gpt.entry_size)
        if not any(kind):
            continue
        number, offset, length = i + 1, first * gpt.sector, (last + 1 - first) * gpt.sector
        if number > MOST_PARTITIONS:
            said.append(f"there are partitions with numbers above {MOST_PARTITIONS}")
            break
        if length <= 0 or offset + length > disk.size:
            said.append(outside(number, offset, length, disk.size))
            continue
        partitions.append(Partition(number, offset, length))
    return Table(tuple(partitions), tuple(said))
